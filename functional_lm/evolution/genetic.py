"""A genetic algorithm over trees: tournaments, crossover, mutation, elites.

A generation's members are the state; `tell` makes the next ones. Child i draws from the generation's key folded with
i, and each leaf from that folded with its path.

Axes: P members, K entrants of a tournament.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.shaping import usable
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

CROSSOVERS = ("uniform", "arithmetic")
MUTATIONS = ("element", "tensor")


@dataclass(frozen=True)
class Settings:
    """The operators. Rates are probabilities; `strength` is in units of the tensor's spread."""

    population: int = 32
    elites: int = 2
    tournament: int = 3
    pressure: float = 0.9  # probability that a tournament's best wins; else the next, by the same rule
    crossover: str = "uniform"
    crossover_rate: float = 0.7
    mutation: str = "element"  # noise on single numbers, or on whole tensors
    mutation_rate: float = 0.1
    strength: float = 0.1
    floor: float = 0.02  # the least spread: a tensor of equal numbers would never change


class Population(NamedTuple):
    """The state. `members` [P, ...] are the ones that `ask` gives; `centre` is the best of the last generation told."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    members: Tree


def genetic(settings: Settings, wrap: Wrap = unwrapped) -> Strategy:
    """The strategy; `wrap` (`compiled`, say) goes around its heavy parts.

    Raises UsageError for settings that contradict each other.
    """
    check(settings)
    count = settings.population

    def following(key: Tensor, members: Tree, order: Tensor) -> Tree:
        children = torch.vmap(lambda k: child(k, members, order, settings))(common.member_keys(key, count))
        kept = order[: settings.elites]
        return tree.map(lambda new, old: torch.cat([old[kept], new[settings.elites :]]), children, members)

    def first(key: Tensor, start: Tree) -> Tree:
        return beginning(key, start, settings)

    first, following = wrap(first), wrap(following)

    def init(key: Tensor, start: Tree) -> Population:
        return Population(*common.begun(key, start), first(key, start))

    def ask(state: Population) -> Candidates:
        return Candidates({}, {}, state.members)

    def tell(state: Population, fitness: Float[Tensor, "P"]) -> Population:
        best, best_fitness = common.improved(state, fitness, lambda i: tree.map(lambda x: x[i], state.members))
        ranked, _ = usable(fitness)
        order = ranked.argsort(descending=True, stable=True)
        members = following(common.generation_key(state), state.members, order)
        centre = tree.map(lambda leaf: leaf[order[0]], state.members)
        return Population(state.key, state.generation + 1, centre, best, best_fitness, members)

    return Strategy("genetic", count, init, ask, tell)


def beginning(key: Tensor, start: Tree, settings: Settings) -> Tree:
    """The first members [P, ...]: the start itself, and mutants of it in which nothing is left out."""
    own = common.member_keys(keys.fold_in_name(key, "start"), settings.population)
    stacked = tree.map(lambda leaf: leaf.expand(settings.population, *leaf.shape), start)
    spread = spreads(start, settings.floor)
    mutated = torch.vmap(lambda k, m: mutate(k, m, spread, settings, always=True))(own, stacked)
    return tree.map(lambda new, old: torch.cat([old[None], new[1:]]), mutated, start)


def child(key: Tensor, members: Tree, order: Int[Tensor, "P"], settings: Settings) -> Tree:
    """One child: two parents by tournament, crossed (or the first as it is), then mutated."""
    first_key, second_key, cross_key, mutate_key = keys.split(key, 4).unbind()
    parents = [compete(k, order, settings) for k in (first_key, second_key)]
    first, second = (tree.map(lambda leaf, i=i: leaf[i], members) for i in parents)
    whether, how = keys.split(cross_key).unbind()
    crossed = cross(how, first, second, settings.crossover)
    crosses = keys.bernoulli(whether, settings.crossover_rate)
    made = tree.map(lambda both, one: torch.where(crosses, both, one), crossed, first)
    return mutate(mutate_key, made, spreads(made, settings.floor), settings)


def compete(key: Tensor, order: Int[Tensor, "P"], settings: Settings) -> Int[Tensor, ""]:
    """The winner of a tournament: the best of K entrants with probability p, else the next best with p, and so on.

    Goldberg and Deb, "A comparative analysis of selection schemes", FOGA 1991, section 5.
    """
    entrants_key, luck_key = keys.split(key).unbind()
    places = keys.randint(entrants_key, (settings.tournament,), 0, order.shape[0], torch.int64).sort().values
    wins = keys.bernoulli(luck_key, settings.pressure, (settings.tournament,))
    last = torch.arange(settings.tournament, device=key.device) == settings.tournament - 1
    return order[places[(wins | last).long().argmax()]]


def cross(key: Tensor, first: Tree, second: Tree, kind: str) -> Tree:
    """`uniform`: each number from either parent; `arithmetic`: the mean with one random weight for the child."""
    if kind == "arithmetic":
        return tree.lerp(first, second, keys.uniform(keys.fold_in_name(key, "weight")))
    chosen = common.drawn(key, common.shapes_of(first), lambda k, shape, _: keys.bernoulli(k, 0.5, shape))
    return tree.map_named(lambda name, a, b: torch.where(chosen[name], a, b), first, second)


def spreads(node: Tree, floor: float) -> Tree:
    """The standard deviation of each tensor's numbers, 0-d; of one that is constant its size, and at least `floor`."""

    def spread(leaf: Tensor) -> Tensor:
        deviation = leaf.float().std(correction=0)
        return torch.where(deviation > floor, deviation, leaf.float().square().mean().sqrt()).clamp(min=floor)

    return tree.map(spread, node)


def mutate(key: Tensor, member: Tree, spread: Tree, settings: Settings, always: bool = False) -> Tree:
    """Gaussian noise of `strength` spreads on each number (or each tensor) with probability `mutation_rate`.

    `always` (for the first generation) leaves nothing out.
    """
    noise_key, where_key = keys.split(key).unbind()
    noise = common.drawn(noise_key, common.shapes_of(member))
    tensors = settings.mutation == "tensor"
    places = {name: () if tensors else shape for name, shape in common.shapes_of(member).items()}
    hit = common.drawn(where_key, places, lambda k, shape, _: keys.bernoulli(k, settings.mutation_rate, shape))

    def changed(name: str, leaf: Tensor, size: Tensor) -> Tensor:
        step = settings.strength * size * noise[name]
        return leaf + (step if always else torch.where(hit[name], step, 0.0)).to(leaf.dtype)

    return tree.map_named(changed, member, spread)


def check(settings: Settings) -> None:
    """Raise UsageError for operators that contradict each other."""
    common.check_population(settings.population)
    if not 0 <= settings.elites < settings.population:
        raise UsageError(f"{settings.elites} elites leave no room in a population of {settings.population}")
    if settings.tournament < 1:
        raise UsageError(f"a tournament of {settings.tournament} has no winner; give at least 1")
    for name in ("pressure", "crossover_rate", "mutation_rate"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UsageError(f"{name} is {getattr(settings, name)}; a probability lies between 0 and 1")
    for name, kinds in (("crossover", CROSSOVERS), ("mutation", MUTATIONS)):
        if getattr(settings, name) not in kinds:
            raise UsageError(f"{name} is {getattr(settings, name)!r}; it can be {', '.join(kinds)}")
