"""What a model is worth, as pure functions `(model, batch) -> 0-d float32`, higher is better.

All members see one batch. `model` is a compute copy, `batch` holds `tokens` and `targets` [B, T] as everywhere, IGNORED
where nothing counts.

Axes: B batch, T time, V vocabulary, O objectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm.errors import UsageError
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

Batch = Mapping[str, Tensor]
Objective = Callable[[Tree, Batch], Float[Tensor, ""]]


def vmappable(config: ModelConfig) -> ModelConfig:
    """The architecture as a population computes it: no dropout, and attention written out, which vmaps."""
    return dataclasses.replace(config, dropout=0.0, checkpoint_activations=False, attention="standard")


def loss(config: ModelConfig) -> Objective:
    """Minus nats per predicted token."""
    config = vmappable(config)

    def objective(model: Tree, batch: Batch) -> Float[Tensor, ""]:
        nll, sums = transformer.loss(model, batch, config)
        return -nll / sums["tokens"].clamp(min=1)

    return objective


def bits(config: ModelConfig) -> Objective:
    """Minus bits per byte; `batch["bytes"]` [] is the number of bytes that the targets are."""
    config = vmappable(config)

    def objective(model: Tree, batch: Batch) -> Float[Tensor, ""]:
        nll, _ = transformer.loss(model, batch, config)
        return -nll / math.log(2) / batch["bytes"].clamp(min=1)

    return objective


def accuracy(config: ModelConfig) -> Objective:
    """The share of targets that are the likeliest token."""
    config = vmappable(config)

    def objective(model: Tree, batch: Batch) -> Float[Tensor, ""]:
        targets = batch["targets"]
        there = targets != transformer.IGNORED
        right = transformer.forward(model, batch["tokens"], config, None, batch.get("documents")).argmax(-1) == targets
        return (right & there).sum() / there.sum().clamp(min=1)

    return objective


OBJECTIVES: dict[str, Callable[[ModelConfig], Objective]] = {"loss": loss, "bits": bits, "accuracy": accuracy}


def objective(name: str, config: ModelConfig) -> Objective:
    """The objective of that name. Raises UsageError with the names there are."""
    if name not in OBJECTIVES:
        raise UsageError(f"there is no fitness {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](config)


def several(objectives: Sequence[Objective]) -> Objective:
    """`(model, batch) -> figures` [O] of several objectives."""

    def objective(model: Tree, batch: Batch) -> Float[Tensor, "O"]:
        return torch.stack([one(model, batch).float() for one in objectives])

    return objective
