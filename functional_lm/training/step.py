"""One step of training as pure functions of a state that is a tree.

    grads, metrics = gradients(state, batch)       what this batch says, summed over its tokens
    state          = apply(state, grads, metrics)  what the optimizer makes of it
    state, metrics = train_step(state, batch)      both, for one compiled graph

Sums are kept apart from counts up to `apply`, so that k microbatches added up are one batch of k times the size,
whatever tokens each of them holds.

Only the leaves of the state's `params` are differentiated, updated and stored: all of a model, or a part of it
(an adapter, say) that stands in front of a frozen rest.

Axes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model import lora, transformer
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.training import scaler
from functional_lm.training.schedule import Schedule
from functional_lm.training.transformation import Optimizer
from functional_lm.tree import Tree

Batch = Mapping[str, Tensor]
# (compute copy, batch, config, dropout key, z_loss) -> (value to differentiate, sums for Metrics)
Objective = Callable[[Tree, Batch, ModelConfig, "Tensor | None", float], tuple[Tensor, dict[str, Any]]]


class TrainState(NamedTuple):
    """Every number that the next step reads; a pytree, stored as it is.

    `numbers` are the hyper-parameters that a step multiplies by (0-d float32: peak learning rate, weight decay, betas,
    length of the run, ...), tensors so that they can change and can differ between the members of a population.
    `ema` and `scaler` are empty where they are not used.
    """

    step: Tensor  # [] int64, steps taken
    skipped: Tensor  # [] int64, how many of them changed nothing, as loss or gradient were not finite
    params: Tree
    optimizer: Tree
    ema: Tree  # exponential mean of the parameters
    scaler: Tree  # of a float16 loss
    key: Tensor
    numbers: dict[str, Tensor]

    @property
    def best_params(self) -> Tree:
        """The parameters to measure and to keep: the mean where there is one."""
        return self.ema or self.params


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


DEFAULTS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "momentum": 0.95,
    "grad_clip": 1.0,
    "ema_decay": 0.999,
    "total_steps": 1000.0,
}


def training(
    config: ModelConfig,
    optimizer: Optimizer,
    schedule: Schedule,
    dtype: torch.dtype = torch.float32,
    numbers: Mapping[str, float] | None = None,
    fuse: bool = True,
    z_loss: float = 0.0,
    ema: bool = False,
    frozen: Tree | None = None,
    objective: Objective = transformer.loss,
) -> Training:
    """The step of `config` under `optimizer`.

    `dtype` is that of the compute copy (float16 brings a loss scale with it), the masters stay float32; `numbers`
    change some of DEFAULTS; `z_loss` weighs the squared log-partition function; `ema` keeps a mean of the parameters.

    `frozen` (of `compute.freeze`) is the part of the model that the state's parameters lack: no gradient, no optimizer
    state, not in a checkpoint, and one for all members of a population. `objective` is what is minimised.
    """
    drops = frozen is not None and lora.drops(frozen)
    constants = {**DEFAULTS, **(numbers or {})}

    def init(params: Tree, key: Tensor) -> TrainState:
        device = key.device
        return TrainState(
            step=torch.zeros((), dtype=torch.int64, device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            params=params,
            optimizer=optimizer.init(params),
            ema=tree.copy(params) if ema else {},
            scaler=scaler.init(device) if dtype == torch.float16 else {},
            key=key,
            numbers={name: torch.tensor(float(value), device=device) for name, value in sorted(constants.items())},
        )

    def gradients(state: TrainState, batch: Batch, microbatch: Tensor | int = 0) -> tuple[Tree, Metrics]:
        key = None
        if config.dropout > 0 or drops:
            key = keys.fold_in(keys.fold_in(state.key, state.step), microbatch)
        scale = state.scaler.get("scale")
        return loss_gradients(state.params, batch, config, key, dtype, fuse, z_loss, scale, frozen, objective)

    def apply(state: TrainState, grads: Tree, metrics: Metrics) -> tuple[TrainState, dict[str, Tensor]]:
        tokens = metrics.tokens.clamp(min=1)
        grads = tree.map(lambda g: g / tokens, grads)
        norm, numbers = tree.norm(grads), state.numbers
        finite = torch.isfinite(norm) & torch.isfinite(metrics.nll)
        learning_rate = schedule(state.step, numbers["total_steps"]) * numbers["learning_rate"]
        now = {**numbers, "step": state.step, "learning_rate": learning_rate}
        updates, moments = optimizer.update(grads, state.optimizer, state.params, now)
        params = tree.map(lambda p, u: (p + u).to(p.dtype), state.params, updates)
        mean = averaged(state.ema, params, state.step, numbers["ema_decay"])
        new, old = (params, moments, mean), (state.params, state.optimizer, state.ema)
        params, moments, mean = tree.map(lambda after, before: torch.where(finite, after, before), new, old)
        after = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            params=params,
            optimizer=moments,
            ema=mean,
            scaler=scaler.update(state.scaler, finite),
            key=state.key,
            numbers=numbers,
        )
        return after, {"loss": metrics.nll / tokens, "grad_norm": norm, "learning_rate": learning_rate}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        return apply(state, *gradients(state, batch))

    return Training(init, gradients, apply, train_step)


def averaged(mean: Tree, params: Tree, step: Tensor, decay: Tensor) -> Tree:
    """The exponential mean of the parameters, quick at first: its decay is (1 + t) / (10 + t) up to `decay`."""
    keep = torch.minimum(decay, (1.0 + step) / (10.0 + step))
    return tree.map(lambda old, new: new + keep * (old - new), mean, params) if mean else mean


def loss_gradients(
    params: Tree,
    batch: Batch,
    config: ModelConfig,
    key: Tensor | None,
    dtype: torch.dtype,
    fuse: bool = True,
    z_loss: float = 0.0,
    scale: Tensor | None = None,
    frozen: Tree | None = None,
    objective: Objective = transformer.loss,
) -> tuple[Tree, Metrics]:
    """Gradients of the summed loss with respect to the masters, through the compute copy.

    The loss is multiplied by `scale` on its way through float16, and the gradients are divided by it.
    """

    def value(masters: Tree) -> tuple[Tensor, dict[str, Any]]:
        copy = whole(masters, frozen, dtype, fuse, key)
        loss, sums = objective(copy, batch, config, key, z_loss)
        return loss if scale is None else loss * scale, sums

    gradient = recomputing_gradient if config.checkpoint_activations else torch.func.grad
    grads, sums = gradient(value, has_aux=True)(params)
    if scale is not None:
        grads = tree.map(lambda g: g / scale, grads)
    return grads, Metrics(**sums)


def whole(params: Tree, frozen: Tree | None, dtype: torch.dtype, fuse: bool = True, key: Tensor | None = None) -> Tree:
    """The compute copy of the whole model: of the masters, in front of what is frozen; `key` lets adapters drop."""
    if frozen is None:
        return compute_copy(params, dtype, fuse)
    copy = tree.overlay(frozen, compute_copy(params, dtype, fuse=False))
    return copy if key is None else lora.keyed(copy, keys.fold_in_name(key, "adapters"))


def recomputing_gradient(function: Callable[[Tree], tuple[Tensor, Any]], has_aux: bool = True) -> Callable[..., Any]:
    """torch.func.grad for functions that checkpoint activations, which it cannot differentiate (pytorch #122729).

    The same gradient through torch.autograd, from detached leaves; it neither nests nor vmaps.
    """
    assert has_aux

    def gradient(params: Tree) -> tuple[Tree, Any]:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        with torch.enable_grad():
            value, aux = function(leaves)
            grads = iter(torch.autograd.grad(value, tree.leaves(leaves)))
        return tree.map(lambda leaf: next(grads), leaves), aux

    return gradient
