"""The folder of an evolution: one run at a time, damage, signals, too little memory, a disk that fails."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from evolutions import at, contents, evolved, there, weights_of

from functional_lm import disk, evolve, evolve_result, files, run_folder
from functional_lm.errors import DataError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import loop

__all__ = ["at", "there"]  # fixtures


def test_a_folder_has_one_run_at_a_time(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    with run_folder.held(at / "run"):
        before = contents(at / "run")
        assert evolved(at / "run", "--generations", "4") == 1
        assert f"another process is at work in {at / 'run'}; wait for it" in capsys.readouterr().err
        assert contents(at / "run") == before
    assert not (at / "run" / run_folder.LOCK).exists()


@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_a_run_to_replace_is_there_until_the_new_one_has_measured(
    ends: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(What is killed tidies nothing up: the next command does.)"""
    assert evolved(at / "run", data="rows.jsonl") == 0
    before = contents(at / "run")
    if ends == "refused":
        assert (
            evolved(at / "run", "--overwrite", "--fitness", "scores:fails", "--max_tokens", "4", data="rows.jsonl") == 1
        )
        assert capsys.readouterr().err == "error: the fitness scores:fails raised ValueError: on purpose\n"
    else:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "told", lambda *_: sys.exit(137))
            with pytest.raises(SystemExit):
                evolved(at / "run", "--overwrite", "--sigma", "0.5", data="rows.jsonl")
        assert evolved(at / "run", "--resume", "never", data="rows.jsonl") == 2
    assert contents(at / "run") == before
    for generations, more in ((1, []), (0, ["--minutes", "1e-9"])):
        assert evolved(at / "run", "--overwrite", "--generations", "1", *more, data="rows.jsonl") == 0
        assert not (at / "run" / run_folder.REPLACED).exists()
        assert len(journals.read(at / "run" / "journal.jsonl").generations) == generations


def test_a_folder_of_something_else_is_left_as_it_is(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "letters").mkdir()
    (at / "letters" / "to_mother.txt").write_text("dear")
    (at / "texts" / "data").mkdir(parents=True)
    (at / "texts" / "data" / "mine.txt").write_text("words")
    (at / "training").mkdir()
    files.write_json(at / "training" / "run.json", {"options": {}})
    before = contents(at)
    for name, message in {
        "letters": "letters holds to_mother.txt and no run; choose another --out",
        "texts": "texts holds data and no run; choose another --out",
        "training": "training already holds a training; choose another --out, or --overwrite it",
    }.items():
        assert evolved(at / name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for name in ("letters", "texts"):
        assert evolved(at / name, "--overwrite") == 2
        assert f"--overwrite replaces a run and {at / name} holds something else" in capsys.readouterr().err
    assert contents(at) == before
    (at / "prepared" / "data").mkdir(parents=True)
    (at / "prepared" / "data" / "text.json").write_text("{}")
    assert evolved(at / "prepared") == 0


def test_a_damaged_checkpoint_is_named_passed_over_and_kept(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal has all that it knew, even if no checkpoint is whole."""
    assert evolved(at / "whole", "--generations", "4") == 0
    assert evolved(at / "run", "--save_every", "1") == 0
    for path in sorted((at / "run" / "checkpoints").iterdir()):
        data = bytearray((path / "state.safetensors").read_bytes())
        data[-9] ^= 1
        (path / "state.safetensors").write_bytes(data)
    damaged = contents(at / "run" / "checkpoints" / "step-00000003")
    capsys.readouterr()
    assert evolved(at / "run", "--save_every", "1", "--generations", "4") == 0
    said = capsys.readouterr().out
    for step in (2, 3):
        assert f"step-0000000{step}: state.safetensors is damaged (its sha256 is another)" in said
    assert weights_of(at / "run") == weights_of(at / "whole")
    assert contents(at / "run" / "checkpoints" / "step-00000003") == damaged


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("g++ was killed"), 130), (DataError("no number"), 1)])
def test_a_signal_that_ends_the_compiler_too_is_an_interruption_and_no_error(
    error: Exception, code: int, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the package has to say is said all the same. The next call goes on."""

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.population.chunks", signalled)
        assert evolved(at / "run") == code
    assert capsys.readouterr().err == ("interrupted\n" if code == 130 else "error: no number\n")
    assert evolved(at / "run") == 0


def test_where_memory_is_short_it_is_said_what_needs_less(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written where it is known, and else when it happens."""
    full, genetic = at / "full", ["--strategy", "genetic", "--space", "full"]
    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.memory.free_memory", lambda device: 1 << 20)
        assert evolved(full, *genetic, "--population", "1000000") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --population 1000000: genetic holds ")
        assert "and 1 MiB are free; --population " in said
        fits = said.split("; --population ")[1].split(" ")[0]
        assert not full.exists()
        assert evolved(full, *genetic, "--population", fits, "--generations", "1") == 0

    def short(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.population.chunks", short)
        assert evolved(at / "run") == 1
    assert capsys.readouterr().err == (
        "error: out of memory with 4 members, 4 at once; --chunk_size 2 goes on with fewer of them; a new run needs "
        "less with a smaller --batch_size or --population, or --noise regenerated\n"
    )
    assert evolved(at / "run", "--chunk_size", "2") == 0


@pytest.mark.parametrize("name", ["journal.jsonl", "state.json"])
def test_a_folder_that_goes_is_not_made_again(name: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, seen = at / "run", [0]

    def vanishing(operation: disk.Operation) -> Any:
        seen[0] += operation.path.name.endswith(name)
        if seen[0] == 5 and out.exists():
            shutil.rmtree(out)
        return operation.act(1.0)

    with disk.watched_by(vanishing):
        assert evolved(out, "--save_every", "1") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the generation was not written (")
    assert "the same command goes on from there" in said
    assert not out.exists()


@pytest.mark.parametrize("how", ["full", "gone"])
def test_what_is_evolved_and_cannot_be_written_is_not_lost(
    how: str, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = at / "run"

    def full(operation: disk.Operation) -> Any:
        if operation.path.name.endswith("summary.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))
        return operation.act(1.0)

    def gone(*arguments: Any) -> None:
        shutil.rmtree(out)
        evolve_result.finish(*arguments)

    with monkeypatch.context() as patch, disk.watched_by(full if how == "full" else lambda one: one.act(1.0)):
        if how == "gone":
            patch.setattr(evolve, "finish", gone)
        assert evolved(out) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the model was not written (")
    assert "; the same command goes on from the last checkpoint when the disk is well again" in said
    assert out.exists() == (how == "full")
    assert evolved(out) == 0
