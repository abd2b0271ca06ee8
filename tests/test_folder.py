"""A model folder gives back the model that was saved, says what it is, and names what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, configs, weights

import functional_lm
from functional_lm import folder, keys, tree
from functional_lm.errors import DataError
from functional_lm.interop import hugging_face
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import family_of
from functional_lm.model.transformer import init
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree

TEXT = "A folder is a promise: what went in comes out.\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizers.train([TEXT * 20], vocab_size=290)


@pytest.fixture
def saved(tmp_path: Path, bpe: Tokenizer) -> tuple[Path, Tree, ModelConfig]:
    config = ModelConfig(vocab_size=bpe.vocab_size, d_model=8, n_layers=2, n_heads=2, d_ff=8, tie_embeddings=False)
    params = init(config, keys.key(0))
    folder.save(tmp_path / "model", params, config, bpe)
    return tmp_path / "model", params, config


@settings(max_examples=20)
@given(config=configs(), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer, config: ModelConfig, seed: int, dtype: torch.dtype
) -> None:
    config = dataclasses.replace(config, vocab_size=bpe.vocab_size + seed % 3)
    path, params = tmp_path_factory.mktemp("folder") / "deep" / "model", weights(config, seed, dtype)
    functional_lm.save(path, params, config, bpe)
    back, read, tokenizer = functional_lm.load(path)
    assert tree.digest(back) == tree.digest(params)
    assert list(tree.flatten(back)) == list(tree.flatten(params))
    assert read == config
    assert tokenizer.encode(TEXT) == bpe.encode(TEXT)
    exact = functional_lm.load(path, dtype=torch.float64).params
    assert {leaf.dtype for leaf in tree.leaves(exact)} == {torch.float64}
    assert tree.digest(tree.cast(exact, dtype)) == tree.digest(params)
    written = json.loads((path / "config.json").read_text())
    assert written["model_type"] == family_of(config)
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_files_are_hugging_faces(saved: tuple[Path, Tree, ModelConfig], bpe: Tokenizer) -> None:
    path, params, _ = saved
    names = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"}
    names |= {"tokenizer_config.json", "generation_config.json"}
    assert {entry.name for entry in path.iterdir()} == names
    assert safetensors.torch.load_file(path / "model.safetensors").keys() == tree.flatten(params).keys()
    special = {"bos_token_id": bpe.bos_id, "eos_token_id": bpe.eos_id}
    ends = {"eos_token_id": [bpe.eos_id, bpe.special_ids["<|end|>"]]}  # an answer ends with either
    assert json.loads((path / "generation_config.json").read_text()) == {**special, **ends}
    written = json.loads((path / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": bpe.vocab_size,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        **special,
    }
    assert {name: written[name] for name in expected} == expected


def test_saving_again_replaces_the_model_and_leaves_other_files(
    saved: tuple[Path, Tree, ModelConfig], bpe: Tokenizer
) -> None:
    path, _, config = saved
    (path / "README.md").write_text("notes")
    other = dataclasses.replace(config, n_layers=1)
    params = init(other, keys.key(1))
    folder.save(path, params, other, bpe)
    back = folder.load(path)
    assert back.config == other
    assert tree.digest(back.params) == tree.digest(params)
    assert (path / "README.md").read_text() == "notes"
    assert not [entry for entry in path.iterdir() if entry.name.startswith(".")]


def test_a_missing_folder_comes_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no model folder at .*nowhere; train one with `python -m functional_lm\.train"
    ):
        folder.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"no configuration at .*config\.json"),
        ("model.safetensors", r"no file .*model\.safetensors"),
        ("tokenizer.*", "no tokenizer in"),
    ],
)
def test_a_missing_part_is_named(saved: tuple[Path, Tree, ModelConfig], name: str, message: str) -> None:
    for part in saved[0].glob(name):
        part.unlink()
    with pytest.raises(DataError, match=message):
        folder.load(saved[0])


@settings(max_examples=25)
@given(cut=st.integers(0, 2000))
def test_a_truncated_model_is_named(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer, cut: int) -> None:
    path = tmp_path_factory.mktemp("folder")
    config = ModelConfig(vocab_size=bpe.vocab_size, d_model=4, n_layers=1, n_heads=1, d_ff=4)
    folder.save(path, init(config, keys.key(0)), config, bpe)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"model\.safetensors is not a whole safetensors file"):
        folder.load(path)


def test_tensors_that_the_config_does_not_describe_are_named(saved: tuple[Path, Tree, ModelConfig]) -> None:
    path, params, config = saved
    flat = tree.flatten(params)
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        rf"lacks the tensor '{name}'": {key: leaf for key, leaf in flat.items() if key != name},
        r"holds a tensor 'model\.extra\.weight' that": {**flat, "model.extra.weight": torch.zeros(1)},
        rf"'{name}' is \[8, 9\]; config\.json describes \[8, 8\]": {**flat, name: torch.zeros(8, 9)},
    }
    for message, leaves in cases.items():
        tree.save(tree.unflatten(leaves), path / "model.safetensors")
        with pytest.raises(DataError, match=message):
            folder.load(path)
        with pytest.raises(DataError, match="here.*" + message):
            folder.check(tree.unflatten(leaves), config, "here")
    folder.check(tree.cast(params, torch.bfloat16), config, "here")  # the precision is the file's own affair


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    config = ModelConfig(vocab_size=bpe.vocab_size - 1, d_model=4, n_layers=1, n_heads=1, d_ff=4)
    folder.save(tmp_path, init(config, keys.key(0)), config, bpe)
    with pytest.raises(DataError, match=f"the tokenizer has {bpe.vocab_size} ids and the model {bpe.vocab_size - 1}"):
        folder.load(tmp_path)


def test_a_tokenizer_of_the_right_size_that_is_another_is_refused(
    saved: tuple[Path, Tree, ModelConfig], bpe: Tokenizer, tmp_path: Path
) -> None:
    """Every id would be valid and mean something else."""
    other = tokenizers.train([TEXT[::-1] * 20], vocab_size=290)
    assert (other.vocab_size, other.digest != bpe.digest) == (bpe.vocab_size, True)
    other.save(saved[0])
    said = f"its tokenizer is another one ({other.digest[:12]}) than the model learned with ({bpe.digest[:12]})"
    with pytest.raises(DataError, match=re.escape(said)):
        folder.load(saved[0])
    with pytest.raises(DataError, match=re.escape(said)):
        hugging_face.export(saved[0], tmp_path / "exported")
    bpe.save(saved[0])
    assert folder.load(saved[0]).tokenizer.digest == bpe.digest


def test_load_loss_and_gradient_are_three_lines(saved: tuple[Path, Tree, ModelConfig]) -> None:
    params, config, _ = functional_lm.load(saved[0])
    batch = {"tokens": torch.arange(6).view(1, 6), "targets": torch.arange(1, 7).view(1, 6)}
    grads = torch.func.grad(lambda p: functional_lm.loss(p, batch, config)[0])(params)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(grads))
    assert tree.norm(grads) > 0
