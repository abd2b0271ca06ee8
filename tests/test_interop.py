"""Models of other programs come in and ours go out: the same function, whole or not at all.

`transformers` is the counterparty; without it (`pip install 'functional_lm[hf]'`) the laws remain.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CONFIG, bpe, hf, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import SEEDS, assert_close, token_rows, weights
from test_families import members

from functional_lm import folder, tree
from functional_lm.errors import DataError
from functional_lm.inference.text import generate
from functional_lm.interop import hugging_face
from functional_lm.interop.layouts import layouts
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import FAMILIES, NATIVE
from functional_lm.model.transformer import forward
from functional_lm.text.tokenizer import Tokenizer

__all__ = ["bpe", "hf"]  # fixtures


# Laws -----------------------------------------------------------------------------------------------------------------


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
