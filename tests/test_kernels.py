"""Kernels in C++ against their pure forms, and what they promise beyond: the same bits in any company."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import kernels, keys, tree
from functional_lm.compile import compiled
from functional_lm.inference import cache as kv
from functional_lm.kernels import layout
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


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    return keys.randint(keys.key(seed), shape, -127, 128, torch.int64).to(torch.int8)


@given(st.integers(1, 70), st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_blocks_are_the_matrix_in_another_order(outputs, pairs, kind):
    weight = whole_numbers(0, outputs, 2 * pairs).to(kind)
    assert torch.equal(layout.whole(layout.in_blocks(weight), outputs), weight)
    stored = {"qweight": weight, "scales": torch.ones(outputs)} if kind == torch.int8 else {"weight": weight}
    laid = layout.laid_out({"a": stored})["a"]
    index = torch.arange(outputs).flip(0)
    assert torch.equal(layout.rows(laid, index), weight[index].to(layout.rows(laid, index).dtype))


@pytest.mark.parametrize("size", [0, 5, layout.PAGE - 1, layout.PAGE, 3 * layout.PAGE + 7])
def test_memory_is_as_large_as_it_was_asked_for_and_writable(size):
    memory = layout.allocated(size)
    assert memory.shape == (size,)
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * size
    assert size < layout.PAGE or memory.data_ptr() % layout.LINE == 0


@settings(max_examples=60)
@given(st.integers(1, 17), st.integers(1, 70), st.integers(1, 90), KINDS, KINDS, st.integers(0, 99))
def test_a_product_is_the_product(rows, outputs, pairs, kind, weights, seed):
    x, w = normal(seed, rows, 2 * pairs).to(kind), layout.in_blocks(normal(seed + 1, outputs, 2 * pairs).to(weights))
    ours, pure = (make(x, w.contiguous(), *more) for make, more in calls(outputs, None))
    torch.testing.assert_close(ours, pure, rtol=1e-2, atol=2e-3)


@settings(max_examples=40)
@given(st.integers(1, 17), st.integers(1, 70), st.integers(1, 90), KINDS, KINDS, st.integers(0, 99))
def test_a_product_of_whole_numbers_is_exact_but_for_the_result(rows, outputs, pairs, kind, scale_kind, seed):
    weight, x = whole_numbers(seed, outputs, 2 * pairs), normal(seed + 1, rows, 2 * pairs).to(kind)
    scales = keys.uniform(keys.key(seed + 2), (-(-outputs // 32) * 32,)).to(scale_kind) + 0.01
    blocks = layout.in_blocks(weight).contiguous()
    ours, pure = (make(x, blocks, *more) for make, more in calls(outputs, scales))
    torch.testing.assert_close(ours, pure, rtol=1e-2, atol=5e-2)  # a number at the border may be rounded either way
    exact = x.double() @ (weight * scales[:outputs, None].double()).mT
    bound = float(x.abs().amax() / 32767 * 127 * 2 * pairs * scales.max()) + exact.abs() / 100
    assert ((ours - exact).abs() <= bound).all()


def test_rows_become_the_largest_whole_numbers_whose_sums_are_exact():
    weight, x = torch.full((32, 4096), 127, dtype=torch.int8), torch.full((1, 4096), 3.0)
    ours = kernels.product(x, layout.in_blocks(weight).contiguous(), 32, torch.ones(32))
    torch.testing.assert_close(ours, torch.full((1, 32), 3.0 * 127 * 4096), rtol=1e-6, atol=0)
    numbers, _ = kernels.whole_rows(x)
    assert 127 * 4096 * int(numbers.max()) < 2**31 <= 127 * 4096 * (int(numbers.max()) + 1)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_alone(wrong):
    blocks, scales = layout.in_blocks(whole_numbers(0, 32, 8)).contiguous(), torch.ones(32)
    x = normal(1, 2, 8)
    x[0, 3] = wrong
    ours = kernels.product(x, blocks, 32, scales)
    assert not torch.isfinite(ours[0]).any()
    assert torch.equal(ours[1:], kernels.product(x[1:], blocks, 32, scales))
    zero = kernels.product(torch.zeros(1, 8), blocks, 32, scales)
    assert torch.equal(zero, torch.zeros(1, 32))


def calls(outputs, scales):
    """The kernel and its pure form, and how each is told the rest."""
    return (kernels.product, (outputs, scales)), (kernels.pure_product, (scales, outputs))


@settings(max_examples=30)
@given(st.integers(1, 17), st.integers(1, 90), KINDS, st.sampled_from(["same", "int8"]), st.integers(0, 99))
def test_a_row_says_the_same_bits_alone_in_company_and_on_any_number_of_threads(rows, outputs, kind, weights, seed):
    x, w = normal(seed, rows, 96).to(kind), normal(seed + 1, outputs, 96).to(kind)
    scales = None
    if weights == "int8":
        w, scales = whole_numbers(seed, outputs, 96), torch.ones(-(-outputs // 32) * 32)
    blocks = layout.in_blocks(w).contiguous()
    together = kernels.product(x, blocks, outputs, scales)
    for row in range(rows):
        assert torch.equal(kernels.product(x[row : row + 1], blocks, outputs, scales)[0], together[row])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernels.product(x, blocks, outputs, scales), together)
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
        row = slice(slot, slot + 1)
        its_key, its_value = (part[row, :, :end].contiguous() for part in (key, value))
        alone = kernels.filled_rows(query[row], its_key, its_value, at[row], window)
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
def test_a_model_in_blocks_says_what_the_model_says(kind, bits):
    params = init(CONFIG, keys.key(0))
    if bits == 8:
        params = quantize.quantize(params, Plan(8))
    copy = decoding_copy(params, kind)
    tokens = keys.randint(keys.key(1), (3, 5), 0, 50, torch.int64)
    laid = kernels.laid_out(copy)
    names = tree.flatten(laid).keys()
    assert not any(name.endswith(("proj.weight", "lm_head.weight", "packed", "qweight")) for name in names)
    results = []
    for weights in (copy, laid):
        cache = kv.init(CONFIG, 3, 32, kind)
        rows = []
        for t in range(5):
            at = torch.tensor([t, t + 2, t])
            cache, logits = forward_cached(weights, cache, tokens[:, t : t + 1], at, CONFIG)
            rows.append(logits)
        results.append(torch.cat(rows, 1))
    # beside whole numbers the rows have 15 bits
    near = 5e-2 if kind == torch.bfloat16 else 1e-4 if bits == 16 else 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=near, atol=near)


def test_a_bank_of_adapters_hangs_on_blocks_too():
    params = init(CONFIG, keys.key(0))
    adapter = tree.map(lambda leaf: leaf + 0.1, lora.init(params, ["*q_proj", "*down_proj"], 2, keys.key(1)))
    bank = lora.stack(params, [adapter])
    tokens, at = torch.tensor([[3], [4]]), torch.tensor([0, 0])
    said = []
    for weights in (params, kernels.laid_out(params)):
        whole = lora.attach(weights, lora.select(bank, torch.tensor([1, 0])))
        said.append(forward_cached(whole, kv.init(CONFIG, 2, 8, torch.float32), tokens, at, CONFIG)[1])
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


def test_the_operators_are_what_torch_expects_of_operators():
    x, w = normal(0, 3, 32), layout.in_blocks(normal(1, 5, 32)).contiguous()
    torch.library.opcheck(torch.ops.functional_lm.product, (x, w, None, 5))
    key = normal(2, 2, 1, 4, 16)
    torch.library.opcheck(torch.ops.functional_lm.filled_rows, (normal(3, 2, 2, 16), key, key, torch.tensor([1, 3]), 0))
    noise = (normal(1, 3, 5, 8), normal(2, 3, 5, 6), normal(3, 3, 2, 8), normal(4, 3, 6, 2), normal(5, 3))
    torch.library.opcheck(torch.ops.functional_lm.low_rank, noise)
    torch.library.opcheck(torch.ops.functional_lm.low_rank_, noise)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_hangs_on_blocks_as_on_weights(dora):
    params = init(CONFIG, keys.key(0))
    adapter = lora.init(params, ["q_proj", "down_proj", "lm_head"], 2, keys.key(1), dora=dora)
    adapter = tree.map_named(lambda name, leaf: leaf + 0.1 if "lora_B" in name else leaf, adapter)
    tokens, at = torch.tensor([[3], [4]]), torch.tensor([0, 0])
    said = []
    for weights in (params, kernels.laid_out(params)):
        cache = kv.init(CONFIG, 2, 8, torch.float32)
        said.append(forward_cached(lora.attach(weights, adapter), cache, tokens, at, CONFIG)[1])
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


# What low-rank noise adds ---------------------------------------------------------------------------------------------


def members(
    seed: int, sizes: tuple[int, int, int, int, int], kind: torch.dtype, factors: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, tree.Tree]:
    """x [P, M, in], y [P, M, out] and adapters [P, ...] under the kernel's names."""
    count, rows, inputs, outputs, rank = sizes
    own = {"thin_A": normal(seed + 2, count, rank, inputs), "thin_B": normal(seed + 3, count, outputs, rank)}
    noise = {**tree.cast(own, factors), "lora_scale": normal(seed + 4, count)}
    x, y = normal(seed, count, rows, inputs).to(kind), normal(seed + 1, count, rows, outputs).to(kind)
    return x, y, noise


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(1, 9))


@settings(max_examples=60)
@given(SIZES, KINDS, KINDS, st.integers(0, 99))
def test_low_rank_noise_is_two_thin_products(sizes, kind, factors, seed):
    x, y, params = members(seed, sizes, kind, factors)
    a, b = (params[name] for name in layout.THIN)
    wanted = kernels.pure_low_rank(x, y, a, b, params["lora_scale"])
    before = y.clone()
    close = {"rtol": 1e-2, "atol": 2e-2} if kind == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.vmap(kernels.low_rank)(x, y.clone(), params), wanted, **close)
    for member in range(len(x)):
        alone = kernels.low_rank(x[member], y[member], tree.index(params, member))
        torch.testing.assert_close(alone, wanted[member], **close)
    assert torch.equal(y, before)  # outside of vmap nobody's tensor is written to
    back = torch.vmap(partial(kernels.low_rank, transposed=True))(y, x.clone(), params)
    torch.testing.assert_close(back, kernels.pure_low_rank(y, x, b.mT, a.mT, params["lora_scale"]), **close)


@settings(max_examples=40)
@given(SIZES, KINDS, KINDS, st.integers(0, 99))
def test_a_members_noise_says_the_same_bits_in_any_company(sizes, kind, factors, seed):
    """Alone and among members, a row and all rows, shared or not, a part of a wider product, on 1 thread and on 3."""
    x, y, params = members(seed, sizes, kind, factors)
    together = torch.vmap(kernels.low_rank)(x, y.clone(), params)
    wide = torch.cat([y, y, y], -1)
    part = wide[..., y.shape[-1] : 2 * y.shape[-1]]
    torch.set_num_threads(3)
    try:
        assert torch.equal(torch.vmap(kernels.low_rank)(x, part, params), together)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(wide[..., : y.shape[-1]], y)
    for member in range(len(x)):
        own = tree.index(params, member)
        for row in range(x.shape[1]):
            assert torch.equal(kernels.low_rank(x[member, row], y[member, row], own), together[member, row])
    shared = torch.vmap(kernels.low_rank, (None, None, 0))(x[0], y[0], params)
    assert torch.equal(shared[0], together[0])
    alone = [kernels.low_rank(x[0], y[0], tree.index(params, member)) for member in range(len(x))]
    assert torch.equal(shared, torch.stack(alone))


def test_adapters_of_one_rank_and_with_magnitudes_keep_their_names():
    params = init(CONFIG, keys.key(0))
    for rank, dora, served in ((1, False, False), (2, False, True), (2, True, False)):
        adapter = lora.init(params, ["q_proj"], rank, keys.key(1), dora=dora)
        before, after = tree.flatten(adapter), tree.flatten(layout.thin(adapter))
        path = next(name.removesuffix(".lora_A") for name in before if name.endswith("q_proj.lora_A"))
        assert (f"{path}.thin_A" in after) == served == (f"{path}.lora_A" not in after)
        assert len(before) == len(after)


def test_a_compiled_product_and_its_noise_are_the_eager_ones():
    """Fused products, of which each part has noise of its own and is written to in place."""
    weight, (x, _, first) = normal(9, 48, 32), members(0, (3, 5, 32, 16, 4), torch.float32)
    parts = [first, *(members(seed, (3, 5, 32, 16, 4), torch.float32)[2] for seed in (10, 20))]

    def three(x: Tensor, parts: list[tree.Tree]) -> Tensor:
        products = (x @ weight.mT).split(16, -1)
        a, b, c = (kernels.low_rank(x, y, part) for y, part in zip(products, parts))
        return a * b + c

    eager = torch.vmap(three)(x, parts)
    pure = [
        kernels.pure_low_rank(x, y, part["thin_A"], part["thin_B"], part["lora_scale"])
        for y, part in zip((x @ weight.mT).split(16, -1), parts)
    ]
    torch.testing.assert_close(eager, pure[0] * pure[1] + pure[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled(torch.vmap(three))(x, parts), eager)
