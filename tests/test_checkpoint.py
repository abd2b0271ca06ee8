"""A checkpoint is the state bit for bit, a model folder besides, whole or not there, and refused when it is neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functional_lm
from functional_lm import files, folder, keys, tree
from functional_lm.errors import DataError
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.training import checkpoint, optimizer, schedule, step
from functional_lm.training.step import TrainState

SHAPE = {"vocab_size": 300, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 16, "max_len": 8}
CONFIG = ModelConfig(**SHAPE, dropout=0.1)
MEMORY = {"best": 1.25, "patience": [1, 2], "note": "é"}


def start(config: ModelConfig, seed: int) -> TrainState:
    functions = training(config)
    return functions.init(transformer.init(config, keys.key(seed)), keys.key(seed + 1))


def training(config: ModelConfig = CONFIG) -> step.Training:
    return step.training(config, optimizer.optimizer("adamw"), schedule.cosine(2, 0.1), numbers={"total_steps": 10})


def batch(seed: int) -> dict[str, torch.Tensor]:
    return {name: keys.randint(keys.key(seed + i), (2, 8), 0, 300) for i, name in enumerate(("tokens", "targets"))}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train(["some text, not much of it; enough for a vocabulary of bytes\n" * 20], "bpe", 300)


@pytest.fixture(scope="module")
def state() -> TrainState:
    """Three steps into a run: no number in it is a round one."""
    functions, now = training(), start(CONFIG, 0)
    for number in range(3):
        now, _ = functions.train_step(now, batch(number))
    return now


@pytest.fixture(scope="module")
def template() -> TrainState:
    return start(CONFIG, 7)


@pytest.fixture
def saved(tmp_path: Path, state: TrainState, tokenizer: Tokenizer) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", state, CONFIG, tokenizer, MEMORY)


def same(a: Any, b: Any) -> bool:
    one, other = tree.flatten(a), tree.flatten(b)
    return list(one) == list(other) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in zip(one.values(), other.values())
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# There and back -------------------------------------------------------------------------------------------------------


def test_what_comes_back_is_the_state_bit_for_bit(saved: Path, state: TrainState, template: TrainState) -> None:
    assert saved.name == "step-00000003"
    loaded, memory = checkpoint.load(saved, template)
    assert isinstance(loaded, TrainState)
    assert same(loaded, state)
    assert memory == MEMORY


def test_training_goes_on_as_if_nothing_had_been_written(saved: Path, state: TrainState, template: TrainState) -> None:
    functions = training()
    one, other = state, checkpoint.load(saved, template)[0]
    for number in range(3, 6):
        one, report = functions.train_step(one, batch(number))
        other, other_report = functions.train_step(other, batch(number))
        assert same((one, report), (other, other_report))


def test_a_checkpoint_is_a_model_folder(saved: Path, state: TrainState, tokenizer: Tokenizer) -> None:
    params, config, words = functional_lm.load(saved)
    assert same(params, state.params)
    assert config == CONFIG
    assert words.digest == tokenizer.digest


def test_saving_again_gives_the_same_bytes(
    saved: Path, state: TrainState, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    again = checkpoint.save(tmp_path / "again", state, CONFIG, tokenizer, MEMORY)
    assert contents(again) == contents(saved)


def test_saving_leaves_the_state_alone_and_nothing_temporary(saved: Path, state: TrainState) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert int(state.step) == 3


# Which there are ------------------------------------------------------------------------------------------------------


@given(steps=st.sets(st.integers(0, 10**10), max_size=8), keep=st.integers(0, 9))
@settings(max_examples=30)
def test_the_newest_are_kept_in_order_of_their_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], keep: int
) -> None:
    """By number: step 100000000 comes after step 99999999, which its name does not."""
    root = tmp_path_factory.mktemp("run")
    for number in steps:
        (root / checkpoint.name(number)).mkdir()
        (root / checkpoint.name(number) / "file").touch()
    others = ["step-12", "step-0000000a", ".tmp-1-step-00000001", "step-00000001.old", "notes"]
    for name in others:
        (root / name).mkdir()
    ordered = sorted(steps)
    assert checkpoint.listing(root) == [root / checkpoint.name(number) for number in ordered]
    checkpoint.prune(root, keep, lambda path: True)
    kept = ordered[-keep:] if keep else ordered
    assert checkpoint.listing(root) == [root / checkpoint.name(number) for number in kept]
    assert len(list(root.iterdir())) == len(kept) + len(others)


def test_where_nothing_was_saved_nothing_is_listed(tmp_path: Path) -> None:
    assert checkpoint.listing(tmp_path / "absent") == []
    checkpoint.prune(tmp_path / "absent", 1, lambda path: True)


# Damage ---------------------------------------------------------------------------------------------------------------

TENSORS = ("model.safetensors", "training.safetensors")


def refused(path: Path, template: TrainState) -> str:
    with pytest.raises(DataError) as raised:
        checkpoint.load(path, template)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [*TENSORS, "training.json"])
def test_a_missing_part_is_named(saved: Path, template: TrainState, name: str) -> None:
    (saved / name).unlink()
    assert name in refused(saved, template)


@pytest.mark.parametrize("name", TENSORS)
@given(data=st.data())
@settings(max_examples=60)
def test_a_truncated_or_mutated_file_never_loads_as_something_else(
    damaged: Path, state: TrainState, template: TrainState, name: str, data: st.DataObject
) -> None:
    """Cut anywhere, or with a byte of the header changed: refused, or (in what carries no meaning) the same state."""
    path = damaged / name
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    try:
        if data.draw(st.booleans()):
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            refused(damaged, template)
            return
        place, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            loaded, _ = checkpoint.load(damaged, template)
        except DataError:
            return
        assert same(loaded, state)
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, state: TrainState, tokenizer: Tokenizer) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("damaged"), state, CONFIG, tokenizer, MEMORY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        ('{"format": 2', "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[1, 2]", "it holds something else"),
        ('{"step": 3}', "it holds something else"),
        ('{"format": 1, "files": {}}', "format 1; this version reads 2"),
        ('{"format": 2, "files": {}}', "its sha256 is another"),
    ],
)
def test_foreign_notes_are_refused(saved: Path, template: TrainState, text: str, reason: str) -> None:
    (saved / "training.json").write_text(text)
    assert reason in refused(saved, template)


def test_notes_that_are_no_text_are_refused(saved: Path, template: TrainState) -> None:
    (saved / "training.json").write_bytes(b"\xff\xfe\x00")
    assert "it is no JSON" in refused(saved, template)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"n_layers": 1}, "layers.1"),
        ({"n_layers": 3}, "layers.2"),
        ({"d_ff": 32}, "mlp"),
        ({"tie_embeddings": False}, "lm_head"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_tensor(
    saved: Path, changes: dict[str, Any], tensor: str
) -> None:
    assert tensor in refused(saved, start(ModelConfig(**{**SHAPE, **changes}), 0))


def test_another_dtype_is_refused(saved: Path, template: TrainState) -> None:
    assert "float16" in refused(saved, template._replace(params=tree.cast(template.params, torch.float16)))


@pytest.mark.parametrize("part", TENSORS)
def test_parts_of_a_checkpoint_do_not_stand_in_for_each_other(saved: Path, template: TrainState, part: str) -> None:
    other = TENSORS[1 - TENSORS.index(part)]
    shutil.copy(saved / other, saved / part)
    refused(saved, template)


# Crashes --------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "name", "passing"),
    [(folder, "save", 0), *((tree, "save", n) for n in (0, 1)), *((files, "write_json", n) for n in range(4))],
)
def test_a_crash_while_saving_leaves_the_older_ones(
    saved: Path,
    state: TrainState,
    template: TrainState,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    passing: int,
) -> None:
    """At the same step (which replaces it) and at the next: the older one still loads, and nothing else is listed."""
    before, working, calls = contents(saved), getattr(module, name), 0

    def breaking(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > passing:
            raise Crash
        return working(*arguments, **named)

    for newer in (state, state._replace(step=state.step + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, breaking)
            calls = 0
            with pytest.raises(Crash):
                checkpoint.save(saved.parent, newer, CONFIG, tokenizer, {"new": True})
        assert contents(saved) == before
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]
        assert same(checkpoint.load(saved, template)[0], state)
    newest = checkpoint.save(saved.parent, state, CONFIG, tokenizer, {"new": True})
    assert json.loads((newest / "training.json").read_text())["memory"] == {"new": True}
