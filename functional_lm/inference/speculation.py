"""Speculative decoding by prompt lookup: several tokens from one pass where a text repeats itself.

What followed the last few tokens when they occurred before is a guess at what follows now (prompt lookup decoding; the
scheme of guessing and verifying is arXiv 2211.17192's). One pass reads the guesses behind the last token, and each of
its columns chooses a token as a step of its own would: with the logits there and the draw for that place. Guesses are
kept as long as they are what was chosen. Since a draw depends on the slot's key and the token's number alone, the text
is the one without speculation, not only one of the same distribution.

Axes: S slots, K guesses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm.inference.generate import Slots, choose
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward_cached
from functional_lm.tree import Tree

SIZES = (3, 2)  # tokens that have to have occurred before, the longer first


class History:
    """The tokens of one text, and where each run of `SIZES` tokens was followed by something last."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        for size in SIZES:
            if len(self._tokens) >= size:
                self._after[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """`count` tokens that may follow; what reaches the end goes round again, zeros where nothing is known."""
        places = (self._after.get(tuple(self._tokens[-size:])) for size in SIZES)
        place = next((place for place in places if place is not None), None)
        if place is None:
            return [0] * count
        found = self._tokens[place : place + count]
        period = len(self._tokens) - place
        return [found[i % period] for i in range(count)]


def verify(
    state: tuple[Tree, Slots], params: Tree, guesses: Int[Tensor, "S K"], config: ModelConfig, truncating: bool = True
) -> tuple[tuple[Tree, Slots], tuple[Int[Tensor, "S K+1"], Int[Tensor, "S"], Float[Tensor, "S K+1 V"]]]:
    """`decode_step` for up to K + 1 tokens: the tokens of all columns, how many of each row count (1 to K + 1), logits.

    positions[s] + K may not reach the cache's length. The rows of guesses that were wrong are hidden by causality until
    they are written again.
    """
    cache, slots = state
    tokens = torch.cat([slots.tokens[:, None], guesses], dim=1)
    cache, logits = forward_cached(params, cache, tokens, slots.positions, config)
    right, chosen = torch.ones_like(slots.tokens), []
    count, last = torch.zeros_like(right), slots.tokens
    for column in range(tokens.shape[1]):
        said = choose(logits[:, column], slots._replace(drawn=slots.drawn + column), truncating)
        count, last = count + right, torch.where(right > 0, said, last)
        if slots.penalties:
            slots = slots._replace(penalties=slots.penalties.counted(said, right))
        if column < guesses.shape[1]:
            right = right * (guesses[:, column] == said)
        chosen.append(said)
    slots = slots._replace(tokens=last, positions=slots.positions + count, drawn=slots.drawn + count)
    return (cache, slots), (torch.stack(chosen, 1), count, logits)
