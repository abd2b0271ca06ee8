"""GGUF out: one file with a model and its tokenizer, which llama.cpp and its relatives run.

Llama, Mistral (without a window that matters), Qwen2 and Qwen3. llama.cpp rotates neighbouring pairs of a Llama's query
and key heads and the two halves of a Qwen's: the rows of the former are put in that order here.

Axes: H heads, E head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import files
from functional_lm.errors import DataError, UsageError
from functional_lm.interop.hugging_face import Foreign, examine
from functional_lm.model.config import ModelConfig, read_object
from functional_lm.model.families import NATIVE, OURS, family_of, misfit
from functional_lm.model.positions import rotary_frequencies
from functional_lm.text.interface import END, Tokenizer
from functional_lm.text.subword import SentencePieceTokenizer

FILE = "model.gguf"
TYPES = ("f32", "f16", "bf16", "q8_0")
# Their names by ours; `blk.N.` stands before those of a layer.
MODEL = {"embed_tokens": "token_embd", "norm": "output_norm"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FREQUENCIES = "rope_freqs.weight"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PAIRED = ("llama",)  # architectures that rotate neighbours


class Entry(NamedTuple):
    """A tensor of the file before it is read."""

    name: str
    shape: tuple[int, ...]
    kind: str  # one of TYPES
    read: Callable[[], Tensor]


def export(source: str | Path, out: str | Path, kind: str = "f16") -> str:
    """Write the model in `source` as OUT/model.gguf (or OUT itself, a name that ends in .gguf), and say as what.

    Matrices have the type `kind`, vectors float32; matrices whose rows are no multiple of 32 are f16 instead of q8_0.
    One tensor is in memory at a time. Raises DataError for an architecture that llama.cpp would compute otherwise,
    UsageError where `out` exists or the package `gguf` is missing.
    """
    package = _package()
    files.refuse_existing(out)
    found = examine(source)
    architecture = fitting(found.config, str(source))
    entries = list(_entries(found, architecture, kind))

    def write(temporary: Path) -> None:
        writer = package.GGUFWriter(temporary, architecture)
        try:
            _describe(writer, package, found.config, kind, Path(source))
            _tokens(writer, package, found.tokenizer, found.config.vocab_size, Path(source))
            _tensors(writer, package, entries)
        finally:
            writer.close()

    if Path(out).suffix == ".gguf":
        files.write_with(out, write)
    else:
        with files.writing_folder(out) as folder:
            write(folder / FILE)
    return f"GGUF {architecture} of {kind}{_spoken(found.tokenizer)}"


def _spoken(tokenizer: Tokenizer) -> str:
    """What is to be known of the tokenizer in the file."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return ", without a tokenizer: it takes token ids"
    return ", whose tokenizer has no bytes for characters outside its vocabulary" if tokenizer.unigram else ""


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("GGUF files are written by the package gguf; pip install 'functional_lm[gguf]'") from error
    return gguf


def fitting(config: ModelConfig, what: str) -> str:
    """llama.cpp's architecture that computes the same. Raises DataError, with a reason, if there is none."""
    plain = dataclasses.replace(config, sliding_window=0) if config.sliding_window >= config.max_len else config
    if plain.sliding_window:
        raise DataError(
            f"{what}: sliding_window is {plain.sliding_window}, less than max_len {config.max_len}; "
            "llama.cpp attends to all tokens in these architectures"
        )
    family = family_of(plain, NATIVE)
    if family == OURS:
        raise DataError(f"llama.cpp computes no such model as that in {what}: {misfit(plain, 'llama')}")
    return ARCHITECTURES[family]


# Tensors ----------------------------------------------------------------------------------------------------------


def _entries(found: Foreign, architecture: str, kind: str) -> Iterator[Entry]:
    config = found.config
    if config.rope_scaling is not None:
        plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
        yield Entry(FREQUENCIES, tuple(plain.shape), "f32", lambda: plain / rotary_frequencies(config))
    for ours, leaf in found.described.items():
        stored = kind if leaf.dim() > 1 else "f32"
        if stored == "q8_0" and leaf.shape[-1] % 32:
            stored = "f16"
        yield Entry(theirs(ours), tuple(leaf.shape), stored, _reader(found, ours, architecture))


def theirs(ours: str) -> str:
    """llama.cpp's name of a leaf."""
    place, _, leaf = ours.rpartition(".")
    if place == "lm_head":
        return f"output.{leaf}"
    parts = place.split(".")
    if parts[1] != "layers":
        return f"{MODEL[parts[1]]}.{leaf}"
    return f"blk.{parts[2]}.{LAYER['.'.join(parts[3:])]}.{leaf}"


def _reader(found: Foreign, name: str, architecture: str) -> Callable[[], Tensor]:
    heads = {"q_proj": found.config.n_heads, "k_proj": found.config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None or architecture not in PAIRED:
        return lambda: found.read(name)
    return lambda: paired(found.read(name), heads)


def paired(weight: Float[Tensor, "HE *n"], heads: int) -> Float[Tensor, "HE *n"]:
    """Rows of each head from halves, where i is rotated with i + E/2, to neighbours, where 2i is with 2i + 1."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _tensors(writer: Any, package: Any, entries: list[Entry]) -> None:
    import numpy as np

    kinds = package.GGMLQuantizationType
    for entry in entries:
        kind = kinds[entry.kind.upper()]
        size = _bytes(package, entry.shape, kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        values = entry.read().to(torch.float32).contiguous().numpy()
        writer.write_tensor_data(package.quants.quantize(values, kinds[entry.kind.upper()]))


def _bytes(package: Any, shape: tuple[int, ...], kind: Any) -> int:
    numbers, size = package.GGML_QUANT_SIZES[kind]
    count = 1
    for axis in shape:
        count *= axis
    return count // numbers * size


# Keys -------------------------------------------------------------------------------------------------------------


def _describe(writer: Any, package: Any, config: ModelConfig, kind: str, source: Path) -> None:
    mostly = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer.add_type("model")
    writer.add_name(source.resolve().name)
    writer.add_file_type(package.LlamaFileType[mostly])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _tokens(writer: Any, package: Any, tokenizer: Tokenizer, size: int, source: Path) -> None:
    """The vocabulary: SentencePiece's pieces, scores and kinds as they are; ids that no piece has are unused.

    Under the name "llama" it merges the neighbours whose piece has the highest score, as SentencePiece's BPE does;
    under "t5" it looks for the likeliest pieces, as unigram does but for ties, and has no bytes for a character that
    the vocabulary lacks. A literal U+2581 is a space to it. A tokenizer of another kind is left out.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        writer.add_tokenizer_model("no_vocab")
        return
    pieces = tokenizer.pieces()
    missing = range(len(pieces), size)
    unused = int(package.TokenType.UNUSED)
    writer.add_tokenizer_model("t5" if tokenizer.unigram else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text.encode() for piece in pieces] + [f"[unused{i}]".encode() for i in missing])
    writer.add_token_scores([piece.score for piece in pieces] + [-1e4 for _ in missing])
    writer.add_token_types([piece.kind for piece in pieces] + [unused for _ in missing])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    if END in tokenizer.special_ids:
        writer.add_eot_token_id(tokenizer.special_ids[END])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(bool(tokenizer.prefix))
    writer.add_remove_extra_whitespaces(False)
    if template := chat_template(source):
        writer.add_chat_template(template)


def chat_template(source: Path) -> str | None:
    """The template in a folder's `tokenizer_config.json`: a text that is handed on, never run.

    Raises DataError for a file that holds no settings.
    """
    path = source / "tokenizer_config.json"
    found = read_object(path).get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None
