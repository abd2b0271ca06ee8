"""Shaping of fitness: finite whatever is measured, in the order of what is measured, and its formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, numbers

from functional_lm.evolution import shaping

FITNESS = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, math.nan, math.inf, -math.inf]), min_size=2, max_size=12)


@pytest.mark.parametrize("name", sorted(shaping.SHAPINGS))
@given(values=FITNESS, data=st.data())
@settings(max_examples=60)
def test_shaping_is_finite_orderly_and_blind_to_order(name: str, values: list[float], data: st.DataObject) -> None:
    weigh, fitness = shaping.shaping(name), torch.tensor(values)
    weights = weigh(fitness)
    assert torch.isfinite(weights).all()
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    torch.testing.assert_close(weigh(fitness[order]), weights[order])
    comparable, finite = shaping.usable(fitness)
    for i in range(len(values)):
        for j in range(len(values)):
            if comparable[i] > comparable[j]:
                assert weights[i] >= weights[j] - 1e-6
            if comparable[i] == comparable[j]:
                torch.testing.assert_close(weights[i], weights[j])
    if name != "z_score":
        torch.testing.assert_close(weights.sum(), torch.tensor(0.0), rtol=0, atol=1e-5)
    if not finite.any():
        torch.testing.assert_close(weights, torch.zeros_like(weights))


@given(seed=SEEDS, count=st.integers(2, 20))
@settings(max_examples=20)
def test_without_ties_shapings_are_their_formulas(seed: int, count: int) -> None:
    fitness = numbers((count,), seed)
    assume(len(set(fitness.tolist())) == count)
    rank = fitness.argsort().argsort()
    torch.testing.assert_close(shaping.centered_rank(fitness), rank / (count - 1) - 0.5)
    torch.testing.assert_close(shaping.z_score(fitness), (fitness - fitness.mean()) / fitness.std(correction=0))
    raw = [max(0.0, math.log(count / 2 + 1) - math.log(count - r)) for r in rank.tolist()]
    wanted = torch.tensor([value / sum(raw) - 1 / count for value in raw])
    torch.testing.assert_close(shaping.nes(fitness), wanted, rtol=1e-4, atol=1e-6)
