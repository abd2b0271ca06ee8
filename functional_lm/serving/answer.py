"""From a request's tokens to the text that a client sees: whole characters, stop texts cut off, usage counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from functional_lm.inference.engine import Handle
from functional_lm.text.tokenizer import Tokenizer, utf8_decoder


class Answer:
    """The text of one handle in pieces, none of which a later token can take back.

    A piece is held back while it may be the beginning of a stop text or of a character.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.handle, self.tokens = handle, 0
        self._tokenizer, self._stops = tokenizer, stops
        self._stopped = False

    @property
    def finish_reason(self) -> str:
        """OpenAI's words: "stop" or "length", where nothing went wrong."""
        if self._stopped:
            return "stop"
        return {"timeout": "length", "cancelled": "stop"}.get(self.handle.finish_reason, self.handle.finish_reason)

    def __iter__(self) -> Iterator[str]:
        decoder, held = utf8_decoder(), ""
        for token in self.handle:
            self.tokens += 1
            held += decoder.decode(self._tokenizer.decode_bytes([token]))
            if (at := self._first_stop(held)) is not None:
                self._stopped = True
                self.handle.cancel()
                if at:
                    yield held[:at]
                return
            safe = len(held) - self._may_begin(held)
            if safe:
                yield held[:safe]
                held = held[safe:]
        if held := held + decoder.decode(b"", final=True):
            yield held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop begins that is complete first, so that the split into tokens does not matter."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _may_begin(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
