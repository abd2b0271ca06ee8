"""Restarts of CMA-ES: when a run ends, what the next one is, and that parts of a generation are a generation.

Axes: P members of a part, D numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_covariance import descend, rastrigin
from torch import Tensor

from functional_lm import evolve_flags, keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import cma, loop, restarts, vector
from functional_lm.evolution import journal as journals
from functional_lm.evolution.restarts import FIRST, LARGE, SMALL, State
from functional_lm.evolution.strategy import Candidates
from functional_lm.evolve_flags import EvolveFlags

FLAT = torch.zeros(16)


def begun(kind: str = "ipop", size: int = 2, population: int = 16) -> tuple[vector.Strategy, State]:
    strategy = restarts.restarting(kind, population, 2.0)
    return strategy, strategy.init(keys.key(0), {"x": torch.full((size,), 2.5, dtype=torch.float64)})


def test_restarts_find_the_optimum_where_a_single_run_does_not() -> None:
    """Rastrigin's function in 4 dimensions from 2.5, sigma 2, 24 members, to 1e-8: in pycma's IPOP five seeds of eight
    get there within 12,300 evaluations, three of them without a restart."""
    start = torch.full((4,), 2.5, dtype=torch.float64)
    value, used = descend(restarts.restarting("ipop", 24, 2.0), start, rastrigin, 1e-8, 6000, 7)
    assert value <= 1e-8, used
    assert used > 3000  # in the second run
    value, _ = descend(cma.cma_es(24, 2.0), start, rastrigin, 1e-8, 3000, 7)
    assert value > 0.9


@pytest.mark.parametrize("size", [2, 5])
def test_ipop_doubles_after_as_many_generations_as_the_criterion_looks_back(size: int) -> None:
    """A flat fitness ends a run after 10 + ⌈30 D / λ⌉ generations (equal values)."""
    strategy, state = begun(size=size)
    for run, parts in enumerate((1, 2, 4)):
        for _ in range((10 + math.ceil(30 * size / (16 * parts))) * parts):
            assert (int(state.run.number), int(state.run.parts)) == (run, parts)
            state = strategy.tell(state, FLAT)
    assert (int(state.run.number), int(state.run.parts)) == (3, 8)
    torch.testing.assert_close(state.distribution.mean, torch.full((size,), 2.5, dtype=torch.float64))
    assert float(state.distribution.sigma) == 2.0


def test_bipop_gives_the_turn_to_the_regime_that_has_used_less() -> None:
    strategy, state = begun("bipop")
    seen: list[int] = []
    for _ in range(300):
        before = state.run
        state = strategy.tell(state, FLAT)
        run = state.run
        if int(run.number) == int(before.number):
            continue
        spent = before.spent.clone()
        spent[before.regime] += before.used + 16
        assert torch.equal(run.spent, spent)
        assert int(run.regime) == (SMALL if spent[FIRST] + spent[SMALL] < spent[LARGE] else LARGE)
        seen.append(int(run.regime))
        largest = 2 ** seen.count(LARGE)
        if int(run.regime) == LARGE:
            assert (int(run.parts), float(run.sigma)) == (largest, 2.0)
        else:
            assert 1 <= int(run.parts) <= largest / 2
            assert 0.02 <= float(run.sigma) <= 2.0
            assert int(run.limit) <= int(run.large) / 2
    assert {SMALL, LARGE} <= set(seen)
    assert seen.count(LARGE) > 2


def test_a_generation_in_parts_is_one_of_the_larger_population() -> None:
    """A run of two parts does what `cma` does with twice the population; what is not finite is its worst."""
    strategy, state = begun()
    while int(state.run.parts) == 1:
        state = strategy.tell(state, FLAT)
    first = strategy.ask(state).own["x"]
    half = strategy.tell(state, fitness := -rastrigin(first))
    assert tree.digest(half.distribution) == tree.digest(state.distribution)
    second = strategy.ask(half).own["x"]
    assert not torch.equal(first, second)
    more = -rastrigin(second)
    more[3] = math.nan
    told = strategy.tell(half, more)
    search = cma.search_of(2, 32, 2.0, torch.float64, False)
    z = (torch.cat([first, second]) - 2.5) / 2.0
    known = torch.cat([fitness, more]).nan_to_num(-math.inf)
    wanted = search.update(state.distribution, z, vector.places(known))
    for one, other in zip(tree.leaves(told.distribution), tree.leaves(wanted)):
        torch.testing.assert_close(one, other)
    assert float(told.run.best[-1]) == float(torch.cat([fitness, more]).nan_to_num(-math.inf).max())


def test_parts_of_a_generation_are_measured_on_one_minibatch() -> None:
    """(14 generations of one part, then some of two.) They are ranked together; criteria compare generations."""
    strategy, state = begun()
    asked: list[int] = []

    def measure(candidates: Candidates, number: int) -> Tensor:
        asked.append(number)
        return FLAT

    journal = journals.Journal(Path("journal.jsonl"), {}, [], None, "", 0, False)
    loop.run(strategy, state, journal, loop.Plan(18), loop.Hooks(measure, lambda *_: None), None)
    assert asked == [*range(14), 14, 14, 16, 16]
    assert evolve_flags.batches(EvolveFlags(strategy="cma-es")) == 0
    assert evolve_flags.batches(EvolveFlags(strategy="cma-es", restarts="ipop")) == 1
    assert evolve_flags.batches(EvolveFlags(strategy="cma-es", restarts="ipop", batches=3)) == 3


def test_a_state_in_the_middle_of_a_generation_survives_the_disk(tmp_path: object) -> None:
    """Going on from the disk after any number of parts, across restarts, gives the same bits."""
    strategy, state = begun()
    for step in range(60):
        if step in (15, 37, 40):
            tree.save(state, f"{tmp_path}/{step}.safetensors")
            back = tree.copy(tree.restore(state, tree.flatten(tree.load(f"{tmp_path}/{step}.safetensors"))))
            for _ in range(20):
                state, back = strategy.tell(state, FLAT), strategy.tell(back, FLAT)
            assert tree.digest(state) == tree.digest(back)
        state = strategy.tell(state, FLAT)
    assert int(state.run.number) >= 2


def changed(state: State, **to: Tensor) -> cma.Distribution:
    return state.distribution._replace(**to)


TINY = torch.full((2,), 1e-13, dtype=torch.float64)
ENDS = {
    "no effect of an axis": lambda s: {"mean": s.start, "sigma": torch.tensor(1e-15), "path": s.start},
    "no effect of a coordinate": lambda s: {"covariance": torch.diag(torch.tensor([1.0, 1e-40]))},
    "condition": lambda s: {"roots": torch.tensor([1.0, 0.9e-7])},
    "step tolerance": lambda s: {"sigma": torch.tensor(1e-13, dtype=torch.float64)},
    "divergence": lambda s: {"sigma": torch.tensor(2.1e4)},
}


@pytest.mark.parametrize("what", ENDS)
def test_each_criterion_ends_a_run(what: str) -> None:
    _, state = begun()
    known = torch.arange(16.0, dtype=torch.float64)
    assert not any(bool(value) for value in restarts.ended(state.distribution, known, state.run, False).values())
    at = changed(state, **ENDS[what](state))
    assert bool(restarts.ended(at, known, state.run, False)[what])


def history(values: Tensor, state: State) -> dict[str, bool]:
    """What ends a run with that history of best and median, now at generation len(values)."""
    padded = torch.cat([state.run.best, values.double()])[-restarts.HISTORY :]
    run = state.run._replace(best=padded, median=padded)
    at = changed(state, updates=torch.tensor(float(len(values))))
    found = restarts.ended(at, values[-16:].double(), run, False)
    return {name: bool(value) for name, value in found.items() if bool(value)}


def test_a_history_ends_a_run() -> None:
    """Stagnation looks back 120 + 30 D / λ generations or a fifth of the run; rising fitness never ends it."""
    _, state = begun()
    assert not history(torch.arange(500.0), state)
    assert "stagnation" in history(torch.arange(500.0).flip(0), state)
    noisy = (torch.arange(123) % 37).float()
    assert not history(noisy, state)
    assert list(history((torch.arange(124) % 37).float(), state)) == ["stagnation"]
    rises = torch.cat([torch.zeros(500), torch.arange(124.0)])
    assert "stagnation" not in history(rises, state)
    assert "fitness tolerance" in history(1 + 1e-14 * torch.arange(20, dtype=torch.float64), state)


def test_a_run_has_a_length() -> None:
    _, state = begun()
    known = torch.arange(16.0, dtype=torch.float64)
    full = state.run._replace(used=state.run.limit)
    assert bool(restarts.ended(state.distribution, known, full, False)["length"])
    assert restarts.longest(2, 16) == 16 * (100 + 50 * 25 // 4)


def test_populations_of_any_size_have_pycmas_constants() -> None:
    """For all sizes that restarts come to. (pycma's default learns the step size at another rate than the tutorial.)"""
    pycma = pytest.importorskip("cma")
    for members in (8, 16, 64, 256):
        known = cma.constants(5, members, torch.float64)
        wanted = pycma.CMAEvolutionStrategy(5 * [0.0], 1.0, {"popsize": members, "verbose": -9}).sp
        torch.testing.assert_close(known.weights, torch.tensor(wanted.weights, dtype=torch.float64))
        for mine, theirs in ((known.mass, wanted.weights.mueff), (known.c_1, wanted.c1), (known.c_mu, wanted.cmu)):
            assert mine == pytest.approx(theirs)
        assert known.c_c == pytest.approx(wanted.cc)


def test_unknown_restarts_are_refused() -> None:
    with pytest.raises(UsageError, match="there are no restarts 'often'; there are ipop, bipop"):
        restarts.restarting("often", 8, 1.0)
