"""Documents from wherever text lies: files, folders, globs, JSONL, the standard library's own source.

A *source* is a comma-separated list of

    file        any UTF-8 text is one document; a `.jsonl` file holds one document a line
    folder      every file below it, sorted by path; names that start with a dot are passed over
    glob        `books/*.md`, `data/**/*.jsonl`: the files that match, sorted
    stdlib      the .py files of the running Python's standard library, without its tests (some 12 MB)

A document is the text exactly as it lies on disk, line ends included. Only a byte order mark at the very start of a
file is taken off: it tells the encoding and is no text. (U+FEFF anywhere else is kept.)

`documents` streams: it holds one document at a time. A plain file is *one* document however large it is, and needs
some two to five times its size in memory while it is read; text beyond that belongs into JSONL or several files.

Two tables are the places for more formats: `READERS` (how a file is read, by its suffix) and `ROWS` (how a JSON object
becomes text, by a field that it has).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from functional_lm.errors import DataError, UsageError

STDLIB = "stdlib"
STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"})


def documents(source: str) -> Iterator[str]:
    """The documents of `source`, in order, one in memory at a time; empty ones are passed over.

    The source is looked up at once, so that a missing file is refused before any work begins; contents are read as
    the iterator advances. Raises UsageError for a source that says nothing, DataError for one that is not there or
    cannot be read as text (naming file, line and byte).
    """
    return _read_all(files(source), source)


def files(source: str) -> list[Path]:
    """The files that `source` names, in the order in which they are read. Raises as `documents` does."""
    if not source.strip():
        raise UsageError("the data source is empty; name a file, a folder, a glob or 'stdlib'")
    whole = os.path.exists(os.path.expanduser(source))  # a file may have a comma in its name
    items = [source] if whole else [item.strip() for item in source.split(",")]
    if not all(items):
        raise UsageError(f"the data source {source!r} has an empty entry; remove the extra comma")
    return [path for item in items for path in _files_of(item)]


def size(source: str) -> int:
    """Bytes of the files of `source`: what a progress bar counts towards."""
    return sum(path.stat().st_size for path in files(source))


def fingerprint(source: str) -> str:
    """sha256 over path, size and modification time of every file: equal as long as none of them changed."""
    digest = hashlib.sha256()
    for path in files(source):
        status = path.stat()
        digest.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


# Finding files --------------------------------------------------------------------------------------------------


def _files_of(item: str) -> list[Path]:
    if item == STDLIB:
        return _stdlib()
    path = os.path.expanduser(item)
    if os.path.isdir(path):
        found = _walk(Path(path))
    elif os.path.isfile(path):
        if os.path.getsize(path) == 0:
            raise DataError(f"{item} is empty; a data file must hold text")
        found = [Path(path)]
    elif glob.has_magic(item):
        found = sorted(Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    else:
        raise DataError(f"no file or folder {item!r}; check the path, or use 'stdlib' for Python's own source")
    if not found:
        raise DataError(f"no file matches {item!r}; check the path")
    return found


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=Path.as_posix)


def _stdlib() -> list[Path]:
    """Sorted by path. A few files are in other encodings on purpose (they test the tokenizer of Python); skipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in _walk(root, STDLIB_SKIPPED) if path.suffix == ".py" and _is_utf8(path)]
    if not found:
        raise DataError(f"no Python source in {root}; this Python came without its library's source")
    return found


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


# Reading files --------------------------------------------------------------------------------------------------


def _read_all(paths: list[Path], source: str) -> Iterator[str]:
    none = True
    for path in paths:
        reader = READERS.get(path.suffix.lower(), _read_text)
        try:
            for document in reader(path):
                if document:
                    none = False
                    yield document
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if none:
        raise DataError(f"no text in {source!r}: {len(paths)} files, all empty")


def _decode(raw: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 to text. `where` and `offset` (of `raw` in its file) go into the error."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, or leave it out with a glob"
        ) from None


def _read_text(path: Path) -> Iterator[str]:
    yield _text(path)  # from a function, so that the bytes are gone while the text is worked on


def _text(path: Path) -> str:
    raw = path.read_bytes()
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    return _decode(raw[mark:] if mark else raw, str(path), mark)


def _read_json_lines(path: Path) -> Iterator[str]:
    offset = 0
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            where = f"{path}, line {number}"
            line = _decode(raw[mark:], where, offset + mark)
            offset += len(raw)
            if line.strip():
                yield _row_text(_row(line, where), where)


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".jsonl": _read_json_lines}


# Rows: one JSON object to one document ----------------------------------------------------------------------------


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object was expected, not {type(row).__name__}")
    return row


def _row_text(row: dict[str, Any], where: str) -> str:
    for field, read in ROWS.items():
        if field in row:
            try:
                text = read(row)
                text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: field {field!r} is not text ({error})") from None
            return text
    raise DataError(f"{where}: no field {' or '.join(map(repr, ROWS))} among {sorted(row)}")


def _field(name: str) -> Callable[[dict[str, Any]], str]:
    def read(row: dict[str, Any]) -> str:
        if not isinstance(row[name], str):
            raise TypeError(f"it is {type(row[name]).__name__}")
        return row[name]

    return read


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {"text": _field("text"), "content": _field("content")}
