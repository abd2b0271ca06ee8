"""Optimizers as pairs of pure functions, after optax: `init(params) -> state`, `update(...) -> (updates, state)`.

A transformation turns gradients into updates; `chain` composes them, and an optimizer is a chain whose last link has
multiplied by minus the learning rate. Every number that may change during a run (step, learning rate, decay, betas) is
read from `numbers`, 0-d tensors by name: nothing recompiles, and a population may map over any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.tree import Selector, Tree

Numbers = Mapping[str, Tensor]


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(updates, state, params, numbers) -> (updates, state)`; both pure."""

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree, Numbers], tuple[Tree, Any]]


def stateless(function: Callable[[Tree, Tree, Numbers], Tree]) -> Optimizer:
    """A transformation `function(updates, params, numbers)` that remembers nothing."""
    return Optimizer(
        lambda params: {}, lambda updates, state, params, numbers: (function(updates, params, numbers), {})
    )


def chain(**links: Optimizer) -> Optimizer:
    """The links one after the other; each keeps its state under its name, so that it has a name in a checkpoint."""

    def init(params: Tree) -> Tree:
        return {name: state for name, link in links.items() if (state := link.init(params))}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        after: Tree = {}
        for name, link in links.items():
            updates, new = link.update(updates, state.get(name, {}), params, numbers)
            after |= {name: new} if new else {}
        return updates, after

    return Optimizer(init, update)


# Transformations --------------------------------------------------------------------------------------------------


def clip_by_global_norm() -> Optimizer:
    """Scale the whole tree so that its norm is at most `numbers["grad_clip"]` (arXiv 1211.5063); 0 or less: off."""

    def clip(updates: Tree, params: Tree, numbers: Numbers) -> Tree:
        limit = numbers["grad_clip"]
        factor = torch.where(limit > 0, (limit / (tree.norm(updates) + 1e-6)).clamp(max=1.0), 1.0)
        return tree.scale(updates, factor)

    return stateless(clip)


def scale_by_adam(eps: float = 1e-8) -> Optimizer:
    """Adam's direction (arXiv 1412.6980, algorithm 1): bias-corrected first moment over root of the second.

    Reads `beta1`, `beta2` and `step` (0 at the first update). Moments are float32.
    """

    def init(params: Tree) -> Tree:
        return {"m": tree.map(_float32_zeros, params), "v": tree.map(_float32_zeros, params)}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        beta1, beta2, count = numbers["beta1"], numbers["beta2"], numbers["step"] + 1
        m = tree.map(lambda m, g: m + (1 - beta1) * (g - m), state["m"], updates)
        v = tree.map(lambda v, g: v + (1 - beta2) * (g * g - v), state["v"], updates)
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count
        return tree.map(lambda m, v: (m / correct1) / ((v / correct2).sqrt() + eps), m, v), {"m": m, "v": v}

    return Optimizer(init, update)


def add_decayed_weights(decays: Selector) -> Optimizer:
    """Decoupled weight decay (arXiv 1711.05101): add `numbers["weight_decay"]` times the leaves that `decays` names."""
    matches = tree.matcher(decays)

    def decay(updates: Tree, params: Tree, numbers: Numbers) -> Tree:
        return tree.map_named(
            lambda name, u, p: u + numbers["weight_decay"] * p if matches(name) else u, updates, params
        )

    return stateless(decay)


def scale_by_learning_rate() -> Optimizer:
    """Downhill: times minus `numbers["learning_rate"]`, which a schedule has computed for this step."""
    return stateless(lambda updates, params, numbers: tree.scale(updates, -numbers["learning_rate"]))


def _float32_zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=torch.float32)


# Optimizers -------------------------------------------------------------------------------------------------------


def is_matrix(name: str) -> bool:
    """Decay by path: projections and embeddings decay; norms, biases and scales do not."""
    return name.endswith(("weight", "lora_A", "lora_B")) and "norm" not in name


def adamw() -> Optimizer:
    """AdamW (arXiv 1711.05101) behind global-norm clipping."""
    return chain(
        clip=clip_by_global_norm(),
        adam=scale_by_adam(),
        decay=add_decayed_weights(is_matrix),
        rate=scale_by_learning_rate(),
    )


OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {"adamw": adamw}


def optimizer(name: str) -> Optimizer:
    if name not in OPTIMIZERS:
        raise UsageError(f"there is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]()
