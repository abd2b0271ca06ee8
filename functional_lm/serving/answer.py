"""From a request's tokens to the text that a client sees: whole characters, stop texts cut off, usage counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from functional_lm.inference.engine import Handle
from functional_lm.inference.text import until
from functional_lm.text.tokenizer import Tokenizer, utf8_decoder


class Answer:
    """The text of one handle in pieces, none of which a later token can take back.

    A piece is held back while it may be the beginning of a stop text or of a character.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.handle, self.tokens = handle, 0
        self._tokenizer, self._stops = tokenizer, stops
        self._read = self._stopped = False

    @property
    def finish_reason(self) -> str:
        """OpenAI's words: "stop" or "length", where nothing went wrong."""
        if self._stopped:
            return "stop"
        return {"timeout": "length", "cancelled": "stop"}.get(self.handle.finish_reason, self.handle.finish_reason)

    def __iter__(self) -> Iterator[str]:
        yield from until(self._pieces(), self._stops)
        if not self._read:
            self._stopped = True
            self.handle.cancel()

    def _pieces(self) -> Iterator[str]:
        decoder = utf8_decoder()
        for token in self.handle:
            self.tokens += 1
            yield decoder.decode(self._tokenizer.decode_bytes([token]))
        self._read = True
        yield decoder.decode(b"", final=True)
