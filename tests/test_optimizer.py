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
from functional_lm.training import direction, optimizer, schedule, transformation
from functional_lm.tree import Tree

NUMBERS = {
    "learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "momentum": 0.9, "grad_clip": 0.0,
}  # fmt: skip
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


# The others -----------------------------------------------------------------------------------------------------------

MATRICES = {  # paths and shapes of a small model
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.norm.weight": (4,),
}


def twins(
    make: Any, ours: transformation.Optimizer, shapes: Any, steps: int, seed: int, rtol: float, **changes: Any
) -> None:
    """`ours` and the optimizer of torch that `make(list of leaves)` gives take the same steps."""
    params = drawn(shapes, seed, torch.float32)
    theirs = {name: leaf.clone() for name, leaf in tree.flatten(params).items()}
    reference, state = make(list(theirs.values())), ours.init(params)
    for step in range(steps):
        grads = drawn(shapes, seed + step + 1, torch.float32)
        updates, state = ours.update(grads, state, params, numbers(step, torch.float32, **changes))
        params = tree.add(params, updates)
        for name, grad in tree.flatten(grads).items():
            theirs[name].grad = grad.clone()
        reference.step()
        close(params, tree.unflatten(theirs), rtol, rtol / 10)


@given(shapes=TREES, seed=SEED, rate=RATE, beta=st.floats(0, 0.99))
@settings(max_examples=12)
def test_sgd_is_that_of_torch(shapes: Any, seed: int, rate: float, beta: float) -> None:
    twins(
        lambda leaves: torch.optim.SGD(leaves, lr=rate, momentum=beta), optimizer.sgd(), shapes, 8, seed, 1e-4,
        learning_rate=rate, beta1=beta, weight_decay=0.0,
    )  # fmt: skip


NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315),) * 5


@given(seed=SEED, momentum=st.floats(0, 0.99), rows=st.integers(1, 9), columns=st.integers(1, 9))
@settings(max_examples=12)
def test_muon_is_that_of_torch_with_its_polynomials(seed: int, momentum: float, rows: int, columns: int) -> None:
    """torch's products are bfloat16 too, in another order: equal within its rounding."""
    muon = transformation.chain(
        muon=direction.scale_by_muon(NEWTON_SCHULZ),
        decay=transformation.add_decayed_weights("*"),
        rate=transformation.scale_by_learning_rate(),
    )
    shapes = {"a.weight": (rows, columns), "b.weight": (columns, rows), "c.weight": (rows, columns)}
    twins(
        lambda leaves: torch.optim.Muon(
            leaves, lr=1e-2, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        ),
        muon, shapes, 4, seed, 3e-2, momentum=momentum,
    )  # fmt: skip


@given(seed=SEED, rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(max_examples=12)
def test_adafactor_is_that_of_torch_without_its_own_rate(seed: int, rows: int, columns: int) -> None:
    """torch multiplies the rate by the size of the parameter; with that taken out, the steps are the same."""
    leaf = torch.full((rows, columns), 2.0)
    reference = torch.optim.Adafactor([leaf], lr=1e-2, weight_decay=0.0, eps=(1e-15, 1e-3))
    ours = direction.scale_by_adafactor()
    state = ours.init({"a": leaf})
    for step in range(6):
        grad = drawn({"a": (rows, columns)}, seed + step, torch.float32)
        before, size = leaf.clone(), float(leaf.square().mean().sqrt())
        leaf.grad = grad["a"].clone()
        reference.step()
        updates, state = ours.update(grad, state, {"a": before}, numbers(step, torch.float32))
        rate = size * min(1e-2, (step + 1) ** -0.5)
        torch.testing.assert_close(before - rate * updates["a"], leaf, rtol=1e-4, atol=1e-6)


@given(shapes=TREES, seed=SEED, beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.99))
@settings(max_examples=12)
def test_lion_is_its_algorithm(shapes: Any, seed: int, beta1: float, beta2: float) -> None:
    """Algorithm 2 of the paper, leaf by leaf, with its own interpolation and decay."""
    ours, params = optimizer.lion(), drawn(shapes, seed)
    state, momentum = ours.init(params), dict.fromkeys(tree.flatten(params), 0.0)
    for step in range(5):
        grads = drawn(shapes, seed + 1 + step)
        before = tree.flatten(params)
        updates, state = ours.update(grads, state, params, numbers(step, beta1=beta1, beta2=beta2))
        params = tree.add(params, updates)
        for name, g in tree.flatten(grads).items():
            mixed = beta1 * momentum[name] + (1 - beta1) * g
            momentum[name] = beta2 * momentum[name] + (1 - beta2) * g
            decay = NUMBERS["weight_decay"] * before[name] if name in DECAYED else 0.0
            expected = before[name] - NUMBERS["learning_rate"] * (torch.sign(mixed) + decay)
            torch.testing.assert_close(tree.flatten(params)[name], expected, rtol=1e-6, atol=1e-9)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=SEED, size=st.floats(1e-6, 1e6))
@settings(max_examples=40)
def test_orthogonalised_matrices_have_singular_values_near_one(rows: int, columns: int, seed: int, size: float) -> None:
    """Of a random matrix, those that are not lost in bfloat16; and the singular vectors are kept."""
    x = size * keys.normal(keys.key(seed), (3, rows, columns))
    y = direction.orthogonalize(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    u, values, vt = torch.linalg.svd(x, full_matrices=False)
    along = torch.einsum("nik,nij,nkj->nk", u, y, vt)
    kept = values > 2e-2 * values.amax(-1, keepdim=True)
    assert ((along - 1).abs()[kept] < 0.35).all()
    assert torch.linalg.svdvals(y).max() < 1.35


def test_muon_takes_the_matrices_of_the_layers_and_adam_the_rest() -> None:
    params = drawn(MATRICES, 0, torch.float32)
    state = tree.flatten(optimizer.muon().init(params))
    hidden = sorted(name for name in MATRICES if ".layers." in name and "norm" not in name)
    assert sorted(name.removeprefix("parts.muon.m.") for name in state if ".muon." in name) == hidden
    adam = sorted(name.removeprefix("parts.adam.m.") for name in state if ".adam.m." in name)
    assert adam == sorted(set(MATRICES) - set(hidden))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
@given(seed=SEED, rates=st.lists(RATE, min_size=2, max_size=3))
@settings(max_examples=4)
def test_any_optimizer_maps_over_a_population(name: str, seed: int, rates: list[float]) -> None:
    ours = optimizer.optimizer(name)
    params = [drawn(MATRICES, seed + i, torch.float32) for i in range(len(rates))]
    states = [ours.init(member) for member in params]
    each = [numbers(2, torch.float32, learning_rate=rate, grad_clip=1.0) for rate in rates]
    looped = [ours.update(*arguments) for arguments in zip(params, states, params, each)]
    mapped = torch.vmap(ours.update)(*(tree.stack(list(part)) for part in (params, states, params, each)))
    close(mapped, tree.stack(looped), rtol=2e-2, atol=2e-4)


def test_adafactor_remembers_rows_and_columns_alone() -> None:
    state = optimizer.adafactor().init(drawn(MATRICES, 0, torch.float32))
    expected = sum(sum(shape) for shape in MATRICES.values())
    assert tree.size(state) == expected


@given(shapes=TREES, seed=SEED)
@settings(max_examples=15)
def test_a_partition_is_its_parts(shapes: Any, seed: int) -> None:
    params, grads = drawn(shapes, seed), drawn(shapes, seed + 1)
    first = transformation.chain(momentum=direction.scale_by_momentum())
    whole = transformation.partition(matrices=(optimizer.is_matrix, first), rest=("*", direction.scale_by_adam()))
    updates, _ = whole.update(grads, whole.init(params), params, numbers())
    for selected, link in ((True, first), (False, direction.scale_by_adam())):
        part = [name for name in tree.flatten(params) if optimizer.is_matrix(name) == selected]
        ours, theirs = (tree.unflatten({n: tree.flatten(t)[n] for n in part}) for t in (params, grads))
        expected, _ = link.update(theirs, link.init(ours), ours, numbers())
        assert all(torch.equal(tree.flatten(updates)[n], tree.flatten(expected)[n]) for n in part)
    with pytest.raises(UsageError, match="no group takes"):
        transformation.partition(none=(lambda name: False, first)).init({"a": torch.ones(1)})


# Transformations ------------------------------------------------------------------------------------------------------


@given(shapes=TREES, seed=SEED, limit=st.floats(1e-3, 1e2), size=st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_clipping_is_that_of_torch(shapes: Any, seed: int, limit: float, size: float) -> None:
    grads = tree.scale(drawn(shapes, seed, torch.float32), size)
    clipped, _ = transformation.clip_by_global_norm().update(
        grads, {}, grads, numbers(0, torch.float32, grad_clip=limit)
    )
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
    clipped, state = transformation.clip_by_global_norm().update(grads, {}, grads, numbers(grad_clip=limit))
    assert same(clipped, grads)
    assert state == {}


@given(shapes=TREES, seed=SEED)
@settings(max_examples=15)
def test_a_chain_is_its_links_one_after_the_other(shapes: Any, seed: int) -> None:
    params, grads, now = drawn(shapes, seed), drawn(shapes, seed + 1), numbers(3, grad_clip=0.5)
    links = {
        "first": direction.scale_by_adam(),
        "none": transformation.clip_by_global_norm(),
        "second": direction.scale_by_adam(1e-3),
        "rate": transformation.scale_by_learning_rate(),
    }
    whole = transformation.chain(**links)
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


@pytest.mark.parametrize("make", [optimizer.optimizer, schedule.schedule])
def test_an_unknown_name_is_refused_with_those_there_are(make: Any) -> None:
    with pytest.raises(UsageError, match=r"^there is no (optimizer|schedule) 'nosuch'; there are (adamw|cosine).*$"):
        make("nosuch")


# Schedules ------------------------------------------------------------------------------------------------------------


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Loshchilov and Hutter's eq. 5 with eta_max 1 and eta_min `floor`."""
    passed = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return floor + 0.5 * (1.0 - floor) * (1.0 + math.cos(passed * math.pi))


def linear(step: int, steps: int, warmup: int, floor: float) -> float:
    passed = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return 1 + passed * (floor - 1)


def inverse_sqrt(step: int, steps: int, warmup: int, floor: float) -> float:
    """Vaswani et al., section 5.3, over its peak."""
    return max(floor, min(1.0, math.sqrt(max(1, warmup) / (step + 1))))


FORMULAS = {
    "cosine": cosine,
    "linear": linear,
    "constant": lambda *_: 1.0,
    "wsd": lambda *_: 1.0,
    "inverse_sqrt": inverse_sqrt,
}


@pytest.mark.parametrize("name", schedule.BODIES)
@given(
    steps=st.integers(1, 400),
    warmup=st.integers(0, 400),
    floor=st.floats(0, 1),
    cooldown=st.none() | st.floats(0, 1),
)
@settings(max_examples=40)
def test_a_schedule_is_its_formula(name: str, steps: int, warmup: int, floor: float, cooldown: float | None) -> None:
    factor = schedule.schedule(name, warmup, floor, cooldown)
    moments, total = torch.arange(steps + 20), torch.tensor(float(steps))
    values = torch.vmap(factor, in_dims=(0, None))(moments, total)
    share = {None: 0.2 if name == "wsd" else 0.0}.get(cooldown, cooldown)
    begin = steps * (1 - share)

    def expected(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        value = ramp * FORMULAS[name](min(step, begin) if share else step, steps, warmup, floor)
        fallen = min(1.0, max(0.0, (step - begin) / max(1.0, steps - begin))) if share else 0.0
        return value + min(0.0, floor - value) * fallen

    torch.testing.assert_close(values, torch.tensor([expected(int(s)) for s in moments]), rtol=1e-4, atol=1e-4)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6


@given(steps=st.integers(2, 400), floor=st.floats(0, 1))
@settings(max_examples=20)
def test_stable_then_decay_stands_at_the_peak_and_ends_at_the_floor(steps: int, floor: float) -> None:
    factor = schedule.schedule("wsd", 0, floor)
    total = torch.tensor(float(steps))
    assert float(factor(torch.tensor(int(0.8 * steps)), total)) == pytest.approx(1, abs=1e-5)
    if steps >= 5:  # the cooldown is a step or longer
        assert float(factor(torch.tensor(steps), total)) == pytest.approx(floor, abs=1e-5)


@given(steps=st.integers(1, 10**6), warmup=st.integers(0, 10**4), floor=st.floats(0, 1), step=st.integers(0, 2 * 10**6))
def test_a_rate_is_a_finite_number_between_floor_and_peak_at_any_step(
    steps: int, warmup: int, floor: float, step: int
) -> None:
    for name in schedule.BODIES:
        value = schedule.schedule(name, warmup, floor)(torch.tensor(step), torch.tensor(float(steps)))
        assert value.shape == ()
        assert min(floor, 1 / max(1, warmup)) * (1 - 1e-5) - 1e-6 <= float(value) <= 1 + 1e-6
