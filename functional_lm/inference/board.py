"""The tensors of an engine: a cache with a slot for each text, what the slots know, and the compiled passes over them.

It knows slots by number and requests by their settings; who waits and who is next is the engine's (`engine.py`).

Axes: S slots, V vocabulary, C cache length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_lm import kernels, keys, tree
from functional_lm.compile import compiled
from functional_lm.inference import cache as kv
from functional_lm.inference.generate import (
    Scores,
    Slots,
    choose,
    chunks,
    decode_scored,
    decode_step,
    fitting,
    prefill_scored,
    prefill_slot,
    score,
)
from functional_lm.inference.requests import Request, Scored
from functional_lm.inference.sampling import Penalties, Sampling
from functional_lm.inference.speculation import verify
from functional_lm.model import lora
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import precision
from functional_lm.tree import Tree

Weights = tuple[Tree, Tree]  # a model and a bank of adapters, empty without any


class Board:
    """S slots with `length` rows each over one model. One thread at a time."""

    def __init__(
        self,
        params: Tree,
        config: ModelConfig,
        slots: int,
        length: int,
        compile: bool = True,
        bank: Tree | None = None,
        guesses: int = 0,
    ) -> None:
        """`guesses`: how many tokens a step may be handed to verify (`speculation.py`)."""
        self.config = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)
        self.slots, self.guesses = slots, guesses
        self._device = tree.leaves(params)[0].device
        self.sizes = chunks(config, self._device)
        self.chunk = self.sizes[-1]  # tokens of a prompt that are read at once
        self._weights = (kernels.prepared(params, wanted=compile and self._device.type == "cpu"), bank or {})
        rows = -(-length // self.chunk) * self.chunk
        self._cache = kv.init(self.config, slots, rows, precision(params["model"]["embed_tokens"]), self._device)
        self._state = self._empty()
        self._fill = compiled(partial(_fill, config=self.config), donate=True, enabled=compile)
        self._fill_scored = compiled(partial(_fill_scored, config=self.config), donate=True, enabled=compile)
        self.steps: dict[bool, Callable[..., Any]] = {
            plain: compiled(partial(_step, config=self.config, plain=plain), donate=True, enabled=compile)
            for plain in (True, False)
        }

    def _empty(self) -> Slots:
        def whole(value: float, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.full((self.slots,), value, dtype=kind, device=self._device)

        sampling = Sampling.uniform(self.slots, 1.0, device=self._device)
        penalties = Penalties.none(self.slots, self.config.vocab_size, self._device)
        own = keys.key(0, self._device).expand(self.slots, 2).clone()
        return Slots(whole(0), whole(0), whole(0), own, sampling, penalties, whole(0))

    def warm(
        self,
        phase: Callable[[str], AbstractContextManager[Any]],
        scored: Sequence[bool] = (False, True),
        plain: Sequence[bool] = (True, False),
        sizes: Sequence[int] = (),
    ) -> None:
        """Run every graph that is wanted once, so that nothing compiles while somebody waits; each in a named `phase`.

        `scored` are the ways to read, `sizes` how many tokens at once (all, if none is named), `plain` ways to write.
        """
        with torch.inference_mode(False), torch.no_grad():
            for way in scored:
                for size in self.sizes[-1:] if way else sizes or self.sizes:
                    with phase(f"reading {size} tokens with logprobs" if way else f"reading {size} tokens"):
                        self.read(0, (0,) * size, 0, way)
            self.reset()  # a chunk may be the whole cache: no step follows it
            for way in plain:
                with phase("writing" if way else "writing with penalties and logprobs"):
                    self.step([], way)
        self.reset()

    def reset(self) -> None:
        """No slot holds anything."""
        self._state = self._empty()

    def settle(self, slot: int, request: Request, row: int, start: int) -> None:
        """Write a request's settings into its slot, whose first `start` rows hold its prompt; `row` of the bank."""
        state = self._state
        assert state.penalties
        assert isinstance(state.adapters, Tensor)
        state.tokens[slot] = state.drawn[slot] = 0
        state.positions[slot] = start
        state.keys[slot] = keys.key(request.seed, self._device)
        for name in ("temperature", "top_k", "top_p"):
            getattr(state.sampling, name)[slot] = getattr(request, name)
        state.adapters[slot] = row
        by = state.penalties
        by.min_p[slot], by.repetition[slot] = request.min_p, request.repetition_penalty
        by.presence[slot], by.frequency[slot] = request.presence_penalty, request.frequency_penalty
        by.bias[slot], by.prompted[slot], by.counts[slot] = 0.0, False, 0
        by.prompted[slot, list(request.prompt)] = True
        for token, value in request.logit_bias.items():
            by.bias[slot, token] = value

    def release(self, slot: int, kept: int) -> None:
        """The slot is free; steps of the others write into the row behind the `kept` ones."""
        self._state.positions[slot] = kept

    def put(self, row: int, adapter: Tree) -> None:
        """Write an adapter into entry `row` of the bank. Raises DataError where the bank has no room for it."""
        lora.put(self._weights[1], row, adapter)

    def read(self, slot: int, prompt: Sequence[int], start: int, scored: bool) -> tuple[Tensor, Scores | None]:
        """Put the chunk of `prompt` that begins at `start` into the cache: the logits [1, V] behind it, and scores."""

        def whole(*values: int) -> Tensor:
            return torch.tensor(values, device=self._device)

        part, following = (list(prompt[begin : begin + self.chunk]) for begin in (start, start + 1))
        size = self.chunk if scored else fitting(len(part), self.sizes)
        assert isinstance(self._state.adapters, Tensor)
        place = (whole(slot), whole(start), whole(len(part) - 1), self._state.adapters[slot : slot + 1].clone())
        padded, following = (ids + [0] * (size - len(ids)) for ids in (part, following))
        self._state.positions[slot] = start + len(part)  # where a step of the others may write without harm
        if scored:
            self._cache, (logits, scores) = self._fill_scored(
                self._cache, self._weights, whole(*padded)[None], whole(*following), *place
            )
            return logits, scores
        self._cache, logits = self._fill(self._cache, self._weights, whole(*padded)[None], *place)
        return logits, None

    def begin(self, slot: int, logits: Tensor, request: Request, said: Sequence[int] = ()) -> tuple[int, Scores | None]:
        """The token behind what has been read; `said` are the ones that this request has drawn before."""
        state = self._state
        assert state.penalties
        state.drawn[slot], counts = len(said), state.penalties.counts
        counts[slot] = 0  # steps of the others have counted here too
        if said:
            counts[slot] = torch.tensor(said).bincount(minlength=self.config.vocab_size).to(counts)
        own = tree.map(lambda rows: rows[slot : slot + 1], state)
        token = choose(logits, own, truncating=not request.plain)
        state.tokens[slot] = token[0]
        state.drawn[slot] += 1
        counts[slot, token] += 1
        return int(token), score(logits, token) if request.logprobs is not None else None

    def step(
        self, writing: Sequence[int], plain: bool, guesses: Sequence[Sequence[int]] = ()
    ) -> tuple[list[list[int]], Scores | None]:
        """The next tokens of each slot in `writing`, more than one where its `guesses` were right.

        Of the scores, slot s has the rows from s (guesses + 1) on. What other slots compute is not looked at.
        """
        idle = [slot for slot in range(self.slots) if slot not in writing]
        kept = [rows[idle] for rows in (self._state.tokens, self._state.positions, self._state.drawn)]
        given = torch.zeros(self.slots, self.guesses, dtype=torch.int64)
        for slot, own in zip(writing, guesses):
            given[slot] = torch.tensor(own)
        more = (given.to(self._device),) if self.guesses else ()
        (self._cache, self._state), said = self.steps[plain]((self._cache, self._state), self._weights, *more)
        tokens, scores = (said, None) if plain else said
        for rows, before in zip((self._state.tokens, self._state.positions, self._state.drawn), kept):
            rows[idle] = before
        if not self.guesses:
            return [[token] for token in tokens[list(writing)].tolist()], scores
        columns, counts = (rows[list(writing)].tolist() for rows in tokens)
        return [row[:count] for row, count in zip(columns, counts)], scores


def told(scores: Scores, rows: Iterable[int], tokens: Iterable[int], count: int) -> list[Scored]:
    """Rows of scores as numbers, each with its `count` likeliest tokens."""
    chosen, values, ids = (part.tolist() for part in scores)
    return [
        Scored(token, chosen[row], dict(zip(ids[row][:count], values[row][:count]))) for row, token in zip(rows, tokens)
    ]


# The passes -----------------------------------------------------------------------------------------------------------


def _whole(weights: Weights, index: Tensor) -> Tree:
    """The model in which row i goes through entry `index[i]` of the bank."""
    params, adapters = weights
    return lora.attach(params, lora.select(adapters, index)) if adapters else params


def _fill(
    cache: Tree,
    weights: Weights,
    tokens: Tensor,
    slot: Tensor,
    position: Tensor,
    last: Tensor,
    adapter: Tensor,
    config: ModelConfig,
) -> tuple[Tree, Tensor]:
    return prefill_slot(_whole(weights, adapter), cache, tokens, slot, position, last, config)


def _fill_scored(
    cache: Tree,
    weights: Weights,
    tokens: Tensor,
    following: Tensor,
    slot: Tensor,
    position: Tensor,
    last: Tensor,
    adapter: Tensor,
    config: ModelConfig,
) -> tuple[Tree, tuple[Tensor, Scores]]:
    return prefill_scored(_whole(weights, adapter), cache, tokens, following, slot, position, last, config)


def _step(
    state: tuple[Tree, Slots], weights: Weights, *guesses: Tensor, config: ModelConfig, plain: bool
) -> tuple[tuple[Tree, Slots], Any]:
    """Tokens of a step; their scores too, unless all slots are `plain`: then the penalties (off) stay as they are."""
    cache, slots = state
    assert isinstance(slots.adapters, Tensor)
    params = _whole(weights, slots.adapters)
    given = (cache, slots._replace(penalties=())) if plain else state
    if guesses:
        (cache, after), (tokens, count, logits) = verify(given, params, guesses[0], config, not plain)
        said: Any = (tokens, count) if plain else ((tokens, count), score(logits.flatten(0, 1), tokens.flatten()))
    elif plain:
        (cache, after), said = decode_step(given, params, config, truncating=False)
    else:
        (cache, after), said = decode_scored(given, params, config, truncating=True)
    return (cache, after._replace(penalties=slots.penalties) if plain else after), said
