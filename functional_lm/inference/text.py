"""Generation from text to text: the tokenizer at both ends of `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from functional_lm.inference import generate as tokens
from functional_lm.inference.generate import Decoder, GenerateOptions
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first stop text, wherever they split it; the last ones are held back while they may be one.

    Of several stops the one that is complete first counts, so that the split does not matter.
    """
    held, longest = "", max(map(len, stops), default=1) - 1

    def beginning(text: str) -> int:
        """How many of the last characters may be the beginning of a stop."""
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)

    for piece in pieces:
        held += piece
        if found := [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]:
            yield from filter(None, [held[: min(found)[1]]])
            return
        safe = len(held) - beginning(held)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def stream(
    params: Tree, run: Decoder, tokenizer: Tokenizer, prompt: str | list[int], options: GenerateOptions
) -> Iterator[str]:
    """The continuation of a prompt in pieces of whole characters; a stop id ends it and is not part of it.

    An empty prompt is the beginning of a document.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    made = tokens.generate(params, ids or [tokenizer.bos_id], run, options)
    return tokenizers.stream(tokenizer, (token for token in made if token not in options.stop_ids))


def generate(
    params: Tree, config: ModelConfig, tokenizer: Tokenizer, prompt: str = "", compile: bool = False, **options: Any
) -> str:
    """`prompt` and its continuation; `options` are those of `GenerateOptions` (max_tokens, temperature, seed, ...).

    It ends where the model ends its document. For many prompts make a `decoder` once and call `stream`.
    """
    how = GenerateOptions(**{"stop_ids": (tokenizer.eos_id,), **options})
    run = tokens.decoder(config, compile, truncating=how.truncates)
    return prompt + "".join(stream(params, run, tokenizer, prompt, how))
