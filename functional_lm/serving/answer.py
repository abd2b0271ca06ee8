"""From a request's tokens to the text that a client sees: whole characters, stop texts cut off, usage counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from functional_lm.inference.engine import Handle, Scored
from functional_lm.inference.text import until
from functional_lm.text.tokenizer import Tokenizer, utf8_decoder


class Answer:
    """The text of one handle in pieces, none of which a later token can take back.

    A piece is held back while it may be the beginning of a stop text or of a character. When `gone` says that the
    client has left, the request is given up.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.handle, self.tokens = handle, 0
        self.gone: Callable[[], bool] = lambda: False
        self._tokenizer, self._stops = tokenizer, stops
        self._read = self._stopped = False
        self._told = 0

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
        for token in self.handle.follow(self.gone):
            self.tokens += 1
            yield decoder.decode(self._tokenizer.decode_bytes([token]))
        self._read = True
        yield decoder.decode(b"", final=True)

    def news(self) -> list[Scored]:
        """The scores, where asked for, that no earlier call has told: of the tokens in the pieces until here.

        A stop id that ended the text is the last of them; what came after a stop text is not among them.
        """
        end = len(self.handle.scores) if self._read else self.tokens
        begin, self._told = self._told, end
        return self.handle.scores[begin:end]
