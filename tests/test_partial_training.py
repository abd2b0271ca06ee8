"""Training a part of a model: gradients are those of the whole at the part's leaves, and nothing else is kept.

Axes: B batch, T time, P population.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from steps import T, V, close, rows, same
from strategies import assert_trees_close, weights

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.model import lora, transformer
from functional_lm.model.compute import compute_copy, freeze
from functional_lm.model.config import ModelConfig
from functional_lm.training import loop, optimizer, schedule, step
from functional_lm.training.population import vmapped
from functional_lm.tree import Tree

CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, max_len=T, bias="qkv", attention="standard"
)
BASE = weights(CONFIG, 0)


def adapter(targets: Any = lora.ALL_LINEAR, dora: bool = False, dropout: float = 0.0, seed: int = 3) -> Tree:
    made = lora.init(BASE, targets, 2, keys.key(seed), 4.0, dora=dora)
    made = tree.map_named(lambda name, leaf: leaf + 0.1 if "lora_B" in name else leaf, made)
    return lora.with_dropout(made, dropout) if dropout else made


def made(
    whole: Tree, config: ModelConfig = CONFIG, fuse: bool = True, dtype: torch.dtype = torch.float32, **numbers: float
) -> tuple[step.Training, Tree]:
    """The functions that train the adapter alone, and its trained leaves."""
    trained, constant = lora.split(whole)
    frozen = freeze(lora.attach(BASE, constant), trained, dtype, fuse)
    functions = step.training(
        config, optimizer.adamw(), schedule.cosine(2, 0.1), dtype, {"learning_rate": 1e-2, **numbers}, frozen=frozen
    )
    return functions, trained


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_the_whole_model(fuse: bool, dora: bool, again: bool) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_activations=again)
    whole, batch = adapter(lora.ALL_LINEAR if dora else "*", dora), rows(3)
    functions, trained = made(whole, config, fuse)
    grads, metrics = functions.gradients(functions.init(trained, keys.key(1)), batch)
    attached = lora.attach(BASE, whole)
    value, sums = transformer.loss(attached, batch, CONFIG)
    every = torch.func.grad(lambda p: transformer.loss(p, batch, CONFIG)[0])(attached)
    names = tree.flatten(trained).keys()
    close(grads, tree.select(every, lambda name: name in names), rtol=1e-3, atol=1e-4)
    close(metrics.nll, value)
    assert int(metrics.tokens) == int(sums["tokens"])


@pytest.mark.parametrize("part", ["*.mlp.*", "*.q_proj.*", "*.k_proj.bias", "*norm*"])
def test_any_leaves_can_be_what_is_trained(part: str) -> None:
    """Weights, biases and norms too: then nothing is fused that would hide them."""
    batch, trained = rows(3), tree.select(BASE, part)
    functions = step.training(
        CONFIG, optimizer.adamw(), schedule.cosine(2, 0.1), frozen=freeze(BASE, trained, torch.float32)
    )
    grads, _ = functions.gradients(functions.init(trained, keys.key(1)), batch)
    every = torch.func.grad(lambda p: transformer.loss(p, batch, CONFIG)[0])(BASE)
    close(grads, tree.select(every, part), rtol=1e-3, atol=1e-4)


def test_the_frozen_part_is_cast_once_and_nothing_of_it_is_kept() -> None:
    functions, trained = made(adapter(), dtype=torch.bfloat16)
    state = functions.init(trained, keys.key(1))
    assert tree.size(state.optimizer) == 2 * tree.size(trained) < tree.size(BASE)
    after, report = functions.train_step(state, rows(3))
    assert tree.flatten(after.params).keys() == tree.flatten(trained).keys()
    assert not same(after.params, trained)
    assert torch.isfinite(report["loss"])
    frozen = freeze(BASE, trained, torch.bfloat16)
    layer = frozen["model"]["layers"]["0"]
    assert layer["self_attn"]["qkv_proj"]["weight"].dtype == torch.bfloat16
    assert layer["mlp"].keys() == {"down_proj", "gate_up_proj"}


def test_an_adapter_learns() -> None:
    functions, trained = made(adapter(), weight_decay=0.0, learning_rate=5e-2)
    state, losses = functions.init(trained, keys.key(1)), []
    for _ in range(20):
        state, report = functions.train_step(state, rows(4))
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_microbatches_added_up_are_one_batch() -> None:
    functions, trained = made(adapter())
    state, batch = functions.init(trained, keys.key(1)), rows(4)
    halves = [{name: part[half] for name, part in batch.items()} for half in (slice(0, 1), slice(1, 4))]
    total = tree.add(functions.gradients(state, halves[0], 0), functions.gradients(state, halves[1], 1))
    close(total, functions.gradients(state, batch))
    several = loop.whole_step(functions, lambda number: halves[number % 2], 2, compile=False)
    close(several(state, 0)[0].optimizer, functions.train_step(state, batch)[0].optimizer)


def test_a_population_of_adapters_shares_the_base() -> None:
    members = [lora.split(adapter(seed=seed))[0] for seed in range(3)]
    functions, _ = made(adapter())
    states = vmapped(functions).init(tree.stack(members), keys.split(keys.key(1), 3))
    batches = tree.stack([rows(2, seed) for seed in range(3)])
    after, report = vmapped(functions).train_step(states, batches)
    for number in range(3):
        alone, own = functions.train_step(tree.index(states, number), tree.index(batches, number))
        assert_trees_close(tree.index(after.optimizer, number), alone.optimizer, 1e-4)
        torch.testing.assert_close(report["loss"][number], own["loss"])


def test_dropout_draws_by_key_step_and_microbatch() -> None:
    functions, trained = made(adapter(dropout=0.5))
    state, batch = functions.init(trained, keys.key(1)), rows(3)
    first = functions.gradients(state, batch, 0)
    assert same(functions.gradients(state, batch, 0), first)
    for other in (state._replace(key=keys.key(2)), state._replace(step=torch.tensor(4))):
        assert not same(functions.gradients(other, batch, 0), first)
    assert not same(functions.gradients(state, batch, 1), first)
    plain, _ = made(adapter())
    assert not same(plain.gradients(state, batch, 0), first)


def test_the_traced_step_is_the_pure_one() -> None:
    functions, trained = made(adapter(dropout=0.3))
    state, batch = functions.init(trained, keys.key(1)), rows(2)
    traced = compiling.compiled(functions.train_step, backend="eager")
    close(traced(state, batch), functions.train_step(state, batch))
    whole = compute_copy(lora.attach(BASE, adapter()), torch.float32)
    assert "qkv_proj" in whole["model"]["layers"]["0"]["self_attn"]
