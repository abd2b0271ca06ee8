"""Settings of decoding as a space: temperature, truncation and penalties as real numbers, over a model that stays.

    space = decode(params, settings, ["temperature", "top_p"], vocab_size)

Each setting is a number without limits behind a transform, so that a step of the same size means something everywhere:

    temperature, repetition_penalty   e^x                    top_k       e^x, rounded, from 1 to V
    top_p, min_p                      1 / (1 + e^-x)         presence_penalty, frequency_penalty   2 tanh(x / 2)

The members share every product: P·N sequences are rows of one batch, and what differs is their settings [P·N], which
sampling takes row by row anyway. The prompts are read once for all.

Axes: P members, C members of a chunk, N prompts, M tokens of an answer, G settings that are evolved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution.answers import Answering, Prompts, written
from functional_lm.evolution.population import chunks, members, preparation, share
from functional_lm.evolution.spaces import Space
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.inference import cache as kv
from functional_lm.inference.generate import Slots, choose, decode_step, prefill
from functional_lm.inference.sampling import Penalties, Sampling
from functional_lm.model.compute import decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

Settings = dict[str, Tensor]


def _positive(x: Tensor) -> Tensor:
    return x.exp().clamp(0.01, 100)


def _share(x: Tensor) -> Tensor:
    return torch.sigmoid(x).clamp(1e-6, 1 - 1e-6)


def _signed(x: Tensor) -> Tensor:
    return 2 * torch.tanh(x / 2)


INTO: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature": _positive,
    "top_k": torch.exp,  # rounded and held to the vocabulary in `settings_of`
    "top_p": _share,
    "min_p": _share,
    "repetition_penalty": _positive,
    "presence_penalty": _signed,
    "frequency_penalty": _signed,
}
NEARLY_OFF = 0.005  # of a share that is off: its number would be infinite


def number(name: str, value: float, vocab_size: int) -> float:
    """The number that stands for a setting, the transforms' inverse; what is off is nearly off."""
    if name in ("temperature", "repetition_penalty"):
        return math.log(min(max(value, 0.01), 100))
    if name == "top_k":
        return math.log(value or vocab_size)
    if name in ("top_p", "min_p"):
        share = min(max(value, NEARLY_OFF), 1 - NEARLY_OFF)
        return math.log(share / (1 - share))
    return 2 * math.atanh(min(max(value / 2, -0.999), 0.999))


def settings_of(values: Float[Tensor, "*C G"], names: Sequence[str], vocab_size: int) -> Settings:
    """The settings, each [*C], that a candidate's numbers stand for."""
    found = {name: INTO[name](x) for name, x in zip(names, values.float().unbind(-1), strict=True)}
    if "top_k" in found:
        found["top_k"] = found["top_k"].clamp(1, vocab_size).round().long()
    return found


def decode(params: Tree, settings: Mapping[str, float], names: Sequence[str], vocab_size: int) -> Space:
    """The space of the settings `names`, which begin as `settings` says."""
    start = {"settings": torch.tensor([number(name, settings[name], vocab_size) for name in names])}

    def freeze(base: Tree, fixed: Tree, own: Iterable[str], dtype: torch.dtype) -> Tree:
        return decoding_copy(base, dtype)

    return Space("decode", start, params, freeze, lambda frozen, leaves, dtype: frozen, lambda base, leaves: base)


def answerer(
    strategy: Strategy,
    space: Space,
    config: ModelConfig,
    how: Answering,
    dtype: torch.dtype,
    settings: Mapping[str, float],
    names: Sequence[str],
) -> Callable[[Candidates, Prompts, Tensor], Int[Tensor, "P N M"]]:
    """`answers.answerer` for this space: `(candidates, prompts, key) -> tokens`. The draw for token m of prompt n uses
    the same key for every member; settings that are not evolved are those of `settings`."""
    prepare = preparation(strategy, space, dtype)
    mine = share(strategy.population, how.chunk) if how.part is None else how.part
    write = writer(config, how, dtype, settings, names)

    def answer(candidates: Candidates, prompts: Prompts, key: Tensor) -> Int[Tensor, "P N M"]:
        with torch.no_grad():
            frozen, shared = prepare(candidates)
            parts = chunks(candidates.own, strategy.population, mine)
            found = [write(frozen, strategy.members(shared, own), prompts, key) for own in parts]
        return torch.cat(found)[: members(strategy.population, mine)]

    return answer


def writer(
    config: ModelConfig, how: Answering, dtype: torch.dtype, settings: Mapping[str, float], names: Sequence[str] = ()
) -> Callable[[Tree, Tree, Prompts, Tensor], Int[Tensor, "C N M"]]:
    """`(frozen, {"settings": [C, G]}, prompts, key) -> tokens` of one model, a `decoding_copy`."""
    config = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)
    fill = compiled(partial(_fill, config=config), donate=True, enabled=how.compile)
    first = compiled(_first, enabled=how.compile)
    step = compiled(partial(decode_step, config=config), donate=True, enabled=how.compile)

    def slots_of(leaves: Tree, prompts: Prompts, key: Tensor) -> Slots:
        """Member by member, and within one prompt by prompt."""
        own, rows = leaves["settings"], len(prompts.last)
        known = settings_of(own, names, config.vocab_size)
        every = {name: known.get(name, own.new_full(own.shape[:1], value)) for name, value in settings.items()}
        by = {name: value.repeat_interleave(rows) for name, value in every.items()}
        count = own.shape[0]
        seen = torch.arange(prompts.tokens.shape[1], device=own.device) <= prompts.last[:, None]
        table = torch.zeros(rows, config.vocab_size, dtype=torch.int64, device=own.device)
        prompted = table.scatter_add(1, prompts.tokens, seen.long()) > 0
        penalties = Penalties.none(count * rows, config.vocab_size, own.device)._replace(
            min_p=by["min_p"],
            repetition=by["repetition_penalty"],
            presence=by["presence_penalty"],
            frequency=by["frequency_penalty"],
            prompted=prompted.repeat(count, 1),
        )
        zeros = torch.zeros(count * rows, dtype=torch.int64, device=own.device)
        sampling = Sampling(by["temperature"], by["top_k"].long(), by["top_p"])
        return Slots(zeros, prompts.last.repeat(count) + 1, zeros, keys.split(key, rows).repeat(count, 1), sampling,
                     penalties)  # fmt: skip

    def write(frozen: Tree, leaves: Tree, prompts: Prompts, key: Tensor) -> Int[Tensor, "C N M"]:
        count, (rows, time) = leaves["settings"].shape[0], prompts.tokens.shape
        cache = kv.init(config, rows, time + how.tokens, dtype, prompts.last.device)
        cache, logits = fill(cache, frozen, prompts)
        slots, tokens = first(logits.repeat(count, 1), slots_of(leaves, prompts, key))
        state = tree.copy((tree.map(lambda leaf: leaf.repeat(count, 1, 1, 1), cache), slots))
        return written(state, tokens, lambda state, _: step(state, frozen), how).view(count, rows, -1)

    return write


def _fill(cache: Tree, frozen: Tree, prompts: Prompts, config: ModelConfig) -> tuple[Tree, Tensor]:
    return prefill(frozen, cache, prompts.tokens, torch.zeros_like(prompts.last), prompts.last, config)


def _first(logits: Tensor, slots: Slots) -> tuple[Slots, Tensor]:
    """The token behind each prompt, noted."""
    tokens = choose(logits, slots, truncating=True)
    assert isinstance(slots.penalties, Penalties)
    return slots._replace(tokens=tokens, drawn=slots.drawn + 1, penalties=slots.penalties.counted(tokens)), tokens
