"""Documents from wherever text lies: files, folders, globs, web addresses, the standard library's own source.

A *source* is a comma-separated list of

    file        by its suffix: `.jsonl` one row a line, `.json` a list of rows, `.parquet` rows, `.bin` a dataset that
                the same tokenizer made; any other is one document of UTF-8 text. `.gz` or `.zst` may follow
    folder      every file below it, sorted by path; names that start with a dot are passed over
    glob        `books/*.md`, `data/**/*.jsonl`: the files that match, sorted
    http(s)://  a file in the web, downloaded once (`download.py`)
    stdlib      the .py files of the running Python's standard library, without its tests (some 12 MB)

and each may end in `=WEIGHT`: how often training sees its documents, relative to once. Of `=0.25` it sees a quarter
of the documents (always the same ones, chosen by their contents), of `=2` all of them twice in an epoch.

A text is read exactly as it lies on disk, line ends included. Only a byte order mark at the very start of a file is
taken off: it tells the encoding and is no text. (U+FEFF anywhere else is kept.) How files are read is in `readers.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from functional_lm.errors import DataError, UsageError
from functional_lm.text import document, download, readers
from functional_lm.text.document import Document
from functional_lm.text.download import Downloads

STDLIB = "stdlib"
STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf|infinity|nan)"
WEIGHTED = re.compile(rf"(.+)=({NUMBER})", re.DOTALL | re.IGNORECASE)
HEAVIEST = 1000


class Part(NamedTuple):
    """A file of a source, and how often its documents are seen (`selection.copies`)."""

    path: Path
    weight: float


@dataclass(frozen=True)
class Corpus:
    """A source that has been looked up: its files, in the order in which they are read."""

    source: str
    parts: tuple[Part, ...]

    @property
    def files(self) -> list[Path]:
        return [path for path, _ in self.parts]

    @property
    def size(self) -> int:
        """Bytes of all files: what a progress bar counts towards."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def fingerprint(self) -> str:
        """sha256 over path, size, modification time and weight of every file: equal as long as none changed."""
        found = hashlib.sha256()
        for path, weight in self.parts:
            status = path.stat()
            found.update(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, weight]).encode())
        return found.hexdigest()


def find(source: str | Corpus, downloads: Downloads = download.USUAL) -> Corpus:
    """Look a source up, so that a missing file is refused before any work begins; addresses are downloaded.

    Raises UsageError for a source that says nothing, DataError for one that is not there or cannot be read.
    """
    if isinstance(source, Corpus):
        return source
    if not source.strip():
        raise UsageError("the data source is empty; name a file, a folder, a glob, an address or 'stdlib'")
    items = [source] if _exists(source) else [item.strip() for item in source.split(",")]
    if not all(items):
        raise UsageError(f"the data source {source!r} has an empty entry; remove the extra comma")
    weighted = [_weighted(item) for item in items]
    parts = [Part(path, weight) for item, weight in weighted for path in _files_of(item, downloads)]
    for path, _ in parts:
        readers.check(path)
    return Corpus(source, tuple(parts))


def documents(source: str | Corpus) -> Iterator[Document]:
    """The documents of a source, in order, each once; empty ones are passed over.

    The source is looked up at once; contents are read as the iterator advances, and memory holds one document (of a
    long text one segment). Raises as `find` does, and DataError for what cannot be read as text, naming file and line.
    """
    return (entry.document for entry in entries(find(source)))


def texts(source: str | Corpus) -> Iterator[str]:
    """All text of a source, without special tokens, in segments: what a tokenizer is trained on."""
    return document.text_of(documents(source))


class Place(NamedTuple):
    """How far reading has come: files done, and rows of the next one."""

    file: int = 0
    row: int = 0


class Entry(NamedTuple):
    """A document, how often training sees it, where reading stands behind it, and the bytes read before and then."""

    document: Document
    weight: float
    place: Place
    start: int
    end: int


def entries(corpus: Corpus, place: Place = Place()) -> Iterator[Entry]:  # noqa: B008 (a constant)
    """The documents of a corpus from a place on, with what belongs to them."""
    none, base = place == Place(), sum(path.stat().st_size for path in corpus.files[: place.file])
    for number, (path, weight) in list(enumerate(corpus.parts))[place.file :]:
        row, start = place.row if number == place.file else 0, base
        for found, end in readers.read(path, row):
            row += 1
            if any(found):
                none = False
                share = weight * document.repeats(found)
                yield Entry(found, share, Place(number, row), start, base + end)
            start = base + end
        base += path.stat().st_size
    if none:
        many = "its one file is" if len(corpus.parts) == 1 else f"all of its {len(corpus.parts)} files are"
        raise DataError(f"no text in {corpus.source!r}: {many} empty; a source must hold text")


# Finding files --------------------------------------------------------------------------------------------------


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _weighted(item: str) -> tuple[str, float]:
    """An item and its weight, 1 if it says none. Raises UsageError for a weight that is none."""
    match = WEIGHTED.fullmatch(item)
    # The last `key=1` of an address's query, and its checksum, belong to the address.
    inside = download.is_address(item) and re.split("[?&#]", item)[-1].count("=") == 1 and re.search("[?#]", item)
    if not match or inside or _exists(item):
        return item, 1.0
    weight = float(match[2])
    if not 0 < weight <= HEAVIEST:  # NaN is not either
        raise UsageError(f"{item!r} has the weight {match[2]}; it has to be above 0 and at most {HEAVIEST}")
    return match[1].strip(), weight


def _files_of(item: str, downloads: Downloads) -> list[Path]:
    if item == STDLIB:
        return _stdlib()
    if download.is_address(item):
        return [download.fetch(item, downloads)]
    path = os.path.expanduser(item)
    if os.path.isdir(path):
        found = _without_companions(_walk(Path(path)))
    elif readers.is_dataset(Path(path)):
        found = [Path(path)]  # `check` looks for both of its files
    elif os.path.isfile(path):
        if os.path.getsize(path) == 0:
            raise DataError(f"{item} is empty; a data file must hold text")
        found = [Path(path)]
    elif glob.has_magic(item):
        matches = sorted(Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        found = _without_companions(matches)
    else:
        raise DataError(f"no file or folder {item!r}; check the path, or use 'stdlib' for Python's own source")
    if not found:
        raise DataError(f"no file matches {item!r}; check the path")
    return found


def _without_companions(paths: list[Path]) -> list[Path]:
    """Without the files that belong to a dataset: NAME.index and NAME.json beside NAME.bin."""

    def belongs(path: Path) -> bool:
        pair = path.with_suffix(".bin"), path.with_suffix(".index")
        return path.suffix in (".index", ".json") and all(other.is_file() for other in pair)

    return [path for path in paths if not belongs(path)]


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
