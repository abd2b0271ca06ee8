"""Particle swarm optimization with constriction (Clerc and Kennedy, "The particle swarm: explosion, stability, and
convergence in a multidimensional complex space", IEEE Transactions on Evolutionary Computation 6, 2002).

    v = w v + c₁ r₁ (own best - x) + c₂ r₂ (swarm's best - x),   x = x + v        r₁, r₂ uniform, for each number

The usual form: w = χ and c₁ = c₂ = 2.05 χ, where χ = 2 / |2 - φ - √(φ² - 4φ)| for φ = 4.1 (equation 14 with κ = 1).

Axes: P particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import members
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree


def constriction(phi: float) -> float:
    """χ, for φ = c₁ + c₂ above 4 before it is multiplied in."""
    return 2 / abs(2 - phi - math.sqrt(phi * phi - 4 * phi))


@dataclass(frozen=True)
class Settings:
    """`sigma` scatters the first particles around the start; they begin at rest."""

    population: int = 32
    sigma: float = 0.02
    inertia: float = 0.7298
    cognitive: float = 1.49618
    social: float = 1.49618


class Swarm(NamedTuple):
    """The state; `places`, `speeds` and `own` (each particle's best place, with its `fitness`) are [P, ...].

    `centre` is the mean of the own bests.
    """

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    places: Tree
    speeds: Tree
    own: Tree
    fitness: Float[Tensor, "P"]


def particle_swarm(settings: Settings, wrap: Wrap = unwrapped) -> Strategy:
    """The strategy; `wrap` (`compiled`, say) goes around its heavy parts. Raises UsageError for bad settings."""
    check(settings)
    count = settings.population

    def flown(key: Tensor, places: Tree, speeds: Tree, own: Tree, fitness: Tensor) -> tuple[Tree, Tree]:
        top = members.member(own, fitness.argmax())
        drawn = common.member_keys(key, count)
        faster = torch.vmap(lambda k, x, v, mine: speed(k, x, v, mine, top, settings))(drawn, places, speeds, own)
        return tree.add(places, faster), faster

    def beginning(key: Tensor, start: Tree) -> Tree:
        return members.scattered(key, start, count, settings.sigma)

    first, flown = wrap(beginning), wrap(flown)

    def init(key: Tensor, start: Tree) -> Swarm:
        head, places = common.begun(key, start, torch.float64), first(key, start)
        return Swarm(*head, places, tree.zeros_like(places), places, members.unmeasured(key, count))

    def ask(state: Swarm) -> Candidates:
        return Candidates({}, {}, state.places)

    def tell(state: Swarm, fitness: Float[Tensor, "P"]) -> Swarm:
        measured = fitness.to(state.fitness)
        best, best_fitness = common.improved(state, fitness, lambda i: members.member(state.places, i))
        better = torch.isfinite(measured) & (measured > state.fitness)
        own = members.chosen(better, state.places, state.own)
        known = torch.where(better, measured, state.fitness)
        places, speeds = flown(common.generation_key(state), state.places, state.speeds, own, known)
        return Swarm(
            state.key, state.generation + 1, members.mean(own), best, best_fitness, places, speeds, own, known
        )  # fmt: skip

    return Strategy("pso", count, init, ask, tell)


def speed(key: Tensor, x: Tree, v: Tree, own: Tree, top: Tree, settings: Settings) -> Tree:
    """The new velocity of one particle."""
    own_key, top_key = keys.split(key).unbind()
    shapes = common.shapes_of(x)
    r1, r2 = (common.drawn(k, shapes, lambda k, shape, _: keys.uniform(k, shape)) for k in (own_key, top_key))

    def one(name: str, x: Tensor, v: Tensor, mine: Tensor, best: Tensor) -> Tensor:
        pull = settings.cognitive * r1[name] * (mine - x) + settings.social * r2[name] * (best - x)
        return (settings.inertia * v + pull).to(v.dtype)

    return tree.map_named(one, x, v, own, top)


def check(settings: Settings) -> None:
    common.check_population(settings.population)
    if not 0 <= settings.inertia < 1:
        raise UsageError(f"the inertia is {settings.inertia}; from 1 on a swarm never comes to rest")
    for name in ("cognitive", "social"):
        if getattr(settings, name) < 0:
            raise UsageError(f"the {name} weight is {getattr(settings, name)}; it has to be at least 0")
