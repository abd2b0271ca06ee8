"""Strategies over one ravelled vector: what they share, so that each is a draw and an update.

    search.init(mean [D], sigma) -> distribution
    search.points(distribution, z [P, D]) -> x [P, D]            z standard normal
    search.update(distribution, z, places) -> distribution       `places` [P]: 0 for the best, P - 1 for the worst

Member i's z is drawn from the generation's key folded with i and with the leaf's path, again in `tell`: neither other
leaves, nor their order, nor the number of members change what a leaf draws. What becomes of it is one vector: step
sizes and covariances know all leaves, and the eigenvectors of a full CMA-ES their order.

Axes: P members, D numbers of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.shaping import usable
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

FULL_LIMIT = 2000  # numbers beyond which a full covariance (D² of them, and D³ work) is refused


class Search(NamedTuple):
    """The functions of one strategy over vectors."""

    init: Callable[[Float[Tensor, "D"]], Any]
    points: Callable[[Any, Float[Tensor, "P D"]], Float[Tensor, "P D"]]
    update: Callable[[Any, Float[Tensor, "P D"], Int[Tensor, "P"]], Any]
    mean: Callable[[Any], Float[Tensor, "D"]]


class State(NamedTuple):
    """A strategy's state; `distribution` is its own."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    distribution: Any


def ravel(node: Tree, dtype: torch.dtype) -> Float[Tensor, "D"]:
    """All leaves end to end, in the tree's order."""
    return torch.cat([leaf.to(dtype).flatten() for leaf in tree.leaves(node)])


def unravel(vectors: Float[Tensor, "*P D"], like: Tree) -> Tree:
    """The trees of vectors, in the shapes and dtypes of `like`."""
    leaves = tree.leaves(like)
    parts = iter(vectors.split([leaf.numel() for leaf in leaves], dim=-1))
    return tree.map(lambda leaf: next(parts).reshape((*vectors.shape[:-1], *leaf.shape)).to(leaf.dtype), like)


def over_vectors(
    name: str,
    population: int,
    search: Callable[[int, torch.dtype], Search],
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    wrap: Wrap = unwrapped,
) -> Strategy:
    """The strategy that `search(D, dtype)` makes for a tree of D numbers. `limit` is the largest D.

    `wrap` (`compiled`, say) goes around ask and tell.
    """
    common.check_population(population)

    def made(like: Tree) -> Search:
        return search(tree.size(like), dtype)

    def init(key: Tensor, start: Tree) -> State:
        head = common.begun(key, start, dtype)
        check_size(name, tree.size(start), limit)
        # No two leaves are one tensor and all lie as those of later generations do, so that one graph serves all.
        return tree.copy(State(*head, made(start).init(ravel(start, dtype))))

    def draws(state: State) -> Float[Tensor, "P D"]:
        return drawn(common.generation_key(state), population, state.centre, dtype)

    def ask(state: State) -> Candidates:
        points = made(state.centre).points(state.distribution, draws(state))
        return Candidates({}, {}, unravel(points, state.centre))

    def tell(state: State, fitness: Float[Tensor, "P"]) -> State:
        own = made(state.centre)

        def candidate(index: Tensor) -> Tree:
            each = common.member_keys(common.generation_key(state), population)
            z = drawn_of(each[index[None]], state.centre, dtype)  # its own draw: those of all are not kept
            return unravel(own.points(state.distribution, z)[0], state.centre)

        best, best_fitness = common.improved(state, fitness, candidate)
        known, finite = usable(fitness)
        told = own.update(state.distribution, draws(state), places(known))
        some = finite.any()  # where nothing is known there is nothing to follow
        distribution = tree.map(lambda new, old: torch.where(some, new, old), told, state.distribution)
        centre = unravel(own.mean(distribution), state.centre)
        return State(state.key, state.generation + 1, centre, best, best_fitness, distribution)

    return Strategy(name, population, init, wrap(ask), wrap(tell))


def check_size(name: str, size: int, limit: int | None) -> None:
    """Raise UsageError for more numbers than a full covariance is kept of."""
    if limit is not None and size > limit:
        raise UsageError(
            f"{name} keeps a full covariance, and {size} numbers are more than {limit}; "
            "evolve fewer, or use snes or sep-cma-es"
        )


def drawn(key: Tensor, population: int, like: Tree, dtype: torch.dtype) -> Float[Tensor, "P D"]:
    """Standard normal numbers for each member of a generation, in the order of the leaves of `like`."""
    return drawn_of(common.member_keys(key, population), like, dtype)


def drawn_of(members: Int[Tensor, "Q 2"], like: Tree, dtype: torch.dtype) -> Float[Tensor, "Q D"]:
    """Those of some members, by their keys."""
    sizes = {name: (math.prod(shape),) for name, shape in common.shapes_of(like).items()}

    def one(own: Tensor) -> Tensor:
        parts = list(common.drawn(own, sizes, dtype=dtype).values())
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return torch.vmap(one)(members)


def places(known: Float[Tensor, "P"]) -> Int[Tensor, "P"]:
    """The place of each member: 0 for the best one; of equals the first stays in front."""
    return known.argsort(descending=True, stable=True).argsort()


def weighed(weights: Float[Tensor, "P"], rows: Float[Tensor, "P D"]) -> Float[Tensor, "D"]:
    """The sum of rows by weights.

    Not a product, for which the compiler would first hold all of the rows; a sum draws them where it adds them.
    """
    return (weights[:, None] * rows).sum(0)
