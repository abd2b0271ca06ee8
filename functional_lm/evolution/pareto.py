"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE
Transactions on Evolutionary Computation 6, 2002): the genetic algorithm for several objectives.

A member dominates another that is nowhere better and somewhere worse. Rank 0 are those that nothing dominates, rank 1
those that only rank 0 does, and so on; within a rank the less crowded come first. Parents win binary tournaments by
that order, and of parents and children together the first P stay. Crossover and mutation are the genetic algorithm's.

All objectives are maximised. A row with anything that is not finite is worse than every other.

Axes: N members that are compared, P members of the population, O objectives.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.evolution import genetic, members
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree


class Population(NamedTuple):
    """The state; `figures` are those of each of the `members`.

    `centre` is the front's compromise, `best` the best of all in the first objective, `best_fitness` its figure there.
    """

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    members: Tree
    figures: Float[Tensor, "P O"]


def nsga2(settings: genetic.Settings, objectives: int, wrap: Wrap = unwrapped) -> Strategy:
    """The strategy; `wrap` (`compiled`, say) goes around its heavy parts. Elites and tournaments are its own.

    Raises UsageError for settings that contradict each other.
    """
    settings = dataclasses.replace(settings, elites=0, tournament=2, pressure=1.0)
    genetic.check(settings)
    if objectives < 2:
        raise UsageError(f"{objectives} objective has no front; give at least 2, or use genetic")
    count = settings.population

    def first(key: Tensor, start: Tree) -> Tree:
        return genetic.beginning(key, start, settings)

    def born(key: Tensor, parents: Tree, ranked: Tensor) -> Tree:
        return torch.vmap(lambda own: genetic.child(own, parents, ranked, settings))(common.member_keys(key, count))

    first, born = wrap(first), wrap(born)

    def init(key: Tensor, start: Tree) -> Population:
        head = common.begun(key, start, torch.float64)
        return Population(*head, first(key, start), members.unmeasured(key, count, objectives))

    def asked(state: Population) -> Tree:
        if int(state.generation) == 0:
            return state.members
        return born(common.generation_key(state), state.members, order(state.figures))

    def ask(state: Population) -> Candidates:
        return Candidates({}, {}, asked(state))

    def tell(state: Population, fitness: Float[Tensor, "P O"]) -> Population:
        children, figures = asked(state), usable(fitness.to(state.figures))
        best, best_fitness = common.improved(state, figures[:, 0], lambda i: members.member(children, i))
        # Children first: of equals the new ones stay, so that a plateau is crossed.
        pool = tree.map(lambda new, old: torch.cat([new, old]), children, state.members)
        known = torch.cat([figures, state.figures])
        stay = order(known)[:count]
        now, kept = tree.map(lambda leaf: leaf[stay], pool), known[stay]
        some = torch.isfinite(kept[:, 0]).any()
        middle = members.member(now, compromise(kept))
        centre = tree.map(lambda new, old: torch.where(some, new, old), middle, state.centre)
        return Population(state.key, state.generation + 1, centre, best, best_fitness, now, kept)

    def told(state: Population) -> dict[str, float]:
        return {"front": int(front(state.figures).sum())}

    return Strategy("nsga2", count, init, ask, tell, figures=objectives, told=told)


def usable(figures: Float[Tensor, "N O"]) -> Float[Tensor, "N O"]:
    """Rows of -inf in place of those that are not finite throughout."""
    return torch.where(torch.isfinite(figures).all(1, keepdim=True), figures, -math.inf)


def dominance(figures: Float[Tensor, "N O"]) -> Bool[Tensor, "N N"]:
    """Whether i dominates j."""
    first, second = figures[:, None], figures[None]
    return (first >= second).all(-1) & (first > second).any(-1)


def ranks(figures: Float[Tensor, "N O"]) -> Int[Tensor, "N"]:
    """The number of each member's front (section III-A): fronts are taken away one after the other."""
    over = dominance(usable(figures))
    rank = torch.full((len(figures),), -1, device=figures.device)
    number = 0
    while bool((left := rank < 0).any()):
        rank = torch.where(left & ~(over & left[:, None]).any(0), number, rank)
        number += 1
    return rank


def crowding(figures: Float[Tensor, "N O"], rank: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The crowding distance within each front (section III-B): the sides of the box between a member's neighbours.

    Each objective is scaled by its range in the front. The ends of a front are infinitely far from the others.
    """
    figures = usable(figures).double()
    fronts, total = int(rank.max()) + 1, figures.new_zeros(len(figures))
    for values in figures.unbind(1):
        at = values.argsort(stable=True)
        at = at[rank[at].argsort(stable=True)]
        high = values.new_full((fronts,), -math.inf).scatter_reduce(0, rank, values, "amax")[rank[at]]
        low = values.new_full((fronts,), math.inf).scatter_reduce(0, rank, values, "amin")[rank[at]]
        sorted_, same = values[at], rank[at][1:] == rank[at][:-1]
        edge = torch.ones(len(at) + 1, dtype=torch.bool, device=rank.device)
        edge[1:-1] = ~same
        beside = torch.cat([sorted_[:1], sorted_, sorted_[-1:]])
        side = torch.where(high > low, (beside[2:] - beside[:-2]) / (high - low), 0.0)
        total = total.index_add(0, at, torch.where(edge[1:] | edge[:-1], math.inf, side))
    return torch.where(torch.isfinite(figures[:, 0]), total, 0.0)


def order(figures: Float[Tensor, "N O"]) -> Int[Tensor, "N"]:
    """The members from the best to the worst by the crowded comparison: lower rank, then greater distance."""
    rank = ranks(figures)
    at = crowding(figures, rank).argsort(descending=True, stable=True)
    return at[rank[at].argsort(stable=True)]


def front(figures: Float[Tensor, "N O"]) -> Bool[Tensor, "N"]:
    """Which are finite and dominated by none."""
    return (ranks(figures) == 0) & torch.isfinite(figures).all(1)


def compromise(figures: Float[Tensor, "N O"]) -> Int[Tensor, ""]:
    """The member of the front that is nearest to the best of every objective, each scaled by its range in the front.

    The global criterion method of Miettinen, "Nonlinear multiobjective optimization", 1999, section 2.1.
    """
    inside = front(figures)[:, None]
    top = torch.where(inside, figures, -math.inf).amax(0)
    span = top - torch.where(inside, figures, math.inf).amin(0)
    away = torch.where(inside & (span > 0), (top - figures) / span, 0.0).square().sum(1)
    return torch.where(inside[:, 0], away, math.inf).argmin()
