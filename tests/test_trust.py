"""What a run folder says to who comes next: damage, the same run or another, company."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import FLAGS, contents, copy, cut_back, equal_runs, one_line, pretrain, read, run, text

from functional_lm import files, run_folder, training_flags, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import flags_of
from functional_lm.errors import DataError
from functional_lm.training import checkpoint

__all__ = ["copy", "run", "text"]  # fixtures
QUIET = {"sample_tokens": 0, "eval_every": 0}


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


def test_json_of_a_run_is_what_every_reader_understands(run: Path) -> None:
    for path in run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert FLAGS["steps"] == 12
