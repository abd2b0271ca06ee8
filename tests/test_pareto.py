"""NSGA-II against its paper's definitions, written out by hand, and on Zitzler's first function.

Axes: N members, O objectives, P members of a population.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import genetic, pareto
from functional_lm.evolution.strategy import evaluate

VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, math.nan, math.inf, -math.inf])


def rows_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    return st.integers(1, 3).flatmap(
        lambda size: st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=12)
    )


ROWS = rows_of(VALUES)
DISTINCT = st.integers(2, 3).flatmap(
    lambda size: st.integers(1, 12).flatmap(
        lambda count: st.lists(st.permutations(range(count)), min_size=size, max_size=size).map(
            lambda columns: [list(map(float, row)) for row in zip(*columns)]
        )
    )
)


def dominates(a: list[float], b: list[float]) -> bool:
    if not all(map(math.isfinite, a)):
        return False
    if not all(map(math.isfinite, b)):
        return True
    return all(x >= y for x, y in zip(a, b)) and a != b


def rank_by_hand(rows: list[list[float]]) -> list[int]:
    """One more than the highest rank among those that dominate a member."""
    known: dict[int, int] = {}

    def rank(i: int) -> int:
        if i not in known:
            known[i] = 1 + max((rank(j) for j in range(len(rows)) if dominates(rows[j], rows[i])), default=-1)
        return known[i]

    return [rank(i) for i in range(len(rows))]


def crowding_by_hand(rows: list[list[float]], rank: list[int]) -> list[float]:
    """crowding-distance-assignment, front by front."""
    distance = [0.0] * len(rows)
    for number in set(rank):
        inside = [i for i in range(len(rows)) if rank[i] == number]
        for objective in range(len(rows[0])):
            inside.sort(key=lambda i: rows[i][objective])
            distance[inside[0]] = distance[inside[-1]] = math.inf
            span = rows[inside[-1]][objective] - rows[inside[0]][objective]
            for before, i, after in zip(inside, inside[1:], inside[2:]):
                distance[i] += (rows[after][objective] - rows[before][objective]) / span
    return distance


@given(rows=ROWS)
@settings(max_examples=150, deadline=None)
def test_ranks_are_the_definition(rows: list[list[float]]) -> None:
    assert pareto.ranks(torch.tensor(rows)).tolist() == rank_by_hand(rows)


@given(rows=ROWS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_know_no_order(rows: list[list[float]], data: st.DataObject) -> None:
    at = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    figures = torch.tensor(rows)
    assert torch.equal(pareto.ranks(figures[at]), pareto.ranks(figures)[at])


@given(rows=DISTINCT)
@settings(max_examples=100, deadline=None)
def test_crowding_is_the_papers(rows: list[list[float]]) -> None:
    figures = torch.tensor(rows, dtype=torch.float64)
    rank = pareto.ranks(figures)
    wanted = torch.tensor(crowding_by_hand(rows, rank.tolist()), dtype=torch.float64)
    torch.testing.assert_close(pareto.crowding(figures, rank), wanted)


@given(rows=ROWS)
@settings(max_examples=100, deadline=None)
def test_the_order_is_total_and_what_is_not_finite_comes_last(rows: list[list[float]]) -> None:
    figures = torch.tensor(rows)
    at = pareto.order(figures)
    assert sorted(at.tolist()) == list(range(len(rows)))
    rank = pareto.ranks(figures)
    distance = pareto.crowding(figures, rank)
    assert not distance.isnan().any()
    pairs = [(int(rank[i]), -float(distance[i])) for i in at]
    assert pairs == sorted(pairs)
    finite = torch.isfinite(figures).all(1)[at].tolist()
    assert finite == sorted(finite, reverse=True)


@given(rows=ROWS)
@settings(max_examples=100, deadline=None)
def test_the_compromise_is_on_the_front(rows: list[list[float]]) -> None:
    figures = torch.tensor(rows)
    chosen = int(pareto.compromise(figures))
    if any(all(map(math.isfinite, row)) for row in rows):
        assert bool(pareto.front(figures)[chosen])
        assert not any(dominates(row, rows[chosen]) for row in rows)


def test_the_compromise_is_the_nearest_to_the_best_of_all_scaled() -> None:
    figures = torch.tensor([[0.0, 100.0], [1.0, 0.0], [0.6, 70.0], [0.7, 40.0], [0.1, 10.0]])
    assert int(pareto.compromise(figures)) == 2


# The strategy ---------------------------------------------------------------------------------------------------------


def zdt1(node: tree.Tree) -> tuple[float, float]:
    """Zitzler, Deb and Thiele 2000; both minimised, so with a minus. The front is f₂ = 1 - √f₁."""
    x = node["x"].clamp(0, 1).double()
    g = 1 + 9 * x[1:].mean()
    return -float(x[0]), -float(g * (1 - (x[0] / g).sqrt()))


def test_the_front_of_zdt1() -> None:
    """With 10 numbers and 40 members: near the front throughout, and spread over the whole of it."""
    how = genetic.Settings(40, crossover_rate=0.9, mutation_rate=0.15, strength=0.3)
    strategy = pareto.nsga2(how, 2)
    state = strategy.init(keys.key(0), {"x": torch.full((10,), 0.5)})
    for _ in range(80):
        state = strategy.tell(state, evaluate(strategy, strategy.ask(state), zdt1))
    points = -state.figures[pareto.front(state.figures)]
    assert len(points) > 30
    assert float((points[:, 1] - (1 - points[:, 0].sqrt())).mean()) < 0.03
    first = points[:, 0].sort().values
    assert float(first[0]) < 0.01
    assert float(first[-1]) > 0.9
    assert float(first.diff().max()) < 0.2
    assert strategy.told(state) == {"front": len(points)}


def begun(population: int = 8, objectives: int = 2) -> tuple[pareto.Strategy, pareto.Population]:
    strategy = pareto.nsga2(genetic.Settings(population, strength=0.5), objectives)
    return strategy, strategy.init(keys.key(0), {"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}})


FIGURES = st.lists(st.tuples(VALUES, VALUES), min_size=8, max_size=8)


@given(first=FIGURES, second=FIGURES)
@settings(max_examples=15, deadline=None)
def test_of_parents_and_children_the_best_stay(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    strategy, state = begun()
    parents = strategy.ask(state)
    state = strategy.tell(state, torch.tensor(first))
    children = strategy.ask(state)
    told = strategy.tell(state, torch.tensor(second))
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves((told.members, told.centre, told.best)))
    everyone = torch.tensor([*first, *second])
    ranked, finite = pareto.ranks(everyone), torch.isfinite(everyone).all(1)
    taken = sorted(ranked.tolist())[:8]
    stayed = torch.isfinite(told.figures).all(1)
    assert int(stayed.sum()) == min(8, int(finite.sum()))
    mine = pareto.ranks(torch.cat([told.figures.float(), everyone]))[:8]
    assert sorted(mine[stayed].tolist()) == taken[: int(stayed.sum())]
    wanted = {tuple(row) for row in everyone[finite].tolist()}
    assert {tuple(row) for row in told.figures[stayed].tolist()} <= wanted
    if finite.any():
        value = everyone[finite][:, 0].max()
        assert float(told.best_fitness) == float(value)
        origin = torch.where(finite, everyone[:, 0], -math.inf)
        firsts = [i for i in range(16) if float(origin[i]) == float(value)]
        members = [strategy.dense(parents if i < 8 else children, i % 8) for i in firsts]
        assert tree.digest(told.best) in [tree.digest(one) for one in members]
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(strategy.ask(told)))


def test_a_state_survives_the_disk_and_is_a_function_of_what_was_told(tmp_path: object) -> None:
    strategy, state = begun()
    rows = [torch.tensor([[float((7 * i + g) % 5), float((3 * i) % 7)] for i in range(8)]) for g in range(3)]
    for figures in rows[:2]:
        state = strategy.tell(state, figures)
    tree.save(state, f"{tmp_path}/state.safetensors")
    back = tree.copy(tree.restore(state, tree.flatten(tree.load(f"{tmp_path}/state.safetensors"))))
    assert tree.digest(strategy.tell(back, rows[2])) == tree.digest(strategy.tell(state, rows[2]))


def test_one_objective_is_refused() -> None:
    with pytest.raises(UsageError, match="1 objective has no front; give at least 2, or use genetic"):
        begun(objectives=1)
