"""Log-likelihoods in the two forms in which OpenAI's clients read them. Natural logarithms, of the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from functional_lm.inference.engine import Handle, Scored
from functional_lm.text.tokenizer import Tokenizer, utf8_decoder


class Lists:
    """The form of /v1/completions: four lists side by side, told piece by piece.

    The first token of a prompt has no likelihood. A token that ended the text is the last of the lists.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder, self._length = tokenizer, utf8_decoder(), 0

    def prompt(self, handle: Handle) -> dict[str, list[Any]]:
        """The tokens of an echoed prompt."""
        return self._more([(handle.request.prompt[0], None), *((one.token, one) for one in handle.prompt_scores)])

    def said(self, scores: Iterable[Scored]) -> dict[str, list[Any]]:
        """Further tokens of the answer."""
        return self._more([(scored.token, scored) for scored in scores])

    def _more(self, told: Sequence[tuple[int, Scored | None]]) -> dict[str, list[Any]]:
        offsets = []
        for token, _ in told:
            offsets.append(self._length)
            self._length += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return {
            "tokens": [_shown(token, self._tokenizer) for token, _ in told],
            "token_logprobs": [None if scored is None else scored.logprob for _, scored in told],
            "top_logprobs": [None if scored is None else _named(scored, self._tokenizer) for _, scored in told],
            "text_offset": offsets,
        }


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Lists one behind the other."""
    return {name: first[name] + second[name] for name in first}


def of_chat(scores: Iterable[Scored], ends: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The form of /v1/chat/completions: an entry for each token but those that end an answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _shown(token, tokenizer),
            "logprob": logprob,
            "bytes": list(tokenizer.decode_bytes([token])),
        }

    content = [
        {**entry(scored.token, scored.logprob), "top_logprobs": [entry(*pair) for pair in scored.likeliest.items()]}
        for scored in scores
        if scored.token not in ends
    ]
    return {"content": content, "refusal": None}


def _shown(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; one that is a special token by its name, one that is no whole character by its bytes."""
    spelled = tokenizer.decode_bytes([token])
    if not spelled:
        return next((name for name, own in tokenizer.special_ids.items() if own == token), "")
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _named(scored: Scored, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens by their text, and the token itself; of equal texts the likeliest stays."""
    pairs = [*scored.likeliest.items(), (scored.token, scored.logprob)]
    named: dict[str, float] = {}
    for token, logprob in pairs:
        named.setdefault(_shown(token, tokenizer), logprob)
    return named
