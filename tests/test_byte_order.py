"""Numbers whose bytes were turned round are told from weights, and weights are never taken for such."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import byte_order

KINDS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def turned(leaf: Tensor) -> Tensor:
    width = leaf.element_size()
    raw = leaf.contiguous().view(torch.uint8).numpy().reshape(-1, width)[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(raw)).flatten().view(leaf.dtype).view(leaf.shape)


def norms(kind: torch.dtype, seed: int = 0) -> list[Tensor]:
    """As a trained model has them: scales near 1, biases near 0, some of them never touched."""
    draw = torch.Generator().manual_seed(seed)
    scales = [1 + 0.1 * torch.randn(64, generator=draw) for _ in range(5)]
    biases = [0.02 * torch.randn(64, generator=draw) for _ in range(4)]
    return [leaf.to(kind) for leaf in (*scales, *biases, torch.ones(64), torch.zeros(64))]


@given(
    st.lists(
        st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-12) | st.sampled_from([0.0, 1.0, -1.0]),
        max_size=80,
    ),
    st.sampled_from(KINDS),
)
def test_weights_of_any_kind_are_never_taken_for_turned_ones(values: list[float], kind: torch.dtype) -> None:
    leaf = torch.tensor(values).to(kind)
    assert not byte_order.absurd([leaf])
    assert not byte_order.absurd([leaf, torch.zeros(64, dtype=kind), torch.ones(64, dtype=kind)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaves", [[], [torch.zeros(1000)], [torch.zeros(0)], [torch.full((15,), 1e-40)]])
def test_zeros_and_what_died_away_are_left_alone(leaves: list[Tensor], kind: torch.dtype) -> None:
    """Numbers that decayed below all bounds, each in its own way, are no sane ones when they are turned."""
    draw = torch.Generator().manual_seed(1)
    dying = torch.rand(256, generator=draw) * 1e-38
    assert not byte_order.absurd([*(leaf.to(kind) for leaf in leaves), dying, torch.ones(300, dtype=kind)])
    assert not byte_order.absurd([dying])
    assert not byte_order.absurd([leaf.to(kind) for leaf in leaves])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("was", [torch.bfloat16, torch.float16, torch.float32])
def test_turned_vectors_of_a_model_are_known(kind: torch.dtype, was: torch.dtype) -> None:
    """Also where no number is NaN or infinite, as of float32 that was bfloat16."""
    leaves = [leaf.to(was).to(kind) for leaf in norms(torch.float32)]
    assert byte_order.absurd(map(turned, leaves))
    assert not byte_order.absurd(leaves)
    if (was, kind) == (torch.bfloat16, torch.float32):
        assert all(bool(turned(leaf).isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_turned_matrices_that_are_not_finite_are_known(kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(1 << 15, generator=draw, dtype=torch.float64).to(kind)
    assert not turned(weights).isfinite().all()
    assert byte_order.turned(turned(weights))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.02])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_among_few_others_is_not_taken_for_turned(
    kind: torch.dtype, value: float, bad: float
) -> None:
    """As in the norm of a model that has hardly been trained."""
    weights = torch.full((32,), value, dtype=torch.float64).to(kind)
    weights[7] = bad
    assert not byte_order.turned(weights)
    assert not byte_order.turned(torch.full((32,), bad).to(kind))
