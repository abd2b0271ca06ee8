"""Laws of functional_lm.keys: JAX's streams, the same in every mode, and random where they should be."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import arithmetic, keys
from functional_lm.errors import UsageError
from functional_lm.threefry import counters

SETTINGS = settings(max_examples=40, deadline=None)
SEEDS = st.integers(-(2**63), 2**63 - 1)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(*values: int) -> Tensor:
    """uint32 values as int32."""
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in values], dtype=torch.int32)


def ulps(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the last place, of 1 for values below 1."""
    scale = torch.exp2(theirs.double().abs().clamp(min=1).log2().floor()) * torch.finfo(theirs.dtype).eps
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, (ours.double() - theirs.double()).abs() / scale)
    return difference.max().item() if difference.numel() else 0.0


# ------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(
    key: tuple[int, int], counter: tuple[int, int], answer: tuple[int, int]
) -> None:
    x0, x1 = words(*counter)
    assert torch.equal(torch.stack(keys.threefry(words(*key), x0, x1)), words(*answer))


TABLE = json.loads((Path(__file__).parent / "data" / "jax_random.json").read_text(encoding="utf-8"))["cases"]
LIMITS = {  # ulp; bfloat16 and float16 values are rounded twice by JAX
    "normal": {"float32": 4, "float64": 32, "float16": 1, "bfloat16": 1},
    "truncated_normal": {"float32": 4, "float64": 32},
    "gumbel": {"float32": 2, "float64": 2},
}


def table() -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for case in TABLE:
        groups[case["draw"], case.get("dtype", "")].append(case)
    return groups


def draw(case: dict[str, Any]) -> Tensor:
    """Ours for a case of the table (tools/jax_table.py)."""
    arguments = {
        name: x for name, x in case.items() if name not in ("draw", "seed", "shape_out", "values", "head", "sha256")
    }
    key = keys.key(case["seed"])
    if case["draw"] == "key":
        return key
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if case["draw"] == "threefry":
        return torch.stack(keys.threefry(key, *words(arguments["x0"], arguments["x1"])))
    if case["draw"] == "bernoulli":
        arguments["p"] = torch.tensor(arguments["p"], dtype=arguments.pop("dtype"))
    if isinstance(arguments.get("x"), list):
        arguments["x"] = torch.arange(math.prod(arguments["x"]), dtype=torch.int32).reshape(arguments["x"])
    if "logits" in arguments:
        logits = arguments["logits"]
        arguments["logits"] = keys.uniform(keys.key(1), logits["shape"], getattr(torch, logits["dtype"]), -4.0, 4.0)
    return getattr(keys, case["draw"])(key, **arguments)


@pytest.mark.parametrize("group", table(), ids=" ".join)
def test_draws_are_those_of_jax(group: tuple[str, str]) -> None:
    limit = LIMITS.get(group[0], {}).get(group[1])
    for case in table()[group]:
        ours = draw(case)
        assert list(ours.shape) == case["shape_out"]
        dtype = torch.uint8 if ours.dtype == torch.bool else INTEGER[ours.element_size()]
        integers = ours.contiguous().view(dtype)
        if limit is not None:
            theirs = torch.tensor(case["values"], dtype=dtype).view(ours.dtype).reshape(ours.shape)
            assert ulps(ours, theirs) <= limit, case
        elif "values" in case:
            assert integers.flatten().tolist() == case["values"], case
        else:
            assert integers.flatten()[:4].tolist() == case["head"], case
            assert hashlib.sha256(integers.numpy().tobytes()).hexdigest() == case["sha256"], case


# --------------------------------------------------------------------------------------------------------------- modes


Draws = dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]
DRAWS: Draws = {  # of key, step, low, high
    "bits": lambda k, step, low, high: keys.bits(k, (11,), torch.int64),
    "uniform": lambda k, step, low, high: keys.uniform(k, (37,), torch.float32, low, high),
    "uniform float64": lambda k, step, low, high: keys.uniform(k, (37,), torch.float64, low, high),
    "bernoulli": lambda k, step, low, high: keys.bernoulli(k, high / 2, (6, 6)),
    "randint": lambda k, step, low, high: keys.randint(k, (37,), -step, step * 1000, torch.int16),
    "randint int64": lambda k, step, low, high: keys.randint(k, (37,), -(10**15), 10**17, torch.int64),
    "permutation": lambda k, step, low, high: keys.permutation(k, 100),
    "categorical": lambda k, step, low, high: keys.categorical(k, low * torch.arange(50).reshape(5, 10), shape=(3, 5)),
    "~normal": lambda k, step, low, high: keys.normal(k, (100,)),
}
MORE: Draws = {  # these take the compiler long and show it little that is new
    "uniform bfloat16": lambda k, step, low, high: keys.uniform(k, (37,), torch.bfloat16, low, high),
    "rows": lambda k, step, low, high: keys.permutation(k, torch.arange(4000).reshape(2000, 2)),
    "~normal float64": lambda k, step, low, high: keys.normal(k, (100,), torch.float64),
    "~truncated": lambda k, step, low, high: keys.truncated_normal(k, low, 2.0, (100,)),
}


def everything(key: Tensor, step: Tensor, low: Tensor, high: Tensor, draws: Draws = DRAWS) -> dict[str, Tensor]:
    """Each draw from a key of its own; the inexact ones are marked ~."""
    batch = keys.split(keys.fold_in_name(keys.fold_in(key, step), "model.norm.weight"), len(draws))
    return {name: draw(k, step, low, high) for (name, draw), k in zip(draws.items(), batch)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert one[name].dtype == other[name].dtype
        if name.startswith("~"):
            assert ulps(one[name], other[name]) <= 4, name
        else:
            assert torch.equal(one[name], other[name]), name


MODE_ARGUMENTS = (torch.tensor(12), torch.tensor(-0.3), torch.tensor(1.1))


def looped(batch: Tensor, *arguments: Any) -> dict[str, Tensor]:
    draws = [everything(key, *arguments) for key in batch]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def test_vmapped_equals_looped() -> None:
    batch = keys.split(keys.key(5), 3)
    mapped = torch.vmap(lambda key: everything(key, *MODE_ARGUMENTS, DRAWS | MORE))(batch)
    assert_same(mapped, looped(batch, *MODE_ARGUMENTS, DRAWS | MORE))


def test_compiled_and_vmapped_equals_eager() -> None:
    torch.compiler.reset()
    compiled = torch.compile(torch.vmap(everything, (0, None, None, None)), fullgraph=True)
    batch = keys.split(keys.key(5), 2)
    assert_same(compiled(batch, *MODE_ARGUMENTS), looped(batch, *MODE_ARGUMENTS))
    # Draws must fuse, or dropout is slow: this fails when a new torch no longer takes our kernel body.
    from torch._inductor.lowering import lowerings

    assert torch.ops.functional_lm.threefry.default in lowerings
    # Other keys, steps and bounds are other values of the same graph.
    with torch.compiler.set_stance("fail_on_recompile"):
        other = keys.split(keys.key(6), 2), torch.tensor(13), torch.tensor(0.2), torch.tensor(0.9)
        assert_same(compiled(*other), looped(*other))


def test_draws_sit_inside_differentiated_and_mapped_functions() -> None:
    def loss(weight: Tensor, key: Tensor) -> Tensor:
        kept = keys.bernoulli(key, 0.5, weight.shape)
        return torch.where(kept, weight, 0.0).square().sum() + keys.normal(key)

    weight, batch = torch.ones(7), keys.split(keys.key(0), 4)
    gradients = torch.vmap(torch.func.grad(loss), (None, 0))(weight, batch)
    assert torch.equal(gradients, torch.stack([2.0 * keys.bernoulli(key, 0.5, (7,)) for key in batch]))


@SETTINGS
@given(SEEDS, st.integers(1, 200), st.integers(1, 60))
def test_blocks_of_an_eager_draw_leave_no_trace(seed: int, size: int, block: int) -> None:
    batch = keys.split(keys.key(seed), 2)
    whole = torch.stack([keys.normal(key, (size,)) for key in batch])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_CPU_BLOCK", block)
        assert ulps(torch.stack([keys.normal(key, (size,)) for key in batch]), whole) <= 4
        assert torch.equal(torch.vmap(lambda key: keys.bits(key, (size,)))(batch)[1], keys.bits(batch[1], (size,)))


def test_counters_go_on_beyond_32_bits() -> None:
    for start in (2**31 - 2, 2**32 - 2, 2**40 + 2**32 - 1):
        high, low = counters(start, start + 4, torch.device("cpu"))
        high = high if isinstance(high, Tensor) else torch.zeros(4, dtype=torch.int32)
        assert ((high.long() << 32) | (low.long() & 0xFFFFFFFF)).tolist() == list(range(start, start + 4))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    everything(keys.key(0), *MODE_ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- keys


@SETTINGS
@given(SEEDS, st.integers(0, 50), st.integers(0, 50))
def test_a_split_key_does_not_depend_on_its_siblings(seed: int, few: int, more: int) -> None:
    key, few = keys.key(seed), min(few, more)
    assert torch.equal(keys.split(key, more)[:few], keys.split(key, few))
    assert all(torch.equal(row, keys.fold_in(key, i)) for i, row in enumerate(keys.split(key, few)))


@SETTINGS
@given(SEEDS, SHAPES)
def test_a_draw_depends_on_the_flat_index_alone(seed: int, shape: tuple[int, ...]) -> None:
    key, size = keys.key(seed), math.prod(shape)
    assert torch.equal(keys.bits(key, shape).flatten(), keys.bits(key, (size + 3,))[:size])


@SETTINGS
@given(SEEDS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@example(0, 0, 2**31)
@example(0, 1, 2**32 - 1)
def test_fold_in_differs_for_every_datum(seed: int, one: int, other: int) -> None:
    key = keys.key(seed)
    assert torch.equal(keys.fold_in(key, one), keys.fold_in(key, other)) == (one == other)
    assert torch.equal(keys.fold_in(key, one), keys.fold_in(key, torch.tensor(one)))


def test_names_fold_in_by_fnv1a_and_do_not_collide() -> None:
    key = keys.key(1)
    assert torch.equal(keys.fold_in_name(key, ""), keys.fold_in(key, 0x811C9DC5))
    assert torch.equal(keys.fold_in_name(key, "foobar"), keys.fold_in(key, 0xBF9CF968))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    leaves = ["weight", "bias", "lora_A.weight", "lora_B.weight"]
    names = [f"model.layers.{i}.{part}.{leaf}" for i in range(20) for part in parts for leaf in leaves]
    assert len({tuple(keys.fold_in_name(key, name).tolist()) for name in names}) == len(names)


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    key = keys.key(0)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(UsageError, match="64 bits"):
            keys.key(seed)
    with pytest.raises(UsageError, match="32 bits"):
        keys.fold_in(key, 2**32)
    for refused in (
        lambda: keys.fold_in(key, torch.tensor(1.0)),
        lambda: keys.fold_in(key, torch.tensor([1])),
        lambda: keys.bits(key, (), torch.int16),
        lambda: keys.uniform(key, (), torch.int32),
        lambda: keys.uniform(key, (2,), low=torch.zeros(2)),
        lambda: keys.randint(key, (), 0, 2, torch.float32),
        lambda: keys.permutation(key, torch.tensor(3)),
    ):
        with pytest.raises(TypeError):
            refused()


# -------------------------------------------------------------------------------------------------------------- ranges


def floats(width: int) -> st.SearchStrategy[float]:
    return st.floats(-1e6, 1e6, width=width, allow_subnormal=False)


@SETTINGS
@given(SEEDS, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_uniform_rounds_the_exact_value_once(seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    bound = floats(32 if dtype == torch.float32 else 64)
    low, high = sorted((data.draw(bound), data.draw(bound)))
    key, kept = keys.key(seed), 23 if dtype == torch.float32 else 52
    draws = keys.uniform(key, (20,), dtype, low, high)
    assert bool(((draws >= low) & (draws <= high)).all())
    unit = keys.uniform(key, (20,), dtype)
    span = Fraction((torch.tensor(high, dtype=dtype) - torch.tensor(low, dtype=dtype)).item())
    for drawn, k in zip(draws, (unit.double() * 2**kept).long().tolist()):
        exact = Fraction(low) + span * Fraction(k, 2**kept)
        error = abs(Fraction(drawn.item()) - exact)
        for direction in (-math.inf, math.inf):
            neighbour = torch.nextafter(drawn, torch.tensor(direction, dtype=dtype))
            assert error <= abs(Fraction(neighbour.item()) - exact) or drawn == low


@SETTINGS
@given(SEEDS, floats(32), floats(32))
def test_both_forms_of_scaling_agree(seed: int, low: float, high: float) -> None:
    mantissa = keys.bits(keys.key(seed), (100,)) & 0x7FFFFF
    bounds = torch.tensor(low), torch.tensor(high)
    assert torch.equal(
        arithmetic.scale(mantissa, *bounds, torch.float32), arithmetic.scale_in_halves(mantissa, *bounds)
    )


@SETTINGS
@given(SEEDS, SHAPES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_uniform_lies_in_the_half_open_unit_interval(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draws = keys.uniform(keys.key(seed), shape, dtype)
    assert draws.shape == shape
    assert draws.dtype == dtype
    assert bool(((draws >= 0) & (draws < 1)).all())


@SETTINGS
@given(SEEDS, st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]), st.data())
def test_randint_stays_in_range_and_takes_tensors(seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    info, key = torch.iinfo(dtype), keys.key(seed)
    low = data.draw(st.integers(info.min, info.max))
    high = data.draw(st.integers(low + 1, info.max + 1))
    draws = keys.randint(key, (30,), low, high, dtype)
    assert draws.dtype == dtype
    assert low <= draws.min().item() <= draws.max().item() < high
    if high < 2**63:
        assert torch.equal(keys.randint(key, (30,), torch.tensor(low), torch.tensor(high), dtype), draws)
        assert torch.equal(keys.randint(key, (30,), torch.tensor(low), high, dtype), draws)
    assert bool((keys.randint(key, (5,), high, low, dtype) == min(high, info.max)).all())


@SETTINGS
@given(SEEDS, st.integers(0, 3000))
def test_permutation_is_one(seed: int, size: int) -> None:
    key = keys.key(seed)
    order = keys.permutation(key, size)
    assert torch.equal(order.sort().values, torch.arange(size))
    rows = torch.arange(2 * size).reshape(size, 2)
    assert torch.equal(keys.permutation(key, rows), rows[order])


@SETTINGS
@given(SEEDS, st.floats(-6, 6, width=32), st.floats(-6, 6, width=32))
def test_truncated_normal_lies_inside(seed: int, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high) + 1e-3
    draws = keys.truncated_normal(keys.key(seed), low, high, (50,))
    assert low < draws.min().item() <= draws.max().item() < high


@SETTINGS
@given(SEEDS, st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
def test_categorical_never_takes_what_has_no_probability(seed: int, allowed: list[bool]) -> None:
    logits = torch.where(torch.tensor(allowed), 0.0, -math.inf)
    for dtype in (torch.float32, torch.bfloat16):
        draws = keys.categorical(keys.key(seed), logits.to(dtype), shape=(20,))
        assert all(allowed[i] for i in draws.tolist())


# ---------------------------------------------------------------------------------------------------------- statistics

N = 200_000


def assert_moments(x: Tensor, mean: float, deviation: float) -> None:
    """Mean and standard deviation within five standard errors (for tails no heavier than the exponential's)."""
    x = x.double()
    assert abs(x.mean().item() - mean) < 5 * deviation / math.sqrt(x.numel())
    assert abs(x.std().item() / deviation - 1) < 10 / math.sqrt(x.numel())


def test_moments() -> None:
    k = keys.split(keys.key(2024), 12)
    assert_moments(keys.uniform(k[0], (N,)), 0.5, 1 / math.sqrt(12))
    assert_moments(keys.uniform(k[1], (N,), low=-3.0, high=5.0), 1.0, 8 / math.sqrt(12))
    assert_moments(keys.normal(k[2], (N,)), 0.0, 1.0)
    assert_moments(keys.normal(k[3], (N,), torch.float64), 0.0, 1.0)
    assert_moments(keys.bernoulli(k[5], 0.1, (N,)), 0.1, 0.3)
    assert_moments(keys.gumbel(k[6], (N,)), 0.5772156649, math.pi / math.sqrt(6))
    assert_moments(keys.truncated_normal(k[7], -2.0, 2.0, (N,)), 0.0, 0.87962566)
    assert_moments(keys.randint(k[8], (N,), 0, 10), 4.5, math.sqrt(99 / 12))
    assert_moments(keys.permutation(k[9], N).float()[: N // 2], (N - 1) / 2, N / math.sqrt(12))


def test_choices_are_as_likely_as_they_should_be() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05])
    key = keys.key(8)
    for counts, expected in (
        (keys.categorical(key, probabilities.log(), shape=(N,)).bincount(minlength=4), N * probabilities),
        (keys.randint(key, (N,), 0, 7).bincount(minlength=7), torch.full((7,), N / 7)),
        (torch.vmap(lambda k: keys.permutation(k, 4)[0])(keys.split(key, 40_000)).bincount(), torch.full((4,), 10_000)),
    ):
        assert ((counts - expected) ** 2 / expected).sum().item() < 25  # chi squared, at most 6 degrees of freedom


def test_neighbouring_keys_are_uncorrelated() -> None:
    key = keys.key(0)
    related = key, keys.key(1), keys.key(2**32), *keys.split(key), keys.fold_in(key, 2), keys.fold_in_name(key, "a")
    streams = [keys.normal(k, (N // 10,)) for k in related]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max().item() < 5 / math.sqrt(N // 10)
