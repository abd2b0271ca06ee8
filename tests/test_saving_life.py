"""A life of saving, crashing, damaging, pruning and going on, beside a model of what has to be true."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults import KINDS, Failing, Killed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from saved_states import CONFIG, loaded, quick, save, state

from functional_lm import disk, files, run_best
from functional_lm.errors import DataError
from functional_lm.training import checkpoint
from functional_lm.training.saving import Saver, Verified
from functional_lm.training.step import TrainState

__all__ = ["quick"]  # a fixture

LAST = 28  # steps
# Rows of a leaf: what is written at once, and so much that its whole pages go past the system's cache.
SIZES = (*[3] * 8, disk.LARGE // 8 + 1, disk.LARGE // 8 + disk.PAGE // 8 * 5 + 3)
# What becomes of a file's bytes, damaged at a place; None: the file is gone.
DAMAGE: dict[str, Callable[[bytes, int], bytes | None]] = {
    "cut": lambda data, at: data[:at],
    "bit": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "zeros": lambda data, at: data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :],
    "gone": lambda data, at: None,
}


class Life(RuleBasedStateMachine):
    """One run over many processes. The model: which steps were saved to the end and are neither damaged nor pruned.

    Each of them names the best model of its time, which has to be there as long as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.out = self.folder / "run"
        self.best = self.rows = 0
        self.step = 0  # of the process
        self.whole: set[int] = set()  # has to be there, and whole
        self.perhaps: set[int] = set()  # a crash came while it was saved or removed
        self.damaged: set[int] = set()  # has to be there, under this name or beside it
        self.rotten: set[int] = set()  # damaged, and this process cannot know: it takes them for whole
        self.keep = 2
        self.verified = Verified(checkpoint.reason)  # as long as the process

    @property
    def root(self) -> Path:
        return self.out / "checkpoints"

    def path(self, step: int) -> Path:
        return self.root / checkpoint.name(step)

    @initialize(keep=st.integers(0, 3), rows=st.sampled_from(SIZES))
    def begin(self, keep: int, rows: int) -> None:
        self.keep, self.rows = keep, rows

    @precondition(lambda self: self.step > self.best)
    @rule(kind=st.none() | st.sampled_from(KINDS), passing=st.integers(0, 16))
    def validate(self, kind: str | None, passing: int) -> None:
        """Better than before: the model is kept, or stays the second where the disk takes none."""
        failing = Failing(kind, passing)
        try:
            with disk.watched_by(failing):
                run_best.keep(self.out, self.step, lambda path: files.write_text(path / "model", f"{self.step}"))
            self.best = self.step
        except OSError:
            pass
        except Killed:
            self.go_on(self.keep)

    # Saving and pruning

    @precondition(lambda self: self.step < LAST)
    @rule(steps=st.integers(0, 3))
    def train_and_save(self, steps: int) -> None:
        """To the end, without trouble."""
        self.step = max(1, self.step + steps)
        self._forget_same_step()
        self._write()
        self.whole.add(self.step)
        self._pruned()
        assert self.step in self.whole  # whatever has rotted: one is

    @precondition(lambda self: self.step < LAST)
    @rule(steps=st.integers(0, 3), kind=st.sampled_from(KINDS), passing=st.integers(0, 90), resume=st.booleans())
    def save_on_a_disk_that_fails(self, steps: int, kind: str, passing: int, resume: bool) -> None:
        failing = Failing(kind, passing)
        self.step = max(1, self.step + steps)
        self._forget_same_step()
        try:
            with disk.watched_by(failing):
                self._write()
        except (OSError, Killed):
            self.damaged.discard(self.step)
            self._uncertain({self.step} | self._old())
            if failing.dead or resume:
                self.go_on(self.keep)
        else:
            self.whole.add(self.step)
            self._pruned()
            if failing.failed:
                self._uncertain(self._old())

    @precondition(lambda self: self.whole)
    @rule(kind=st.none() | st.sampled_from(KINDS), passing=st.integers(0, 16))
    def prune(self, kind: str | None, passing: int) -> None:
        """By itself: after a process that kept more, or was stopped in it."""
        failing = Failing(kind, passing)
        try:
            with disk.watched_by(failing):
                checkpoint.prune(self.root, self.keep, self.verified)
            self._pruned()
        except (OSError, Killed):
            self._uncertain(self._old())
            if failing.dead:
                self.go_on(self.keep)

    def _forget_same_step(self) -> None:
        """One of the same step is replaced if it is valid, which a crash may interrupt between its two renames, and
        set aside if it is not."""
        if self.step in self.whole:
            self._uncertain({self.step})
        if self.step in self.rotten:
            self.rotten.discard(self.step)
            self.damaged.add(self.step)

    def _write(self) -> None:
        saver = Saver(self._save)
        saver.save(state(self.step, self.rows), {"of": self.step, "best": {"step": self.best}})
        saver.wait()
        run_best.prune(self.out, self.best)

    def _save(self, now: TrainState, memory: Mapping[str, Any]) -> None:
        self.verified.add(save(self.root, now, memory, CONFIG))
        checkpoint.prune(self.root, self.keep, self.verified)

    def _old(self) -> set[int]:
        return set(sorted(self.whole | self.rotten | {self.step})[: -self.keep]) if self.keep else set()

    def _uncertain(self, steps: set[int]) -> None:
        self.perhaps |= steps
        self.whole -= steps
        self.rotten -= steps

    def _pruned(self) -> None:
        """The model cannot know whether one that a crash came upon counts: it asks the folder for these alone."""
        there = {step for step in self.perhaps if self.verified(self.path(step))}
        sound = {step for step in there if checkpoint.reason(self.path(step)) is None}
        counted = sorted(self.whole | self.rotten | there)
        kept = set(counted[-self.keep :]) if self.keep else set(counted)
        self.whole, self.rotten, self.perhaps = (self.whole | sound) & kept, (self.rotten | there - sound) & kept, set()
        self.damaged -= self.whole

    # Damage

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), how=st.sampled_from([*DAMAGE]), unseen=st.booleans())
    def corrupt(self, data: st.DataObject, how: str, unseen: bool) -> None:
        """Any file, at any place; `unseen` as a disk rots: a process that has read it has nothing to notice it by."""
        step = data.draw(st.sampled_from(sorted(self.whole)), "step")
        file = data.draw(st.sampled_from(sorted(self.path(step).iterdir())), "file")
        before, time = file.read_bytes(), file.stat().st_mtime_ns
        after = DAMAGE[how](before, data.draw(st.integers(0, len(before) - 1), "position"))
        known = unseen and self.verified(self.path(step))
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)
            os.utime(file, ns=(time, time + 10**9))  # the clock of a file system is coarse
        why = checkpoint.reason(self.path(step))
        if why is None:  # what was zero already, the end of a line
            assert after == before or (file.name == checkpoint.NOTES and same_json(before, after))
            return
        assert file.name in why
        self.whole.discard(step)
        if known:
            self.verified.add(self.path(step))
        (self.rotten if known else self.damaged).add(step)

    # Another process

    @precondition(lambda self: self.step > 0)
    @rule(keep=st.integers(0, 3))
    def go_on(self, keep: int) -> None:
        """A new process: sweeps, and begins where the newest whole checkpoint stands."""
        self.keep, self.verified = keep, Verified(checkpoint.reason)
        self.damaged, self.rotten = self.damaged | self.rotten, set()
        if self.folder.exists():
            files.sweep(self.folder)
        assert not [*self.folder.rglob(".tmp-*")]
        try:
            found, passed_over = checkpoint.newest(self.root)
        except DataError:
            assert not self.whole  # and it is not for want of a checkpoint
            assert checkpoint.listing(self.root)
            self._start_elsewhere()
            return
        if found is None:
            assert not self.whole
            self.step = self.best = 0
            return
        self.step, self.best = loaded(found, self.rows), best_of(found)
        assert self.step in self.whole | self.perhaps
        assert not self.whole or self.step >= max(self.whole)
        assert {int(entry.path.name[5:]) for entry in passed_over} <= self.damaged | self.perhaps
        assert {step for step in self.damaged if step > self.step} <= {int(e.path.name[5:]) for e in passed_over}

    def _start_elsewhere(self) -> None:
        self.out = self.out.with_name(self.out.name + "x")
        self.step, self.best, self.whole, self.perhaps, self.damaged = 0, 0, set(), set(), set()

    @invariant()
    def what_has_to_be_there_is_there(self) -> None:
        for step in self.whole:
            assert loaded(self.path(step), self.rows) == step
        for step in self.damaged:
            assert list(self.root.glob(f"{checkpoint.name(step)}*")), step
        for step in {self.best, *(best_of(self.path(step)) for step in self.whole)} - {0}:
            assert (run_best.kept(self.out, step) / "model").read_text() == f"{step}"

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def best_of(path: Path) -> int:
    return int(checkpoint.notes(path)["memory"]["best"]["step"])


def same_json(one: bytes, other: bytes | None) -> bool:
    return other is not None and json.loads(one) == json.loads(other)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
