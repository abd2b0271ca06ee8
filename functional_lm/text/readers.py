"""How a file becomes documents: by its suffix, after `.gz` or `.zst` was unpacked.

Tables are the places for more formats: `PACKED` in `compression.py` (by the last suffix), `READERS` (by the suffix
before it; any other is plain text) and, in `rows.py`, `ROWS` (how a row becomes a document).

A reader yields one document for each row, empty ones too, so that `skip` rows can be passed over without work when an
interrupted run goes on. It holds one row in memory (of Parquet a few hundred), of a text file one segment.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from functional_lm.errors import DataError, json_kind
from functional_lm.text import json_list, storage
from functional_lm.text import rows as rows_of
from functional_lm.text.compression import PACKED, unpacked
from functional_lm.text.document import Document, Encoded

SEGMENT_BYTES = 1 << 20  # a longer text is read in several segments
SEGMENT_TOKENS = 1 << 20
PARQUET_ROWS = 256
NEEDS = {".parquet": "pyarrow", ".zst": "zstandard"}  # packages of the extra `data`, by suffix


class Opened(NamedTuple):
    """A file that is being read."""

    path: Path
    raw: IO[bytes]  # the file itself; its place tells how far reading has come
    stream: IO[bytes]  # its contents, unpacked


def read(path: Path, skip: int = 0) -> Iterator[tuple[Document, int]]:
    """The documents of a file behind the first `skip` rows, each with the bytes of the file that are read by then.

    Raises DataError naming the file, and the line or row, for what is damaged, cut off or no text.
    """
    reader = READERS.get(_suffixes(path)[0], _read_text)
    with _explained(path), open(path, "rb") as raw, unpacked(_suffixes(path)[1], raw) as stream:
        for document in reader(Opened(path, raw, stream), skip):
            yield document, raw.tell()


def rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a JSON, JSONL or Parquet file as they are, each with its place in words.

    Of a Parquet file it reads the columns that `rows.ROWS` knows. Raises DataError for a file of another kind, and as
    `read` does.
    """

    def whole(row: Any, where: str) -> Any:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON object was expected, not {json_kind(row)}")
        return row, where

    reader = ROW_READERS.get(_suffixes(path)[0])
    if reader is None:
        raise DataError(f"{path}: rows are read from {', '.join(ROW_READERS)}, not from {path.suffix or 'a text'}")
    with _explained(path), open(path, "rb") as raw, unpacked(_suffixes(path)[1], raw) as stream:
        yield from (found for found in reader(Opened(path, raw, stream), 0, whole) if found)


def check(path: Path) -> None:
    """Refuse early what cannot be read at all: a package that is not there, a dataset that is none."""
    for suffix in _suffixes(path):
        if suffix in NEEDS and importlib.util.find_spec(NEEDS[suffix]) is None:
            raise DataError(f"{path} needs the package {NEEDS[suffix]}; pip install 'functional_lm[data]'")
    if is_dataset(path):
        storage.open_dataset(path)


def is_dataset(path: Path) -> bool:
    """Whether a file holds tokens already, by its name."""
    return path.suffix == ".bin"


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix of the format and that of the compression, "" for none."""
    suffix, packed = path.suffix.lower(), ""
    if suffix in PACKED:
        suffix, packed = Path(path.stem).suffix.lower(), suffix
    return suffix, packed


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, as a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut off ({error}); get it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# Text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongText:
    """The text of a large file, read anew each time it is gone through."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with _explained(self.path), open(self.path, "rb") as raw, unpacked(_suffixes(self.path)[1], raw) as stream:
            yield from _segments(stream, str(self.path))


def _read_text(opened: Opened, skip: int) -> Iterator[Document]:
    if skip:
        return
    first = tuple(islice(_segments(opened.stream, str(opened.path)), 2))
    opened.raw.seek(0, os.SEEK_END)
    yield first if len(first) < 2 else LongText(opened.path)


def _segments(stream: IO[bytes], where: str) -> Iterator[str]:
    """Text in segments of some SEGMENT_BYTES, each but the last ending with a line; a longer line stays whole."""
    offset = held = 0
    waiting: list[bytes] = []
    while chunk := stream.read(SEGMENT_BYTES):
        if not offset and not waiting and chunk.startswith(codecs.BOM_UTF8):
            offset = len(codecs.BOM_UTF8)
            chunk = chunk[offset:]
        end = chunk.rfind(b"\n") + 1
        if end:
            raw = b"".join([*waiting, chunk[:end]])
            yield _decode(raw, where, offset)
            offset, waiting, held = offset + len(raw), [], 0
        if end < len(chunk):
            waiting.append(chunk[end:])
            held += len(chunk) - end
        if held > json_list.LONGEST:
            raise DataError(f"{where}: the line at byte {offset} {_too_long()}")
    if waiting:
        yield _decode(b"".join(waiting), where, offset)


def _too_long() -> str:
    return f"has more than {json_list.LONGEST} bytes; {json_list.SHORTER}"


def _decode(raw: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 to text. `where` and `offset` (of `raw` in its file) go into the error."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, or leave it out with a glob"
        ) from None


# Rows ---------------------------------------------------------------------------------------------------------------


Convert = Callable[[Any, str], Any]  # (row, its place in words)


def _read_json_lines(opened: Opened, skip: int, convert: Convert = rows_of.document) -> Iterator[Any]:
    offset = 0
    for number, raw in enumerate(iter(lambda: opened.stream.readline(json_list.LONGEST + 1), b""), 1):
        start, offset = offset, offset + len(raw)
        if len(raw) > json_list.LONGEST:
            raise DataError(f"{opened.path}, line {number} {_too_long()}")
        if number <= skip:
            continue
        mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
        where = f"{opened.path}, line {number}"
        line = _decode(raw[mark:], where, start + mark)
        yield convert(_parse(line, where), where) if line.strip() else ()


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def _read_json(opened: Opened, skip: int, convert: Convert = rows_of.document) -> Iterator[Any]:
    for number, row in enumerate(json_list.elements(opened.path, opened.stream), 1):
        yield convert(row, f"{opened.path}, row {number}") if number > skip else ()


def _read_parquet(opened: Opened, skip: int, convert: Convert = rows_of.document) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    if opened.stream is not opened.raw:
        raise DataError(f"{opened.path}: Parquet is compressed inside; unpack the file and give it as .parquet")
    try:
        file = parquet.ParquetFile(opened.raw, pre_buffer=False)
        fields = list(rows_of.fields_of(file.schema_arrow.names, str(opened.path)))
        for row, where in _parquet_rows(file, fields, skip, opened.path):
            yield convert(row, where)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{opened.path} is no Parquet file or damaged ({' '.join(str(error).split())})") from error


def _parquet_rows(file: Any, fields: list[str], skip: int, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows behind the first `skip`, with their places from 1; groups of rows before them are not read.

    Raises DataError for a row that is too long. In groups that could hold one, rows are read one by one.
    """
    first = 1
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        if first + about.num_rows - 1 > skip:
            at_once = PARQUET_ROWS if about.total_byte_size <= json_list.LONGEST else 1
            batches = file.iter_batches(at_once, [group], fields, use_threads=False)
            rows = chain.from_iterable(map(_parquet_batch, batches))
            for number, row in enumerate(rows, first):
                if row is None:
                    raise DataError(f"{path}, row {number} {_too_long()}")
                if number > skip:
                    yield row, f"{path}, row {number}"
        first += about.num_rows


def _parquet_batch(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Its rows; None for one that is too long."""
    if batch.nbytes <= json_list.LONGEST:
        yield from batch.to_pylist()
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        yield row.to_pylist()[0] if row.nbytes <= json_list.LONGEST else None


def _read_dataset(opened: Opened, skip: int) -> Iterator[Document]:
    data = storage.open_dataset(opened.path)
    for number in range(skip, data.documents):
        ids, copies = data.document(number), int(data.copies[number])
        storage.check_ids(data, ids, int(data.offsets[number]) + 1)
        opened.raw.seek(int(data.offsets[number + 1]) * storage.TOKEN.itemsize)
        yield tuple(
            Encoded(ids[start : start + SEGMENT_TOKENS], data.tokenizer_digest, str(opened.path), copies)
            for start in range(0, len(ids), SEGMENT_TOKENS)
        )


READERS: dict[str, Callable[[Opened, int], Iterator[Document]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".bin": _read_dataset,
}
ROW_READERS: dict[str, Callable[[Opened, int, Convert], Iterator[Any]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
