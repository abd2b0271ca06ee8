"""How a file becomes documents: by its suffix, after `.gz` or `.zst` was unpacked.

Tables are the places for more formats: `PACKED` (compression, by the last suffix), `READERS` (by the suffix before
it; any other is plain text) and, in `rows.py`, `ROWS` (how a row becomes a document).

A reader yields one document for each row, empty ones too, so that `skip` rows can be passed over without work when an
interrupted run goes on. It holds one row in memory (of Parquet a few hundred), of a text file one segment.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from functional_lm.errors import DataError
from functional_lm.text import rows as rows_of
from functional_lm.text import storage
from functional_lm.text.document import Document, Encoded

SEGMENT_BYTES = 1 << 20  # a longer text is read in several segments
CHUNK_BYTES = 1 << 20
SEGMENT_TOKENS = 1 << 20
PARQUET_ROWS = 256
NEEDS = {".parquet": "pyarrow", ".zst": "zstandard"}  # packages of the extra `data`, by suffix


class Opened(NamedTuple):
    path: Path
    raw: IO[bytes]  # the file itself; its place tells how far reading has come
    stream: IO[bytes]  # its contents, unpacked


def read(path: Path, skip: int = 0) -> Iterator[tuple[Document, int]]:
    """The documents of a file behind the first `skip` rows, each with the bytes of the file that are read by then.

    Raises DataError naming the file, and the line or row, for what is damaged, cut off or no text.
    """
    reader = READERS.get(_suffixes(path)[0], _read_text)
    with _explained(path), open(path, "rb") as raw, _unpacked(path, raw) as stream:
        for document in reader(Opened(path, raw, stream), skip):
            yield document, raw.tell()


def rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a JSON, JSONL or Parquet file as they are, each with its place in words.

    Of a Parquet file it reads the columns that `rows.ROWS` knows. Raises DataError for a file of another kind, and as
    `read` does.
    """

    def whole(row: Any, where: str) -> Any:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON object was expected, not {type(row).__name__}")
        return row, where

    reader = ROW_READERS.get(_suffixes(path)[0])
    if reader is None:
        raise DataError(f"{path}: rows are read from {', '.join(ROW_READERS)}, not from {path.suffix or 'a text'}")
    with _explained(path), open(path, "rb") as raw, _unpacked(path, raw) as stream:
        yield from (found for found in reader(Opened(path, raw, stream), 0, whole) if found)


def check(path: Path) -> None:
    """Refuse early what cannot be read at all: a package that is not there, a dataset that is none."""
    for suffix in _suffixes(path):
        if suffix in NEEDS and importlib.util.find_spec(NEEDS[suffix]) is None:
            raise DataError(f"{path} needs the package {NEEDS[suffix]}; pip install 'functional_lm[data]'")
    if is_dataset(path):
        storage.open_dataset(path)


def is_dataset(path: Path) -> bool:
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


# Compression --------------------------------------------------------------------------------------------------------


def _unpacked(path: Path, raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return PACKED.get(_suffixes(path)[1], _as_it_is)(raw)


@contextmanager
def _as_it_is(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    yield raw  # and leave closing to who opened it


def _gzip(raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw))


def _zstd(raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return cast(IO[bytes], io.BufferedReader(_Zstd(raw), CHUNK_BYTES))


class _Zstd(io.RawIOBase):
    """Zstandard frames one after another; unlike the package's own reader it notices a frame that is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None  # the decompressor of the frame that has begun
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._raw.read(CHUNK_BYTES // 8)
            if self._frame is None or self._frame.eof:
                self._frame = self._unpacker.decompressobj() if packed else None
            if self._frame is None:
                return 0
            if not packed:
                raise EOFError("a Zstandard frame has no end")
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


PACKED: dict[str, Callable[[IO[bytes]], AbstractContextManager[IO[bytes]]]] = {".gz": _gzip, ".zst": _zstd}


# Text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongText:
    """The text of a large file, read anew each time it is gone through."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with _explained(self.path), open(self.path, "rb") as raw, _unpacked(self.path, raw) as stream:
            yield from _segments(stream, str(self.path))


def _read_text(opened: Opened, skip: int) -> Iterator[Document]:
    if skip:
        return
    first = tuple(islice(_segments(opened.stream, str(opened.path)), 2))
    opened.raw.seek(0, os.SEEK_END)
    yield first if len(first) < 2 else LongText(opened.path)


def _segments(stream: IO[bytes], where: str) -> Iterator[str]:
    """Text in segments of some SEGMENT_BYTES, each but the last ending with a line; a longer line stays whole."""
    offset = 0
    waiting: list[bytes] = []
    while chunk := stream.read(SEGMENT_BYTES):
        if not offset and not waiting and chunk.startswith(codecs.BOM_UTF8):
            offset = len(codecs.BOM_UTF8)
            chunk = chunk[offset:]
        end = chunk.rfind(b"\n") + 1
        if end:
            raw = b"".join([*waiting, chunk[:end]])
            yield _decode(raw, where, offset)
            offset, waiting = offset + len(raw), []
        if end < len(chunk):
            waiting.append(chunk[end:])
    if waiting:
        yield _decode(b"".join(waiting), where, offset)


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
    for number, raw in enumerate(opened.stream, 1):
        start, offset = offset, offset + len(raw)
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
    for number, row in enumerate(_elements(_Ahead(opened)), 1):
        yield convert(row, f"{opened.path}, row {number}") if number > skip else ()


class _Ahead:
    """Text of a stream, as much of it as is needed: `text[place:]` is what was read and not used."""

    def __init__(self, opened: Opened) -> None:
        self.path, self._stream = opened.path, opened.stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._offset = 0
        self.text, self.place = "", 0

    def more(self) -> bool:
        """Read on, at least as much as there is: what has to be parsed again doubles each time."""
        chunk = self._stream.read(max(CHUNK_BYTES, len(self.text) - self.place))
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = self._offset - held + error.start
            raise DataError(f"{self.path}: byte {place} is not UTF-8; convert the file") from None
        self._offset += len(chunk)
        self.text, self.place = self.text[self.place :] + text, 0
        return bool(chunk)

    def next(self) -> str:
        """The next character that is no white space (it stays), "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""


def _elements(ahead: _Ahead) -> Iterator[Any]:
    """The elements of a JSON list, each parsed when it is due."""
    if ahead.next() != "[":
        raise DataError(f"{ahead.path}: a JSON list of rows was expected (one row a line is .jsonl; text is .txt)")
    ahead.place += 1
    number, ended = 0, ahead.next() == "]"
    while not ended:
        number += 1
        ahead.next()
        yield _element(ahead, f"{ahead.path}, row {number}")
        if ahead.next() not in ("]", ","):
            raise DataError(f"{ahead.path}, row {number}: not JSON (a comma or the list's end has to follow)")
        ended = ahead.text[ahead.place] == "]"
        ahead.place += not ended
    ahead.place += 1
    if ahead.next():
        raise DataError(f"{ahead.path}: something follows the list's end")


def _element(ahead: _Ahead, where: str) -> Any:
    decoder = json.JSONDecoder()
    while True:
        try:
            value, ahead.place = decoder.raw_decode(ahead.text, ahead.place)
            return value
        except json.JSONDecodeError as error:
            # An error far from the end of what was read does not go away when more is read.
            cut_off = error.msg.startswith("Unterminated string") or error.pos > len(ahead.text) - 16
            if not (cut_off and ahead.more()):
                raise DataError(f"{where}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list in a list in a list
            raise DataError(f"{where}: not JSON ({error})") from None


def _read_parquet(opened: Opened, skip: int, convert: Convert = rows_of.document) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    if opened.stream is not opened.raw:
        raise DataError(f"{opened.path}: Parquet is compressed inside; unpack the file and give it as .parquet")
    try:
        file = parquet.ParquetFile(opened.raw, pre_buffer=False)
        fields = rows_of.fields_of(file.schema_arrow.names, str(opened.path))
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in file.iter_batches(PARQUET_ROWS, [group], list(fields), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield convert(row, f"{opened.path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{opened.path} is no Parquet file or damaged ({' '.join(str(error).split())})") from error


def _read_dataset(opened: Opened, skip: int) -> Iterator[Document]:
    data = storage.open_dataset(opened.path)
    for number in range(skip, data.documents):
        ids, copies = data.document(number), int(data.copies[number])
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
