"""Many trainings as one: a population of states is a vmap axis of the step.

    states                = stack([functions.init(params, key) for each member])       leaves [P, ...]
    states, report        = vmapped(functions).train_step(states, batches)             batches [P, B, T]

Members may differ in weights, keys, batches and in any of their `numbers`; each is trained as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.training.step import Batch, Metrics, Training, TrainState
from functional_lm.tree import Tree


def vmapped(functions: Training) -> Training:
    """The same functions over states, batches, gradients and metrics with one more axis in front."""

    def init(params: Tree, key: Tensor) -> TrainState:
        members = zip(tree.unstack(params), key.unbind())
        return tree.stack([functions.init(member, own) for member, own in members])

    def gradients(states: TrainState, batches: Batch, microbatch: Tensor | int = 0) -> tuple[Tree, Metrics]:
        return torch.vmap(functions.gradients, in_dims=(0, 0, None))(states, batches, torch.as_tensor(microbatch))

    def apply(states: TrainState, grads: Tree, metrics: Metrics) -> tuple[TrainState, dict[str, Tensor]]:
        return torch.vmap(functions.apply)(states, grads, metrics)

    def train_step(states: TrainState, batches: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        return torch.vmap(functions.train_step)(states, batches)

    return Training(init, gradients, apply, train_step)


def with_numbers(states: TrainState, numbers: dict[str, Sequence[float]]) -> TrainState:
    """The states with some of their numbers replaced, one value for each member."""
    own: dict[str, Any] = {
        name: torch.tensor(values, dtype=states.numbers[name].dtype, device=states.key.device)
        for name, values in numbers.items()
    }
    return states._replace(numbers={**states.numbers, **own})
