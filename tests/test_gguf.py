"""GGUF files hold the model: each number and key by the package that defines the format, and what llama.cpp says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, numbers, weights

from functional_lm import folder, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.errors import DataError, UsageError
from functional_lm.inference.generate import GenerateOptions, decoder, generate
from functional_lm.interop import gguf as ours
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

TEXT = "A llama walks into a bar; the barman says: «why the long façade?»\n\tfor i in range(10): print(i, 2 * i)\n"
BASE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_len": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False, "n_kv_heads": 4, "rope_theta": 500000.0, "norm_eps": 1e-6},
    "biases": {"bias": "attention"},
    "all biases": {"bias": "all"},
    "own head width": {"head_dim": 32},
    "scaled": {"rope_scaling": (8.0, 1.0, 4.0, 32.0)},
    "mistral": {"sliding_window": 64},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": True, "head_dim": 32},
}
ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizers.train([TEXT * 20], vocab_size=330)


def save(path: Path, words: Tokenizer, seed: int = 0, more: int = 0, **changes: Any) -> tuple[Tree, ModelConfig]:
    config = ModelConfig(words.vocab_size + more, **{**BASE, **changes})
    params = weights(config, seed)
    folder.save(path, params, config, words)
    return params, config


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by llama.cpp's names, float32."""
    return {
        str(t.name): torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))).view(
            *map(int, reversed(t.shape))
        )
        for t in gguf.GGUFReader(path).tensors
    }


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# The file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_every_number_is_there(name: str, kind: str, tmp_path: Path, words: Tokenizer) -> None:
    params, config = save(tmp_path / "model", words, **SHAPES[name])
    ours.export(tmp_path / "model", tmp_path / "out", kind)
    found, flat = stored(tmp_path / "out" / "model.gguf"), tree.flatten(params)
    extra = {ours.FREQUENCIES} if config.rope_scaling else set()
    assert found.keys() == {ours.theirs(leaf) for leaf in flat} | extra
    architecture = ARCHITECTURE.get(name, "llama")
    for leaf, value in flat.items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(leaf.split(".")[-2])
        if heads and architecture == "llama":  # head by head, row by row
            half = config.head_dim // 2
            order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in range(2)]
            value = value[order]
        error = (found[ours.theirs(leaf)] - value).abs()
        if kind == "f32" or value.dim() == 1:
            assert not error.any(), leaf
        else:  # half a step of 1/127 of each block's largest, and the rounding of the scale to float16
            blocks = value.unflatten(-1, (-1, 32))
            assert (error.unflatten(-1, (-1, 32)) <= blocks.abs().amax(-1, keepdim=True) * 0.0045).all(), leaf


@settings(max_examples=10)
@given(
    seed=SEEDS, heads=st.integers(1, 3), pairs=st.integers(1, 4), at=st.tuples(st.integers(0, 50), st.integers(0, 50))
)
def test_neighbours_rotate_as_halves_did(seed: int, heads: int, pairs: int, at: tuple[int, int]) -> None:
    """q kᵀ of rotated heads: by halves of our rows, and of neighbours as complex numbers of the file's."""
    query, key, x = (numbers(shape, seed + i) for i, shape in enumerate([(heads * 2 * pairs, 5)] * 2 + [(2, 5)]))
    angle = torch.outer(torch.tensor(at).float(), 100.0 ** -(torch.arange(pairs) / pairs))

    def halves(w: torch.Tensor, row: int) -> torch.Tensor:
        first, second = (w @ x[row]).view(heads, 2, pairs).unbind(1)
        cos, sin = angle[row].cos(), angle[row].sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def neighbours(w: torch.Tensor, row: int) -> torch.Tensor:
        z = torch.view_as_complex((ours.paired(w, heads) @ x[row]).view(heads, pairs, 2).contiguous())
        return torch.view_as_real(z * torch.exp(1j * angle[row])).flatten(-2)

    expected = (halves(query, 0) * halves(key, 1)).sum(-1)
    assert torch.allclose((neighbours(query, 0) * neighbours(key, 1)).sum(-1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_types_round_as_torch_does(kind: str, tmp_path: Path, words: Tokenizer) -> None:
    params, _ = save(tmp_path / "model", words)
    ours.export(tmp_path / "model", tmp_path / "out.gguf", kind)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    expected = params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].to(dtype).float()
    assert torch.equal(stored(tmp_path / "out.gguf")["blk.0.ffn_up.weight"], expected)


def test_rows_that_no_block_divides_are_float16(tmp_path: Path, words: Tokenizer) -> None:
    save(tmp_path / "model", words, d_ff=40)
    ours.export(tmp_path / "model", tmp_path / "out.gguf", "q8_0")
    kinds = {str(t.name): t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_keys_and_vocabulary(tmp_path: Path, words: Tokenizer) -> None:
    _, config = save(tmp_path / "model", words, more=2, **SHAPES["untied"])
    settings_file = tmp_path / "model" / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"chat_template": "{{ hello }}"}))
    ours.export(tmp_path / "model", tmp_path / "out.gguf", "f16")
    found = keys_of(tmp_path / "out.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "model",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": words.bos_id,
        "tokenizer.ggml.eos_token_id": words.eos_id,
        "tokenizer.ggml.eot_token_id": words.special_ids["<|end|>"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ hello }}",
    }
    assert {name: found[name] for name in expected} == expected
    pieces, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(pieces) == len(kinds) == len(found["tokenizer.ggml.scores"]) == config.vocab_size
    assert pieces[-2:] == [f"[unused{config.vocab_size - 2}]", f"[unused{config.vocab_size - 1}]"]
    assert kinds[-2:] == [5, 5]
    assert {name for name, kind in zip(pieces, kinds) if kind == 3} == set(words.special_ids) - {"<unk>"}
    assert kinds.count(6) == 256
    spoken = [p.replace("\u2581", " ") if k == 1 else "" for p, k in zip(pieces, kinds)]
    assert all(not text or words.decode([number]) == text for number, text in enumerate(spoken[:-2]))


def test_a_tokenizer_of_another_kind_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "model", tokenizers.train((), "bytes"))
    assert "without a tokenizer" in ours.export(tmp_path / "model", tmp_path / "out.gguf")
    assert keys_of(tmp_path / "out.gguf")["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8}, "sliding_window is 8, less than max_len 64"),
        ({"logit_softcap": 3.0}, r"no such model as that in .*: logit_softcap is 3\.0 and a llama has 0\.0"),
        ({"positions": "learned"}, "positions is 'learned'"),
        ({"bias": "qkv", "qk_norm": True}, "no such model"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, words: Tokenizer
) -> None:
    save(tmp_path / "model", words, **changes)
    with pytest.raises(DataError, match=message):
        ours.export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_leaves_nothing(tmp_path: Path, words: Tokenizer) -> None:
    params, config = save(tmp_path / "model", words)
    params["model"]["norm"]["weight"][3] = torch.nan
    folder.save(tmp_path / "model", params, config, words)
    for out in ("out", "out.gguf"):
        with pytest.raises(DataError, match="holds NaN"):
            ours.export(tmp_path / "model", tmp_path / out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_command(tmp_path: Path, words: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", words)

    def run(*words: str) -> int:
        return main(COMMANDS, ["export", "--model", str(tmp_path / "model"), *words])

    assert run("--out", str(tmp_path / "out"), "--format", "gguf", "--gguf_type", "q8_0") == 0
    assert "as a GGUF llama of q8_0" in capsys.readouterr().out
    assert run("--out", str(tmp_path / "out"), "--format", "gguf") == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert run("--out", str(tmp_path / "hf"), "--gguf_type", "f16") == 2
    assert "--gguf_type f16 belongs to --format gguf, not hf" in capsys.readouterr().err
    with pytest.raises(UsageError, match="exists"):
        ours.export(tmp_path / "model", tmp_path / "out" / "model.gguf")


# llama.cpp -----------------------------------------------------------------------------------------------------------


def opened(path: Path, **settings: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which has to be built")
    return llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **settings)


def their_logits(model: Any, ids: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path, words: Tokenizer) -> None:
    params, config = save(tmp_path / "model", words, **SHAPES[name])
    ours.export(tmp_path / "model", tmp_path / "out.gguf", "f32")
    model = opened(tmp_path / "out.gguf")
    ids = words.encode(TEXT)[:40]
    expected = forward(params, torch.tensor([ids]), config)[0]
    found = their_logits(model, ids)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    greedy = list(generate(params, ids[:8], decoder(config, False, False), GenerateOptions(24, temperature=0)))
    model.reset()
    theirs = [token for token, _ in zip(model.generate(ids[:8], temp=0.0, repeat_penalty=1.0), range(24))]
    assert theirs == greedy


@pytest.mark.parametrize(("kind", "limit"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1)])
def test_llama_cpp_reads_narrow_types(kind: str, limit: float, tmp_path: Path, words: Tokenizer) -> None:
    params, config = save(tmp_path / "model", words)
    ours.export(tmp_path / "model", tmp_path / "out.gguf", kind)
    ids = words.encode(TEXT)[:40]
    expected = forward(params, torch.tensor([ids]), config)[0]
    found = their_logits(opened(tmp_path / "out.gguf"), ids)
    assert (found - expected).norm() < limit * expected.norm()


TEXTS = [
    TEXT,
    "  two spaces, \t a tab\n\n\nand lines \n",
    "naïve 漢字 🙂 \x00\x01 <unk> <|endoftext|> <0x41>",
    " a",
    "1234567",
]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_llama_cpp_cuts_text_into_the_same_ids(kind: str, tmp_path: Path) -> None:
    words = tokenizers.train([TEXT * 20], kind, vocab_size=330)
    save(tmp_path / "model", words)
    ours.export(tmp_path / "model", tmp_path / "out.gguf", "f32")
    model = opened(tmp_path / "out.gguf", vocab_only=True)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False, special=False) == words.encode(text), text
        assert model.detokenize(words.encode(text)) == text.encode()
    assert model.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [words.eos_id]
