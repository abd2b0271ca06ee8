"""The one way to the disk for everything that must survive a crash.

A file or folder appears under its final name only when it is whole: it is written beside its place, synced and
renamed. The rename replaces atomically; the parent folder is synced so that the new name survives a power cut. Every
single operation is one of `disk.py`, where a test can make it fail.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from functional_lm import disk, pickles
from functional_lm.disk import make_folder, remove, sync
from functional_lm.errors import DataError, UsageError

__all__ = [
    "append",
    "beside",
    "discard",
    "locked",
    "make_folder",
    "parse_json",
    "read_json",
    "refuse_existing",
    "remove",
]
__all__ += ["replace", "safetensors_header", "sweep", "sweep_beside", "sync", "write_json", "write_text", "write_with"]
__all__ += ["writing", "writing_folder"]

TEMPORARY, UNFINISHED = ".tmp-", ".part-"
BYTE_ORDERS: tuple[Literal["little"], Literal["big"]] = ("little", "big")
LEFT_OVER = re.compile(re.escape(TEMPORARY) + r"(?P<old>old-)?(?P<process>\d+)-(?P<name>.+)", re.DOTALL)


def beside(path: Path) -> Path:
    """The temporary name under which `path` is written; a process has its own."""
    return path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"


def replace(source: Path, target: Path) -> None:
    disk.rename(source, target)
    sync(target.parent)


def discard(path: Path) -> None:
    """Remove a folder at once, as far as its name goes: a crash on the way leaves no half of it that looks whole."""
    doomed = beside(path)
    remove(doomed)
    disk.rename(path, doomed)
    try:
        remove(doomed)
    except BaseException:
        _tidy(doomed)
        raise
    sync(path.parent)


def sweep(folder: Path) -> None:
    """Remove what a crash left half-written anywhere in a folder that nobody else writes to.

    A folder that was about to be replaced, and has not been, gets its name back.
    """
    _sweep(folder.rglob(f"{TEMPORARY}*"), lambda match: True)


def sweep_beside(path: Path) -> None:
    """The same for what processes that are gone left of `path` alone; where the disk does not let it go, it stays."""
    with suppress(OSError):
        _sweep(
            path.parent.glob(f"{TEMPORARY}*"),
            lambda match: match["name"] == path.name and not _lives(int(match["process"])),
        )


def _sweep(found: Iterable[Path], meant: Callable[[re.Match[str]], bool]) -> None:
    for path in sorted(found, reverse=True):  # "old-" before the rest
        match = LEFT_OVER.fullmatch(path.name)
        if match is None or not meant(match) or not path.exists():
            continue
        if match["old"] and not (path.parent / match["name"]).exists():
            replace(path, path.parent / match["name"])
        else:
            remove(path)


def _lives(process: int) -> bool:
    """Whether another process of this machine has the number; this one, which has come here again, does not count."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where to ask is to end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _begun(path: Path) -> Path:
    """The temporary name under which `path` is about to be written, in a folder that is there."""
    make_folder(path.parent)
    sweep_beside(path)
    return beside(path)


@contextmanager
def writing(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it is synced and takes its name, on failure it is removed."""
    path = Path(path)
    temporary = _begun(path)
    try:
        with disk.create(temporary, mode) as file:
            yield file
            disk.sync_file(file)
        replace(temporary, path)
    except BaseException:
        _tidy(temporary)
        raise


def _tidy(path: Path) -> None:
    """Remove what a failure leaves; if the disk does not even let it, the failure itself is what is told."""
    with suppress(OSError):
        remove(path)


def refuse_existing(out: str | Path) -> None:
    """Raise UsageError unless there is nothing at `out`, or an empty folder."""
    out = Path(out)
    sweep_beside(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists; remove it or choose another place")


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are synced and it takes the name.

    An existing folder of that name is replaced. Between the two renames of a replacement the old one lies under a
    temporary name, never nowhere.
    """
    path = Path(path)
    temporary, old = _begun(path), path.parent / f"{TEMPORARY}old-{os.getpid()}-{path.name}"
    remove(temporary)
    try:
        make_folder(temporary)
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            sync(entry)
        sync(temporary)
        if path.exists():
            disk.rename(path, old)
        replace(temporary, path)
        remove(old)
    except BaseException:
        _tidy(temporary)
        with suppress(OSError):
            if old.exists() and not path.exists():
                disk.rename(old, path)
            remove(old)
        raise


def write_with(path: str | Path, write: Callable[[Path], None]) -> None:
    """For libraries that insist on a path: `write(temporary)`, then sync and rename."""
    path = Path(path)
    temporary = _begun(path)
    try:
        disk.write_foreign(temporary, write)
        sync(temporary)
        replace(temporary, path)
    except BaseException:
        _tidy(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    with writing(path, "w") as file:
        file.write(text)


def append(path: str | Path, anew: bool = False) -> IO[Any]:
    """A file of lines to go on with, or to begin `anew`; what is written is with the system at once."""
    path = Path(path)
    make_folder(path.parent)
    return disk.create(path, "w" if anew else "a")


def grow(path: str | Path, text: str, length: int | None = None) -> int:
    """Add to a file that only grows, synced; returns its length. With `length` it is cut to so many bytes first."""
    path = Path(path)
    make_folder(path.parent)
    new = not path.exists()
    with disk.create(path, "ab") as file:
        if length is not None:
            file.truncate(length)
        file.write(text.encode())
        disk.sync_file(file)
        size = os.fstat(file.fileno()).st_size
    if new:
        sync(path.parent)
    return size


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON that every reader understands: NaN and Infinity are refused rather than invented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Raises OSError for a file that cannot be read, ValueError for one that is no JSON."""
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, lists in lists by the thousand included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def not_safetensors(path: str | Path, error: object = None) -> DataError:
    """What is said of a file that is no whole safetensors file."""
    if _swapped(Path(path)):
        return DataError(f"{path} has its bytes in the other order (big-endian; safetensors is little-endian); "
                         "write it again")  # fmt: skip
    why = "" if error is None else f" ({error})"
    return DataError(f"{path} is not a whole safetensors file{why}; write or copy it again")


def _swapped(path: Path) -> bool:
    """Whether a safetensors file would begin with its header's length if that were big-endian."""
    try:
        with open(path, "rb") as file:
            raw = file.read(8)
            little, big = (int.from_bytes(raw, order) for order in BYTE_ORDERS)
            whole = path.stat().st_size
            return len(raw) == 8 and big <= whole - 8 < little and isinstance(parse_json(file.read(big)), dict)
    except (OSError, ValueError):
        return False


def safetensors_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """`{name: {"dtype", "shape", "data_offsets"}}` of a safetensors file, without its tensors and without torch.

    The file begins with the header's length (8 bytes, little-endian) and the header as JSON. Raises DataError for a
    missing file, one that ends before its tensors do, and one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        pickles.refuse(path.parent)
        raise DataError(f"no file {path}")
    whole = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(length)) if length <= whole - 8 else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        intact = all(isinstance(entry["shape"], list) and "dtype" in entry for entry in tensors.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        intact, end = False, 0
    if not intact or 8 + length + end != whole:
        raise not_safetensors(path)
    return tensors


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file at `path`, which is gone afterwards. Raises DataError(refusal) where another process does."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=False, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(refusal) from None
    try:
        yield
    finally:
        _tidy(path)  # while it is held: whoever opened it meanwhile sees that it has lost its name
        lock.release()
