"""Differential evolution and particle swarms: their papers' formulas, found again in what they ask.

Axes: P members, D numbers.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, numbers
from test_covariance import descend, rastrigin, rosenbrock
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import differential, elites, genetic, members, pareto, swarm

START = {"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}}


def flat(node: tree.Tree) -> Tensor:
    """[P, D]"""
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(node)], 1)


def begun(how: differential.Settings, seed: int = 0) -> tuple[differential.Strategy, differential.Population]:
    """A population whose first generation is told."""
    strategy = differential.differential(how)
    state = strategy.init(keys.key(seed), START)
    return strategy, strategy.tell(state, numbers((how.population,), seed))


@pytest.mark.parametrize("base", differential.BASES)
def test_a_mutant_is_a_base_and_a_scaled_difference_of_distinct_others(base: str) -> None:
    """With CR = 1 a trial is the mutant; exactly one choice of the other members explains all its numbers."""
    how = differential.Settings(6, 1.0, base, 0.7, 1.0)
    strategy, state = begun(how)
    x, trials, best = flat(state.members), flat(strategy.ask(state).own), int(state.fitness.argmax())
    seen = set()
    for i in range(6):
        explained = []
        for r0, r1, r2 in itertools.permutations([j for j in range(6) if j != i], 3):
            start = {"rand": x[r0], "best": x[best], "current-to-best": x[i] + 0.7 * (x[best] - x[i])}[base]
            if torch.allclose(start + 0.7 * (x[r1] - x[r2]), trials[i], atol=1e-5):
                explained.append((r0, r1, r2))
        assert len(explained) == (1 if base == "rand" else 3)  # r0 stands for one of the three that are left
        seen |= set(explained)
    assert len(seen) > 3


@given(seed=SEEDS, i=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_others_are_distinct(seed: int, i: int) -> None:
    found = [int(j) for j in differential.others(keys.key(seed), torch.tensor(i), 8, 3)]
    assert len({i, *found}) == 4
    assert all(0 <= j < 8 for j in found)


def test_others_are_uniform() -> None:
    own = keys.split(keys.key(0), 3000)
    drawn = torch.vmap(lambda key: torch.stack(differential.others(key, torch.tensor(2), 5, 3)))(own)
    counts = torch.stack([(drawn == j).float().mean(0) for j in range(5)])
    wanted = torch.full((5, 3), 0.25)
    wanted[2] = 0
    torch.testing.assert_close(counts, wanted, rtol=0, atol=0.04)


@given(seed=SEEDS, rate=st.sampled_from([0.0, 0.3, 0.9]))
@settings(max_examples=15, deadline=None)
def test_a_trial_takes_at_least_one_number_of_the_mutant(seed: int, rate: float) -> None:
    how = differential.Settings(12, 1.0, "rand", 0.5, rate)
    strategy, state = begun(how, seed)
    changed = flat(strategy.ask(state).own) != flat(state.members)
    assert (changed.sum(1) >= 1).all()
    if rate == 0:
        assert (changed.sum(1) == 1).all()


def test_as_many_numbers_as_the_crossover_rate_says() -> None:
    how = differential.Settings(500, 1.0, "rand", 0.5, 0.3)
    strategy, state = begun(how)
    changed = (flat(strategy.ask(state).own) != flat(state.members)).float()
    assert float(changed.mean()) == pytest.approx(0.3 + 0.7 / 7, abs=0.03)
    torch.testing.assert_close(changed.mean(0), torch.full((7,), 0.4), rtol=0, atol=0.08)


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.nan, math.inf, -math.inf]), min_size=8, max_size=8),
    seed=SEEDS,
)
@settings(max_examples=25, deadline=None)
def test_selection_is_greedy_member_by_member(values: list[float], seed: int) -> None:
    strategy, state = begun(differential.Settings(8, 1.0), seed)
    trials = strategy.ask(state).own
    told = strategy.tell(state, torch.tensor(values))
    for i, value in enumerate(values):
        wins = math.isfinite(value) and value >= float(state.fitness[i])
        source = trials if wins else state.members
        assert tree.digest(tree.index(told.members, i)) == tree.digest(tree.index(source, i))
        assert float(told.fitness[i]) == (value if wins else float(state.fitness[i]))


def test_differential_evolution_on_functions() -> None:
    """Rosenbrock's valley in 2 dimensions, De Jong's second function of the paper, to its 1e-6; Rastrigin's in 5."""
    how = differential.Settings(10, 1.0, "rand", 0.9, 0.9)
    value, used = descend(differential.differential(how), torch.tensor([-1.0, 1.5]).double(), rosenbrock, 1e-6, 4000)
    assert value <= 1e-6, used
    how = differential.Settings(30, 3.0, "rand", 0.5, 0.2)
    value, used = descend(differential.differential(how), torch.full((5,), 2.5).double(), rastrigin, 1e-3, 12000)
    assert value <= 1e-3, used


# The swarm ------------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_constriction() -> None:
    chi = swarm.constriction(4.1)
    assert chi == pytest.approx(0.7298, abs=5e-5)
    assert swarm.Settings().inertia == pytest.approx(chi, abs=5e-5)
    assert swarm.Settings().cognitive == swarm.Settings().social == pytest.approx(2.05 * chi, abs=1e-4)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_particles_fly_as_the_equation_says(seed: int) -> None:
    """What of the step is not inertia lies between no pull and the whole of both, number by number."""
    how = swarm.Settings(8, 1.0, 0.6, 1.2, 1.7)
    strategy = swarm.particle_swarm(how)
    state = strategy.init(keys.key(seed), START)
    for step in range(3):
        state = strategy.tell(state, numbers((8,), seed % 1000 + step))
    fitness = numbers((8,), seed % 1000 + 7)
    told = strategy.tell(state, fitness)
    x, v, moved = flat(state.places), flat(state.speeds), flat(told.places)
    torch.testing.assert_close(moved, x + flat(told.speeds))
    own, top = flat(told.own), flat(told.own)[int(told.fitness.argmax())]
    mine, all_ = 1.2 * (own - x), 1.7 * (top - x)
    low, high = (torch.stack([part.clamp(**{side: 0}) for part in (mine, all_)]).sum(0) for side in ("max", "min"))
    rest = flat(told.speeds) - 0.6 * v
    assert (rest >= low - 1e-5).all()
    assert (rest <= high + 1e-5).all()
    better = fitness.double() > state.fitness
    torch.testing.assert_close(own, torch.where(better[:, None], x, flat(state.own)))
    assert (told.fitness >= state.fitness).all()
    torch.testing.assert_close(flat(tree.map(lambda leaf: leaf[None], told.centre))[0], own.mean(0))


def test_the_draws_of_a_swarm_are_uniform_and_of_their_own() -> None:
    """A particle at rest whose own best is elsewhere: the step over the pull is r₁, then r₂, then both."""
    far = {"x": torch.full((4000,), 2.0)}
    rest, here = tree.zeros_like(far), tree.zeros_like(far)
    how = swarm.Settings(4, 1.0, 0.5, 1.0, 1.0)
    first = swarm.speed(keys.key(0), here, rest, far, here, how)["x"] / 2
    second = swarm.speed(keys.key(0), here, rest, here, far, how)["x"] / 2
    both = swarm.speed(keys.key(0), here, rest, far, far, how)["x"] / 2
    torch.testing.assert_close(both, first + second)
    for draws in (first, second):
        assert float(draws.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(draws.var()) == pytest.approx(1 / 12, abs=0.01)
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) == pytest.approx(0, abs=0.06)


def test_a_swarm_on_functions() -> None:
    strategy = swarm.particle_swarm(swarm.Settings(20, 1.0))
    value, used = descend(strategy, torch.full((6,), 2.0).double(), lambda x: x.square().sum(-1), 1e-6, 6000)
    assert value <= 1e-6, used
    strategy = swarm.particle_swarm(swarm.Settings(40, 2.0))
    value, used = descend(strategy, torch.full((4,), 2.5).double(), rastrigin, 1e-3, 12000)
    assert value <= 1e-3, used


# Both -----------------------------------------------------------------------------------------------------------------


def test_the_first_members_are_the_start_and_a_scatter_of_its_own_width() -> None:
    start = {"x": torch.linspace(-1, 1, 500)}
    found = members.scattered(keys.key(0), start, 8, 0.3)["x"]
    assert torch.equal(found[0], start["x"])
    torch.testing.assert_close((found[1:] - start["x"]).std(1), torch.full((7,), 0.3), rtol=0.12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: differential.differential(differential.Settings(3)), "a population of 3 is too small"),
        (lambda: differential.differential(differential.Settings(8, base="x")), "the base is 'x'; it can be rand"),
        (lambda: differential.differential(differential.Settings(8, weight=0)), "the differential weight is 0"),
        (lambda: differential.differential(differential.Settings(8, crossover=2)), "the crossover rate is 2"),
        (lambda: swarm.particle_swarm(swarm.Settings(8, inertia=1.0)), "the inertia is 1.0; from 1 on"),
        (lambda: swarm.particle_swarm(swarm.Settings(8, social=-1)), "the social weight is -1"),
    ],
)
def test_what_cannot_work_is_refused(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["map-elites", "nsga2"])
def test_large_draws_compile_once_and_are_those_of_the_eager_form(kind: str) -> None:
    """256 members over five generations, of which the first draws otherwise."""
    start = {"a": torch.linspace(-1, 1, 96).view(4, 24), "b": {"c": torch.ones(24)}}
    grid = elites.Grid((6, 5), (0.0, 0.0), (8.0, 8.0))
    made = {
        "map-elites": lambda wrap: elites.map_elites(elites.Settings(grid, 256, 0.3, 0.2), wrap),
        "nsga2": lambda wrap: pareto.nsga2(genetic.Settings(256), 2, wrap),
    }
    eager, quick = made[kind](lambda function: function), made[kind](compiling.compiled)
    states = [strategy.init(keys.key(0), start) for strategy in (eager, quick)]
    graphs = []
    for _ in range(5):
        asked = [strategy.ask(state).own for strategy, state in zip((eager, quick), states)]
        for one, other in zip(tree.leaves(asked[0]), tree.leaves(asked[1])):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
        x = asked[0]["a"]
        told = torch.stack([-x.square().mean((1, 2)), x[:, 0, 0] + 4, x[:, 1, 0] + 4], 1)[:, : eager.figures]
        states = [strategy.tell(state, told) for strategy, state in zip((eager, quick), states)]
        graphs.append(compiling.graphs())
    assert graphs[1:] == graphs[1:2] * 4
