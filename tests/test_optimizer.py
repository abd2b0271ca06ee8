"""AdamW and clipping are torch's, decay goes by path, schedules are their formulas; all of it pure and mappable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.training import optimizer, schedule
from functional_lm.tree import Tree

NUMBERS = {"learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.0}
DECAYED = ("a.weight", "model.embed_tokens.weight", "layers.3.mlp.up_proj.weight", "q_proj.lora_A", "q_proj.lora_B")
KEPT = (
    "a.bias", "model.norm.weight", "layers.0.input_layernorm.weight", "self_attn.q_norm.weight", "q_proj.lora_scale",
    "layers.0.post_attention_layernorm.bias",
)  # fmt: skip
SHAPES = st.lists(st.integers(1, 4), max_size=2).map(tuple)
TREES = st.dictionaries(st.sampled_from(DECAYED + KEPT), SHAPES, min_size=1, max_size=5)
SEED = st.integers(0, 2**31)
RATE = st.floats(1e-5, 1e-1)


def numbers(step: int = 0, dtype: torch.dtype = torch.float64, **changes: float) -> dict[str, Tensor]:
    values = {name: torch.tensor(value, dtype=dtype) for name, value in {**NUMBERS, **changes}.items()}
    return {**values, "step": torch.tensor(step)}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    key = keys.key(seed)
    return tree.unflatten({n: keys.normal(keys.fold_in_name(key, n), s, dtype) for n, s in shapes.items()})


def close(a: Any, b: Any, rtol: float, atol: float) -> None:
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# AdamW --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 1e-6)])
@given(shapes=TREES, seed=SEED, rate=RATE, decay=st.floats(0, 1), beta1=st.floats(0, 0.99), beta2=st.floats(0.5, 0.999))
@settings(max_examples=12)
def test_twenty_steps_are_those_of_torch(
    dtype: torch.dtype, rtol: float, atol: float, shapes: Any, seed: int, rate: float, decay: float, beta1: float,
    beta2: float,
) -> None:  # fmt: skip
    """The rate changes from step to step, as under a schedule; names alone say which leaves decay."""
    ours, params = optimizer.adamw(), drawn(shapes, seed, dtype)
    theirs = {name: leaf.clone() for name, leaf in tree.flatten(params).items()}
    groups = [
        {"params": [leaf for name, leaf in theirs.items() if name in DECAYED], "weight_decay": decay},
        {"params": [leaf for name, leaf in theirs.items() if name in KEPT], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=rate, betas=(beta1, beta2), eps=1e-8)
    state = ours.init(params)
    for step in range(20):
        grads = drawn(shapes, seed + step + 1, dtype)
        now = rate * (1 - step / 40)
        given_now = numbers(step, dtype, learning_rate=now, weight_decay=decay, beta1=beta1, beta2=beta2)
        updates, state = ours.update(grads, state, params, given_now)
        params = tree.add(params, updates)
        for group in reference.param_groups:
            group["lr"] = now
        for name, grad in tree.flatten(grads).items():
            theirs[name].grad = grad
        reference.step()
        close(params, tree.unflatten(theirs), rtol, atol)


@given(shapes=TREES, seed=SEED, decay=st.floats(0.01, 1))
@settings(max_examples=25)
def test_without_a_gradient_only_named_matrices_shrink(shapes: Any, seed: int, decay: float) -> None:
    ours, params = optimizer.adamw(), drawn(shapes, seed)
    updates, _ = ours.update(tree.zeros_like(params), ours.init(params), params, numbers(weight_decay=decay))
    for name, update in tree.flatten(updates).items():
        expected = -NUMBERS["learning_rate"] * decay * tree.flatten(params)[name] if name in DECAYED else 0 * update
        torch.testing.assert_close(update, expected)


def test_the_state_has_names_for_a_checkpoint_and_is_float32() -> None:
    params = {"a": {"weight": torch.ones(2, 3, dtype=torch.bfloat16)}, "b": {"bias": torch.ones(3)}}
    state = optimizer.adamw().init(params)
    assert list(tree.flatten(state)) == ["adam.m.a.weight", "adam.m.b.bias", "adam.v.a.weight", "adam.v.b.bias"]
    assert all(leaf.dtype == torch.float32 and not leaf.any() for leaf in tree.leaves(state))
    _, after = optimizer.adamw().update(params, state, params, numbers(dtype=torch.float32))
    assert [leaf.shape for leaf in tree.leaves(after)] == [leaf.shape for leaf in tree.leaves(state)]
    assert {leaf.dtype for leaf in tree.leaves(after)} == {torch.float32}


@given(shapes=TREES, seed=SEED)
@settings(max_examples=15)
def test_an_update_leaves_its_arguments_alone(shapes: Any, seed: int) -> None:
    ours, params, grads = optimizer.adamw(), drawn(shapes, seed), drawn(shapes, seed + 1)
    state = ours.init(params)
    arguments = (grads, state, params, numbers(grad_clip=0.1))
    before = tree.copy(arguments)
    first, second = ours.update(*arguments), ours.update(*arguments)
    assert same(arguments, before)
    assert same(first, second)


@given(shapes=TREES, seed=SEED, rates=st.lists(RATE, min_size=1, max_size=4))
@settings(max_examples=15)
def test_a_population_with_its_own_numbers_is_the_loop(shapes: Any, seed: int, rates: list[float]) -> None:
    ours, members = optimizer.adamw(), range(len(rates))
    params, grads = ([drawn(shapes, seed + offset + i) for i in members] for offset in (0, 1000))
    states = [ours.init(member) for member in params]
    each = [numbers(learning_rate=rate, grad_clip=1.0, weight_decay=10 * rate) for rate in rates]
    looped = [ours.update(*arguments) for arguments in zip(grads, states, params, each)]
    mapped = torch.vmap(ours.update)(*(tree.stack(list(part)) for part in (grads, states, params, each)))
    close(mapped, tree.stack(looped), rtol=1e-6, atol=1e-9)


# Transformations ------------------------------------------------------------------------------------------------------


@given(shapes=TREES, seed=SEED, limit=st.floats(1e-3, 1e2), size=st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_clipping_is_that_of_torch(shapes: Any, seed: int, limit: float, size: float) -> None:
    grads = tree.scale(drawn(shapes, seed, torch.float32), size)
    clipped, _ = optimizer.clip_by_global_norm().update(grads, {}, grads, numbers(0, torch.float32, grad_clip=limit))
    theirs = [leaf.clone().requires_grad_() for leaf in tree.leaves(grads)]
    for leaf, grad in zip(theirs, tree.leaves(grads)):
        leaf.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(tree.norm(grads), norm)
    close(clipped, [leaf.grad for leaf in theirs], rtol=1e-5, atol=1e-8)
    assert float(tree.norm(clipped)) <= limit * (1 + 1e-5)


@pytest.mark.parametrize(("limit", "size"), [(0.0, 1e9), (-1.0, 1e9), (1.0, 0.0), (1e3, 1.0)])
def test_clipping_leaves_alone_what_is_off_or_short_or_nothing(limit: float, size: float) -> None:
    grads = {"a": torch.full((3,), size)}
    clipped, state = optimizer.clip_by_global_norm().update(grads, {}, grads, numbers(grad_clip=limit))
    assert same(clipped, grads)
    assert state == {}


@given(shapes=TREES, seed=SEED)
@settings(max_examples=15)
def test_a_chain_is_its_links_one_after_the_other(shapes: Any, seed: int) -> None:
    params, grads, now = drawn(shapes, seed), drawn(shapes, seed + 1), numbers(3, grad_clip=0.5)
    links = {
        "first": optimizer.scale_by_adam(),
        "none": optimizer.clip_by_global_norm(),
        "second": optimizer.scale_by_adam(1e-3),
        "rate": optimizer.scale_by_learning_rate(),
    }
    whole = optimizer.chain(**links)
    state = whole.init(params)
    assert list(state) == ["first", "second"]
    updates, after = whole.update(grads, state, params, now)
    expected, states = grads, {}
    for name, link in links.items():
        expected, states[name] = link.update(expected, link.init(params), params, now)
    assert same(updates, expected)
    assert same(after, {name: states[name] for name in ("first", "second")})


@pytest.mark.parametrize(("name", "decays"), [*((name, True) for name in DECAYED), *((name, False) for name in KEPT)])
def test_decay_by_path(name: str, decays: bool) -> None:
    assert optimizer.is_matrix(name) == decays


@pytest.mark.parametrize("make", [optimizer.optimizer, lambda name: schedule.schedule(name, 10, 1, 0.1)])
def test_an_unknown_name_is_refused_with_those_there_are(make: Any) -> None:
    with pytest.raises(UsageError, match=r"^there is no (optimizer|schedule) 'nosuch'; there are (adamw|cosine).*$"):
        make("nosuch")


# Schedules ------------------------------------------------------------------------------------------------------------


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Loshchilov and Hutter's eq. 5 with eta_max 1 and eta_min `floor`, behind a linear warm-up."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if step <= warmup:
        return ramp
    passed = min(1.0, (step - warmup) / max(1, steps - warmup))
    return ramp * (floor + 0.5 * (1.0 - floor) * (1.0 + math.cos(passed * math.pi)))


def constant(step: int, steps: int, warmup: int, floor: float) -> float:
    return 1.0 if step + 1 >= warmup else (step + 1) / warmup


@pytest.mark.parametrize(("name", "formula"), [("cosine", cosine), ("constant", constant)])
@given(steps=st.integers(1, 400), warmup=st.integers(0, 400), floor=st.floats(0, 1))
@settings(max_examples=60)
def test_a_schedule_is_its_formula(name: str, formula: Any, steps: int, warmup: int, floor: float) -> None:
    factor = schedule.schedule(name, steps, warmup, floor)
    moments = torch.arange(steps + 20)
    values = torch.vmap(factor)(moments)
    torch.testing.assert_close(
        values, torch.tensor([formula(int(s), steps, warmup, floor) for s in moments]), rtol=1e-5, atol=1e-6
    )
    assert values.dtype == torch.float32
    assert 0 < values[0] <= 1 or (warmup == 0 and values[0] == 1)
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6
    after = values[warmup:]
    assert (after.diff() <= 1e-6).all()
    if name == "cosine" and warmup < steps:
        torch.testing.assert_close(values[steps:], torch.full((20,), floor), rtol=1e-5, atol=1e-6)


@given(steps=st.integers(1, 10**6), warmup=st.integers(0, 10**4), floor=st.floats(0, 1), step=st.integers(0, 2 * 10**6))
def test_a_rate_is_a_finite_number_between_floor_and_peak_at_any_step(
    steps: int, warmup: int, floor: float, step: int
) -> None:
    for name in schedule.SCHEDULES:
        value = schedule.schedule(name, steps, warmup, floor)(torch.tensor(step))
        assert value.shape == ()
        assert min(floor, 1 / max(1, warmup)) * (1 - 1e-5) - 1e-6 <= float(value) <= 1 + 1e-6
