"""A whole population through one compiled call: members are a vmap axis, what they share is not mapped.

    evaluate = evaluator(strategy, space, objective, dtype, chunk, compiled)
    fitness  = evaluate(candidates, batch)                                      [P]

The members go through in chunks of one size, so that one graph serves all of them and all generations; the last chunk
is filled up with members that count nothing.

Axes: P members, C members of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.evolution.fitness import Batch, Objective
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.spaces import Space
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

Evaluate = Callable[[Candidates, Batch], Float[Tensor, "P"]]


class Prepared(NamedTuple):
    """A generation ready to be computed: the shared compute copy, and what a member is made with."""

    frozen: Tree
    shared: Tree


class Share(NamedTuple):
    """The part of a population that one process computes: chunks of `size` members, those numbered `chunks`."""

    size: int
    chunks: range
    rank: int = 0
    ranks: int = 1


def share(population: int, size: int | None = None, rank: int = 0, ranks: int = 1) -> Share:
    """The share of one rank: a run of whole chunks, so that every rank computes the shapes that one alone would.

    Raises UsageError where there are more ranks than chunks.
    """
    size = population if size is None else min(size, population)
    count = -(-population // size)
    if ranks > population:
        raise UsageError(f"{ranks} ranks are more than the {population} members; start fewer, or give more members")
    if ranks > count:
        raise UsageError(
            f"{ranks} ranks are more than the {count} chunk{'s' * (count > 1)} of {size} members; start at most "
            f"{count}, or give --chunk_size {population // ranks} or less (of the fitness the last bits may change)"
        )
    each, more = divmod(count, ranks)
    start = rank * each + min(rank, more)
    return Share(size, range(start, start + each + (rank < more)), rank, ranks)


def preparation(strategy: Strategy, space: Space, dtype: torch.dtype) -> Callable[[Candidates], Prepared]:
    """What is done once a generation; nothing where members share what the base has already."""
    kept: dict[str, Any] = {}

    def prepare(candidates: Candidates) -> Prepared:
        if "names" not in kept:
            first = tree.map(lambda leaf: leaf[0], candidates.own)
            kept["names"] = list(tree.flatten(strategy.member(candidates.shared, first)))
        if candidates.fixed or "frozen" not in kept:
            frozen = space.freeze(space.base, candidates.fixed, kept["names"], dtype)
            if candidates.fixed:
                return Prepared(frozen, candidates.shared)
            kept["frozen"] = frozen
        return Prepared(kept["frozen"], candidates.shared)

    return prepare


def member_of(strategy: Strategy, space: Space, objective: Objective, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`(frozen, shared, own, batch) -> fitness` [] of one member: what is mapped over."""

    def one(frozen: Tree, shared: Tree, own: Tree, batch: Batch) -> Tensor:
        return objective(space.model(frozen, strategy.member(shared, own), dtype), batch).float()

    return one


def evaluator(
    strategy: Strategy,
    space: Space,
    objective: Objective,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
    wrap: Wrap = unwrapped,
    part: Share | None = None,
) -> Evaluate:
    """`(candidates, batch) -> fitness` [P] float32 through vmapped, wrapped (compiled) calls of `chunk` members.

    With a `part` it measures that alone.
    """
    prepare, one = preparation(strategy, space, dtype), member_of(strategy, space, objective, dtype)
    together = wrap(torch.vmap(one, in_dims=(None, None, 0, None)))
    mine = share(strategy.population, chunk) if part is None else part

    def evaluate(candidates: Candidates, batch: Batch) -> Float[Tensor, "P"]:
        with torch.no_grad():
            frozen, shared = prepare(candidates)
            found = [together(frozen, shared, own, batch) for own in chunks(candidates.own, strategy.population, mine)]
        return torch.cat(found)[: members(strategy.population, mine)]

    return evaluate


def members(population: int, part: Share) -> int:
    """How many members a part has."""
    return min(part.chunks.stop * part.size, population) - part.chunks.start * part.size


def chunks(own: Tree, population: int, part: Share) -> Iterator[Tree]:
    """The chunks of a part; the last one of all is filled up with repetitions of the last member."""
    size = part.size
    for start in (number * size for number in part.chunks):
        stop = min(start + size, population)
        if stop - start == size:
            yield tree.map(lambda leaf, start=start, stop=stop: leaf[start:stop], own)
        else:
            index = torch.arange(start, start + size, device=tree.leaves(own)[0].device).clamp(max=population - 1)
            yield tree.map(lambda leaf, index=index: leaf[index], own)


def looped(strategy: Strategy, space: Space, objective: Objective, dtype: torch.dtype = torch.float32) -> Evaluate:
    """The same one member after the other, from plain parameters: the reference, and what a loop costs."""

    def evaluate(candidates: Candidates, batch: Batch) -> Float[Tensor, "P"]:
        from functional_lm.model.compute import compute_copy

        found = []
        with torch.no_grad():
            for i in range(strategy.population):
                params = space.whole(space.base, strategy.dense(candidates, i))
                found.append(objective(compute_copy(params, dtype), batch).float())
        return torch.stack(found)

    return evaluate
