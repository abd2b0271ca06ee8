"""Batches for the tests of the model, and the gradient of its loss on them.

Axes: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from strategies import LONGEST, document_rows, numbers, token_rows
from torch import Tensor

from functional_lm import tree
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import IGNORED, loss
from functional_lm.tree import Tree

FEW = settings(max_examples=25)
TIMES = st.integers(1, LONGEST)


def batch_of(config: ModelConfig, rows: int, time: int, seed: int) -> dict[str, Tensor]:
    """A batch with targets, a quarter of them not predicted, and packed documents."""
    targets = token_rows(config, (rows, time), seed + 1)
    return {
        "tokens": token_rows(config, (rows, time), seed),
        "targets": targets.masked_fill(numbers((rows, time), seed + 2) > 0.7, IGNORED),
        "documents": document_rows(rows, time, seed + 3),
    }


def nll(params: Tree, batch: dict[str, Tensor], config: ModelConfig) -> Tensor:
    return loss(params, batch, config)[0]


def gradient(function: Any, params: Tree) -> tuple[Tree, Tensor]:
    """Through torch.autograd, which every form of attention supports."""
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    value = function(leaves)
    grads = torch.autograd.grad(value, tree.leaves(leaves), allow_unused=True, materialize_grads=True)
    names = tree.flatten(leaves)
    return tree.unflatten(dict(zip(names, grads))), value.detach()
