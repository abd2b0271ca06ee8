"""CMA-ES that begins again when it has converged, with other populations.

IPOP (Auger and Hansen, "A restart CMA evolution strategy with increasing population size", CEC 2005): each run has
twice the population of the one before. BIPOP (Hansen, "Benchmarking a BI-population CMA-ES on the BBOB-2009 function
testbed", GECCO 2009): such runs take turns with runs of small populations and small steps; the regime that has used
fewer evaluations goes next, and the first run counts as a small one, as in the author's program.

A strategy asks P members at a time, so populations are multiples of P (BIPOP's small ones are rounded to one): a
generation of m P members is asked in m parts, whose fitness the state keeps and whose noise is drawn again when the
last part is told. Every run begins where the first one began.

Axes: P members of a part, Q members of some parts or of all, M most parts, D numbers of the tree, H generations
remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import cma, vector
from functional_lm.evolution import strategy as common
from functional_lm.evolution.cma import Distribution
from functional_lm.evolution.shaping import usable
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

KINDS = ("ipop", "bipop")
DOUBLINGS = 9  # the most that BIPOP's author allows; later runs of the large regime stay at that size
SHORTEST = 10  # generations of a run, unless its first step is lost in its numbers or beyond them (`ended`)
HISTORY = 20000  # generations, the most that stagnation looks back
FIRST, LARGE, SMALL = range(3)


class Run(NamedTuple):
    """Where the restarts stand. Numbers are 0-d; int64 unless said."""

    number: Tensor  # runs that have ended
    regime: Tensor  # FIRST, LARGE or SMALL
    doublings: Tensor  # of the large regime
    parts: Tensor  # m: this run's population / P
    told: Tensor  # parts of this generation so far
    used: Tensor  # evaluations of this run
    limit: Tensor  # how many it may use
    spent: Int[Tensor, "3"]  # evaluations of ended runs, by regime
    large: Tensor  # evaluations of the last run that was not small
    sigma: Float[Tensor, ""]  # that the run began with
    fitness: Float[Tensor, "M P"]
    best: Float[Tensor, "H"]  # of each generation of this run, the newest last
    median: Float[Tensor, "H"]


class State(NamedTuple):
    """The state; `start` is where runs begin."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    distribution: Distribution
    start: Float[Tensor, "D"]
    run: Run


def restarting(
    kind: str,
    population: int,
    sigma: float,
    separable: bool = False,
    dtype: torch.dtype | None = None,
    doublings: int = DOUBLINGS,
) -> Strategy:
    """CMA-ES, full (float64) or separable (float32), with restarts of a kind; `population` is the first run's.

    Raises UsageError for a kind that there is not.
    """
    common.check_population(population)
    if kind not in KINDS:
        raise UsageError(f"there are no restarts {kind!r}; there are {', '.join(KINDS)}")
    dtype = dtype or (torch.float32 if separable else torch.float64)
    name = f"{'sep-' if separable else ''}cma-es"
    search = _searches(sigma, dtype, separable)

    def init(key: Tensor, start: Tree) -> State:
        head = common.begun(key, start, dtype)
        vector.check_size(name, tree.size(start), None if separable else vector.FULL_LIMIT)
        at = vector.ravel(start, dtype)
        run = _first(at, population, sigma, doublings)
        return State(*head, search(at, population).init(at), at, run)

    def draws(state: State, first: int, last: int) -> Float[Tensor, "Q D"]:
        """The noise of some parts of the present generation."""
        parts = state.generation - state.run.told + torch.arange(first, last + 1, device=state.key.device)
        own = torch.vmap(lambda part: keys.fold_in(state.key, part))(parts)
        return torch.vmap(lambda key: vector.drawn(key, population, state.centre, dtype))(own).flatten(0, 1)

    def points(state: State, z: Tensor) -> Float[Tensor, "P D"]:
        return search(state.start, population).points(state.distribution, z)

    def ask(state: State) -> Candidates:
        part = int(state.run.told)
        return Candidates({}, {}, vector.unravel(points(state, draws(state, part, part)), state.centre))

    def tell(state: State, fitness: Float[Tensor, "P"]) -> State:
        part, run = int(state.run.told), state.run
        whole = part + 1 == int(run.parts)
        z = draws(state, 0 if whole else part, part)
        x = points(state, z[-population:])
        best, best_fitness = common.improved(state, fitness, lambda i: vector.unravel(x[i], state.centre))
        measured = run.fitness.index_copy(0, run.told[None], usable(fitness)[0].to(run.fitness)[None])
        run = run._replace(fitness=measured, told=run.told + 1, used=run.used + population)
        after = state._replace(generation=state.generation + 1, best=best, best_fitness=best_fitness, run=run)
        return generation_told(after, z, measured[: part + 1].flatten()) if whole else after

    def generation_told(state: State, z: Float[Tensor, "Q D"], known: Float[Tensor, "Q"]) -> State:
        """The state after the last part of a generation of Q members."""
        run = state.run._replace(told=torch.zeros_like(state.run.told))
        if not bool(torch.isfinite(known).any()):
            return state._replace(run=run)
        distribution = search(state.start, len(z)).update(state.distribution, z, vector.places(known))
        run = run._replace(
            best=torch.cat([run.best[1:], known.max()[None]]),
            median=torch.cat([run.median[1:], known.median()[None]]),
        )
        if bool(torch.stack(list(ended(distribution, known, run, separable).values())).any()):
            key = keys.fold_in_name(common.generation_key(state), "restart")
            run = following(key, run, kind, population, sigma, state.start.shape[0], doublings)
            distribution = search(state.start, population).init(state.start)._replace(sigma=run.sigma)
        centre = vector.unravel(distribution.mean, state.centre)
        return state._replace(centre=centre, distribution=distribution, run=run)

    return Strategy(name, population, init, ask, tell, told=figures, batch=first_part)


def first_part(state: State) -> int:
    """The number of the part that the present generation began with."""
    return int(state.generation - state.run.told)


def figures(state: State) -> dict[str, float]:
    """What is recorded of a state."""
    return {"restarts": int(state.run.number), "parts": int(state.run.parts), "sigma": float(state.distribution.sigma)}


def _searches(sigma: float, dtype: torch.dtype, separable: bool) -> Callable[[Tensor, int], Any]:
    def search(start: Float[Tensor, "D"], members: int) -> vector.Search:
        return cma.search_of(start.shape[0], members, sigma, dtype, separable)

    return search


# Runs -----------------------------------------------------------------------------------------------------------------


def _first(at: Float[Tensor, "D"], population: int, sigma: float, doublings: int) -> Run:
    def number(value: int) -> Tensor:
        return torch.tensor(value, device=at.device)

    worst = torch.full((HISTORY,), -math.inf, dtype=at.dtype, device=at.device)
    return Run(
        number(0), number(FIRST), number(0), number(1), number(0), number(0),
        number(longest(at.shape[0], population)), torch.zeros(3, dtype=torch.int64, device=at.device), number(0),
        torch.tensor(sigma, dtype=at.dtype, device=at.device),
        torch.full((2**doublings, population), -math.inf, dtype=at.dtype, device=at.device), worst, worst.clone(),
    )  # fmt: skip


def longest(size: int, members: int) -> int:
    """Evaluations of a run, at most: 100 + 50 (D + 3)² / √λ generations (Hansen 2009, section 3)."""
    return members * int(100 + 50 * (size + 3) ** 2 / math.sqrt(members))


def most_parts(parts: int, doublings: int = DOUBLINGS) -> int:
    """The largest population, over the first one, of restarts that are asked so many parts in all."""
    doubled, asked = 0, SHORTEST
    while doubled < doublings and asked + 2 ** (doubled + 1) <= parts:
        doubled += 1
        asked += SHORTEST * 2**doubled
    return int(2**doubled)


def following(key: Tensor, run: Run, kind: str, population: int, sigma: float, size: int, most: int) -> Run:
    """The run after one that ended.

    A small one has (λ_large / 2 λ_first)^(U²) times the first population, rounded, σ 10^(-2U) times the first, and half
    the evaluations of the last large one (Hansen 2009, section 2).
    """
    device = run.number.device
    spent = run.spent.clone()
    spent[run.regime] += run.used
    large = run.large if int(run.regime) == SMALL else run.used
    small = kind == "bipop" and int(spent[FIRST] + spent[SMALL]) < int(spent[LARGE])
    doublings = int(run.doublings) + (0 if small else 1)
    parts, step, limit = 2 ** min(doublings, most), 1.0, 0
    if small:
        first, second = keys.uniform(key, (2,), torch.float64).tolist()
        parts, step = max(1, round((parts / 2) ** (first**2))), 10 ** (-2 * second)
        limit = int(large) // 2
    limit = min(filter(None, (limit, longest(size, parts * population))))
    worst = torch.full_like(run.best, -math.inf)
    return Run(
        run.number + 1, torch.tensor(SMALL if small else LARGE, device=device),
        torch.tensor(min(doublings, most), device=device), torch.tensor(parts, device=device),
        torch.zeros_like(run.told), torch.zeros_like(run.used), torch.tensor(limit, device=device), spent, large,
        torch.full_like(run.sigma, sigma * step), torch.full_like(run.fitness, -math.inf), worst, worst.clone(),
    )  # fmt: skip


# What ends a run ------------------------------------------------------------------------------------------------------


def ended(at: Distribution, known: Float[Tensor, "Q"], run: Run, separable: bool) -> dict[str, Bool[Tensor, ""]]:
    """The criteria of arXiv 1604.00772, appendix B.3, each true or false, after a generation with `known` fitness.

    The tolerances are those of Hansen 2009: TolFun 1e-12, TolX 1e-12 σ₀.
    """
    size, members, count = at.mean.shape[0], len(known), int(at.updates)
    window = min(10 + math.ceil(30 * size / members), HISTORY)
    recent = run.best[-window:]
    scales = at.sigma * (at.covariance if separable else at.covariance.diagonal()).sqrt()
    filled = count >= window
    axis = (count - 1) % size
    along = scales if separable else at.sigma * at.roots[axis] * at.basis[:, axis]
    return {
        "no effect of an axis": (at.mean == at.mean + 0.1 * along).all(),
        "no effect of a coordinate": (at.mean == at.mean + 0.2 * scales).any(),
        "condition": (at.roots.max() / at.roots.min()).square() > 1e14,
        "equal values": (recent.max() == recent.min()) & filled,
        "fitness tolerance": (recent.max() - recent.min() < 1e-12) & (known.max() - known.min() < 1e-12) & filled,
        "step tolerance": ((scales < 1e-12 * run.sigma) & (at.sigma * at.path.abs() < 1e-12 * run.sigma)).all(),
        "divergence": at.sigma * at.roots.max() > 1e4 * run.sigma,
        "stagnation": torch.tensor(stagnating(run, count, size, members), device=at.mean.device),
        "length": run.used >= run.limit,
    }


def stagnating(run: Run, count: int, size: int, members: int) -> bool:
    """Whether neither the best nor the median of the newest 30 % is better than of the oldest 30 % of a window.

    The window is the last fifth of the run, at least 120 + 30 D / λ and at most `HISTORY` generations.
    """
    window = min(max(count // 5, 120 + math.ceil(30 * size / members)), HISTORY)
    if count < window:
        return False
    share = max(1, 3 * window // 10)
    return all(bool(values[-share:].median() <= values[-window:][:share].median()) for values in (run.best, run.median))
