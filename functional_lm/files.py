"""The one door to the disk for everything that must survive a crash.

A file or folder appears under its final name only when it is whole: it is written beside its place, synced and
renamed. The rename replaces atomically; the parent folder is synced so that the new name survives a power cut.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".tmp-"


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    flags = os.O_RDONLY
    with suppress(PermissionError):  # Windows cannot open a folder
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def beside(path: Path) -> Path:
    """The temporary name under which `path` is written; a process has its own."""
    return path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it is synced and takes its name, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are synced and it takes the name.

    An existing folder of that name is replaced. Between the two renames of a replacement the old one lies under a
    temporary name, never nowhere.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = beside(path), path.parent / f"{TEMPORARY}old-{os.getpid()}-{path.name}"
    remove(temporary)
    try:
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            sync(entry)
        sync(temporary)
        if path.exists():
            os.replace(path, old)
        replace(temporary, path)
        remove(old)
    except BaseException:
        remove(temporary)
        if old.exists() and not path.exists():
            os.replace(old, path)
        remove(old)
        raise


def write_with(path: str | Path, write: Callable[[Path], None]) -> None:
    """For libraries that insist on a path: `write(temporary)`, then sync and rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        write(temporary)
        sync(temporary)
        replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    with writing(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON that every reader understands: NaN and Infinity are refused rather than invented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))
