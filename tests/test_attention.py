"""What a layer is made of: both forms of attention, norms, positions.

Axes: B batch, T time, D model width.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from batches import FEW, TIMES, batch_of, gradient, nll
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_close, assert_trees_close, configs, document_rows, numbers, token_rows, weights
from torch import Tensor

from functional_lm.model.attention import LONG, flash, standard, use_flash, visible
from functional_lm.model.config import CHOICES, ModelConfig
from functional_lm.model.norm import norm
from functional_lm.model.positions import restart, rotary_frequencies, rotate, rotation, sinusoids

# Attention ------------------------------------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query [*B, H, T, E], key and value [*B, K, C, E], mask: None is causal; in any other each query sees a key."""
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    kv_heads, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    time, seed, kind = draw(TIMES), draw(SEEDS), draw(st.sampled_from(["causal", "shared", "own"]))
    length = time if kind == "causal" else draw(TIMES)
    query = 2 * numbers((*batch, kv_heads * groups, time, width), seed)
    key, value = (numbers((*batch, kv_heads, length, width), seed + i) for i in (1, 2))
    if kind == "causal":
        return query, key, value, None
    mask = numbers((*(batch if kind == "own" else ()), time, length), seed + 3) > 0.3
    return query, key, value, mask.index_fill(-1, torch.tensor(seed % length), True)


@settings(max_examples=50)
@given(product=products(), seed=SEEDS)
def test_standard_attention_is_the_fused_kernel(
    product: tuple[Tensor, Tensor, Tensor, Tensor | None], seed: int
) -> None:
    query, key, value, mask = product
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    towards = numbers(tuple(query.shape), seed)
    one, two, three = leaves
    found, expected = standard(one, two, three, mask), flash(one, two, three, mask)
    assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad((y * towards).sum(), leaves) for y in (found, expected))):
        assert_close(mine, theirs)


@FEW
@given(config=configs(), rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_the_kind_of_attention_changes_neither_loss_nor_gradient(
    config: ModelConfig, rows: int, time: int, seed: int
) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)
    if seed % 2:
        del batch["documents"]
    results = [
        gradient(partial(nll, batch=batch, config=dataclasses.replace(config, attention=kind)), params)
        for kind in ("standard", "flash", "auto")
    ]
    for grads, value in results[1:]:
        assert_close(value, results[0][1], 1e-4)
        assert_trees_close(grads, results[0][0], 3e-4)


@pytest.mark.parametrize("kind", CHOICES["attention"])
def test_auto_is_fused_for_long_rows(kind: str) -> None:
    config = ModelConfig(attention=kind)
    chosen = [use_flash(config, torch.empty(1, 2, time, 4)) for time in (LONG - 1, LONG)]
    assert chosen == {"auto": [False, True], "standard": [False, False], "flash": [True, True]}[kind]


@given(
    queries=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    keys_at=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    window=st.integers(0, 4),
    seed=SEEDS,
)
def test_a_query_sees_its_own_past(queries: list[int], keys_at: list[int], window: int, seed: int) -> None:
    one, two = (token_rows(ModelConfig(vocab_size=2), (len(x),), seed) for x in (queries, keys_at))
    mask = visible(torch.tensor(queries), torch.tensor(keys_at), window, one, two)
    expected = [
        [k <= q and (not window or q - k < window) and int(one[i]) == int(two[j]) for j, k in enumerate(keys_at)]
        for i, q in enumerate(queries)
    ]
    assert mask.tolist() == expected


# Parts ----------------------------------------------------------------------------------------------------------------


@FEW
@given(width=st.integers(1, 9), eps=st.floats(1e-6, 1.0), seed=SEEDS, shift=st.booleans())
def test_norms_are_torchs(width: int, eps: float, seed: int, shift: bool) -> None:
    x, weight, bias = numbers((2, 3, width), seed) * 3, numbers((width,), seed + 1), numbers((width,), seed + 2)
    params = {"bias": bias, "weight": weight} if shift else {"weight": weight}
    assert_close(norm({"weight": weight}, x, "rmsnorm", eps), F.rms_norm(x, (width,), weight, eps))
    expected = F.layer_norm(x, (width,), weight, bias if shift else None, eps)
    assert_close(norm(params, x, "layernorm", eps), expected, 1e-4)
    coarse = norm(params, x.bfloat16(), "layernorm", eps)
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, norm(params, x.bfloat16().float(), "layernorm", eps).bfloat16())


@FEW
@given(config=configs(positions="rope"), seed=SEEDS, far=st.integers(0, 50))
def test_rotation_keeps_lengths_and_knows_only_distances(config: ModelConfig, seed: int, far: int) -> None:
    query, key = (numbers((1, 6, config.head_dim), seed + i, torch.float64) for i in (0, 1))
    here, there = (rotation(config, torch.arange(6) + shift, 64) for shift in (0, far))
    assert_close(rotate(query, here).norm(dim=-1), query.norm(dim=-1), 1e-6)
    products = [rotate(query, by) @ rotate(key, by).mT for by in (here, there)]
    assert_close(products[1], products[0], 1e-4)
    still = rotate(query, rotation(config, torch.zeros(6, dtype=torch.int64), 1))
    assert torch.equal(still, query)
    rest = slice(config.rotary_width, None)
    assert torch.equal(rotate(query, there)[..., rest], query[..., rest])
    stacked = rotation(config, torch.stack([torch.arange(6), torch.arange(6) + far]), 64)
    both = rotate(torch.stack([query, query]), stacked)
    assert torch.equal(both, torch.stack([rotate(query, here), rotate(query, there)]))


@given(config=configs(positions="rope", head_dim=8))
def test_frequencies_are_the_papers(config: ModelConfig) -> None:
    expected = [oracle.frequency(i, config) for i in range(config.rotary_width // 2)]
    torch.testing.assert_close(rotary_frequencies(config), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [2, 8, 30])
def test_sinusoids_of_a_distance_are_a_rotation(width: int) -> None:
    """The paper's reason for them: PE(t + k) is a fixed linear function of PE(t)."""
    table = sinusoids(width, 64).double().view(64, width // 2, 2)
    points = torch.complex(table[..., 1], table[..., 0])
    assert_close(torch.view_as_real(points[1:] / points[:-1]), torch.view_as_real(points[1:2].expand(63, -1)), 1e-5)
    assert points[1, 0].angle().item() == pytest.approx(1.0, abs=1e-6)


@given(rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_positions_restart_with_each_document(rows: int, time: int, seed: int) -> None:
    documents = document_rows(rows, time, seed)
    for numbering, found in zip(documents.tolist(), restart(documents).tolist()):
        assert found == [numbering[:t].count(number) for t, number in enumerate(numbering)]
    assert torch.equal(restart(documents)[0], restart(documents[0]))
