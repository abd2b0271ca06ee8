"""A JSON list read element by element, so that a file may be larger than the memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from functional_lm.errors import DataError

CHUNK_BYTES = 1 << 20
LONGEST = 1 << 30  # characters of a row, bytes of a line: it is held in memory as a whole
SHORTER = "cut it into shorter ones"  # what helps


class _Ahead:
    """Text of a stream, as much of it as is needed: `text[place:]` is what was read and not used."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._offset = 0
        self.text, self.place = "", 0

    def more(self) -> bool:
        """Read on, at least as much as there is: what has to be parsed again doubles each time."""
        if len(self.text) - self.place > LONGEST:
            raise DataError(f"{self.path}: a row has more than {LONGEST} characters; {SHORTER}")
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


def elements(path: Path, stream: IO[bytes]) -> Iterator[Any]:
    """The elements of the JSON list that a stream holds (UTF-8), each parsed when it is due.

    Raises DataError, naming `path` and the row, for what is no list, no JSON or no UTF-8.
    """
    ahead = _Ahead(path, stream)
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
