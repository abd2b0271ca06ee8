"""The likelihood of text under a model: sums over tokens that add up over batches.

Axes: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm.model import transformer
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

Score = Callable[[Tree, Mapping[str, Tensor]], Mapping[str, Tensor]]


class Likelihood(NamedTuple):
    """Nats over a number of predicted tokens."""

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, size: int) -> float:
        """Bits per byte of the text, `size` bytes: comparable across tokenizers, as nats per token are not."""
        return self.nll / math.log(2) / max(1, size)


def score(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Score:
    """`(params, batch) -> {"nll", "tokens"}`, pure: the loss without dropout, computed in `dtype`."""
    config = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)

    def sums(params: Tree, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        return transformer.loss(compute_copy(params, dtype), batch, config)[1]

    return sums


def measure(params: Tree, batches: Iterable[Mapping[str, Tensor]], scorer: Score) -> Likelihood:
    """The likelihood of all batches together."""
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            sums = scorer(params, batch)
            nll, tokens = nll + float(sums["nll"]), tokens + int(sums["tokens"])
    return Likelihood(nll, tokens)
