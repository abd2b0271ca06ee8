"""The genetic algorithm's operators: what they take, how much they change, and how often the best one wins."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from strategies import SEEDS, numbers

from functional_lm import keys, tree
from functional_lm.evolution import genetic


def test_elites_stay_as_they_are() -> None:
    strategy = genetic.genetic(genetic.Settings(8, elites=3))
    state = strategy.init(keys.key(0), {"a": {"weight": torch.zeros(5, 4)}, "norm": {"weight": torch.ones(4)}})
    fitness = torch.tensor([0.0, 5.0, math.nan, 7.0, 1.0, 6.0, 2.0, 3.0])
    after = strategy.tell(state, fitness)
    for place, index in enumerate((3, 5, 1)):
        assert tree.digest(tree.index(after.members, place)) == tree.digest(tree.index(state.members, index))


@given(seed=SEEDS)
@settings(max_examples=20)
def test_crossover_takes_from_both_and_from_nowhere_else(seed: int) -> None:
    first, second = {"x": numbers((30,), 1)}, {"x": numbers((30,), 2)}
    child = genetic.cross(keys.key(seed), first, second, "uniform")["x"]
    from_first, from_second = child == first["x"], child == second["x"]
    assert (from_first | from_second).all()
    assert from_first.any()
    assert from_second.any()
    mixed = genetic.cross(keys.key(seed), first, second, "arithmetic")["x"]
    share = (mixed - first["x"]) / (second["x"] - first["x"])
    torch.testing.assert_close(share, share[:1].expand(30), rtol=1e-3, atol=1e-3)
    assert 0 <= float(share[0]) <= 1


def test_mutation_is_scaled_by_the_tensors_spread() -> None:
    member = {"wide": 10 * numbers((40, 50), 0), "narrow": 0.1 * numbers((40, 50), 1)}
    how = genetic.Settings(8, mutation_rate=0.25, strength=0.5)
    changed = genetic.mutate(keys.key(0), member, genetic.spreads(member, how.floor), how)
    for name, spread in (("wide", 10), ("narrow", 0.1)):
        step = changed[name] - member[name]
        hit = step != 0
        assert float(hit.float().mean()) == pytest.approx(0.25, abs=0.03)
        assert float(step[hit].std()) == pytest.approx(0.5 * spread, rel=0.15)
    whole = dataclasses.replace(how, mutation="tensor")
    shares = [
        float((genetic.mutate(keys.key(i), member, genetic.spreads(member, 0.0), whole)["wide"] != member["wide"])
              .float().mean())
        for i in range(40)
    ]  # fmt: skip
    assert {round(share, 2) for share in shares} == {0.0, 1.0}


@pytest.mark.parametrize(("tournament", "pressure"), [(1, 1.0), (3, 1.0), (3, 0.6)])
def test_tournaments_win_as_often_as_their_rule_says(tournament: int, pressure: float) -> None:
    how = genetic.Settings(8, tournament=tournament, pressure=pressure)
    order = torch.tensor([4, 2, 0, 1, 3, 5, 7, 6])
    own = keys.split(keys.key(0), 4000)
    winners = torch.vmap(lambda key: genetic.compete(key, order, how))(own)
    best = float((winners == 4).float().mean())
    # The best is among K entrants j times (binomially); one of its places wins before any other's.
    wanted = 0.0
    for times in range(1, tournament + 1):
        chance = math.comb(tournament, times) * (1 / 8) ** times * (7 / 8) ** (tournament - times)
        wins = 1 - (1 - pressure) ** times if times < tournament else 1.0
        wanted += chance * wins
    assert best == pytest.approx(wanted, abs=0.03)
