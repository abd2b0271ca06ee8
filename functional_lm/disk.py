"""Whatever changes the disk, one function for each kind of operation, and a place where a test can stand in the way.

Everything in the package that creates, writes, syncs, renames or removes a file or folder does it here (a test walks
the syntax trees). `watched_by` hands each operation to a guard before it is done: a guard counts them, lets number k
fail as a full or broken disk does, or does nothing any more, as a process that was killed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast


class Operation(NamedTuple):
    """One change, not made yet."""

    kind: str  # "create", "write", "sync", "rename", "unlink", "truncate", "mkdir" or "rmdir"
    path: Path
    act: Callable[[float], Any]  # makes it; a write writes this share of its bytes, the others are indivisible
    source: Path | None = None  # of a rename, which makes it `path`


Guard = Callable[[Operation], Any]
_GUARDS: list[Guard] = []
_HASHED = threading.local()  # .digests, while a thread hashes what it writes
_NEVER_MADE: list[Path] = []

LARGE, PAGE = 1 << 20, 4096  # bytes
GONE = "the run folder is gone"


@contextmanager
def watched_by(guard: Guard) -> Iterator[None]:
    """Hand every operation of this process, of all its threads, to `guard`; it returns what `act` does, or raises."""
    _GUARDS.append(guard)
    try:
        yield
    finally:
        _GUARDS.remove(guard)


def _do(kind: str, path: str | os.PathLike[str], act: Callable[[float], Any], source: Path | None = None) -> Any:
    """Make the change. An error that does not say which file it is about is told."""
    try:
        return _GUARDS[-1](Operation(kind, Path(path), act, source)) if _GUARDS else act(1.0)
    except OSError as error:
        if error.errno is not None:
            error.filename = re.sub(r"\.tmp-(old-)?\d+-", "", str(error.filename or path))  # the name it was to get
        raise


# Files ----------------------------------------------------------------------------------------------------------------


class _File(io.FileIO):
    """A file without a buffer: each write is one operation, and what it returned from is with the system."""

    digest: Any = None  # of what was to be written, where it is wanted

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self.digest is not None:
            self.digest.update(view)
        _do("write", cast(str, self.name), lambda share: self._all(view[: int(share * len(view))]))
        return len(view)

    def close(self) -> None:
        if self.digest is not None and not self.closed and _digests() is not None:
            _digests()[Path(str(self.name))] = self.digest.hexdigest()
        super().close()

    def _all(self, view: memoryview) -> None:
        if len(view) >= LARGE and hasattr(os, "O_DIRECT"):
            view = self._directly(view)
        while view:
            view = view[super().write(view) or 0 :]

    def _directly(self, view: memoryview) -> memoryview:
        """Write the whole pages of what is large past the system's cache, which costs a processor more than the disk.

        Returns what is left: the last bytes, or all where the file system knows no such thing.
        """
        import fcntl

        head = -self.tell() % PAGE
        while head:
            written = super().write(view[:head]) or 0
            view, head = view[written:], head - written
        flags = fcntl.fcntl(self.fileno(), fcntl.F_GETFL)
        try:
            with mmap.mmap(-1, LARGE) as room:  # begins at a page, as such writes have to
                fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT)
                while len(view) >= PAGE:
                    size = min(LARGE, len(view) // PAGE * PAGE)
                    room[:size] = view[:size]
                    with memoryview(room) as whole:
                        written = super().write(whole[:size]) or 0
                    view = view[written:]
                    if written % PAGE:
                        break
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags)
        return view

    def truncate(self, size: int | None = None, /) -> int:
        cut, self.digest = super().truncate, None
        return int(_do("truncate", cast(str, self.name), lambda share: cut(size)))


@contextmanager
def hashed() -> Iterator[dict[Path, str]]:
    """The sha256 of every file that this thread writes from its beginning while the block lasts, by name.

    It is that of what was to be written: what the disk made of it is not read.
    """
    before, _HASHED.digests = _digests(), {}
    try:
        yield _HASHED.digests
    finally:
        _HASHED.digests = before


def _digests() -> Any:
    return getattr(_HASHED, "digests", None)


def create(path: Path, mode: str = "wb") -> IO[Any]:
    """A file to write, as `open` gives it; text is UTF-8 with `\\n`."""
    plain = mode.replace("b", "").replace("t", "")
    file: _File = _do("create", path, lambda share: _File(str(path), plain))
    if _digests() is not None and plain == "w":
        file.digest = hashlib.sha256()
    if "b" in mode:
        return cast("IO[Any]", file)
    return io.TextIOWrapper(cast("Any", file), encoding="utf-8", newline="\n", write_through=True)


def reading(path: Path, past_cache: bool) -> io.FileIO:
    """A file to read, without a buffer; past the system's cache, if asked and where that can be."""

    def opened(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | (os.O_DIRECT if past_cache else 0))
        except (AttributeError, OSError):  # no such system, no such file system, or no such file
            return os.open(name, flags)

    return io.FileIO(str(path), "r", opener=opened)


def sync_file(file: IO[Any]) -> None:
    """What was written to an open file is on the disk when this returns."""
    file.flush()
    _do("sync", file.name, lambda share: os.fsync(file.fileno()))


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open a folder
        return
    try:
        _do("sync", path, lambda share: os.fsync(descriptor))
    finally:
        os.close(descriptor)


def write_foreign(path: Path, write: Callable[[Path], None]) -> None:
    """For libraries that insist on a path: all that `write(path)` does is one write."""

    def act(share: float) -> None:
        write(path)
        if share < 1:
            os.truncate(path, int(share * path.stat().st_size))

    _do("write", path, act)


# Names ----------------------------------------------------------------------------------------------------------------


def rename(source: Path, target: Path) -> None:
    """Atomic; a file at `target` is replaced, and so is an empty folder."""
    _do("rename", target, lambda share: os.replace(source, target), source)
    digests = _digests()
    if digests is not None:
        digests.pop(target, None)
        if source in digests:
            digests[target] = digests.pop(source)


@contextmanager
def never_made(path: Path) -> Iterator[None]:
    """As long as the block lasts no thread makes this folder of a run: if it vanishes on the way, it is gone."""
    _NEVER_MADE.append(path)
    try:
        yield
    finally:
        _NEVER_MADE.remove(path)


def gone(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a run (`never_made`) that this path lies in, if it has vanished."""
    above = {Path(path), *Path(path).parents}
    return next((folder for folder in _NEVER_MADE if folder in above and not folder.is_dir()), None)


def make_folder(path: Path) -> None:
    """The folder, with those above it; nothing if it is there."""
    if path.is_dir():
        return
    if path in _NEVER_MADE:
        raise FileNotFoundError(errno.ENOENT, GONE, str(path))
    if path.parent != path:
        make_folder(path.parent)
    _do("mkdir", path, lambda share: path.mkdir(exist_ok=True))


def remove_empty(path: Path) -> None:
    """A folder with nothing in it. Raises OSError for another one."""
    _do("rmdir", path, lambda share: path.rmdir())


def remove(path: Path) -> None:
    """A file, or a folder with everything in it, if it is there; a link and not what it points to."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove(entry)
        remove_empty(path)
    elif path.exists() or path.is_symlink():
        _do("unlink", path, lambda share: path.unlink(missing_ok=True))
