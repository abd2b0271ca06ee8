"""Compression of text files: a stream of packed bytes becomes a stream of bytes.

`PACKED` is the place for more formats. What is damaged or cut off ends in EOFError, zlib.error or gzip.BadGzipFile.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any, cast

CHUNK_BYTES = 1 << 17  # of packed bytes, at once
BUFFER_BYTES = 1 << 20


@contextmanager
def _as_it_is(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    yield raw  # and leave closing to who opened it


def _gzip(raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=raw))


def _zstd(raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return cast(IO[bytes], io.BufferedReader(_Zstd(raw), BUFFER_BYTES))


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
            packed = packed or self._raw.read(CHUNK_BYTES)
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


def unpacked(suffix: str, raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """The contents of a file whose compression has this suffix; as they are for one that PACKED does not know."""
    return PACKED.get(suffix, _as_it_is)(raw)
