"""Adapter folders: an adapter trained here is PEFT's, and PEFT's are ours, with the same logits.

`peft` and `transformers` are the counterparties; without them (`pip install 'functional_lm[hf]'`) the refusals remain.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import hf
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_close, token_rows, weights
from test_lora import adapters

import functional_lm as flm
from functional_lm import folder, keys, tree
from functional_lm.errors import DataError
from functional_lm.interop import peft as ours
from functional_lm.model import lora
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward
from functional_lm.text.simple import ByteTokenizer

__all__ = ["hf"]  # a fixture

CONFIG = ModelConfig(
    vocab_size=262, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, max_len=32, tie_embeddings=False
)
PARAMS, TOKENS = weights(CONFIG, 0), token_rows(CONFIG, (2, 9), 1)
TARGETS = {
    "attention": ("q_proj", "v_proj"),
    "one layer": ("model.layers.1.mlp.down_proj", "o_proj"),
    "everything": ("all-linear", "lm_head", "embed_tokens"),
}


@pytest.fixture(scope="module")
def libraries(hf: Any) -> Any:
    return hf, pytest.importorskip("peft", reason="peft is not installed (pip install 'functional_lm[hf]')")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    folder.save(path, PARAMS, CONFIG, ByteTokenizer())
    return path


def trained(targets: tuple[str, ...], rslora: bool, dora: bool, rank: int = 3) -> tuple[tree.Tree, ours.Settings]:
    made = lora.init(PARAMS, targets, rank, keys.key(5), 4.0, rslora, dora)
    drawn = tree.map_named(lambda name, leaf: 0.3 * keys.normal(keys.fold_in_name(keys.key(6), name), leaf.shape), made)
    made = tree.map_named(
        lambda name, leaf, noise: noise if "lora_B" in name else leaf * (1 + noise) if "magnitude" in name else leaf,
        made,
        drawn,
    )
    return made, ours.Settings(rank, 4.0, targets, 0.1, rslora, dora, "the base", tree.digest(PARAMS))


def opened_there(libraries: Any, base: Path, adapter: Path) -> torch.Tensor:
    """The logits of TOKENS where PEFT opens a base and an adapter folder."""
    transformers, peft = libraries
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def made_there(libraries: Any, base: Path, adapter: Path, embeddings: bool = False, **how: Any) -> torch.Tensor:
    """The same with an adapter that PEFT makes and saves; `embeddings` copies those of the base beside it."""
    transformers, peft = libraries
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM", **how)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        theirs = model.eval()(TOKENS).logits
    model.save_pretrained(str(adapter), save_embedding_layers=embeddings)
    return theirs


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_an_adapter_trained_here_is_pefts(
    libraries: Any, base: Path, tmp_path: Path, name: str, rslora: bool, dora: bool
) -> None:
    targets = tuple(t for t in TARGETS[name] if not (dora and "embed" in t))
    adapter, how = trained(targets, rslora, dora)
    ours.save(tmp_path, adapter, how, PARAMS)
    theirs = opened_there(libraries, base, tmp_path)
    found = forward(lora.attach(PARAMS, adapter), TOKENS, CONFIG)
    assert_close(found, theirs, 1e-4)
    assert (found - forward(PARAMS, TOKENS, CONFIG)).abs().max() > 0.1


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_an_adapter_of_pefts_is_ours(
    libraries: Any, base: Path, tmp_path: Path, name: str, rslora: bool, dora: bool
) -> None:
    linear = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    targets = [t for t in TARGETS[name] if t != "all-linear" and not (dora and "embed" in t)]
    targets += linear if name == "everything" else []
    theirs = made_there(
        libraries, base, tmp_path, target_modules=targets, use_rslora=rslora, use_dora=dora,
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.o_proj": 1},
    )  # fmt: skip
    adapter = flm.load_adapter(tmp_path, PARAMS)
    assert_close(forward(lora.attach(PARAMS, adapter), TOKENS, CONFIG), theirs, 1e-4)
    assert_close(forward(lora.merge(PARAMS, adapter), TOKENS, CONFIG), theirs, 1e-4)


@given(seed=SEEDS, data=st.data())
@settings(max_examples=15)
def test_a_folder_gives_the_adapter_back(tmp_path_factory: pytest.TempPathFactory, seed: int, data: Any) -> None:
    path = tmp_path_factory.mktemp("adapter")
    adapter = data.draw(adapters(PARAMS))
    parts = lora.projections(adapter).values()
    rank, scale = next(iter(parts))["lora_A"].shape[0], float(next(iter(parts))["lora_scale"])
    how = ours.Settings(rank, scale * rank, ("x",), dora="lora_magnitude" in next(iter(parts)))
    ours.save(path, adapter, how, PARAMS)
    found, settings_ = ours.load(path, PARAMS)
    assert tree.flatten(found).keys() == tree.flatten(adapter).keys()
    assert all(torch.allclose(a, b) for a, b in zip(tree.leaves(found), tree.leaves(adapter), strict=True))
    assert (settings_.rank, settings_.dora) == (rank, how.dora)


def saved(path: Path, changes: dict[str, Any] | None = None) -> Path:
    adapter, how = trained(("q_proj",), False, False)
    ours.save(path, adapter, how, PARAMS)
    file = path / ours.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **(changes or {})}))
    return path


def test_an_adapter_for_another_base_is_refused_unless_told(tmp_path: Path) -> None:
    other = tree.map(lambda leaf: leaf + 0.01, PARAMS)
    saved(tmp_path)
    assert flm.load_adapter(tmp_path, PARAMS)
    with pytest.raises(DataError, match=r"was trained on another base \(.*--any_base"):
        flm.load_adapter(tmp_path, other)
    assert flm.load_adapter(tmp_path, other, any_base=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0; it has to be above 0"),
        ({"r": 4}, "has rank 3; adapter_config.json says 4"),
        ({"bias": "all"}, "bias is 'all', which is not understood"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "which changed the base"),
        ({"use_dora": True}, "use_dora is True, and"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_a_setting_that_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        flm.load_adapter(saved(tmp_path, changes), PARAMS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    flat = tree.flatten(tree.load(tmp_path / ours.WEIGHTS))
    first = next(iter(flat))

    def refuses(changed: dict[str, torch.Tensor], message: str) -> None:
        tree.save(tree.unflatten(changed), tmp_path / ours.WEIGHTS)
        with pytest.raises(DataError, match=message):
            flm.load_adapter(tmp_path, PARAMS)

    refuses({**flat, first: flat[first][:, :-1]}, r"is \[3, 15\]; this base needs \[3, 16\]")
    refuses({**flat, first: flat[first] * float("nan")}, "not finite")
    refuses({name: leaf for name, leaf in flat.items() if name != first}, "lacks 'lora_A'")
    refuses({**flat, "base_model.model.x.lora_A.weight": flat[first]}, "'x', which this model lacks|lacks 'lora_B'")
    refuses({**flat, "other": flat[first]}, "has an unknown tensor 'other'")
    (tmp_path / ours.WEIGHTS).write_bytes((tmp_path / ours.WEIGHTS).read_bytes()[:-8])
    with pytest.raises(DataError):
        flm.load_adapter(tmp_path, PARAMS)
    (tmp_path / ours.WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        flm.load_adapter(tmp_path, PARAMS)


TIED_CONFIG = dataclasses.replace(CONFIG, tie_embeddings=True)
TIED = {"model": PARAMS["model"]}


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tied")
    folder.save(path, TIED, TIED_CONFIG, ByteTokenizer())
    return path


def test_an_adapter_of_an_embedding_that_is_the_output_too_is_pefts(
    libraries: Any, tied_base: Path, tmp_path: Path
) -> None:
    adapter, how = trained(("embed_tokens", "q_proj"), False, False)
    ours.save(tmp_path, adapter, how, TIED)
    theirs = opened_there(libraries, tied_base, tmp_path)
    found = forward(lora.attach(TIED, adapter), TOKENS, TIED_CONFIG)
    assert_close(found, theirs, 1e-4)
    assert_close(forward(lora.merge(TIED, adapter), TOKENS, TIED_CONFIG), theirs, 1e-4)
    again, _ = ours.load(tmp_path, TIED)
    assert tree.digest(again) == tree.digest(adapter)


@pytest.mark.parametrize("copies", [True, False])
def test_pefts_adapter_of_such_an_embedding_is_ours(
    libraries: Any, tied_base: Path, tmp_path: Path, copies: bool
) -> None:
    how = {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}
    theirs = made_there(libraries, tied_base, tmp_path, copies, **how)
    assert_close(forward(lora.attach(TIED, flm.load_adapter(tmp_path, TIED)), TOKENS, TIED_CONFIG), theirs, 1e-4)
    if copies:
        with pytest.raises(DataError, match=r"brings weights of its own for '(lm_head|model\.embed_tokens)'"):
            flm.load_adapter(tmp_path, tree.map(lambda leaf: leaf + 1, TIED))


def test_an_adapter_of_the_input_alone_is_refused_where_it_is_the_output_too(tmp_path: Path) -> None:
    adapter, how = trained(("embed_tokens",), False, False)
    ours.save(tmp_path, adapter, how, PARAMS)
    with pytest.raises(DataError, match="adapts this model's embedding and not its output"):
        flm.load_adapter(tmp_path, TIED, any_base=True)


def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    made, how = trained(TARGETS["attention"], False, False)
    ours.save(tmp_path, made, how, PARAMS)
    (tmp_path / ours.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model\.bin is a pickle, .* never opened; .*save_pretrained\(OTHER\)"):
        ours.load_adapter(tmp_path, PARAMS)
