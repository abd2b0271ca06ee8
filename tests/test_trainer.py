"""What the flags of training promise: lengths, ends, means, populations, records and words for trouble."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import FLAGS, contents, lines, losses, one_line, pretrain, read, text

import functional_lm
from functional_lm import run_best, training_flags, tree
from functional_lm.errors import UsageError
from functional_lm.text import dataset
from functional_lm.training import checkpoint, loop, optimizer, schedule

__all__ = ["text"]  # a fixture

QUIET = {"sample_tokens": 0, "gradient_accumulation_steps": 1, "eval_every": 0, "save_every": 0}


def test_the_names_of_the_flags_are_those_of_the_rooms() -> None:
    assert tuple(optimizer.OPTIMIZERS) == training_flags.OPTIMIZERS
    assert tuple(schedule.BODIES) == training_flags.SCHEDULES


# Lengths and ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["true", "false"])
def test_epochs_are_passes_over_the_training_text(text: Path, tmp_path: Path, packing: str) -> None:
    out = tmp_path / "run"
    assert (
        pretrain(**{**QUIET, "steps": None}, data=text, out=out, epochs=1.5, save_epochs="true", packing=packing) == 0
    )
    view, _ = dataset.split(dataset.open_dataset(out / "data" / "text"), 0.2, 1337)
    epoch = dataset.windows_per_epoch(view, 32, packing == "true") / 4
    assert read(out / "summary.json")["steps"] == round(1.5 * epoch)
    saved = [int(path.name[5:]) for path in checkpoint.listing(out / "checkpoints")]
    assert saved == [math.ceil(epoch), round(1.5 * epoch)]


@pytest.fixture(scope="module")
def warm(text: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first step of a process takes seconds, whatever it is."""
    assert pretrain(**{**QUIET, "steps": 1}, data=text, out=tmp_path_factory.mktemp("warm")) == 0


def test_minutes_end_a_run_and_the_same_minutes_are_all_that_it_gets(
    warm: None, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "run", {**QUIET, "steps": None, "minutes": 0.02}
    assert pretrain(**flags, data=text, out=out) == 0
    summary = read(out / "summary.json")
    assert summary["ended"] == "time"
    assert 1.2 <= summary["training_seconds"] < 20
    assert summary["steps"] == len(losses(out)) > 3
    rates = [row["learning_rate"] for row in lines(out) if "loss" in row]
    assert min(rates[5:]) < 0.5 * max(rates)  # the schedule saw the end coming
    assert pretrain(**flags, data=text, out=out) == 0
    assert "is trained already" in capsys.readouterr().out
    assert pretrain(**{**flags, "minutes": 0.04}, data=text, out=out) == 0
    assert read(out / "summary.json")["steps"] > summary["steps"]
    assert read(out / "summary.json")["training_seconds"] >= 2.4


def test_patience_ends_a_run_and_keeps_its_best_model(text: Path, tmp_path: Path) -> None:
    """A rate so high that the model is soon worse than before."""
    out = tmp_path / "run"
    flags = {**QUIET, "steps": 60, "eval_every": 2, "eval_batches": 1000, "patience": 3, "schedule": "constant"}
    assert pretrain(**flags, data=text, out=out, learning_rate=0.3, warmup_steps=8, grad_clip=0, optimizer="sgd") == 0
    measured = [(row["step"], row["val_loss"]) for row in lines(out) if "val_loss" in row]
    summary = read(out / "summary.json")
    during = [(step, loss) for step, loss in measured if step % 2 == 0 and step <= summary["steps"]]
    values = [loss if loss is not None else math.inf for _, loss in during[: summary["steps"] // 2]]
    best = min(range(len(values)), key=values.__getitem__)
    if summary["ended"] == "patience":
        assert best == len(values) - 4
    assert summary["best_step"] == during[best][0]
    assert summary["val_loss"] == pytest.approx(values[best], rel=1e-4)


def test_patience_goes_on_after_a_resume(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = {**QUIET, "eval_every": 2, "patience": 50}
    assert pretrain(**flags, data=text, out=out, steps=4) == 0
    memory = read(checkpoint.listing(out / "checkpoints")[-1] / "training.json")["memory"]
    assert memory["best"]["step"] == read(out / "summary.json")["best_step"] == 2
    assert pretrain(**flags, data=text, out=out, steps=8) == 0
    assert read(out / "summary.json")["best_step"] in (2, 4, 6)
    named = {read(path / "training.json")["memory"]["best"]["step"] for path in checkpoint.listing(out / "checkpoints")}
    assert {int(path.name[5:]) for path in (out / "best").iterdir()} == named


def test_more_patience_goes_on_as_if_there_had_been_so_much_from_the_beginning(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**QUIET, "data": text, "eval_every": 1, "eval_batches": 1, "steps": 12, "learning_rate": 3.0}
    flags |= {"warmup_steps": 0, "grad_clip": 0, "optimizer": "sgd"}
    early, whole = tmp_path / "early", tmp_path / "whole"
    assert pretrain(**flags, out=whole, patience=50) == 0
    assert pretrain(**flags, out=early, patience=2) == 0
    ended = read(early / "summary.json")
    assert (ended["ended"], ended["steps"] < 12) == ("patience", True)
    capsys.readouterr()
    for patience in (1, 2):
        assert pretrain(**flags, out=early, patience=patience) == 0
        said = capsys.readouterr().out
        assert f"is trained already: {ended['steps']} steps" in said
        assert "a larger --patience (0: none) goes on from there" in said
    assert pretrain(**{**flags, "save_every": 5}, out=early, patience=50, keep=1) == 0
    assert (early / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(early) == losses(whole)


@pytest.mark.parametrize(
    ("first", "same", "more"),
    [
        ({"steps": 3}, {"steps": 2}, {"steps": 4}),
        ({"epochs": 0.1}, {"epochs": 0.05}, {"epochs": 0.2}),
        ({"steps": 3, "minutes": 9}, {"steps": 3, "minutes": 10}, {"steps": 4, "minutes": 9}),
        ({"steps": 90_000, "minutes": 0.005}, {"steps": 90_001, "minutes": 0.005}, {"steps": 90_000, "minutes": 0.04}),
    ],
)
def test_a_finished_run_goes_on_if_there_is_more_of_what_ended_it(
    first: dict[str, Any], same: dict[str, Any], more: dict[str, Any], warm: None, text: Path, tmp_path: Path
) -> None:
    flags = {**QUIET, "steps": None, "data": text, "out": tmp_path, "gradient_accumulation_steps": 1}
    assert pretrain(**{**flags, **first}) == 0
    before = contents(tmp_path)
    for asked in (first, same):
        assert pretrain(**{**flags, **asked}) == 0
        assert contents(tmp_path) == before
    assert pretrain(**{**flags, **more}) == 0
    assert read(tmp_path / "summary.json")["steps"] > json.loads(before["summary.json"])["steps"]


def test_a_damaged_best_model_is_no_result(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = {**QUIET, "eval_every": 2, "patience": 50, "learning_rate": 1e-30}
    assert pretrain(**flags, data=text, out=out, steps=4) == 0
    best = run_best.kept(out, read(out / "summary.json")["best_step"])
    weights = bytearray((best / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (best / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert pretrain(**flags, data=text, out=out, steps=6) == 1
    assert "the best model is damaged" in capsys.readouterr().err


# Weights --------------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_weights_is_measured_and_kept(text: Path, tmp_path: Path) -> None:
    plain, mean = tmp_path / "plain", tmp_path / "mean"
    assert pretrain(**QUIET, data=text, out=plain) == 0
    assert pretrain(**QUIET, data=text, out=mean, ema_decay=0.9) == 0
    assert losses(plain) == losses(mean)  # it changes what is kept and not what is trained
    last = checkpoint.listing(mean / "checkpoints")[-1]
    assert tree.digest(functional_lm.load(last).params) == tree.digest(functional_lm.load(plain).params)
    saved = tree.load(last / "training.safetensors")["ema"]
    assert tree.digest(saved) == tree.digest(functional_lm.load(mean).params)
    assert tree.digest(saved) != tree.digest(functional_lm.load(plain).params)


@pytest.mark.parametrize("name", training_flags.OPTIMIZERS)
def test_every_optimizer_learns_the_text(name: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rate = {"sgd": 0.3, "lion": 0.002}.get(name, 0.01)
    assert pretrain(**QUIET, data=text, out=out, optimizer=name, learning_rate=rate, steps=25, dropout=0) == 0
    values = [loss for _, loss in losses(out)]
    assert values[-1] < values[0] - 0.6


@pytest.mark.parametrize("name", training_flags.SCHEDULES)
def test_every_schedule_is_the_recorded_rate(name: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(**QUIET, data=text, out=out, schedule=name, min_learning_rate=0.002, cooldown=0.5) == 0
    factor = schedule.schedule(name, 3, 0.2, 0.5)
    expected = [0.01 * float(factor(torch.tensor(step), torch.tensor(12.0))) for step in range(12)]
    assert [row["learning_rate"] for row in lines(out) if "loss" in row] == pytest.approx(expected, rel=1e-5)


# Populations ----------------------------------------------------------------------------------------------------------


def test_each_member_of_a_population_is_trained_as_if_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together, given = tmp_path / "together", {"seeds": (3, 5, 5), "learning_rates": (0.01, 0.01, 0.02)}
    flags = {**FLAGS, "data": text, "save_every": 0, "eval_every": 6, "sample_tokens": 0}
    lists = {name: ",".join(map(str, values)) for name, values in given.items()}
    assert pretrain(**flags, out=together, **lists) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d ", line)]
    assert sorted(row[0] for row in table) == ["0", "1", "2"]
    assert [float(row[3]) for row in table] == sorted(float(row[3]) for row in table)
    for member, (seed, rate) in enumerate(zip(*given.values())):
        alone = tmp_path / str(member)
        assert pretrain(**{**flags, "learning_rate": rate, "min_learning_rate": rate / 10}, out=alone, seed=seed) == 0
        ours = [row["loss"][member] for row in lines(together) if "loss" in row]
        assert ours == pytest.approx([loss for _, loss in losses(alone)], rel=1e-4)
        mine, theirs = read(together / "members" / str(member) / "summary.json"), read(alone / "summary.json")
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)
        assert (mine["seed"], mine["learning_rate"]) == (seed, rate)
    summary = read(together / "summary.json")
    best = min(summary["members"], key=lambda member: member["val_loss"])
    assert (summary["member"], summary["val_loss"]) == (best["member"], best["val_loss"])
    winner = tree.digest(functional_lm.load(together / "members" / str(best["member"])).params)
    assert winner == tree.digest(functional_lm.load(together).params)


def test_a_population_is_resumed_bit_for_bit(text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = {**QUIET, "data": text, "population": 2, "schedule": "constant"}
    assert pretrain(**flags, out=whole) == 0
    assert pretrain(**flags, out=parts, steps=6) == 0
    assert pretrain(**flags, out=parts) == 0
    for member in "01":
        name = f"members/{member}/model.safetensors"
        assert contents(parts)[name] == contents(whole)[name]
    assert read(parts / "members" / "1" / "summary.json")["seed"] == 1338


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"population": 3, "seeds": "1,2"}, "--population is for 3 models and --seeds for 2"),
        ({"learning_rates": "0.1,0.2", "weight_decays": "0.1"}, "--learning_rates is for 2 models and --weight_decays"),
        ({"population": 1}, "--population is for one model"),
        ({"population": 2, "patience": 1, "eval_every": 1}, "--patience ends one training"),
        ({"steps": 3, "epochs": 2}, "--steps and --epochs both give the length"),
        ({"patience": 3, "eval_every": 0}, "--patience 3 counts validations"),
        ({"device": "mps"}, "torch sees no mps device here"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    flags: dict[str, Any], words: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(**flags, data=text, out=tmp_path / "run") == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "run").exists()


# Records and trouble --------------------------------------------------------------------------------------------------


def test_samples_are_in_the_log_as_often_as_asked(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(**{**QUIET, "sample_tokens": 4}, data=text, out=out, sample_every=5) == 0
    log = (out / "training.log").read_text()
    assert re.findall(r"step (\d+) sample: '", log) == ["5", "10", "12"]


def test_steps_are_traced(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretrain(**QUIET, data=text, out=out, profile=2) == 0
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    assert "aten::embedding" in names
    assert "Self CPU" in (out / "training.log").read_text()
    assert "the trace of 2 steps is in" in capsys.readouterr().out


def test_weights_and_biases_get_the_same_records(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert pretrain(**QUIET, data=text, out=tmp_path / "none", wandb="true") == 2
    assert "pip install 'functional_lm[wandb]'" in one_line(capsys)
    calls: list[tuple[Any, ...]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(("finish",))
    )
    package = types.SimpleNamespace(init=lambda **settings: calls.append(("init", settings)) or run, Html=str)
    monkeypatch.setitem(sys.modules, "wandb", package)
    out = tmp_path / "run"
    assert pretrain(**{**QUIET, "sample_tokens": 2}, data=text, out=out, wandb="true", wandb_project="mine") == 0
    assert calls[0][1]["project"] == "mine"
    assert calls[0][1]["config"]["batch_size"] == 4
    logged = [(step, values["loss"]) for step, values in calls[1:-1] if "loss" in values]
    assert logged == losses(out)
    assert calls[-1] == ("finish",)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_which_flag_to_turn(
    error: Exception, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(loop, "run", fails)
    assert pretrain(**QUIET, data=text, out=tmp_path / "run") == 1
    said = one_line(capsys)
    assert "out of memory with 4 rows of 32 tokens; --batch_size 2 with --gradient_accumulation_steps 2" in said
    assert "--checkpoint_activations" in said


def test_other_errors_are_not_called_out_of_memory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "run", fails)
    assert pretrain(**QUIET, data=text, out=tmp_path / "run") == 1
    assert "mat1 and mat2" in one_line(capsys)


def test_a_population_ends_where_nothing_is_held_out(text: Path, tmp_path: Path) -> None:
    """Its members' losses are null in JSON, which has no word for what is no number."""
    out = tmp_path / "run"
    assert pretrain(**{**QUIET, "steps": 2, "seeds": "3,5", "val_fraction": 0}, data=text, out=out) == 0
    summary = read(out / "summary.json")
    assert [summary["val_loss"], *(member["val_loss"] for member in summary["members"])] == [None] * 3
    assert functional_lm.load(out)


def test_a_length_is_resolved_once() -> None:
    flags = training_flags.TrainingFlags()
    assert training_flags.resolve_length(flags, 7.0).steps == 900
    assert training_flags.resolve_length(training_flags.TrainingFlags(epochs=2.5), 7.0).steps == 18
    assert training_flags.resolve_length(training_flags.TrainingFlags(minutes=1.0), 7.0).steps is None
    with pytest.raises(UsageError, match="--min_learning_rate"):
        training_flags.check(training_flags.TrainingFlags(min_learning_rate=1.0))


def test_a_vocabulary_that_nobody_asked_for_shrinks_to_the_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(**{**QUIET, "vocab_size": None, "steps": 2}, data=text, out=out) == 0
    most = int(re.search(r"the text has no more than (\d+) pieces", capsys.readouterr().out)[1])
    model = functional_lm.load(out)
    assert model.tokenizer.vocab_size == model.config.vocab_size == most < 4096
    assert pretrain(**{**QUIET, "vocab_size": None, "steps": 4}, data=text, out=out) == 0  # it is the same run
