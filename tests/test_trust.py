"""What a run survives, and what a person is told: damage, full disks, signals, kills, company, spikes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import CODES
from training_runs import FLAGS, contents, cut_back, equal_runs, lines, losses, one_line, pretrain, read, run, text

from functional_lm import disk, files, run_folder, training_flags, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import flags_of
from functional_lm.disk import Operation
from functional_lm.errors import DataError
from functional_lm.model import transformer
from functional_lm.pretraining_flags import TrainOptions
from functional_lm.run_saving import Trouble
from functional_lm.text import dataset
from functional_lm.training import checkpoint, step

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # where the other processes look, too
import soak

__all__ = ["run", "text"]  # fixtures
QUIET = {"sample_tokens": 0, "eval_every": 0}


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_passed_over_and_kept(
    run: Path, copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_back(copy, 12)
    damaged = copy / "checkpoints" / "step-00000012"
    flip(damaged / "model.safetensors")
    before = contents(damaged)
    assert pretrain(data=text, out=copy) == 0
    said = capsys.readouterr().out
    assert "passing over a damaged checkpoint, which is kept: " in said
    assert f"{damaged}: model.safetensors is damaged (its sha256 is another)" in said
    assert "going on from" in said
    assert "step-00000008" in said
    equal_runs(copy, run)
    assert contents(copy / "checkpoints" / "step-00000012.damaged") == before


def test_if_all_are_damaged_it_stops_and_lists_each_and_begins_nothing(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoint.listing(copy / "checkpoints"):
        flip(path / "training.safetensors")
    before = contents(copy)
    for flags in ({}, {"resume": "never"}, {"steps": 20}):
        assert pretrain(data=text, out=copy, **flags) == 1
        said = one_line(capsys)
        assert all(f"step-{step:08d}: training.safetensors is damaged" in said for step in (4, 8, 12))
        assert contents(copy) == before
    assert pretrain(data=text, out=copy, overwrite=True, steps=2, **QUIET) == 0


def test_a_named_checkpoint_that_is_damaged_is_refused(
    copy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "checkpoints" / "step-00000008"
    flip(path / "config.json")
    assert pretrain(data=text, out=tmp_path / "other", resume=path) == 1
    assert f"--resume {path}: config.json is damaged" in one_line(capsys)
    assert not (tmp_path / "other").exists()


def test_orphans_of_a_crash_are_removed_and_an_interrupted_replacement_is_undone(
    run: Path, copy: Path, text: Path
) -> None:
    cut_back(copy, 8)
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".tmp-77-step-00000012")
    (copy / ".tmp-77-model.safetensors").write_bytes(b"half")
    os.replace(checkpoints / "step-00000008", checkpoints / ".tmp-old-77-step-00000008")
    assert pretrain(data=text, out=copy) == 0
    assert not list(copy.rglob(".tmp-*"))
    equal_runs(copy, run)


def test_a_run_to_replace_is_there_until_the_new_one_trains(
    copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused for its text, behind all checks of flags; killed while it prepares."""
    short, before = copy.parent / "short.txt", contents(copy)
    short.write_text("too short")
    flags = {"overwrite": True, "tokenizer": shutil.copytree(copy, copy.parent / "words"), "vocab_size": None}
    assert pretrain(data=short, out=copy, **flags) == 1
    assert "too few for one block" in one_line(capsys)
    assert contents(copy) == before

    def killed(*arguments: Any) -> Any:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.text.prepare.dataset_of", killed)
        with pytest.raises(SystemExit):
            pretrain(data=text, out=copy, **flags)
    assert not (copy / "checkpoints").exists()
    assert pretrain(data=text, out=copy) == 0
    assert contents(copy) == before


# The same run or another ----------------------------------------------------------------------------------------------


def test_every_flag_is_free_to_change_or_compared() -> None:
    """A new flag changes the mathematics until somebody says that it does not."""
    commands = {command.name: command for command in COMMANDS}
    names = {flag.name for verb in ("pretrain", "finetune", "dpo") for flag in flags_of(commands[verb])}
    assert names >= training_flags.FREE
    assert {
        "learning_rate",
        "batch_size",
        "seed",
        "compile",
        "threads",
        "dtype",
        "spike",
    } & training_flags.FREE == set()


def test_harmless_flags_are_taken(run: Path, copy: Path, text: Path) -> None:
    cut_back(copy, 4)
    harmless = {"save_every": 3, "keep": 1, "log_every": 2, "on_save_error": "continue", "sample_tokens": 0}
    assert pretrain(data=text, out=copy, **harmless) == 0
    assert contents(copy)["model.safetensors"] == contents(run)["model.safetensors"]


def test_what_decides_the_best_model_or_the_way_back_is_no_harmless_flag(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run without --patience and --spike, which has no such flags to keep, everything goes."""
    flags = {**QUIET, "eval_every": 1, "data": text, "out": copy.with_name("other"), "steps": 2}
    assert pretrain(**flags, patience=2, spike=9.0) == 0
    capsys.readouterr()
    assert pretrain(**{**flags, "steps": 4, "eval_every": 2}, patience=2, spike=9.0, save_epochs=True) == 2
    said = one_line(capsys)
    assert "(--eval_every was 1, is 2; --save_epochs was False, is True)" in said
    assert pretrain(**{**flags, "steps": 4}, patience=2, spike=9.0) == 0


def test_a_file_may_be_named_in_another_way(
    run: Path, copy: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_back(copy, 8)
    monkeypatch.chdir(text.parent)
    other = text.with_name("other.txt")
    other.write_text("another text altogether")
    try:
        assert pretrain(data=other.name, out=copy, **QUIET) == 2
        assert f"(--data was {text}, is {other.name})" in one_line(capsys)
    finally:
        other.unlink()
    assert pretrain(data=f"./{text.name}", out=f"{copy}/", **QUIET) == 0
    assert contents(copy)["model.safetensors"] == contents(run)["model.safetensors"]


def test_another_length_of_an_unfinished_run_is_refused(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_back(copy, 8)
    assert pretrain(data=text, out=copy, steps=20) == 2
    assert "belongs to a run of another length (--steps was 12, is 20), from which its learning rates" in one_line(
        capsys
    )
    assert pretrain(data=text, out=copy, steps=20, override=True, **QUIET) == 0
    assert read(copy / "summary.json")["steps"] == 20


def test_a_text_that_has_changed_is_another_run(copy: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_back(copy, 8)
    changed = copy.parent / "changed.txt"
    shutil.copy(text, changed)
    out = copy.parent / "run"
    assert pretrain(data=changed, out=out, **QUIET) == 0
    changed.write_text(changed.read_text().replace("foxes", "boxes"))
    capsys.readouterr()
    assert pretrain(data=changed, out=out, steps=14, **QUIET) == 1
    assert "belongs to another run (the text has changed); --override" in one_line(capsys)


def test_a_run_that_has_saved_nothing_yet_is_not_written_over_by_another(
    copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    for name in ("model.safetensors", "summary.json"):
        (copy / name).unlink()
    before = contents(copy)
    assert pretrain(data=text, out=copy, seed=5) == 2
    assert "belongs to another run (--seed was 1337, is 5)" in one_line(capsys)
    assert contents(copy) == before
    (copy / "run.json").write_text('{"options": 3')
    assert pretrain(data=text, out=copy, seed=5) == 1
    assert "run.json is damaged" in one_line(capsys)


def test_what_the_future_depends_on_is_in_the_checkpoint(run: Path) -> None:
    notes = checkpoint.notes(run / "checkpoints" / "step-00000008")
    assert notes["step"] == 8
    assert notes["memory"]["position"] == 16
    assert notes["run"]["options"].keys() >= {"compile", "dtype", "threads", "seed", "learning_rate", "batch_size"}
    assert set(contents(run / "checkpoints" / "step-00000008")) == {*notes["files"], "training.json"}
    names = tree.load(run / "checkpoints" / "step-00000008" / "training.safetensors").keys()
    assert names == {"key", "numbers", "optimizer", "skipped", "step"}


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


# Company --------------------------------------------------------------------------------------------------------------


def test_a_second_trainer_in_the_same_folder_is_refused(
    copy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (copy, tmp_path / "fresh"):
        with run_folder.held(out):
            before = contents(out)
            assert pretrain(data=text, out=out, steps=20) == 1
            assert f"another process is at work in {out}; wait for it" in one_line(capsys)
            assert contents(out) == before
    assert not (tmp_path / "fresh").exists()
    assert not (copy / run_folder.LOCK).exists()


def test_a_lock_file_of_a_killed_process_locks_nobody_out(copy: Path, text: Path) -> None:
    (copy / run_folder.LOCK).touch()
    assert pretrain(data=text, out=copy) == 0


def test_a_folder_of_something_else_is_left_as_it_is(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "letters"
    out.mkdir()
    (out / "to_mother.txt").write_text("dear")
    for flags in ({}, {"overwrite": True}):
        assert pretrain(data=text, out=out, **flags) == 2
        assert str(out) in one_line(capsys)
    (tmp_path / "evolved").mkdir()
    files.write_json(tmp_path / "evolved" / "run.json", {"kind": "evolution", "options": {}})
    assert pretrain(data=text, out=tmp_path / "evolved") == 2
    assert "already holds an evolution; choose another --out, or --overwrite it" in one_line(capsys)
    assert contents(out) == {"to_mother.txt": b"dear"}


def test_what_a_killed_beginning_left_is_begun_again(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "data" / ".part-text").mkdir(parents=True)
    (out / ".tmp-77-run.json").write_text("{")
    for _ in ("begun", "ended"):
        assert pretrain(data=text, out=out, steps=2, **QUIET) == 0
        assert not list(out.rglob(".tmp-*"))
        (out / ".tmp-77-README.md").write_text("#")


def test_two_locks_exclude_each_other(tmp_path: Path) -> None:
    with files.locked(tmp_path / "lock", "busy"), pytest.raises(DataError, match="busy"):
        files.locked(tmp_path / "lock", "busy").__enter__()
    with files.locked(tmp_path / "lock", "busy"):
        pass
    assert not list(tmp_path.iterdir())


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


# Real processes -------------------------------------------------------------------------------------------------------


def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert soak.soak(3, tmp_path, seed=4).kills == 3


@pytest.mark.long
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    result = soak.soak(100, tmp_path, seed=1)
    assert result.kills == 100
    assert len(result.resumed) > 10


@pytest.mark.long
def test_compiled_it_is_killed_and_ends_with_the_bytes_of_a_compiled_one(tmp_path: Path) -> None:
    """And not with those of eager steps, which round in another order."""
    assert soak.soak(3, tmp_path, seed=3, compile=True).kills == 3
    argv = {"data": tmp_path / "text.txt", "compile": "true", "steps": 4, "patience": 0}
    soak.finished(soak.words(**argv, out=tmp_path / "run"), tmp_path / "log")
    cut_back(tmp_path / "run", 3)
    mixed = soak.begun(soak.words(**{**argv, "compile": "false"}, out=tmp_path / "run"), tmp_path / "said")
    mixed.join(120)
    assert mixed.exitcode == 2
    assert "belongs to another run (--compile was True, is False)" in (tmp_path / "said").read_text()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_saves_and_says_130_and_a_second_trainer_is_refused(tmp_path: Path) -> None:
    """Exit code 130, documented in the README, for SIGTERM as for Ctrl-C."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = soak.words(
        data=soak.text(tmp_path / "text.txt"), out=out, steps=100_000, save_every=99_999, eval_every=99_999
    )
    first = soak.begun(argv, log)
    until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > 5)
    second = soak.begun(argv, tmp_path / "second")
    second.join(60)
    assert second.exitcode == 1
    assert f"another process is at work in {out}" in (tmp_path / "second").read_text()
    os.kill(first.pid, signal.SIGTERM)
    first.join(60)
    assert first.exitcode == 130
    said = log.read_text()
    assert "finishing this step, then saving (once more to stop at once)" in said
    assert "Traceback" not in said
    (saved,) = checkpoint.listing(out / "checkpoints")
    assert losses(out)[-1][0] == checkpoint.notes(saved)["step"]
    assert not (out / run_folder.LOCK).exists()


def test_the_second_signal_exits_at_once(tmp_path: Path) -> None:
    """In a run whose step never ends."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = soak.words(data=soak.text(tmp_path / "text.txt"), out=out, steps=9)
    process = soak.context().Process(target=soak.stuck, args=(argv, str(log)))
    process.start()
    until(lambda: log.exists() and "stuck" in log.read_text())
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "once more to stop at once" in log.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    said = process.exitcode
    process.kill()
    assert said == 130
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_waits_for_the_last_checkpoint_and_a_second_one_does_not(tmp_path: Path, signals: int) -> None:
    """SIGTERM behind the last step, while its checkpoint is being written."""
    out, log, gate = tmp_path / "run", tmp_path / "log", tmp_path / "gate"
    off = dict.fromkeys(("save_every", "eval_every", "patience", "spike"), 0)
    argv = soak.words(data=soak.text(tmp_path / "text.txt"), out=out, steps=2, **off)
    process = soak.context().Process(target=soak.held, args=(argv, str(log), str(gate)))
    process.start()
    until(lambda: log.exists() and "held" in log.read_text())
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: "once more to stop at once" in log.read_text())
    if signals == 2:
        os.kill(process.pid, signal.SIGTERM)
    else:
        gate.touch()
    process.join(60)
    assert process.exitcode == 130
    assert "Traceback" not in log.read_text()
    assert [path.name for path in checkpoint.listing(out / "checkpoints")] == ["step-00000002"][: 2 - signals]
    assert not (out / "model.safetensors").exists()


def test_json_of_a_run_is_what_every_reader_understands(run: Path) -> None:
    for path in run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert FLAGS["steps"] == 12
