"""MAP-Elites: an archive is the best of each cell that was ever told, whatever came in which order.

Axes: P members, C cells, K numbers of a descriptor.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import elites
from functional_lm.evolution.elites import Grid
from functional_lm.evolution.strategy import evaluate

GRID = Grid((4, 3), (-2.0, 0.0), (2.0, 3.0))
START = {"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}}
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5, 2.0, 9.0, math.nan, math.inf, -math.inf])
ROWS = st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=6, max_size=6)


def begun(population: int = 6, line: float = 0.0) -> tuple[elites.Strategy, elites.Archive]:
    strategy = elites.map_elites(elites.Settings(GRID, population, 0.5, line))
    return strategy, strategy.init(keys.key(0), START)


def cell_by_hand(first: float, second: float) -> tuple[int, int]:
    return min(3, max(0, math.floor(first + 2))), min(2, max(0, math.floor(second)))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_cells_are_places_on_the_grid(descriptors: list[tuple[float, float]]) -> None:
    found = elites.cells(torch.tensor(descriptors, dtype=torch.float64), GRID).tolist()
    assert found == [3 * row + column for row, column in (cell_by_hand(*one) for one in descriptors)]


@given(generations=st.lists(ROWS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_the_archive_is_the_best_of_each_cell(generations: list[list[tuple[float, float, float]]]) -> None:
    """Held against a dictionary; of equals the one that came first stays."""
    strategy, state = begun()
    best: dict[int, tuple[float, str, tuple[float, float]]] = {}
    for rows in generations:
        members = strategy.ask(state)
        assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(members))
        for i, (fitness, *kind) in enumerate(rows):
            if not all(map(math.isfinite, (fitness, *kind))):
                continue
            row, column = cell_by_hand(*kind)
            if fitness > best.get(3 * row + column, (-math.inf,))[0]:
                best[3 * row + column] = (fitness, tree.digest(strategy.dense(members, i)), (kind[0], kind[1]))
        state = strategy.tell(state, torch.tensor(rows))
    assert {i for i in range(12) if math.isfinite(float(state.fitness[i]))} == set(best)
    for cell, (fitness, digest, kind) in best.items():
        assert float(state.fitness[cell]) == fitness
        assert tree.digest(tree.index(state.elites, cell)) == digest
        assert tuple(state.descriptors[cell].tolist()) == kind
    assert float(state.best_fitness) == max((one[0] for one in best.values()), default=-math.inf)
    if best:
        assert tree.digest(state.best) in {one[1] for one in best.values() if one[0] == float(state.best_fitness)}
    told = strategy.told(state)
    assert told["cells"] == len(best)
    assert told["cells_fitness"] == pytest.approx(sum(one[0] for one in best.values()))


@given(rows=ROWS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_winners_know_no_order(rows: list[tuple[float, float, float]], data: st.DataObject) -> None:
    at = torch.tensor(data.draw(st.permutations(range(6))))
    figures = torch.tensor(rows, dtype=torch.float64)
    cell = elites.cells(figures[:, 1:], GRID)
    _, one = elites.winners(cell, figures[:, 0], 12)
    index, other = elites.winners(cell[at], figures[at, 0], 12)
    assert torch.equal(one, other)
    filled = torch.isfinite(one)
    assert torch.equal(figures[at, 0][index][filled], one[filled])
    assert (cell[at][index][filled] == torch.arange(12)[filled]).all()


def test_children_come_from_filled_cells_alone() -> None:
    strategy, state = begun(400)
    rows = torch.full((400, 3), math.nan)
    rows[7], rows[9] = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([2.0, -1.5, 2.5])
    parents = strategy.ask(state)
    state = strategy.tell(state, rows)
    children = strategy.ask(state).own["a"]
    first, second = (strategy.dense(parents, i)["a"] for i in (7, 9))
    nearer = ((children - first).norm(dim=1) < (children - second).norm(dim=1)).float().mean()
    assert 0.3 < float(nearer) < 0.7
    middle = (first + second) / 2
    torch.testing.assert_close(children.mean(0), middle, rtol=0, atol=0.15)


def test_a_step_along_the_line_leads_to_the_other_elite() -> None:
    """Without noise, children of two elites lie on the line through them, each at its own place."""
    strategy = elites.map_elites(elites.Settings(GRID, 40, 1e-9, 0.5))
    state = strategy.init(keys.key(0), {"a": torch.zeros(3)})
    state = state._replace(
        elites={"a": torch.arange(12.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])},
        fitness=torch.where(torch.arange(12) % 5 == 1, 1.0, -math.inf).double(),
    )
    children = strategy.ask(state).own["a"]
    torch.testing.assert_close(children, children[:, :1] * torch.tensor([1.0, 2.0, -1.0]), rtol=1e-4, atol=1e-4)
    assert len(set((children[:, 0] * 1000).round().tolist())) > 15


def test_it_fills_the_grid_with_the_best_of_each_kind() -> None:
    """The descriptor is the place in a plane, the fitness minus the rest: each cell is found, its best approached."""

    def kinds(node: tree.Tree) -> tuple[float, float, float]:
        x = node["x"]
        return -float(x[2:].square().sum()), float(x[0]), float(x[1])

    grid = Grid((5, 5), (-1.0, -1.0), (1.0, 1.0))
    strategy = elites.map_elites(elites.Settings(grid, 50, 0.25, 0.2))
    state = strategy.init(keys.key(0), {"x": torch.zeros(4)})
    for _ in range(30):
        state = strategy.tell(state, evaluate(strategy, strategy.ask(state), kinds))
    assert strategy.told(state)["cells"] == 25
    assert float(state.fitness.mean()) > -0.05
    for cell in range(25):
        fitness, *kind = kinds(tree.index(state.elites, cell))
        assert fitness == pytest.approx(float(state.fitness[cell]))
        assert int(elites.cells(torch.tensor([kind], dtype=torch.float64), grid)) == cell


def test_a_state_survives_the_disk(tmp_path: object) -> None:
    strategy, state = begun()
    rows = torch.tensor([[float(i), i - 3.0, i / 2] for i in range(6)])
    state = strategy.tell(state, rows)
    tree.save(state, f"{tmp_path}/state.safetensors")
    back = tree.copy(tree.restore(state, tree.flatten(tree.load(f"{tmp_path}/state.safetensors"))))
    assert tree.digest(strategy.tell(back, rows + 1)) == tree.digest(strategy.tell(state, rows + 1))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid((4,), (0.0, 0.0), (1.0, 1.0)), "a grid has bins and a range for each number of a descriptor"),
        (Grid((0, 4), (0.0, 0.0), (1.0, 1.0)), "0x4 bins are no grid of 1 to"),
        (Grid((4,), (1.0,), (1.0,)), "the range 1:1 is empty or has no end; give LOW:HIGH"),
    ],
)
def test_what_is_no_grid_is_refused(grid: Grid, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        elites.map_elites(elites.Settings(grid))
