"""Fitness of generated text: every member answers the same prompts at once, and a Python function scores the answers.

    answer  = answerer(strategy, space, config, how)
    tokens  = answer(candidates, prompts, key)            [P, N, M]
    fitness = scores(tokens, rows, ...)                   [P]

Prompts are read and tokens decoded for all members of a chunk in one compiled call each, over caches with one more
axis. A member's noise is drawn once for all of its tokens. The draw for token m of prompt n uses
`fold_in(fold_in(key, n), m)`, for all members alike.

Axes: P members, C members of a chunk, N prompts, T tokens of a prompt, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.errors import DataError, UsageError
from functional_lm.evolution.fitness import vmappable
from functional_lm.evolution.population import Share, chunks, making, members, model_of, preparation, share
from functional_lm.evolution.spaces import Space
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.inference import cache as kv
from functional_lm.inference.generate import prefill
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward_cached
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree

T = TypeVar("T")
AGAIN = 1.0  # seconds between interruptions of what goes on behind its limit
Row = Mapping[str, Any]
Score = Callable[[Sequence[str], Sequence[Row]], Sequence[float]]


@dataclass(frozen=True)
class Answering:
    """How answers are written: up to `tokens`, greedily at temperature 0, until one of `stops`."""

    tokens: int
    stops: tuple[int, ...]
    temperature: float = 0.0
    chunk: int | None = None
    compile: bool = False
    part: Share | None = None  # of the population, where it is not all of it
    with_kernels: bool = False  # `population.making` says which


class Prompts(NamedTuple):
    """N prompts padded on the right, and the place of each one's last token."""

    tokens: Int[Tensor, "N T"]
    last: Int[Tensor, "N"]


def padded(prompts: Sequence[Sequence[int]], length: int, device: torch.device | str = "cpu") -> Prompts:
    """Prompts as one tensor of `length` columns."""
    rows = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in zip(rows, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return Prompts(rows.to(device), torch.tensor([len(prompt) - 1 for prompt in prompts], device=device))


def choose(logits: Float[Tensor, "N V"], row_keys: Int[Tensor, "N 2"], drawn: Tensor, temperature: float) -> Tensor:
    """The next token of each row; `temperature` is static."""
    if temperature == 0:
        return logits.argmax(-1)
    own = torch.vmap(keys.fold_in, (0, None))(row_keys, drawn)
    return torch.vmap(keys.categorical)(own, logits.float() / temperature)


def answerer(
    strategy: Strategy, space: Space, config: ModelConfig, how: Answering, dtype: torch.dtype = torch.float32
) -> Callable[[Candidates, Prompts, Tensor], Int[Tensor, "P N M"]]:
    """`(candidates, prompts, key) -> tokens`: what each member goes on with; behind a stop there is whatever comes."""
    config = vmappable(config)
    prepare = preparation(strategy, space, dtype)
    mine = share(strategy.population, how.chunk) if how.part is None else how.part

    def fill(
        cache: Tree, frozen: Tree, own: Tree, prompts: Prompts, row_keys: Tensor, drawn: Tensor
    ) -> tuple[Tree, Tensor]:
        start = torch.zeros_like(prompts.last)

        def one(cache: Tree, own: Tree) -> tuple[Tree, Tensor]:
            model = model_of(space, dtype, frozen, own)
            cache, logits = prefill(model, cache, prompts.tokens, start, prompts.last, config)
            return cache, choose(logits, row_keys, drawn, how.temperature)

        return torch.vmap(one)(cache, own)

    def step(
        state: tuple[Tree, Tensor], frozen: Tree, own: Tree, at: Tensor, row_keys: Tensor, drawn: Tensor
    ) -> tuple[tuple[Tree, Tensor], Tensor]:
        def one(cache: Tree, own: Tree, tokens: Tensor) -> tuple[Tree, Tensor]:
            model = model_of(space, dtype, frozen, own)
            cache, logits = forward_cached(model, cache, tokens[:, None], at, config)
            return cache, choose(logits[:, -1], row_keys, drawn, how.temperature)

        cache, tokens = torch.vmap(one)(state[0], own, state[1])
        return (cache, tokens), tokens

    leaves = compiled(making(strategy, space, dtype, how.with_kernels), enabled=how.compile)
    read = compiled(fill, donate=True, enabled=how.compile)
    decode = compiled(step, donate=True, enabled=how.compile)

    def write(frozen: Tree, own: Tree, prompts: Prompts, key: Tensor) -> Int[Tensor, "C N M"]:
        count, (rows, time), device = tree.leaves(own)[0].shape[0], prompts.tokens.shape, prompts.last.device
        cache = kv.init(config, count * rows, time + how.tokens, dtype, device)
        cache = tree.map(lambda leaf: leaf.view(count, rows, *leaf.shape[1:]), cache)
        row_keys = keys.split(key, rows)
        cache, tokens = read(cache, frozen, own, prompts, row_keys, torch.tensor(0, device=device))

        def go_on(state: Any, number: int) -> tuple[Any, Tensor]:
            at, drawn = prompts.last + number, torch.tensor(number, device=device)
            made: tuple[Any, Tensor] = decode(state, frozen, own, at, row_keys, drawn)
            return made

        return written((cache, tokens.clone()), tokens, go_on, how)

    def answer(candidates: Candidates, prompts: Prompts, key: Tensor) -> Int[Tensor, "P N M"]:
        with torch.no_grad():
            frozen, shared = prepare(candidates)
            parts = chunks(candidates.own, strategy.population, mine)
            found = [write(frozen, leaves(frozen, shared, own), prompts, key) for own in parts]
        return torch.cat(found)[: members(strategy.population, mine)]

    return answer


def written(
    state: T, first: Int[Tensor, "*N"], go_on: Callable[[T, int], tuple[T, Tensor]], how: Answering
) -> Int[Tensor, "*N M"]:
    """The first tokens and those behind them, `state, tokens = go_on(state, number)`, until every text has ended."""
    made, ended = [first], stopped(first, how.stops)
    for number in range(1, how.tokens):
        if bool(ended.all()):
            break
        state, tokens = go_on(state, number)
        made.append(tokens)
        ended |= stopped(tokens, how.stops)
    made += [torch.full_like(first, how.stops[0] if how.stops else 0)] * (how.tokens - len(made))
    return torch.stack(made, -1)


def stopped(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """Where one of the stops has been written."""
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for stop in stops:
        ended |= tokens == stop
    return ended


# Texts and their scores -----------------------------------------------------------------------------------------------


def texts(
    tokens: Int[Tensor, "P N M"], tokenizer: Tokenizer, stops: Sequence[int], stop_texts: Sequence[str] = ()
) -> list[list[str]]:
    """Each member's answers up to the first stop. The same tokens are decoded once."""
    known: dict[tuple[int, ...], str] = {}

    def decoded(ids: list[int]) -> str:
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        kept = tuple(ids[:end])
        if kept not in known:
            text = tokenizer.decode(list(kept))
            known[kept] = min((text.partition(stop)[0] for stop in stop_texts), key=len, default=text)
        return known[kept]

    return [[decoded(ids) for ids in member] for member in tokens.tolist()]


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """1 where an answer is the row's `response`, white space around them aside."""
    return [float(answer.strip() == str(row["response"]).strip()) for answer, row in zip(answers, rows, strict=True)]


def named(name: str) -> Score:
    """`exact`, or the function that `module:function` names (the working directory counts as a place for modules).

    A function takes the answers of one member and the rows, and returns a number for each. Raises UsageError.
    """
    if name == "exact":
        return exact_match
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"the fitness {name!r} is neither known nor of the form module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(f"the fitness {name!r} cannot be imported: {_told(error)}") from error
    if not callable(found):
        raise UsageError(f"the fitness {name!r} is {type(found).__name__}, not a function")
    score: Score = found
    return score


def values_of(answers: Sequence[str], rows: Sequence[Row], score: Score, name: str) -> list[float]:
    """The score of each answer. Raises DataError where the function raises, exits or returns something else."""
    try:
        found: Any = score(list(answers), copy.deepcopy(list(rows)))  # which are those of other members too
        if isinstance(found, Iterator):  # a generator runs only here
            found = list(found)
    except (KeyboardInterrupt, _Late):
        raise
    except BaseException as error:  # sys.exit() too, which would end the command without a word
        raise DataError(f"the fitness {name} raised {_told(error)}") from error
    values = _numbers(found, name)
    if len(values) != len(rows):
        raise DataError(f"the fitness {name} returned {len(values)} numbers for {len(rows)} answers; one for each")
    return values


def _numbers(found: Any, name: str) -> list[float]:
    """What a function returned, as numbers. Raises DataError."""
    kind = type(found).__name__
    if isinstance(found, (str, bytes, Mapping, Set)):  # whose parts may be numbers, but are not those of the answers
        raise DataError(f"the fitness {name} returned {kind}; one number for each answer")
    try:
        listed = list(found)
        kind += " of " + ", ".join(sorted({type(value).__name__ for value in listed}))
        return [float(value) for value in listed]
    except Exception as error:
        raise DataError(f"the fitness {name} returned {kind}; one number for each answer") from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def scored(members: Sequence[Sequence[str]], rows: Sequence[Row], score: Score, name: str) -> Float[Tensor, "P"]:
    """The mean score of each member's answers. Raises DataError as `values_of` does."""
    means = []
    for answers in members:
        values = values_of(answers, rows, score, name)
        means.append(math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan)
    return torch.tensor(means)


class _Late(BaseException):
    """The time is over. No Exception, which a function may pass over, nor the TimeoutError of its own socket."""


def limited(seconds: float, what: str, work: Callable[[], T]) -> T:
    """`work()`. Raises DataError once it has taken so long; 0, and outside the main thread: no limit.

    It interrupts Python code, sleeping and waiting, but no call into a library that never returns to Python. What
    goes on all the same is interrupted again every second, and what it returns is not taken.
    """
    passed, within = False, True

    def late(number: int, frame: Any) -> None:
        nonlocal passed
        passed = True
        if within:
            raise _Late

    if not seconds or not hasattr(signal, "setitimer"):
        return work()
    try:
        before = signal.signal(signal.SIGALRM, late)
    except ValueError:
        return work()
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
            made = work()
        finally:
            within = False
    except KeyboardInterrupt:
        raise
    except BaseException:
        if not passed:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if passed:
        raise DataError(f"{what} took more than {seconds:g} s; give --timeout more, or make it faster")
    return made
