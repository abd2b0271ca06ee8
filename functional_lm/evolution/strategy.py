"""What a strategy is: pure functions around a state that is a pytree.

    state      = strategy.init(key, start)          start: any tree of floating-point tensors
    candidates = strategy.ask(state)                P members, as what they share and what each has of its own
    state      = strategy.tell(state, fitness)      fitness [P], higher is better

`strategy.members(shared, own)` are the leaves that are each member's own [C, ...], of all or of a run of them, in front
of `candidates.fixed`, which all have as they stand. So an evaluation is
`vmap(lambda own: f(overlay(fixed, own)))(members(shared, own))`, and a member may be leaves, noise that is added inside
the forward, or nothing but a key to draw it from.

Draws are functions of (generation's key, member, leaf's path) alone, so that `tell` needs no candidates: it draws what
it needs again. Neither the order of leaves nor which others there are changes a draw. (One looks at all
of them: differential evolution, where it picks the number that is always crossed.)

Axes: P members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution.shaping import usable
from functional_lm.tree import Tree


class Candidates(NamedTuple):
    """P members: leaves that all have as they stand, what a member is made with, what it has of its own [P, ...]."""

    fixed: Tree
    shared: Tree
    own: Tree


class State(Protocol):
    """What every strategy's state keeps besides its own. Numbers are 0-d tensors."""

    @property
    def key(self) -> Tensor: ...
    @property
    def generation(self) -> Tensor: ...
    @property
    def centre(self) -> Tree: ...
    @property
    def best(self) -> Tree: ...
    @property
    def best_fitness(self) -> Tensor: ...


def as_it_stands(shared: Tree, own: Tree) -> Tree:
    """The `members` of strategies whose candidates are plain trees."""
    return own


def plain(candidates: Candidates, index: int) -> Tree:
    """The `dense` of those."""
    return tree.index(candidates.own, index)


def nothing(state: Any) -> dict[str, float]:
    return {}


def generation_of(state: State) -> int:
    return int(state.generation)


def unchanged(state: Any) -> Any:
    return state


class Strategy(NamedTuple):
    """The functions of one strategy. `dense` makes plain leaves of what `ask` gave for one member.

    With more than one figure, fitness is [P, figures]. `told` are numbers about a state for its records. What is
    measured at states of the same `batch` is ranked together, and on the same minibatch. `renewed` is a state with this
    strategy's numbers in place of those that it was saved with.
    """

    name: str
    population: int
    init: Callable[[Tensor, Tree], Any]
    ask: Callable[[Any], Candidates]
    tell: Callable[[Any, Tensor], Any]
    members: Callable[[Tree, Tree], Tree] = as_it_stands
    dense: Callable[[Candidates, int], Tree] = plain
    figures: int = 1
    told: Callable[[Any], dict[str, float]] = nothing
    batch: Callable[[Any], int] = generation_of
    renewed: Callable[[Any], Any] = unchanged


def unmoved(population: int = 1) -> Strategy:
    """No search at all: candidates that were made elsewhere, to be measured."""

    def never(*_: Any) -> Any:
        raise TypeError("a strategy that only measures neither asks nor tells")

    return Strategy("unmoved", population, never, never, never)


def shape_of_fitness(strategy: Strategy) -> tuple[int, ...]:
    """[P], or [P, O] where a member has several figures."""
    return (strategy.population,) if strategy.figures == 1 else (strategy.population, strategy.figures)


def evaluate(strategy: Strategy, candidates: Candidates, function: Callable[[Tree], Any]) -> Float[Tensor, "P *O"]:
    """The fitness of each member by any Python function of its plain tree, one after the other, float64.

    A function of several figures returns a sequence of them.
    """
    values = [function(strategy.dense(candidates, i)) for i in range(strategy.population)]
    if strategy.figures > 1:
        return torch.tensor([[float(figure) for figure in row] for row in values], dtype=torch.float64)
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def begun(
    key: Tensor, start: Tree, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tree, Tree, Float[Tensor, ""]]:
    """What every state begins with: the key, generation 0, `start` as centre and as best, whose fitness is unknown.

    `dtype` is that of the fitness. Raises UsageError for a tree that holds nothing to evolve.
    """
    check_tree(start)
    return key, torch.zeros((), dtype=torch.int64, device=key.device), start, start, worst(key).to(dtype)


def improved(state: State, fitness: Float[Tensor, "P"], candidate: Callable[[Tensor], Tree]) -> tuple[Tree, Tensor]:
    """The best tree and fitness so far, given this generation's; `candidate(index)` is called for its winner."""
    sorted_out, _ = usable(fitness)
    index = sorted_out.argmax()
    value = sorted_out.amax().to(state.best_fitness.dtype)
    better = value > state.best_fitness
    best = tree.map(lambda new, old: torch.where(better, new, old).to(old.dtype), candidate(index), state.best)
    return best, torch.where(better, value, state.best_fitness)


def worst(like: Tensor) -> Float[Tensor, ""]:
    """The fitness of what has not been measured."""
    return torch.full((), -math.inf, device=like.device)


# Draws ----------------------------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


def generation_key(state: State) -> Tensor:
    return keys.fold_in(state.key, state.generation)


def member_keys(key: Tensor, count: int) -> Int[Tensor, "P 2"]:
    """A key for each member. Member i's does not depend on how many there are."""
    return keys.split(key, count)


def leaf_keys(key: Tensor, names: list[str]) -> Int[Tensor, "N 2"]:
    """The key of each name: `fold_in_name`, as one table."""
    table = torch.tensor([keys.name_hash(name) - 2**32 * (keys.name_hash(name) >> 31) for name in names])
    return torch.vmap(keys.fold_in, (None, 0))(key, table.to(device=key.device, dtype=torch.int32))


def drawn(
    key: Tensor, shapes: Shapes, draw: Callable[..., Tensor] = keys.normal, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A draw for each name, from the key folded with it; names of one shape in one call, one kernel."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(tuple(shape), []).append(name)
    made: dict[str, Tensor] = {}
    for shape, names in groups.items():
        together = torch.vmap(lambda own, shape=shape: draw(own, shape, dtype))(leaf_keys(key, names))
        made |= dict(zip(names, together.unbind()))
    return {name: made[name] for name in shapes}


def shapes_of(node: Tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in tree.flatten(node).items()}


# What is asked of all of them -----------------------------------------------------------------------------------------


def check_population(population: int, least: int = 2, antithetic: bool = False) -> None:
    """Raise UsageError for a population that the strategy cannot work with."""
    if population < least:
        raise UsageError(f"a population of {population} is too small; this strategy needs at least {least}")
    if antithetic and population % 2:
        raise UsageError(f"a population of {population} is odd; antithetic pairs need an even one")


def check_tree(start: Tree) -> None:
    """Raise UsageError for a tree that holds nothing to evolve."""
    flat = tree.flatten(start)
    if not flat:
        raise UsageError("there is nothing to evolve; choose leaves that the model has")
    for name, leaf in flat.items():
        if not leaf.is_floating_point():
            raise UsageError(f"{name} holds {leaf.dtype}; only floating-point leaves are evolved")
