"""Kernels in C++ against their pure forms, and what they promise beyond: the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import kernels, keys, tree
from functional_lm.inference import cache as kv
from functional_lm.model import lora, quantize
from functional_lm.model.compute import decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.quantize import Plan
from functional_lm.model.transformer import forward_cached, init


@pytest.fixture(scope="module", autouse=True)
def kernels_are_there() -> None:
    if why := kernels.obstacle():
        pytest.skip(why)


KINDS = st.sampled_from([torch.float32, torch.bfloat16])
CONFIG = ModelConfig(
    vocab_size=50, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_len=64, tie_embeddings=False
)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return keys.normal(keys.key(seed), shape)


@settings(max_examples=60)
@given(st.integers(1, 17), st.integers(1, 70), st.integers(1, 6), KINDS, KINDS, st.integers(0, 99))
def test_few_rows_are_the_product(rows, outputs, blocks, kind, weights, seed):
    x, w = normal(seed, rows, 32 * blocks).to(kind), normal(seed + 1, outputs, 32 * blocks).to(weights)
    torch.testing.assert_close(kernels.few_rows(x, w), kernels.pure_few_rows(x, w), rtol=1e-2, atol=2e-3)


@settings(max_examples=40)
@given(st.integers(1, 17), st.integers(1, 70), st.integers(1, 6), KINDS, KINDS, st.integers(0, 99))
def test_few_rows_of_whole_numbers_are_exact_but_for_the_result(rows, outputs, blocks, kind, scale_kind, seed):
    w = keys.randint(keys.key(seed), (outputs, 32 * blocks), -127, 128, torch.int64).to(torch.int8)
    x = normal(seed + 1, rows, 32 * blocks).to(kind)
    scales = keys.uniform(keys.key(seed + 2), (outputs,)).to(scale_kind) + 0.01
    ours, pure = kernels.few_rows(x, w, scales), kernels.pure_few_rows(x, w, scales)
    torch.testing.assert_close(ours, pure, rtol=1e-2, atol=1e-2)


@settings(max_examples=30)
@given(st.integers(1, 16), st.integers(1, 40), KINDS, KINDS, st.integers(0, 99))
def test_a_row_says_the_same_bits_alone_in_company_and_on_any_number_of_threads(rows, outputs, kind, weights, seed):
    x, w = normal(seed, rows, 96).to(kind), normal(seed + 1, outputs, 96).to(weights)
    together = kernels.few_rows(x, w)
    for row in range(rows):
        assert torch.equal(kernels.few_rows(x[row : row + 1], w)[0], together[row])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(kernels.few_rows(x, w), together)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([16, 32, 48, 256]),
    st.integers(0, 9), KINDS, st.integers(0, 99),
)  # fmt: skip
def test_filled_rows_are_attention(slots, shared, groups, length, width, window, kind, seed):
    query = normal(seed, slots, shared * groups, width).to(kind)
    key, value = (normal(seed + i, slots, shared, length, width).to(kind) for i in (1, 2))
    at = keys.randint(keys.key(seed + 3), (slots,), 0, length, torch.int64)
    ours = kernels.filled_rows(query, key, value, at, window)
    rtol, atol = (1e-5, 1e-6) if kind == torch.float32 else (1e-2, 1e-3)
    torch.testing.assert_close(ours, kernels.pure_filled_rows(query, key, value, at, window), rtol=rtol, atol=atol)
    for slot in range(slots):  # neither the company nor what lies behind the filled rows is looked at
        end = int(at[slot]) + 1
        own = [part[slot : slot + 1, :, :end].contiguous() for part in (key, value)]
        alone = kernels.filled_rows(query[slot : slot + 1], *own, at[slot : slot + 1], window)
        assert torch.equal(alone[0], ours[slot])


def test_scores_far_apart_neither_overflow_nor_vanish():
    query = torch.full((1, 1, 16), 100.0)
    key = torch.stack([torch.full((16,), value) for value in (-100.0, 100.0, 99.999)])[None, None]
    value = torch.arange(3.0)[None, None, :, None].expand(1, 1, 3, 16).contiguous()
    at = torch.tensor([2])
    ours = kernels.filled_rows(query, key, value, at)
    torch.testing.assert_close(ours, kernels.pure_filled_rows(query, key, value, at, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_marked_model_says_what_the_model_says(kind, bits):
    params = init(CONFIG, keys.key(0))
    if bits == 8:
        params = quantize.quantize(params, Plan(8))
    copy = decoding_copy(params, kind)
    tokens = keys.randint(keys.key(1), (3, 5), 0, 50, torch.int64)
    marked = kernels.marked(copy)
    assert any(name.endswith(kernels.FEW) for name in tree.flatten(marked))
    results = []
    for weights in (copy, marked):
        cache = kv.init(CONFIG, 3, 32, kind)
        rows = []
        for t in range(5):
            at = torch.tensor([t, t + 2, t])
            cache, logits = forward_cached(weights, cache, tokens[:, t : t + 1], at, CONFIG)
            rows.append(logits)
        results.append(torch.cat(rows, 1))
    rtol, atol = (1e-4, 1e-4) if kind == torch.float32 else (5e-2, 5e-2)
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)


def test_a_bank_of_adapters_hangs_on_marked_weights_too():
    params = init(CONFIG, keys.key(0))
    adapter = tree.map(lambda leaf: leaf + 0.1, lora.init(params, ["*q_proj", "*down_proj"], 2, keys.key(1)))
    bank = lora.stack(params, [adapter])
    tokens, at = torch.tensor([[3], [4]]), torch.tensor([0, 0])
    said = []
    for weights in (params, kernels.marked(params)):
        whole = lora.attach(weights, lora.select(bank, torch.tensor([1, 0])))
        said.append(forward_cached(whole, kv.init(CONFIG, 2, 8, torch.float32), tokens, at, CONFIG)[1])
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


def test_the_operators_are_what_torch_expects_of_operators():
    x, w = normal(0, 3, 32), normal(1, 5, 32)
    torch.library.opcheck(torch.ops.functional_lm.few_rows, (x, w))
    key = normal(2, 2, 1, 4, 16)
    torch.library.opcheck(torch.ops.functional_lm.filled_rows, (normal(3, 2, 2, 16), key, key, torch.tensor([1, 3]), 0))
