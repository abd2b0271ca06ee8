"""Gradient transformations as pairs of pure functions, after optax, and what composes them.

A transformation turns updates into updates; `chain` and `partition` compose them. Every number that may change during
a run (step, learning rate, decay, betas) is read from `numbers`, 0-d tensors by name: nothing recompiles, and a
population may map over any of them.
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


def partition(**groups: tuple[Selector, Optimizer]) -> Optimizer:
    """Each leaf goes through the first group whose selector takes its path; states lie under the groups' names.

    Raises UsageError for a leaf that no group takes.
    """

    matchers = {name: tree.matcher(selector) for name, (selector, _) in groups.items()}  # what tracing cannot do

    def split(whole: Tree) -> dict[str, Tree]:
        rest, parts = tree.flatten(whole), {}
        for name, takes in matchers.items():
            parts[name] = tree.unflatten({path: rest.pop(path) for path in list(rest) if takes(path)})
        if rest:
            raise UsageError(f"no group takes {next(iter(rest))!r}; end with one for '*'")
        return {name: part for name, part in parts.items() if part}

    def init(params: Tree) -> Tree:
        states = {name: groups[name][1].init(part) for name, part in split(params).items()}
        return {name: state for name, state in states.items() if state}

    def update(updates: Tree, state: Tree, params: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
        made: dict[str, Tensor] = {}
        after: Tree = {}
        parts = split(params)
        for name, part in split(updates).items():
            new, kept = groups[name][1].update(part, state.get(name, {}), parts[name], numbers)
            made |= tree.flatten(new)
            after |= {name: kept} if kept else {}
        return tree.map_named(lambda path, _: made[path], updates), after

    return Optimizer(init, update)


def clip_by_global_norm() -> Optimizer:
    """Scale the whole tree so that its norm is at most `numbers["grad_clip"]` (arXiv 1211.5063); 0 or less: off."""

    def clip(updates: Tree, params: Tree, numbers: Numbers) -> Tree:
        limit = numbers["grad_clip"]
        factor = torch.where(limit > 0, (limit / (tree.norm(updates) + 1e-6)).clamp(max=1.0), 1.0)
        return tree.scale(updates, factor)

    return stateless(clip)


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
