"""DPO: its loss is the formula, its reference is held, and its objective adds up over pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_close, assert_trees_close, numbers, token_rows, weights

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.model import lora
from functional_lm.model.compute import freeze
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import IGNORED, forward
from functional_lm.training import optimizer, preference, schedule, step

CONFIG = ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=12, max_len=8)


def pairs(count: int, seed: int) -> dict[str, torch.Tensor]:
    tokens, hidden = token_rows(CONFIG, (2 * count, 7), seed), numbers((2 * count, 6), seed) < 0
    hidden[:, -1] = False
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].masked_fill(hidden, IGNORED)}


@given(count=st.integers(1, 3), beta=st.floats(0.01, 2), seed=SEEDS)
@settings(max_examples=20)
def test_the_loss_is_the_formula(count: int, beta: float, seed: int) -> None:
    """Equation 7 written out, pair by pair and token by token, in Python's floats."""
    policy, reference, batch = weights(CONFIG, seed), weights(CONFIG, seed + 1), pairs(count, seed)

    def log_probability(params: tree.Tree, row: int) -> float:
        logits = forward(params, batch["tokens"][row : row + 1], CONFIG)[0].double()
        total = 0.0
        for scores, target in zip(logits, batch["targets"][row].tolist()):
            if target != IGNORED:
                total += float(scores[target]) - math.log(sum(math.exp(float(score)) for score in scores))
        return total

    expected = 0.0
    for pair in range(count):
        chosen, rejected = (
            log_probability(policy, row) - log_probability(reference, row) for row in (pair, pair + count)
        )
        expected += math.log1p(math.exp(-beta * (chosen - rejected)))
    value, sums = preference.objective(reference, beta)(policy, batch, CONFIG, None, 0.0)
    assert_close(value, torch.tensor(expected), 1e-4)
    assert (int(sums["tokens"]), float(sums["nll"])) == (count, float(value))


def test_it_begins_at_log_two_with_the_gradient_of_the_paper() -> None:
    """At the reference each pair's gradient is -β/2 (∇ log π(y_w) - ∇ log π(y_l)) (section 4, with σ(0) = 1/2)."""
    params, batch, beta = weights(CONFIG, 0), pairs(2, 0), 0.3
    objective = preference.objective(params, beta)
    value, _ = objective(params, batch, CONFIG, None, 0.0)
    assert_close(value, torch.tensor(2 * math.log(2)), 1e-5)
    grads = torch.func.grad(lambda p: objective(p, batch, CONFIG, None, 0.0)[0])(params)

    def margin(p: tree.Tree) -> torch.Tensor:
        chosen, rejected = preference.answer_log_probabilities(p, batch, CONFIG).chunk(2)
        return (chosen - rejected).sum()

    assert_trees_close(grads, tree.scale(torch.func.grad(margin)(params), -beta / 2), 1e-4)


def test_padding_is_no_pair_and_parts_add_up() -> None:
    policy, objective = weights(CONFIG, 0), preference.objective(weights(CONFIG, 1), 0.5)
    batch = pairs(3, 0)
    whole, sums = objective(policy, batch, CONFIG, None, 0.0)
    parts = [
        objective(policy, {name: part[[i, i + 3]] for name, part in batch.items()}, CONFIG, None, 0.0) for i in range(3)
    ]
    assert_close(sum(part for part, _ in parts), whole, 1e-5)
    empty = {**batch, "targets": batch["targets"].clone()}
    empty["targets"][[1, 4]] = IGNORED
    value, fewer = objective(policy, empty, CONFIG, None, 0.0)
    assert int(sums["tokens"]) == 3
    assert int(fewer["tokens"]) == 2
    assert_close(value, whole - parts[1][0], 1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_the_traced_step_is_the_pure_one(again: bool) -> None:
    """An adapter's step with the reference inside, with and without recomputed activations."""
    config = dataclasses.replace(CONFIG, checkpoint_activations=again)
    base = weights(config, 0)
    trained, constant = lora.split(lora.init(base, "q_proj", 2, keys.key(0)))
    frozen = freeze(lora.attach(base, constant), trained, torch.float32)
    functions = step.training(
        config,
        optimizer.adamw(),
        schedule.cosine(0, 0.1),
        frozen=frozen,
        objective=preference.objective(frozen, 0.1),
    )
    state, batch = functions.init(trained, keys.key(1)), pairs(2, 0)
    traced = compiling.compiled(functions.train_step, backend="eager")
    (found, report), (expected, other) = traced(state, batch), functions.train_step(state, batch)
    assert_trees_close(found.params, expected.params, 1e-5)
    assert_trees_close(report, other, 1e-4)
    assert float(report["loss"]) == pytest.approx(math.log(2), rel=1e-4)
