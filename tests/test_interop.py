"""Models of other programs come in and ours go out: the same function, the same ids, whole or not at all.

`transformers` is the counterparty; without it (`pip install 'functional_lm[hf]'`) the laws and refusals remain.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import SEEDS, assert_close, token_rows, weights
from test_families import members

import functional_lm
from functional_lm import folder, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.errors import DataError, UsageError
from functional_lm.inference.text import generate
from functional_lm.interop import hugging_face
from functional_lm.interop.layouts import layouts
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import FAMILIES, NATIVE
from functional_lm.model.transformer import abstract, forward
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer

TEXT = "A folder is a promise: what went in comes out.\n"
CONFIG = {"vocab_size": 290, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "max_len": 64}


@pytest.fixture(scope="session")
def hf() -> Any:
    """transformers, imported once: it takes some seconds."""
    reason = "transformers is not installed (pip install 'functional_lm[hf]')"
    transformers = pytest.importorskip("transformers", reason=reason)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return tokenizers.train([TEXT * 20], vocab_size=290)


def save(path: Path, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> tree.Tree:
    params = weights(config, seed)
    folder.save(path, params, config, tokenizer)
    return params


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json as another program would, which knows nothing of ours."""
    values = json.loads((path / "config.json").read_text())
    values.pop("functional_lm", None)
    (path / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.fixture
def llama(tmp_path: Path, bpe: Tokenizer) -> Path:
    """A small Llama as another program would have written it."""
    save(tmp_path / "llama", ModelConfig(**CONFIG, tie_embeddings=False), bpe)
    edit(tmp_path / "llama")
    return tmp_path / "llama"


# Laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8)
@given(data=st.data(), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_goes_out_comes_in_again(
    tmp_path_factory: pytest.TempPathFactory,
    bpe: Tokenizer,
    name: str,
    data: st.DataObject,
    seed: int,
    dtype: torch.dtype,
) -> None:
    config = dataclasses.replace(data.draw(members(name)), vocab_size=bpe.vocab_size)
    place, params = tmp_path_factory.mktemp("interop"), weights(config, seed, dtype)
    folder.save(place / "ours", params, config, bpe)
    assert hugging_face.export(place / "ours", place / "theirs", name) == name
    loaded = hugging_face.load_folder(place / "theirs")
    assert loaded.config == config
    assert tree.digest(loaded.params) == tree.digest(params)
    assert loaded.tokenizer.digest == bpe.digest
    hugging_face.import_folder(place / "theirs", place / "again")
    back = folder.load(place / "again")
    assert back.config == config
    assert tree.digest(back.params) == tree.digest(params)
    if name in NATIVE:  # our folder is theirs already
        assert load_file(place / "ours" / "model.safetensors").keys() == tree.flatten(params).keys()


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10)
@given(data=st.data(), seed=SEEDS)
def test_a_layout_holds_every_leaf_once_and_joins_what_it_splits(name: str, data: st.DataObject, seed: int) -> None:
    config = data.draw(members(name))
    flat, found = tree.flatten(weights(config, seed)), layouts(name, config)
    assert sorted(ours for layout in found for ours in layout.ours) == sorted(flat)
    assert len({layout.theirs for layout in found}) == len(found)
    for layout in found:
        parts = tuple(flat[name] for name in layout.ours)
        back = layout.split(layout.join(parts))
        assert len(back) == len(parts)
        assert all(torch.equal(mine, again) for mine, again in zip(parts, back, strict=True))


def test_a_file_written_tensor_by_tensor_is_the_one_written_at_once(tmp_path: Path) -> None:
    flat = {"b": torch.ones(3, dtype=torch.bfloat16), "a.1": torch.zeros(2, 3), "c": torch.tensor(2.0)}
    flat |= {"a.10": torch.zeros(0, 4), "d": torch.ones(1, dtype=torch.float64), "a.2": torch.arange(4.0).view(2, 2).T}
    flat |= {"e": torch.arange(-2, 3, dtype=torch.int8), "f": torch.arange(3)}
    described = {name: leaf.to("meta") for name, leaf in flat.items()}
    tree.save_each(tmp_path / "each", described, flat.__getitem__)
    assert tree.digest(tree.load(tmp_path / "each")) == tree.digest(tree.unflatten(flat))

    def broken(name: str) -> torch.Tensor:
        if name == "c":
            raise DataError("no more")
        return flat[name]

    with pytest.raises(DataError, match="no more"):
        tree.save_each(tmp_path / "half", described, broken)
    assert [entry.name for entry in tmp_path.iterdir()] == ["each"]


# Against transformers -------------------------------------------------------------------------------------------------

V, SIZES = 290, {"vocab_size": 290, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NEOX = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64}
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
OLD = {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 1}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**HEADS}),
    "llama-3": ("Llama", {**HEADS, "rope_theta": 5e5, "rope_scaling": {**SCALED, **ORIGINAL}}),
    "llama-biases": ("Llama", {**HEADS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**HEADS, "sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", {**HEADS, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**HEADS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**HEADS, "head_dim": 10, "attention_bias": True}),
    "gpt2": ("GPT2", {**OLD}),
    "gpt2-relu": ("GPT2", {**OLD, "activation_function": "relu", "n_inner": 20, "tie_word_embeddings": False}),
    "pythia": ("GPTNeoX", {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 500}),
    "neox-serial": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
}


def theirs(hf: Any, name: str, path: Path, tokenizer: Tokenizer, **how: Any) -> Any:
    """A model of transformers with random weights, in float32, saved at `path`."""
    kind, values = THEIRS[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, f"{kind}Config")(**values, **IDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        model.tie_weights()
    model.save_pretrained(path, **how)
    tokenizer.save(path)
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens).logits
    return found


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=steps, do_sample=False, eos_token_id=None)
    continuation: list[int] = found[0, len(ids) :].tolist()
    return continuation


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_compute_the_same_here_and_back_there(hf: Any, name: str, tmp_path: Path, bpe: Tokenizer) -> None:
    shards = {"max_shard_size": "10KB"} if name in ("llama", "gpt2") else {}
    model = theirs(hf, name, tmp_path / "theirs", bpe, **shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(shards)
    params, config, _ = hugging_face.load_folder(tmp_path / "theirs")
    tokens = token_rows(config, (2, 20), 0)
    expected = logits(model, tokens)
    assert_close(forward(params, tokens, config), expected, 1e-5)
    hugging_face.import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert tree.digest(folder.load(tmp_path / "ours").params) == tree.digest(params)
    assert hugging_face.export(tmp_path / "ours", tmp_path / "back") == model.config.model_type
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert back.config.model_type == model.config.model_type
    assert_close(logits(back, tokens), expected, 1e-6)


@settings(max_examples=4)
@given(data=st.data(), seed=SEEDS)
@pytest.mark.parametrize("name", NATIVE)
def test_our_folders_open_there_as_they_are(
    hf: Any, tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer, name: str, data: st.DataObject, seed: int
) -> None:
    config = dataclasses.replace(data.draw(members(name)), vocab_size=bpe.vocab_size)
    path = tmp_path_factory.mktemp("ours")
    params = save(path, config, bpe, seed)
    model = hf.AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = token_rows(config, (2, 12), seed)
    assert_close(logits(model, tokens), forward(params, tokens, config), 1e-4)


def test_greedy_text_is_the_same(hf: Any, tmp_path: Path, bpe: Tokenizer) -> None:
    config = ModelConfig(**CONFIG, rope_scaling=(4, 1, 4, 16))
    params = save(tmp_path, config, bpe)
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (hf.AutoModelForCausalLM, hf.AutoTokenizer))
    ids = bpe.encode("A folder")
    assert tokenizer("A folder")["input_ids"] == ids
    mine = generate(params, config, bpe, "A folder", max_tokens=20, temperature=0, stop_ids=())
    assert "A folder" + bpe.decode(greedy(model, ids, 20)) == mine
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "again")
    again = hugging_face.load_folder(tmp_path / "again")
    assert (again.config, tree.digest(again.params)) == (config, tree.digest(params))
    assert again.tokenizer.encode("A folder") == ids


# Tokenizers -----------------------------------------------------------------------------------------------------------

HOSTILE = [
    "  ",
    "    ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "e",
    "out",
    " promise",
    "😀",
    "e\u0301",
    "\u2581",
    "\0",
    "12",
    "<0x41>",
]
HOSTILE += ["ﬁ", "中文", "\ufeff", "\u200d", "<|user", "A folder is a"]
SPACED = (TEXT + "    spaces  \n\n\tand ends 2024: said the king to the queen, aa aaa aaaa ababab\n") * 20
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(scope="session", params=["bpe", "char", "bytes"])
def opened(request: Any, hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer, and what AutoTokenizer makes of the files that it saves."""
    made = tokenizers.train([SPACED], request.param, vocab_size=320)
    path = tmp_path_factory.mktemp("tokenizer")
    save(path, ModelConfig(**{**CONFIG, "vocab_size": made.vocab_size}), made)
    return made, hf.AutoTokenizer.from_pretrained(path)


@given(text=TEXTS)
def test_ids_are_the_same_there(opened: tuple[Tokenizer, Any], text: str) -> None:
    made, there = opened
    if any(name in text for name in made.special_ids):
        return  # theirs finds special tokens in a text
    ids = made.encode(text)
    assert there(text)["input_ids"] == ids
    assert there.decode(ids, skip_special_tokens=True) == text


@given(text=TEXTS)
def test_what_they_save_again_is_the_same_here(
    opened: tuple[Tokenizer, Any], saved_again: Tokenizer, text: str
) -> None:
    made, _ = opened
    assert saved_again.encode(text) == made.encode(text)
    assert saved_again.decode(made.encode(text)) == text
    assert dict(saved_again.special_ids) == dict(made.special_ids)


@pytest.fixture(scope="session")
def saved_again(opened: tuple[Tokenizer, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our vocabulary in the files that transformers writes, which has no SentencePiece model."""
    path = tmp_path_factory.mktemp("again")
    opened[1].save_pretrained(path)
    assert not (path / "tokenizer.model").exists()
    return tokenizers.load(path)


def test_special_tokens_are_the_same_there(opened: tuple[Tokenizer, Any]) -> None:
    made, there = opened
    assert (there.bos_token_id, there.eos_token_id) == (made.bos_id, made.eos_id)
    assert {name: there.convert_tokens_to_ids(name) for name in made.special_ids} == dict(made.special_ids)
    assert len(there) == made.vocab_size


@given(text=TEXTS)
def test_unigram_ids_are_as_likely_there(hf: Any, unigram: tuple[Tokenizer, Any], text: str) -> None:
    made, there = unigram
    if not any(name in text for name in made.special_ids):
        ids = there(text)["input_ids"]
        assert there.decode(ids, skip_special_tokens=True) == text
        assert "<0x" in text or sorted(ids) == sorted(made.encode(text))


@pytest.fixture(scope="session")
def unigram(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    made = tokenizers.train([SPACED], "unigram", vocab_size=300)
    path = tmp_path_factory.mktemp("tokenizer")
    save(path, ModelConfig(**{**CONFIG, "vocab_size": made.vocab_size}), made)
    return made, hf.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session", params=["gpt2", "llama-3"])
def byte_level(request: Any, hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A byte-level BPE of theirs: here, and there."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Theirs

    made = Theirs(models.BPE())
    if request.param == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
        parts = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        made.pre_tokenizer, made.normalizer = pre_tokenizers.Sequence(parts), normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT * 20], trainer)
    made.add_special_tokens(["<|begin|>", "<|end_of_text|>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    made.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 400)])
    assert made.token_to_id("<|begin|>") <= 400
    path = tmp_path_factory.mktemp("byte-level")
    there = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end_of_text|>")
    there.chat_template = "{{ messages }}"
    there.save_pretrained(path)
    return tokenizers.load(path), there


@given(texts=st.lists(TEXTS.map(lambda text: text.replace("e\u0301", "é")), min_size=1, max_size=3))
def test_byte_level_ids_are_theirs_and_lose_nothing(byte_level: tuple[Tokenizer, Any], texts: list[str]) -> None:
    import unicodedata

    here, there = byte_level
    for text, ids in zip(texts, here.encode_batch(texts), strict=True):
        assert here.encode(text) == ids.tolist()
        assert here.decode(ids) == text
        assert here.byte_lengths[ids].sum() == len(text.encode())
        if text == unicodedata.normalize("NFC", text):
            assert there(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_a_byte_level_tokenizer_keeps_the_interface(byte_level: tuple[Tokenizer, Any], hf: Any, tmp_path: Path) -> None:
    here, there = byte_level
    assert isinstance(here, Tokenizer)
    assert (here.bos_id, here.eos_id) == (there.bos_token_id, there.eos_token_id)
    assert dict(here.special_ids) == {"<|begin|>": here.bos_id, "<|end_of_text|>": here.eos_id}
    assert here.vocab_size == len(there)
    assert here.decode(list(here.special_ids.values())) == ""
    spelled = here.encode("<|begin|>e\u0301<tool>")
    assert here.bos_id not in spelled
    assert here.decode(spelled) == "<|begin|>e\u0301<tool>"
    with pytest.raises(DataError, match="surrogate"):
        here.encode("\ud800")
    with pytest.raises(DataError, match="outside the vocabulary"):
        here.decode([here.vocab_size])
    copied = pickle.loads(pickle.dumps(here))
    here.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    again = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == there.chat_template
    for other in (copied, loaded):
        assert other.digest == here.digest
        assert other.encode(TEXT) == here.encode(TEXT) == again(TEXT, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in here.encode_batch([TEXT, ""], threads=2)] == [here.encode(TEXT), []]


BYTE_LEVEL_REFUSED: dict[str, Callable[[Any], Any]] = {
    "only BPE that is byte-level": lambda made: made["pre_tokenizer"].update(type="Whitespace"),
    "a WordPiece cut by": lambda made: made["model"].update(type="WordPiece"),
    "adds a space": lambda made: made["pre_tokenizer"].update(add_prefix_space=True),
    "its normalizer is Lowercase": lambda made: made.update(normalizer={"type": "Lowercase"}),
    "its model has end_of_word_suffix '</w>'": lambda made: made["model"].update(end_of_word_suffix="</w>"),
    "lacks 1 of the 256 bytes": lambda made: made["model"]["vocab"].pop("!"),
    "ids that are no whole numbers": lambda made: made["model"]["vocab"].update({"!": 1 << 40}),
    "is not spelled in bytes": lambda made: made["model"]["vocab"].update({"a b": 300}),
    "takes text around it away": lambda made: made["added_tokens"].append(
        {"content": "<x>", "id": 301, "special": False, "lstrip": True}
    ),
    "not a tokenizer.json": lambda made: made.pop("model"),
}


def byte_level_json() -> dict[str, Any]:
    from functional_lm.text.byte_pairs import alphabet

    special = {"id": 256, "content": "<end>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "added_tokens": [{**special, "normalized": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(alphabet())}, "merges": []},
    }


@pytest.mark.parametrize("message", BYTE_LEVEL_REFUSED)
def test_other_tokenizers_are_refused(message: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'functional_lm[hf]')")
    path = tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    made = byte_level_json()
    path.write_text(json.dumps(made))
    assert tokenizers.load(tmp_path).bos_id == 256
    BYTE_LEVEL_REFUSED[message](made)
    path.write_text(json.dumps(made))
    with pytest.raises(DataError, match=message) as caught:
        tokenizers.load(tmp_path)
    assert str(path) in str(caught.value)
    path.write_text(json.dumps(byte_level_json()))
    for beside, reason in (("{}", "no bos_token and no eos_token"), ('{"eos_token": "it"}', "'it' .* not in the voc")):
        (tmp_path / "tokenizer_config.json").write_text(beside)
        with pytest.raises(DataError, match=reason):
            tokenizers.load(tmp_path)


def test_a_space_that_a_model_puts_before_a_text_is_kept(hf: Any, tmp_path: Path) -> None:
    """Llama 2's SentencePiece models: the ids are those of transformers."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    here = tokenizers.load(tmp_path)
    save(tmp_path / "model", ModelConfig(**{**CONFIG, "vocab_size": 300}), here)
    there = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("A folder", " is", "two\nlines\n", "", "é 😀\t", "promise  what"):
        ids = here.encode(text)
        assert ids == plain.encode(text) == there(text)["input_ids"], text
        assert here.decode(ids) == (" " + text if text else "")
        assert there.decode(ids, skip_special_tokens=True) == text
    assert tokenizers.load(tmp_path / "model").digest == pickle.loads(pickle.dumps(here)).digest == here.digest


# Refusals -------------------------------------------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path / "model.safetensors"))


def shard(path: Path) -> Path:
    """Split a folder's tensors into two shards with an index; the index is returned."""
    found = tensors(path)
    names = sorted(found)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: found[name] for name in names if places[name] == file}, path / file)
    (path / "model.safetensors").unlink()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = tensors(path)
    change(found)
    save_file(found, path / "model.safetensors")


def change_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = shard(path)
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


def poison(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"][3] = float("nan")


def to_pickle(path: Path) -> None:
    torch.save(tensors(path), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lie(path: Path) -> None:
    """A header that gives a tensor more rows than the file has bytes."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    assert b'"shape":[290,16]' in data
    file.write_bytes(data.replace(b'"shape":[290,16]', b'"shape":[299,16]'))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    rf"lacks the tensor '{UP}' that its config\.json": lambda p: change_tensors(p, lambda found: found.pop(UP)),
    r"holds 'model\.extra\.weight', which its config\.json does not ask for": lambda p: change_tensors(
        p, lambda found: found.update({"model.extra.weight": torch.zeros(1)})
    ),
    rf"'{NORM}' is \[17\]; config\.json asks for \[16\]": lambda p: change_tensors(
        p, lambda found: found.update({NORM: torch.zeros(17)})
    ),
    rf"'{NORM}' holds NaN or infinite numbers": lambda p: change_tensors(p, poison),
    rf"'{NORM}' is stored as I8; only F64": lambda p: change_tensors(
        p, lambda found: found.update({NORM: torch.zeros(16, dtype=torch.int8)})
    ),
    r"pytorch_model\.bin is a pickle, .* never opened; .*save_pretrained": to_pickle,
    r"no model\.safetensors and no": lambda p: (p / "model.safetensors").unlink(),
    r"model\.safetensors is not a whole safetensors file": lie,
    r"names the shard '\.\./x\.safetensors'": lambda p: change_index(
        p, lambda places: places.update({NORM: "../x.safetensors"})
    ),
    r"names the shard '/etc/passwd'": lambda p: change_index(p, lambda places: places.update({NORM: "/etc/passwd"})),
    r"names the shard 'a\\\\b\.safetensors'": lambda p: change_index(
        p, lambda places: places.update({NORM: "a\\b.safetensors"})
    ),
    r"no file .*model-9\.safetensors": lambda p: change_index(
        p, lambda places: places.update({NORM: "model-9.safetensors"})
    ),
    r"promises the tensor 'more'": lambda p: change_index(
        p, lambda places: places.update(more="model-00001-of-00002.safetensors")
    ),
    rf"holds '{NORM}', and model\.safetensors\.index\.json does not say so": lambda p: change_index(
        p, lambda places: places.pop(NORM)
    ),
    r"has model\.safetensors and model\.safetensors\.index\.json": lambda p: (
        p / "model.safetensors.index.json"
    ).write_text("{}"),
    "is no index of shards": lambda p: shard(p).write_text("[]"),
    "tie_word_embeddings is true .* 'lm_head.weight' is not the embedding": lambda p: edit(p, tie_word_embeddings=True),
    "'rope_type' is 'yarn'": lambda p: edit(p, rope_scaling={"type": "yarn"}),
    "no tokenizer in": lambda p: [(p / name).unlink() for name in ("tokenizer.model", "tokenizer.json")],
    "the tokenizer has 290 ids and the model 200": lambda p: (
        edit(p, vocab_size=200),
        change_tensors(
            p,
            lambda found: found.update({name: leaf[:200].clone() for name, leaf in found.items() if len(leaf) == 290}),
        ),
    ),
    "no configuration at": lambda p: (p / "config.json").unlink(),
    "is not JSON": lambda p: (p / "config.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_and_leaves_nothing(
    message: str, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    DAMAGES[message](llama)
    with pytest.raises(DataError, match=message) as caught:
        hugging_face.load_folder(llama)
    assert "\n" not in str(caught.value)
    assert main(COMMANDS, ["import", "--from", str(llama), "--out", str(tmp_path / "out" / "here")]) == 1
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert [entry for entry in tmp_path.rglob("*") if "out" in entry.parts and entry.is_file()] == []
    assert not (tmp_path / "out" / "here").exists()


def test_shards_and_older_files_are_read(llama: Path, tmp_path: Path) -> None:
    expected = tree.digest(hugging_face.load_folder(llama).params)
    bare = {name.removeprefix("model."): leaf for name, leaf in tensors(llama).items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    whole = shutil.copytree(llama, tmp_path / "whole")
    save_file(bare, whole / "model.safetensors")
    shard(llama)
    for path in (llama, whole):
        assert tree.digest(hugging_face.load_folder(path).params) == expected
    tied = {**tensors(whole), "lm_head.weight": tensors(whole)["embed_tokens.weight"].clone()}
    save_file(tied, whole / "model.safetensors")
    edit(whole, tie_word_embeddings=True)
    assert "lm_head" not in hugging_face.load_folder(whole).params


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_files_of_the_bare_model_and_with_masks_are_read(name: str, tmp_path: Path, bpe: Tokenizer) -> None:
    old = {"norm": "layernorm", "bias": "all", "feed_forward": "gelu", "tie_embeddings": name == "gpt2"}
    old |= {"positions": "learned"} if name == "gpt2" else {}
    save(tmp_path / "ours", ModelConfig(**{**CONFIG, "n_kv_heads": 4, **old}), bpe)
    hugging_face.export(tmp_path / "ours", path := tmp_path / "theirs", name)
    expected = tree.digest(hugging_face.load_folder(path).params)
    base, place = ("transformer.", "h.1.attn") if name == "gpt2" else ("gpt_neox.", "layers.1.attention")
    found = {key.removeprefix(base).replace("embed_out", "lm_head"): leaf for key, leaf in tensors(path).items()}
    found |= {f"{place}.bias": torch.ones(1, 1, 4, 4), f"{place}.masked_bias": torch.tensor(-1e4)}
    save_file(found, path / "model.safetensors")
    assert tree.digest(hugging_face.load_folder(path).params) == expected
    if name == "gpt_neox":
        save_file({**found, "embed_out.weight": torch.ones(290, 16)}, path / "model.safetensors")
        with pytest.raises(DataError, match=r"'embed_out\.weight' and 'lm_head\.weight' have the same place"):
            hugging_face.load_folder(path)


def test_the_keys_of_a_family_win_over_ours(llama: Path, bpe: Tokenizer) -> None:
    config = ModelConfig(**CONFIG, tie_embeddings=False, dropout=0.1, attention="flash")
    save(llama, config, bpe)
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**values, "rope_theta": 5.0}))
    assert hugging_face.load_folder(llama).config == dataclasses.replace(config, rope_theta=5.0)


def test_a_foreign_folder_has_to_be_brought_in_first(llama: Path) -> None:
    with pytest.raises(DataError, match=rf"'llama' of another program; .* import --from {llama} --out DIR"):
        functional_lm.load(llama)


def test_nothing_that_exists_is_replaced(llama: Path, tmp_path: Path) -> None:
    for function in (hugging_face.import_folder, hugging_face.export):
        with pytest.raises(UsageError, match="exists; remove it or choose another place"):
            function(llama, llama)
    (tmp_path / "empty").mkdir()
    hugging_face.import_folder(llama, tmp_path / "empty")
    with pytest.raises(DataError, match="no model folder at"):
        hugging_face.import_folder(tmp_path / "nowhere", tmp_path / "new")


def test_the_commands(llama: Path, tmp_path: Path, bpe: Tokenizer, capsys: Any) -> None:
    def run(*words: Any) -> int:
        return main(COMMANDS, [str(word) for word in words])

    assert run("import", "--from", llama, "--out", tmp_path / "in") == 0
    assert run("export", "--model", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert "as a llama" in capsys.readouterr().out
    assert tree.digest(folder.load(tmp_path / "in").params) == tree.digest(hugging_face.load_folder(llama).params)
    assert run("export", "--format", "gpt2", "--model", tmp_path / "in", "--out", tmp_path / "gpt2") == 1
    assert "is no gpt2: n_kv_heads is 2 and a gpt2 has 4" in capsys.readouterr().err
    odd = ModelConfig(**CONFIG, logit_softcap=3.0)
    save(tmp_path / "odd", odd, bpe)
    assert run("export", "--model", tmp_path / "odd", "--out", tmp_path / "never") == 1
    assert "no family of Hugging Face computes this model: logit_softcap is 3.0" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
    assert sum(leaf.numel() for leaf in tree.flatten(abstract(odd)).values()) > 0
