"""A whole population through one compiled call: members are a vmap axis, what they share is not mapped.

    evaluate = evaluator(strategy, space, objective, dtype, chunk, compiled)
    fitness  = evaluate(candidates, batch)                                      [P]

The members go through in chunks of one size, so that one graph serves all of them and all generations; the last chunk
is filled up with members that count nothing. What each has of its own is made first, for a chunk, and then computed
with: noise that were drawn in the midst of the products would be drawn again for whatever reads it.

Axes: P members, C members of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import kernels, tree
from functional_lm.errors import UsageError
from functional_lm.evolution.fitness import Batch, Objective
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.spaces import Space
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.model.compute import compute_copy
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
            first = tree.map(lambda leaf: leaf[:1], candidates.own)
            kept["names"] = list(tree.flatten(strategy.members(candidates.shared, first)))
        if candidates.fixed or "frozen" not in kept:
            frozen = space.freeze(space.base, candidates.fixed, kept["names"], dtype)
            if candidates.fixed:
                return Prepared(frozen, candidates.shared)
            kept["frozen"] = frozen
        return Prepared(kept["frozen"], candidates.shared)

    return prepare


def making(
    strategy: Strategy, space: Space, dtype: torch.dtype, with_kernels: bool = False
) -> Callable[[Tree, Tree, Tree], Tree]:
    """`(frozen, shared, own [C, ...]) -> [C, ...]`: what each member computes with, its own leaves or its model.

    `with_kernels` leaves adapters as they are, for the kernel of low-rank noise.
    """

    def each(frozen: Tree, leaves: Tree) -> Tree:
        if space.makes:
            return space.model(frozen, leaves, dtype)
        return compute_copy(kernels.thin(leaves) if with_kernels else leaves, dtype, fuse=False)

    def make(frozen: Tree, shared: Tree, own: Tree) -> Tree:
        return torch.vmap(each, in_dims=(None, 0))(frozen, strategy.members(shared, own))

    return make


def model_of(space: Space, dtype: torch.dtype, frozen: Tree, made: Tree) -> Tree:
    """The model of one of the members that `making` made."""
    return made if space.makes else space.model(frozen, made, dtype)


def measuring(space: Space, objective: Objective, dtype: torch.dtype) -> Callable[[Tree, Tree, Batch], Tensor]:
    """`(frozen, made [C, ...], batch) -> fitness` [C]."""

    def one(frozen: Tree, made: Tree, batch: Batch) -> Tensor:
        return objective(model_of(space, dtype, frozen, made), batch).float()

    return torch.vmap(one, in_dims=(None, 0, None))


def evaluator(
    strategy: Strategy,
    space: Space,
    objective: Objective,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
    wrap: Wrap = unwrapped,
    part: Share | None = None,
    with_kernels: bool = False,
) -> Evaluate:
    """`(candidates, batch) -> fitness` [P] float32 through two wrapped (compiled) calls for each `chunk` of members.

    With a `part` it measures that alone. `with_kernels` asks for `kernels.obstacle()` to be None.
    """
    prepare = preparation(strategy, space, dtype)
    make, measure = wrap(making(strategy, space, dtype, with_kernels)), wrap(measuring(space, objective, dtype))
    mine = share(strategy.population, chunk) if part is None else part

    def evaluate(candidates: Candidates, batch: Batch) -> Float[Tensor, "P"]:
        with torch.no_grad():
            frozen, shared = prepare(candidates)
            parts = chunks(candidates.own, strategy.population, mine)
            found = [measure(frozen, make(frozen, shared, own), batch) for own in parts]
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
        found = []
        with torch.no_grad():
            for i in range(strategy.population):
                params = space.whole(space.base, strategy.dense(candidates, i))
                found.append(objective(compute_copy(params, dtype), batch).float())
        return torch.stack(found)

    return evaluate
