"""One step of training as pure functions of a state that is a tree.

    grads, metrics = gradients(state, batch)       what this batch says, summed over its tokens
    state          = apply(state, grads, metrics)  what the optimizer makes of it
    state, metrics = train_step(state, batch)      both, for one compiled graph

Sums are kept apart from counts up to `apply`, so that k microbatches added up are one batch of k times the size,
whatever tokens each of them holds.

Axes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model import transformer
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.training.optimizer import Optimizer
from functional_lm.training.schedule import Schedule
from functional_lm.tree import Tree

Batch = Mapping[str, Tensor]


class TrainState(NamedTuple):
    """Every number that the next step reads; a pytree, stored as it is.

    `numbers` are the hyper-parameters that a step multiplies by (0-d float32: peak learning rate, weight decay, betas,
    clip), tensors so that they can differ between the members of a population.
    """

    step: Tensor
    params: Tree
    optimizer: Tree
    key: Tensor
    numbers: dict[str, Tensor]


class Metrics(NamedTuple):
    """Sums over tokens, 0-d: they add up over microbatches."""

    nll: Tensor
    tokens: Tensor


class Training(NamedTuple):
    """The functions of one run; each is pure and closes over static things alone."""

    init: Callable[[Tree, Tensor], TrainState]
    gradients: Callable[..., tuple[Tree, Metrics]]
    apply: Callable[[TrainState, Tree, Metrics], tuple[TrainState, dict[str, Tensor]]]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]


def training(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: Schedule,
    dtype: torch.dtype = torch.float32,
    numbers: Mapping[str, float] | None = None,
    fuse: bool = True,
) -> Training:
    """The step of `config` under `optimizer`; `dtype` is that of the compute copy, the masters stay float32."""
    constants = {**DEFAULTS, **(numbers or {})}

    def init(params: Tree, key: Tensor) -> TrainState:
        device = key.device
        values = {name: torch.tensor(float(value), device=device) for name, value in sorted(constants.items())}
        return TrainState(
            torch.zeros((), dtype=torch.int64, device=device), params, optimizer.init(params), key, values
        )

    def gradients(state: TrainState, batch: Batch, microbatch: Tensor | int = 0) -> tuple[Tree, Metrics]:
        key = None
        if config.dropout > 0:
            key = keys.fold_in(keys.fold_in(state.key, state.step), microbatch)
        return loss_gradients(state.params, batch, config, key, dtype, fuse)

    def apply(state: TrainState, grads: Tree, metrics: Metrics) -> tuple[TrainState, dict[str, Tensor]]:
        tokens = metrics.tokens.clamp(min=1)
        grads = tree.map(lambda g: g / tokens, grads)
        learning_rate = schedule(state.step) * state.numbers["learning_rate"]
        now = {**state.numbers, "step": state.step, "learning_rate": learning_rate}
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params, now)
        params = tree.map(lambda p, u: (p + u).to(p.dtype), state.params, updates)
        report = {"loss": metrics.nll / tokens, "grad_norm": tree.norm(grads), "learning_rate": learning_rate}
        return state._replace(step=state.step + 1, params=params, optimizer=optimizer_state), report

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        return apply(state, *gradients(state, batch))

    return Training(init, gradients, apply, train_step)


DEFAULTS = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0}


def loss_gradients(
    params: Tree, batch: Batch, config: ModelConfig, key: Tensor | None, dtype: torch.dtype, fuse: bool = True
) -> tuple[Tree, Metrics]:
    """Gradients of the summed loss with respect to the masters, through the compute copy."""

    def objective(masters: Tree) -> tuple[Tensor, dict[str, Any]]:
        return transformer.loss(compute_copy(masters, dtype, fuse), batch, config, key)

    grads, (_, sums) = torch.func.grad_and_value(objective, has_aux=True)(params)
    return grads, Metrics(**sums)
