"""OpenAI-ES (arXiv 1703.03864): isotropic Gaussian noise on every number, antithetic pairs, centred ranks.

Axes: P members, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.evolution import gradient
from functional_lm.evolution.gradient import Perturbation, Settings, Wrap, unwrapped
from functional_lm.evolution.strategy import Shapes, Strategy
from functional_lm.training.optimizer import adamw
from functional_lm.training.transformation import Optimizer
from functional_lm.tree import Tree


def openai_es(
    settings: Settings,
    optimizer: Optimizer | None = None,
    numbers: Mapping[str, float] | None = None,
    wrap: Wrap = unwrapped,
    dtype: torch.dtype = torch.float32,
) -> Strategy:
    """The strategy; `optimizer` (AdamW if not given) is any of `training/`, `numbers` are σ and what it reads.

    With `dtype` float64 the whole state is float64, whatever the tree that it begins with is.
    """
    return gradient.estimating("openai-es", settings, dense(dtype), optimizer or adamw(), numbers, wrap, dtype)


def dense(dtype: torch.dtype = torch.float32) -> Perturbation:
    """A number of noise for each number of the tree, drawn in `dtype`."""

    def draw(key: Tensor, shapes: Shapes) -> Tree:
        return tree.unflatten(gradient.sample(key, shapes, dtype))

    def put(centre: Tree, noise: Tree, amount: Tensor) -> Tree:
        return tree.map_named(lambda _, leaf, e: leaf + (amount * e).to(leaf.dtype), centre, noise)

    def total(weights: Tensor, noises: Tree, shapes: Shapes) -> Tree:
        return tree.map(lambda e: (weights.to(e.dtype) @ e.flatten(1)).view(e.shape[1:]), noises)

    return Perturbation(
        draw, put, lambda centre: {}, total, lambda shapes: sum(math.prod(shape) for shape in shapes.values())
    )
