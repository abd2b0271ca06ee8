"""What a run survives while it trains: full and broken disks, folders that vanish, numbers that are none, spikes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import CODES
from training_runs import contents, copy, cut_back, equal_runs, lines, losses, one_line, pretrain, read, run, text

from functional_lm import disk, tree
from functional_lm.disk import Operation
from functional_lm.model import transformer
from functional_lm.pretraining_flags import TrainOptions
from functional_lm.run_saving import Trouble
from functional_lm.text import dataset
from functional_lm.training import checkpoint, step

__all__ = ["copy", "run", "text"]  # fixtures
QUIET = {"sample_tokens": 0, "eval_every": 0}


# Disks ----------------------------------------------------------------------------------------------------------------


def failing_under(name: str, code: int, times: int = 10**9) -> Callable[[Operation], Any]:
    """A disk on which nothing can be written below a folder of this name, so many times."""
    left = [times]

    def guard(operation: Operation) -> Any:
        if name in operation.path.parts and operation.kind == "write" and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(operation.path))
        return operation.act(1.0)

    return guard


@pytest.mark.parametrize("kind", CODES)
def test_a_disk_that_takes_no_checkpoint_stops_the_run_and_leaves_the_old_ones(
    run: Path, copy: Path, text: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    cut_back(copy, 8)
    before = contents(copy / "checkpoints")
    with disk.watched_by(failing_under("checkpoints", CODES[kind])):
        assert pretrain(data=text, out=copy) == 1
    said = one_line(capsys)
    assert f"{os.strerror(CODES[kind])}); what was saved before is whole" in said
    assert contents(copy / "checkpoints") == before
    assert pretrain(data=text, out=copy) == 0
    equal_runs(copy, run)


def test_or_it_goes_on_if_it_is_told_to(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with disk.watched_by(failing_under("checkpoints", errno.ENOSPC, times=1)):
        assert pretrain(data=text, out=out, on_save_error="continue") == 0
    assert "No space left on device); training goes on without it" in capsys.readouterr().out
    assert [path.name for path in checkpoint.listing(out / "checkpoints")] == ["step-00000008", "step-00000012"]
    equal_runs(out, run)


def test_records_that_cannot_be_written_are_lost_or_end_the_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in (("stop", 1), ("continue", 0)):
        out = tmp_path / name
        with disk.watched_by(failing_under("metrics.jsonl", errno.EIO, times=2)):
            assert pretrain(data=text, out=out, on_save_error=name, **QUIET) == code
        said = capsys.readouterr()
        assert "a record of the run was lost (" in (said.err if code else said.out)
    assert [row["step"] for row in lines(tmp_path / "continue")][:10] == list(range(3, 13))


@pytest.mark.parametrize("profile", [1, 50])
def test_a_trace_that_cannot_be_written_is_lost_or_ends_the_run(
    run: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], profile: int
) -> None:
    """In the middle of the run, or where it ends before its trace does."""

    def full(operation: Operation) -> Any:
        if operation.path.name.endswith("trace.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))
        return operation.act(1.0)

    for how, code in (("stop", 1), ("continue", 0)):
        out = shutil.copytree(run, tmp_path / how)
        cut_back(out, 8)
        capsys.readouterr()
        with disk.watched_by(full):
            assert pretrain(data=text, out=out, profile=profile, on_save_error=how) == code
        said = capsys.readouterr()
        why = f"the trace was not written ({out / 'trace.json'}: No space left on device); "
        after = f"{why}{'what was saved before is whole' if code else 'training goes on without it'}"
        assert after in (said.err if code else said.out)
        assert not list(out.glob("*trace*"))
    equal_runs(out, run)


def test_a_trace_that_a_run_does_not_reach_is_told_before_or_behind_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(data=text, out=out, profile=2, steps=3) == 2
    assert "--profile 2 traces steps after the first 3, and --steps is 3; give --steps above 3" in one_line(capsys)
    assert not out.exists()
    for steps, said in (
        (4, "the trace of 1 step is in"),
        (6, "--profile traced nothing: it begins after 3 steps of a"),
    ):
        assert pretrain(data=text, out=out, profile=2, steps=steps, **QUIET) == 0
        assert said in capsys.readouterr().out


def test_each_kind_of_trouble_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    trouble = Trouble(TrainOptions(on_save_error="continue"), "a record was lost")
    for _ in range(3):
        for name in ("metrics.jsonl", "training.log"):
            trouble(OSError(errno.ENOSPC, "No space left on device", name))
    said = [f"a record was lost ({name}: No space left on device); " for name in ("metrics.jsonl", "training.log")]
    assert capsys.readouterr().out == "".join(f"{line}training goes on without it\n" for line in said)


@pytest.mark.parametrize("flags", [QUIET, {"sample_tokens": 0, "patience": 9, "eval_every": 1, "save_every": 0}])
def test_a_folder_that_is_gone_is_not_made_again(
    flags: dict[str, Any],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, plain = tmp_path / "run", dataset.batch

    def vanishing(view: Any, number: int, *rest: Any) -> Any:
        if number == 5:  # at once: the best model may be on its way into it
            out.rename(tmp_path / "elsewhere")
        return plain(view, number, *rest)

    monkeypatch.setattr(dataset, "batch", vanishing)
    assert pretrain(data=text, out=out, **flags) == 1
    assert f"the checkpoint was not written ({out}: the run folder is gone)" in one_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "step-00000004"])
def test_a_folder_that_goes_while_it_is_saved_into_is_not_made_again(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first operation of a checkpoint on a path of this name: its folder, a file in it, its last file."""
    out = tmp_path / "run"

    def vanishing(operation: disk.Operation) -> Any:
        if operation.path.name.endswith(name) and out.exists():
            shutil.rmtree(out)
        return operation.act(1.0)

    with disk.watched_by(vanishing):
        assert pretrain(data=text, out=out, **QUIET) == 1
    assert "the checkpoint was not written (" in one_line(capsys)
    assert not out.exists()


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of microbatches whose loss and gradient are not finite."""
    plain, bad = transformer.loss, set[int]()
    numbers: list[int] = []
    batch = dataset.batch

    def noting(view: Any, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return batch(view, number, *rest)

    def loss(params: Any, batch: Any, config: Any, key: Any = None, z_loss: float = 0.0) -> Any:
        value, sums = plain(params, batch, config, key, z_loss)
        factor = torch.nan if numbers and numbers[-1] in bad else 1.0
        return value * factor, {**sums, "nll": sums["nll"] * factor}

    monkeypatch.setattr(dataset, "batch", noting)
    made = step.training
    monkeypatch.setattr(step, "training", lambda *a, **k: made(*a, **{"objective": loss, **k}))
    return bad


def test_a_step_that_is_not_finite_changes_nothing_and_is_logged_with_its_place(
    text: Path, tmp_path: Path, poisoned: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned.add(2 * 5 + 1)  # the second microbatch of step 6
    out = tmp_path / "run"
    flags = {"save_every": 1, "ema_decay": 0.9, "eval_every": 3, "patience": 9, "sample_tokens": 0}
    assert pretrain(data=text, out=out, **flags) == 0
    row = next(row for row in lines(out) if "skipped" in row)
    assert (row["step"], row["skipped"], row["microbatch"], row["loss"]) == (6, 1, 10, None)
    assert "step 6 changed nothing: its loss or gradient was not finite (microbatch 10 of" in capsys.readouterr().out
    before, after = (out / "checkpoints" / checkpoint.name(step) for step in (5, 6))
    assert tree.digest(tree.load(before / "model.safetensors")) == tree.digest(tree.load(after / "model.safetensors"))
    old, new = (tree.load(path / "training.safetensors") for path in (before, after))
    assert all(tree.digest(old[name]) == tree.digest(new[name]) for name in ("optimizer", "ema"))
    assert (int(new["skipped"]), int(new["step"])) == (1, 6)


def test_too_many_in_a_row_end_the_run_also_across_processes(
    text: Path, tmp_path: Path, poisoned: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned |= {13, 15, 17, 19}  # steps 7, 8, 9, 10
    out, flags = tmp_path / "run", {**QUIET, "save_every": 1, "bad_steps": 4}
    assert pretrain(data=text, out=out, **flags) == 1
    assert "the loss is not finite in step 10 and in the 3 before it (microbatch 18 of the data" in one_line(capsys)
    assert checkpoint.listing(out / "checkpoints")[-1].name == "step-00000009"
    assert pretrain(data=text, out=out, **flags) == 1
    assert "is not finite in step 10 and in the 3 before it" in one_line(capsys)


def test_what_is_not_finite_is_never_the_best() -> None:
    from functional_lm.trainer import Best

    best = Best()
    assert [best.observe(1, value) for value in (float("nan"), float("inf"), 3.0, float("-inf"), 2.0)] == [
        False, False, True, False, True,
    ]  # fmt: skip


def test_a_spike_goes_back_past_its_batches_and_is_the_same_when_killed_behind_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch 27 holds nothing but one token over and over, which a model of the text does not expect."""
    plain, seen = dataset.batch, []

    def strange(view: Any, number: int, *rest: Any) -> Any:
        seen.append(number)
        made = plain(view, number, *rest)
        return {**made, "targets": made["targets"] * 0 + 7} if number == 26 else made

    monkeypatch.setattr(dataset, "batch", strange)
    flags = {**QUIET, "gradient_accumulation_steps": 1, "spike": 1.15, "save_every": 5, "steps": 32}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain(data=text, out=whole, **flags) == 0
    assert (
        "the loss spiked in step 27: back to step 25, past the batches of the steps between" in capsys.readouterr().out
    )
    assert seen == [*range(27), *range(27, 34)]
    assert [step for step, _ in losses(whole)] == list(range(1, 33))
    memory = checkpoint.notes(checkpoint.listing(whole / "checkpoints")[-1])["memory"]
    assert (memory["ahead"], memory["rewinds"]) == (2, 1)
    shutil.copytree(whole, parts)
    cut_back(parts, 30)
    assert pretrain(data=text, out=parts, **flags) == 0
    assert contents(parts)["model.safetensors"] == contents(whole)["model.safetensors"]
    assert losses(parts) == losses(whole)


def test_a_spike_on_a_full_disk_goes_back_all_the_same(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one checkpoint on nothing can be written any more, the lines of the records least of all."""
    plain = dataset.batch

    def strange(view: Any, number: int, *rest: Any) -> Any:
        made = plain(view, number, *rest)
        return {**made, "targets": made["targets"] * 0 + 7} if number == 26 else made

    monkeypatch.setattr(dataset, "batch", strange)
    flags = {**QUIET, "gradient_accumulation_steps": 1, "spike": 1.15, "save_every": 5, "steps": 32, "data": text}
    assert pretrain(**flags, out=tmp_path / "whole") == 0
    full = {"on": False}

    def guard(operation: Operation) -> Any:
        if full["on"] and operation.kind in ("write", "create", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))
        result = operation.act(1.0)
        full["on"] |= operation.kind == "rename" and operation.path.name == "step-00000025"
        return result

    capsys.readouterr()
    with disk.watched_by(guard):
        assert pretrain(**flags, out=tmp_path / "run", on_save_error="continue") == 1
    said = capsys.readouterr()
    assert "the loss spiked in step 27: back to step 25" in said.out
    assert "No space left on device); training goes on without it" in said.out
    assert "model.safetensors: No space left on device); the same command goes on from the last ch" in said.err
    assert losses(tmp_path / "run")[-1][0] == 25
    assert pretrain(**flags, out=tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert contents(tmp_path / "run")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


def test_a_best_model_that_could_not_be_kept_is_not_the_best(text: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", {"data": text, "eval_every": 1, "patience": 9, "sample_tokens": 0, "steps": 6}
    with disk.watched_by(failing_under("best", errno.ENOSPC)):
        assert pretrain(**flags, out=out, on_save_error="continue") == 0
    assert read(out / "summary.json")["best_step"] == 0
    assert contents(out)["model.safetensors"] == contents(out)["checkpoints/step-00000006/model.safetensors"]
