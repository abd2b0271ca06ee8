"""Disks that fail: guards for `disk.watched_by` that let some operations pass and then break, each in its own way."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from functional_lm.disk import Operation

CODES = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}
DENIED = {"denied": errno.EACCES}  # of a place that belongs to somebody else, from the first operation on
# crash: the process is killed before the operation, and does nothing any more. power: the machine loses its power, and
# with it whatever was written and not synced. torn: killed in the middle of a write. full, broken, read-only: errors,
# once or (a full disk) as long as bytes are written.
KINDS = ("crash", "power", "torn", *CODES)


class Killed(BaseException):
    """The process is not there any more; what runs afterwards in this one must change nothing."""


class Failing:
    """Lets `passing` operations pass; what comes next fails as `kind` says. None: counts them and lets all pass."""

    def __init__(self, kind: str | None = None, passing: int = 0) -> None:
        self.kind, self.passing = kind, passing
        self.done: list[tuple[str, Path]] = []
        self.failed = self.dead = False
        self.unsynced: dict[Path, int] = {}  # how much of a file is on the disk for certain, where not all of it is
        self._lock = threading.Lock()

    def __call__(self, operation: Operation) -> Any:
        with self._lock:
            return self._handle(operation)

    def _handle(self, operation: Operation) -> Any:
        if self.dead:
            raise Killed
        if self.kind is not None and len(self.done) >= self.passing and self._fails(operation):
            self.failed = True
            return self._fail(operation)
        self.done.append((operation.kind, operation.path))
        result = operation.act(1.0)
        self._note(operation)
        return result

    def _fails(self, operation: Operation) -> bool:
        """A full disk refuses bytes and nothing else; a denied place refuses all; other errors come once."""
        if self.kind == "full":
            return operation.kind in ("write", "mkdir", "create", "sync")
        return not self.failed or self.kind in DENIED

    def _fail(self, operation: Operation) -> Any:
        if self.kind in DENIED:
            raise OSError(DENIED[self.kind], os.strerror(DENIED[self.kind]), str(operation.path))
        if self.kind in CODES:
            if self.kind == "full" and operation.kind == "write":
                operation.act(0.3)
            raise OSError(CODES[self.kind], os.strerror(CODES[self.kind]), str(operation.path))
        self.dead = True
        if self.kind == "torn" and operation.kind == "write":
            operation.act(0.5)
        if self.kind == "power":
            for path, synced in self.unsynced.items():
                if path.is_file():
                    lost(path, synced)
        raise Killed

    def _note(self, operation: Operation) -> None:
        """What was there before, or is synced, stays; `create` for more lines leaves those that there are."""
        path = operation.path
        if operation.kind == "create":
            self.unsynced[path] = path.stat().st_size
        elif operation.kind == "write":
            self.unsynced.setdefault(path, 0)
        elif operation.kind == "truncate" and path in self.unsynced:
            self.unsynced[path] = min(self.unsynced[path], path.stat().st_size)
        elif operation.kind == "sync":
            if path in self.unsynced and path.is_file():
                self.unsynced[path] = path.stat().st_size
        elif operation.kind == "unlink":
            self.unsynced.pop(path, None)
        elif operation.source is not None:
            self.unsynced.pop(path, None)
            for old in [old for old in self.unsynced if old.is_relative_to(operation.source)]:
                self.unsynced[path / old.relative_to(operation.source)] = self.unsynced.pop(old)


def lost(path: Path, synced: int = 0) -> None:
    """What a power cut leaves of bytes that were not synced: the length, perhaps, and zeros from a third of them on."""
    size = path.stat().st_size
    begin = synced + (size - synced) // 3
    if begin < size:
        with open(path, "r+b") as file:
            file.seek(begin)
            file.write(bytes(size - begin))


def operations(work: Callable[[], None]) -> list[tuple[str, Path]]:
    """What some work does to the disk."""
    from functional_lm import disk

    counting = Failing()
    with disk.watched_by(counting):
        work()
    return counting.done
