"""The step: its gradients are autograd's, parts add up to the whole, and nothing but key and numbers decides.

Axes: B batch, T time, V vocabulary, P population.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import CONFIGS, DROPPING, LLAMA, SEED, T, V, close, made, rows, same, start
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model import transformer
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.training import scaler, step
from functional_lm.training.step import TrainState

# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_are_those_of_autograd(name: str, fuse: bool) -> None:
    """The reference is the plain loss of the unfused tree, differentiated by the engine and not by torch.func."""
    config, batch = CONFIGS[name], rows(3)
    params = transformer.init(config, keys.key(0))
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    nll, sums = transformer.loss(leaves, batch, config)
    reference = torch.autograd.grad(nll, tree.leaves(leaves))
    grads, metrics = step.loss_gradients(params, batch, config, None, torch.float32, fuse)
    close(grads, tree.restore(params, dict(zip(tree.flatten(params), reference))))
    torch.testing.assert_close(metrics.nll, nll.detach())
    assert int(metrics.tokens) == int(sums["tokens"]) == int((batch["targets"] != transformer.IGNORED).sum())
    assert all(leaf.abs().max() > 0 for leaf in tree.leaves(grads))


def test_a_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences in float64 along the gradient itself."""
    params, batch = tree.cast(transformer.init(LLAMA, keys.key(0)), torch.float64), rows(2)
    grads, _ = step.loss_gradients(params, batch, LLAMA, None, torch.float64)
    step_size = 1e-4 / float(tree.norm(grads))
    ahead, behind = (
        transformer.loss(tree.add(params, tree.scale(grads, sign * step_size)), batch, LLAMA)[0] for sign in (1, -1)
    )
    slope = float(ahead - behind) / (2 * step_size)
    assert math.isclose(slope, float(tree.norm(grads)) ** 2, rel_tol=1e-4)


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=SEED, ignored=st.floats(0, 0.95))
@settings(max_examples=20)
def test_microbatches_added_up_are_one_batch(sizes: list[int], seed: int, ignored: float) -> None:
    """Whatever number of tokens each of them holds; and so are the parameters that follow."""
    functions = made(grad_clip=0.5)
    state, batch = start(functions), rows(sum(sizes), seed, ignored)
    parts = zip(*(part.split(sizes) for part in batch.values()))
    totals = [functions.gradients(state, dict(zip(batch, part)), i) for i, part in enumerate(parts)]
    total = totals[0]
    for added in totals[1:]:
        total = tree.add(total, added)
    whole = functions.gradients(state, batch)
    close(total, whole)
    assert int(total[1].tokens) == int(whole[1].tokens)
    (one, report), (other, other_report) = functions.apply(state, *total), functions.apply(state, *whole)
    # Adam divides by the root of the square: where a gradient is rounding error, its direction is too.
    certain = tree.map(lambda g: g.abs() > 1e-4, whole[0])
    close(tree.map(torch.mul, one.params, certain), tree.map(torch.mul, other.params, certain), atol=2e-5)
    close(one.optimizer, other.optimizer)
    close(report, other_report)


@given(seed=SEED)
@settings(max_examples=10)
def test_padding_contributes_nothing(seed: int) -> None:
    functions = made()
    state, batch = start(functions), rows(2, seed)
    padding = {**rows(2, seed + 1), "targets": torch.full((2, T), transformer.IGNORED)}
    longer = {name: torch.cat([batch[name], padding[name]]) for name in batch}
    close(functions.gradients(state, longer), functions.gradients(state, batch))
    grads, metrics = functions.gradients(state, padding)
    assert not any(leaf.any() for leaf in tree.leaves(grads))
    assert (float(metrics.nll), int(metrics.tokens)) == (0.0, 0)


def test_a_batch_of_nothing_but_padding_is_a_step_without_a_gradient() -> None:
    functions = made(weight_decay=0.0)
    state = start(functions)
    after, report = functions.train_step(state, {**rows(2), "targets": torch.full((2, T), transformer.IGNORED)})
    assert same(after.params, state.params)
    assert (int(after.step), float(report["loss"]), float(report["grad_norm"])) == (1, 0.0, 0.0)


# The step -------------------------------------------------------------------------------------------------------------


def test_train_step_is_apply_of_gradients_and_both_are_pure() -> None:
    functions = made(DROPPING)
    state, batch = start(functions, DROPPING), rows(3)
    before = tree.copy((state, batch))
    composed = functions.apply(state, *functions.gradients(state, batch))
    assert same(functions.train_step(state, batch), composed)
    assert same(functions.train_step(state, batch), composed)
    assert same((state, batch), before)
    assert int(composed[0].step) == 1
    assert same(composed[0].key, state.key)
    assert same(composed[0].numbers, state.numbers)


def test_the_report_is_the_mean_loss_the_norm_before_clipping_and_the_scheduled_rate() -> None:
    functions = made(grad_clip=1e-3)
    state, batch = start(functions)._replace(step=torch.tensor(1)), rows(3)
    grads, metrics = functions.gradients(state, batch)
    _, report = functions.apply(state, grads, metrics)
    assert sorted(report) == ["grad_norm", "learning_rate", "loss"]
    torch.testing.assert_close(report["loss"], metrics.nll / metrics.tokens)
    torch.testing.assert_close(report["grad_norm"], tree.norm(grads) / metrics.tokens)
    torch.testing.assert_close(report["learning_rate"], torch.tensor(1e-2 * 2 / 3))  # two of three steps of warm-up


def test_one_step_is_torchs_step_on_the_mean_loss() -> None:
    """Everything together, against torch.optim, clip_grad_norm_ and the engine."""
    functions, batch = made(grad_clip=0.1, weight_decay=0.2), rows(3)
    state = start(functions)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), state.params)
    nll, sums = transformer.loss(leaves, batch, LLAMA)
    (nll / sums["tokens"]).backward()
    torch.nn.utils.clip_grad_norm_(tree.leaves(leaves), 0.1)
    flat = tree.flatten(leaves)
    groups = [
        {"params": [leaf for name, leaf in flat.items() if leaf.dim() == 2], "weight_decay": 0.2},
        {"params": [leaf for name, leaf in flat.items() if leaf.dim() < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2 / 3, betas=(0.9, 0.95)).step()
    after, _ = functions.train_step(state, batch)
    close(after.params, tree.map(Tensor.detach, leaves), atol=2e-5)


def test_training_lowers_the_loss() -> None:
    config = dataclasses.replace(LLAMA, initializer_range=0.02)
    functions, batch = made(config), rows(4)
    state, losses = start(functions, config), []
    for _ in range(20):
        state, report = functions.train_step(state, batch)
        losses.append(float(report["loss"]))
    assert losses[0] == pytest.approx(math.log(V), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_depends_on_key_step_and_microbatch_and_on_nothing_else() -> None:
    functions, batch = made(DROPPING), rows(3)
    state = start(functions, DROPPING)
    base = functions.gradients(state, batch, 0)
    drawn = [made().gradients(state, batch, 0)]  # no dropout
    drawn += [functions.gradients(state._replace(key=keys.key(99)), batch, 0)]
    for number, microbatch in itertools.product(range(3), range(3)):
        drawn += [functions.gradients(state._replace(step=torch.tensor(number)), batch, microbatch)]
    assert not any(same(one, other) for one, other in itertools.combinations(drawn, 2))
    state_of_torch = torch.get_rng_state()
    torch.rand(3)
    moved = state._replace(optimizer=tree.map(torch.ones_like, state.optimizer), numbers=tree.scale(state.numbers, 2.0))
    for other in (
        functions.gradients(moved, batch, 0),
        functions.gradients(state, batch, torch.tensor(0)),
        functions.gradients(state, batch),
    ):
        assert same(other, base)
    torch.set_rng_state(state_of_torch)
    functions.gradients(state, batch)
    assert torch.equal(torch.get_rng_state(), state_of_torch)


def test_without_dropout_neither_key_nor_step_nor_microbatch_matter() -> None:
    functions, batch = made(), rows(3)
    state = start(functions)
    other = state._replace(key=keys.key(99), step=torch.tensor(7))
    assert same(functions.gradients(other, batch, 5), functions.gradients(state, batch))


# What a step may do besides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_with_recomputed_activations_are_the_same(name: str) -> None:
    config, batch = CONFIGS[name], rows(3)
    again = dataclasses.replace(config, checkpoint_activations=True, dropout=0.3)
    functions, recomputing = made(dataclasses.replace(config, dropout=0.3)), made(again)
    state = start(functions, config)
    close(recomputing.gradients(state, batch, 2), functions.gradients(state, batch, 2))


def test_recomputing_keeps_less() -> None:
    """Bytes that wait for the backward pass: with recomputation a layer keeps its input alone."""

    def kept(config: ModelConfig) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        params = tree.map(Tensor.requires_grad_, transformer.init(config, keys.key(0)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transformer.loss(params, rows(8), config)
        return total

    deep = dataclasses.replace(LLAMA, n_layers=6)
    assert kept(dataclasses.replace(deep, checkpoint_activations=True)) < 0.4 * kept(deep)


@given(weight=st.floats(1e-3, 1.0), seed=SEED)
@settings(max_examples=8)
def test_the_z_loss_is_the_squared_log_partition_and_is_not_reported(weight: float, seed: int) -> None:
    batch, params = rows(3, seed), transformer.init(LLAMA, keys.key(seed))
    logits = transformer.forward(params, batch["tokens"], LLAMA)
    counted = batch["targets"] != transformer.IGNORED
    z = logits.logsumexp(-1)[counted].square().sum()
    plain, sums = transformer.loss(params, batch, LLAMA)
    more, same_sums = transformer.loss(params, batch, LLAMA, None, weight)
    torch.testing.assert_close(more, plain + weight * z)
    assert same(sums, same_sums)
    ours, _ = step.loss_gradients(params, batch, LLAMA, None, torch.float32, z_loss=weight)
    theirs = torch.func.grad(lambda p: transformer.loss(p, batch, LLAMA, None, weight)[0])(params)
    close(ours, theirs)


def test_the_mean_of_the_parameters_is_its_recurrence() -> None:
    functions = made(ema_decay=0.5, ema=True)
    state = start(functions)
    mean = state.params
    for number in range(6):
        state, _ = functions.train_step(state, rows(2, seed=number))
        keep = min(0.5, (1 + number) / (10 + number))
        mean = tree.map(lambda old, new, keep=keep: keep * old + (1 - keep) * new, mean, state.params)
        close(state.ema, mean, rtol=1e-5, atol=1e-6)
    assert state.best_params is state.ema
    assert start(made()).best_params is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad: float) -> None:
    functions = made(ema=True)
    state, _ = functions.train_step(start(functions), rows(2))
    grads, metrics = functions.gradients(state, rows(2, seed=1))
    broken = tree.map_named(lambda name, g: g * bad if "down_proj" in name else g, grads)
    for arguments in ((broken, metrics), (grads, metrics._replace(nll=metrics.nll * bad))):
        after, report = functions.apply(state, *arguments)
        assert same((after.params, after.optimizer, after.ema), (state.params, state.optimizer, state.ema))
        assert (int(after.step), int(after.skipped)) == (2, 1)
        assert not (math.isfinite(report["loss"]) and math.isfinite(report["grad_norm"]))
    after, _ = functions.apply(state, grads, metrics)
    assert int(after.skipped) == 0
    assert not same(after.params, state.params)


def test_a_float16_loss_is_scaled_and_its_gradients_are_those_of_float32() -> None:
    half, precise = made(dtype=torch.float16), made()
    state = start(half)
    assert float(state.scaler["scale"]) == scaler.START
    batch = rows(4)
    ours, theirs = half.gradients(state, batch), precise.gradients(start(precise), batch)
    torch.testing.assert_close(ours[1].nll, theirs[1].nll, rtol=1e-2, atol=0)
    assert float(tree.norm(tree.subtract(ours[0], theirs[0]))) < 0.02 * float(tree.norm(theirs[0]))
    tiny = state._replace(scaler={**state.scaler, "scale": torch.tensor(1e-5)})
    lost = half.gradients(tiny, batch)[0]  # without the scale some of the gradients vanish
    assert sum(int((leaf == 0).sum()) for leaf in tree.leaves(lost)) > 2 * sum(
        int((leaf == 0).sum()) for leaf in tree.leaves(ours[0])
    )


@given(events=st.lists(st.booleans(), max_size=30), interval=st.integers(1, 5))
def test_the_scale_halves_after_an_overflow_and_doubles_after_good_steps(events: list[bool], interval: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaler, "INTERVAL", interval)
        state, scale, good = scaler.init(torch.device("cpu")), scaler.START, 0
        for finite in events:
            state = scaler.update(state, torch.tensor(finite))
            good = good + 1 if finite else 0
            scale = scale if finite else max(1.0, scale / 2)
            if good == interval:
                good, scale = 0, min(scaler.LARGEST, 2 * scale)
            assert (float(state["scale"]), int(state["good"])) == (scale, good)
    assert scaler.update({}, torch.tensor(True)) == {}


# Populations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_batch", [True, False])
def test_a_population_of_states_is_the_loop(shared_batch: bool) -> None:
    """Members differ in weights, key and learning rate; two steps, with dropout."""
    functions = made(DROPPING)
    states = [
        start(functions, DROPPING, seed)._replace(
            numbers={**functions.init({}, keys.key(0)).numbers, "learning_rate": torch.tensor(rate)}
        )
        for seed, rate in enumerate((1e-3, 1e-2, 3e-2))
    ]
    batches = [rows(2, 0 if shared_batch else seed) for seed in range(3)]
    mapped = torch.vmap(functions.train_step, in_dims=(0, None if shared_batch else 0))
    stacked: TrainState = tree.stack(states)
    for _ in range(2):
        stacked, report = mapped(stacked, batches[0] if shared_batch else tree.stack(batches))
        looped = [functions.train_step(state, batch) for state, batch in zip(states, batches)]
        states = [state for state, _ in looped]
        close(stacked.optimizer, tree.stack([state.optimizer for state in states]))
        close(stacked.params, tree.stack([state.params for state in states]), atol=1e-3)
        close(report, tree.stack([report for _, report in looped]))
    assert stacked.step.tolist() == [2, 2, 2]
    rates = report["learning_rate"]
    assert rates[0] < rates[1] < rates[2]


# Precision ------------------------------------------------------------------------------------------------------------


def test_masters_moments_and_gradients_stay_float32_under_a_bfloat16_copy() -> None:
    batch, precise, coarse = rows(4), made(), made(dtype=torch.bfloat16)
    state = start(precise)
    grads, metrics = coarse.gradients(state, batch)
    exact, exact_metrics = precise.gradients(state, batch)
    assert {leaf.dtype for leaf in tree.leaves((grads, metrics.nll))} == {torch.float32}
    assert not torch.equal(metrics.nll, exact_metrics.nll)  # it really was computed in bfloat16
    torch.testing.assert_close(metrics.nll, exact_metrics.nll, rtol=2e-2, atol=0)
    apart = tree.subtract(grads, exact)
    assert 0 < float(tree.norm(apart)) < 0.05 * float(tree.norm(exact))
    after, _ = coarse.train_step(state, batch)
    assert {leaf.dtype for leaf in tree.leaves((after.params, after.optimizer))} == {torch.float32}


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    functions, batch = made(dtype=torch.bfloat16, learning_rate=1e-6, weight_decay=0.0), rows(4)
    state = start(functions)
    after, _ = functions.train_step(state, batch)
    weight, moved = (s.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"] for s in (state, after))
    assert (weight != moved).float().mean() > 0.9
    assert (weight.bfloat16() != moved.bfloat16()).float().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compute_copy_casts_matrices_alone_and_fuses_what_shares_an_input(dtype: torch.dtype) -> None:
    params = transformer.init(CONFIGS["gpt2"], keys.key(0))
    copy = compute_copy(params, dtype)
    for leaf in tree.leaves(copy):
        assert leaf.dtype == (dtype if leaf.dim() > 1 else torch.float32)
    attention, before = copy["model"]["layers"]["0"]["self_attn"], params["model"]["layers"]["0"]["self_attn"]
    assert sorted(attention) == ["o_proj", "qkv_proj"]
    for leaf in ("weight", "bias"):
        parts = torch.cat([before[name][leaf] for name in ("q_proj", "k_proj", "v_proj")])
        assert torch.equal(attention["qkv_proj"][leaf], parts.to(attention["qkv_proj"][leaf].dtype))
