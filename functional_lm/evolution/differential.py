"""Differential evolution (Storn and Price, "Differential evolution", Journal of Global Optimization 11, 1997).

    mutant = base + F (x_r1 - x_r2)        base: x_r0 (rand), the best member, or x_i + F (x_best - x_i)
    trial  = each number from the mutant with probability CR, one of them always, else from x_i      ("bin")
    x_i    = trial if it is as good or better

Members are measured once, in the first generation; then a generation is a trial for each of them. `tell` makes the
trials again, so the state holds the members alone.

Axes: P members, D numbers of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import members
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

BASES = ("rand", "best", "current-to-best")  # rand/1/bin, best/1/bin, current-to-best/1/bin


@dataclass(frozen=True)
class Settings:
    """`weight` is F, `crossover` is CR; `sigma` scatters the first members around the start."""

    population: int = 32
    sigma: float = 0.02
    base: str = "rand"
    weight: float = 0.5
    crossover: float = 0.9


class Population(NamedTuple):
    """The state; `fitness` is that of each of the `members` [P, ...]. `centre` is their mean."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    members: Tree
    fitness: Float[Tensor, "P"]


def differential(settings: Settings, wrap: Wrap = unwrapped) -> Strategy:
    """The strategy; `wrap` (`compiled`, say) goes around its heavy parts. Raises UsageError for bad settings."""
    check(settings)
    count = settings.population

    def tried(key: Tensor, now: Tree, fitness: Tensor) -> Tree:
        own, places = common.member_keys(key, count), torch.arange(count, device=key.device)
        best = members.member(now, fitness.argmax())
        return torch.vmap(lambda k, i: trial(k, i, now, best, settings))(own, places)

    def beginning(key: Tensor, start: Tree) -> Tree:
        return members.scattered(key, start, count, settings.sigma)

    first, tried = wrap(beginning), wrap(tried)

    def init(key: Tensor, start: Tree) -> Population:
        head = common.begun(key, start, torch.float64)
        return Population(*head, first(key, start), members.unmeasured(key, count))

    def asked(state: Population) -> Tree:
        if int(state.generation) == 0:
            return state.members
        return tried(common.generation_key(state), state.members, state.fitness)

    def ask(state: Population) -> Candidates:
        return Candidates({}, {}, asked(state))

    def tell(state: Population, fitness: Float[Tensor, "P"]) -> Population:
        trials, measured = asked(state), fitness.to(state.fitness)
        best, best_fitness = common.improved(state, fitness, lambda i: members.member(trials, i))
        better = torch.isfinite(measured) & (measured >= state.fitness)
        now = members.chosen(better, trials, state.members)
        known = torch.where(better, measured, state.fitness)
        return Population(state.key, state.generation + 1, members.mean(now), best, best_fitness, now, known)

    return Strategy("differential-evolution", count, init, ask, tell)


def trial(key: Tensor, i: Int[Tensor, ""], now: Tree, best: Tree, settings: Settings) -> Tree:
    """The trial for member i."""
    others_key, cross_key, always_key = keys.split(key, 3).unbind()
    count, f = settings.population, settings.weight
    parents = [members.member(now, other) for other in others(others_key, i, count, 3)]
    target = members.member(now, i)

    def mutant(x: Tensor, top: Tensor, r0: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
        base = {"rand": r0, "best": top, "current-to-best": x + f * (top - x)}[settings.base]
        return base + f * (r1 - r2)

    made = tree.map(mutant, target, best, *parents)
    shapes = common.shapes_of(target)
    taken = common.drawn(cross_key, shapes, lambda k, shape, _: keys.bernoulli(k, settings.crossover, shape))
    always = at(keys.randint(always_key, (), 0, tree.size(target), torch.int64), shapes)
    return tree.map_named(lambda name, x, v: torch.where(taken[name] | always[name], v, x), target, made)


def at(number: Int[Tensor, ""], shapes: common.Shapes) -> dict[str, Tensor]:
    """For each leaf where its numbers are the one of that number, counted through all leaves."""
    found: dict[str, Tensor] = {}
    before = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found[name] = (torch.arange(before, before + size, device=number.device) == number).view(shape)
        before += size
    return found


def others(key: Tensor, i: Int[Tensor, ""], count: int, how_many: int) -> list[Int[Tensor, ""]]:
    """Members that differ from i and from each other, uniformly."""
    taken: list[Tensor] = [i]
    for number, own in enumerate(keys.split(key, how_many).unbind(), 1):
        place = keys.randint(own, (), 0, count - number, torch.int64)
        for before in torch.stack(taken).sort().values.unbind():
            place = place + (place >= before)
        taken.append(place)
    return taken[1:]


def check(settings: Settings) -> None:
    common.check_population(settings.population, 4)
    if settings.base not in BASES:
        raise UsageError(f"the base is {settings.base!r}; it can be {', '.join(BASES)}")
    if settings.weight <= 0:
        raise UsageError(f"the differential weight is {settings.weight}; it has to be above 0")
    if not 0 <= settings.crossover <= 1:
        raise UsageError(f"the crossover rate is {settings.crossover}; a probability lies between 0 and 1")
