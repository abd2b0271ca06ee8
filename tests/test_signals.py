"""Real processes: signals, the first and the second, and kills at random instants."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import cut_back, losses

from functional_lm import run_folder
from functional_lm.training import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # where the other processes look, too
import soak


def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    result = soak.soak(3, tmp_path, seed=4, behind=2)
    assert result.kills >= 3
    assert result.kills - result.resumed[soak.NONE] >= 2


@pytest.mark.long
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    result = soak.soak(100, tmp_path, seed=1)
    assert result.kills == 100
    assert len(result.resumed) > 10


@pytest.mark.long
def test_compiled_it_is_killed_and_ends_with_the_bytes_of_a_compiled_one(tmp_path: Path) -> None:
    """And not with those of eager steps, which round in another order."""
    assert soak.soak(3, tmp_path, seed=3, compile=True, behind=1).kills >= 3
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
