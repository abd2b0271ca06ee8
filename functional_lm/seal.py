"""Sealed folders: a JSON of notes that knows the length and sha256 of every file beside it, and its own.

Safetensors notices a file that was cut off and not one in which a bit has flipped or whose tail is zeros; a seal
notices all of them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_lm import disk, files
from functional_lm.errors import DataError

CHUNK = 1 << 20
OWN = "sha256"  # of the notes themselves, all else in canonical JSON


class LaterFormat(DataError):
    """Whole, but of a later version of this program."""


def seal(
    folder: Path, name: str, format: int, notes: Mapping[str, Any], digests: Mapping[Path, str] | None = None
) -> None:
    """Write `name` into a folder that is otherwise complete. Files that are not in `digests` are read."""
    entries = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != name)
    known = digests or {}
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": known.get(path) or sha256(path)}
        for path in entries
    }
    whole = {"format": format, **notes, "files": listed}
    files.write_json(folder / name, {**whole, OWN: own(whole)})


def read(folder: Path, name: str, format: int) -> dict[str, Any]:
    """The notes, as they were written; the other files are not looked at. Raises DataError, naming what is wrong."""
    path = folder / name
    try:
        notes = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{folder}: {name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder}: {name} is damaged (it is no JSON)") from error
    if not isinstance(notes, dict) or not {"format", "files"} <= notes.keys():
        raise DataError(f"{folder}: {name} is damaged (it holds something else)")
    intact = notes.pop(OWN, None) == own(notes)
    if notes["format"] != format:
        later = intact and isinstance(notes["format"], int) and notes["format"] > format
        kind, remedy = (LaterFormat, "; use the version that wrote it") if later else (DataError, "")
        raise kind(f"{folder}: {name} has format {notes['format']!r}; this version reads {format}{remedy}")
    if not intact or not _is_list(notes["files"]):
        raise DataError(f"{folder}: {name} is damaged (its sha256 is another)")
    return notes


def _is_list(entries: Any) -> bool:
    """Whether it is what `seal` writes: names below the folder, with length and sha256."""
    return isinstance(entries, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and not (Path(name).is_absolute() or ".." in Path(name).parts)
        for name, entry in entries.items()
    )


def verified(folder: Path, name: str, format: int) -> dict[str, Any]:
    """The notes of a folder of which every file is what it was. Raises DataError, naming the first that is not."""
    notes = read(folder, name, format)
    for entry, expected in notes["files"].items():
        path = folder / entry
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise DataError(f"{folder}: {entry} has {size} bytes, not {expected['bytes']}")
            if sha256(path) != expected["sha256"]:
                raise DataError(f"{folder}: {entry} is damaged (its sha256 is another)")
        except OSError as error:
            raise DataError(f"{folder}: {entry} cannot be read ({error.strerror})") from error
    return notes


def reason(folder: Path, name: str, format: int) -> str | None:
    """Why a sealed folder cannot be used, beginning with its path; None if it can. Raises LaterFormat."""
    try:
        verified(folder, name, format)
    except LaterFormat:
        raise
    except DataError as error:
        return str(error)
    return None


def stamp(folder: Path) -> tuple[tuple[str | int, ...], ...]:
    """Names, lengths and times of a folder's files: as long as they stay, nobody has written to it.

    `st_ctime` notices who sets a file's time back behind the write, as copying programs do.
    """
    entries = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = ((path.relative_to(folder).as_posix(), path.stat()) for path in entries)
    return tuple((name, fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns) for name, fact in facts)


def sha256(path: Path) -> str:
    """Of what lies on the disk: large files are read past the cache, as `disk` writes them, where that can be."""
    digest = hashlib.sha256()
    with (
        disk.reading(path, past_cache=path.stat().st_size >= CHUNK) as file,
        mmap.mmap(-1, CHUNK) as room,
        memoryview(room) as whole,
    ):
        while size := file.readinto(whole):
            digest.update(whole[:size])
    return digest.hexdigest()


def own(notes: Mapping[str, Any]) -> str:
    """What tells notes that a fault of the disk has changed from those that were written."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
