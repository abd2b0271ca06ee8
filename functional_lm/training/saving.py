"""Saving while training goes on: one thread, and at most one copy of a state.

The copy is made before the next step writes into the state's buffers. Writing, syncing and hashing happen in the
thread; the next save waits for it. The copy's memory is kept for the next one: fresh memory has to be had from the
system page by page, which takes longer than to fill it, and to give it back costs the steps theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_lm import seal, tree
from functional_lm.errors import DataError
from functional_lm.training.step import TrainState

Write = Callable[[TrainState, Mapping[str, Any]], None]


class Saver:
    """`save` returns when the state is copied; what goes wrong afterwards is raised by the next call of a method."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._room: list[Tensor] = []  # where copies go

    def save(self, state: TrainState, memory: Mapping[str, Any]) -> None:
        """Copy the state and have it written. Raises the error of the save before, and then saves nothing."""
        self.also(state, lambda copy: self._write(copy, memory))

    def also(self, values: Any, write: Callable[[Any], None]) -> None:
        """Copy a tree and have `write(copy)` called. Raises the error of the save before, and then saves nothing."""
        self.wait()
        copy = self._copied(values)
        # A daemon: a second Ctrl-C ends the process at once, and what is half-written has a temporary name.
        self._thread = threading.Thread(target=self._run, args=(copy, write), daemon=True, name="saver")
        self._thread.start()

    def _copied(self, values: Any) -> Any:
        """The tree in memory of its own on the CPU; only what has no place there yet gets a new one."""
        spare = list(self._room)

        def place(leaf: Tensor) -> Tensor:
            for number, room in enumerate(spare):
                if room.shape == leaf.shape and room.dtype == leaf.dtype:
                    return spare.pop(number)
            self._room.append(torch.empty(leaf.shape, dtype=leaf.dtype))
            return self._room[-1]

        return tree.map(lambda leaf: place(leaf).copy_(leaf.detach()), values)

    def _run(self, copy: Any, write: Callable[[Any], None]) -> None:
        try:
            write(copy)
        except BaseException as error:
            self._error = error

    def busy(self) -> bool:
        """Whether something is being saved."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a save that has ended with one; wait for none."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being saved. Raises the error of what was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


class Verified:
    """Which checkpoints are whole, each read once as long as nobody writes to it.

    What a disk loses unseen, without a write, is not noticed before the next process reads it: until then such a
    checkpoint counts and may keep an older one from being kept. It never costs the last whole one, because a run prunes
    only behind a save, and what was synced just then is kept; a disk that loses that within the moment is not guarded
    against, since to read every checkpoint back is a second digest of every byte.
    """

    def __init__(self, reason: Callable[[Path], str | None]) -> None:
        self._reason = reason
        self._known: dict[Path, Any] = {}

    def add(self, path: Path) -> None:
        """Known to be whole: it was written just now."""
        self._known[path] = seal.stamp(path)

    def __call__(self, path: Path) -> bool:
        try:
            if self._known.get(path) == seal.stamp(path):
                return True
            if self._reason(path) is None:
                self.add(path)
                return True
        except (OSError, DataError):  # DataError: of a later version, which is not ours to count or to remove
            pass
        return False
