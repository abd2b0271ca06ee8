"""Log-likelihoods in the two forms in which OpenAI's clients read them. Natural logarithms, of the model itself."""

from __future__ import annotations

from typing import Any

from functional_lm.inference.engine import Scored
from functional_lm.serving.answer import Answer
from functional_lm.text.tokenizer import Tokenizer, utf8_decoder


def of_completion(answer: Answer, tokenizer: Tokenizer, echo: bool) -> dict[str, list[Any]]:
    """The form of /v1/completions: four lists side by side, the prompt's tokens first where it is echoed.

    The first token of a prompt has no likelihood. A token that ended the text is the last of the lists.
    """
    handle = answer.handle
    prompt = list(handle.request.prompt) if echo else []
    tokens = [*prompt, *(scored.token for scored in handle.scores)]
    scores: list[Scored | None] = [None, *handle.prompt_scores] if echo else []
    scores += handle.scores
    offsets, decoder, length = [], utf8_decoder(), 0
    for token in tokens:
        offsets.append(length)
        length += len(decoder.decode(tokenizer.decode_bytes([token])))
    return {
        "tokens": [_shown(token, tokenizer) for token in tokens],
        "token_logprobs": [None if scored is None else scored.logprob for scored in scores],
        "top_logprobs": [None if scored is None else _named(scored, tokenizer) for scored in scores],
        "text_offset": offsets,
    }


def of_chat(answer: Answer, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """The form of /v1/chat/completions: an entry for each token of the answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _shown(token, tokenizer),
            "logprob": logprob,
            "bytes": list(tokenizer.decode_bytes([token])),
        }

    content = [
        {**entry(scored.token, scored.logprob), "top_logprobs": [entry(*pair) for pair in scored.likeliest.items()]}
        for scored in answer.handle.scores
        if scored.token not in answer.handle.request.stop_ids
    ]
    return {"content": content}


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
