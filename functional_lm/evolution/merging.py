"""Merges as a space: what is evolved are the coefficients, a few numbers, over models that stay as they are.

    space = merged([first, second], ["*", "*.mlp.*"], "ties", base)

A candidate holds for each group of leaves (globs; the last one that matches a leaf counts) the numbers that the method
takes, and the model follows from them by the functions of `model/merge.py`:

    linear, task_arithmetic, ties, dare   {"0": {"weight": [M]}, "1": ...}
    slerp                                 {"0": {"place": []}, ...}           on the arc, from 0 to 1
    ties, dare                            {..., "trim": {"logit": []}}        density = 1 / (1 + e^-logit)

Axes: M models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.evolution.spaces import Space
from functional_lm.model import merge
from functional_lm.model.compute import compute_copy
from functional_lm.model.merge import FROM_BASE, THINNED
from functional_lm.tree import Tree

TRIM = "trim"


class Recipe(NamedTuple):
    """What a candidate says, in the terms of the `merge` command."""

    weights: dict[str, tuple[float, ...]]  # by pattern
    density: float | None


def merged(
    models: Sequence[Tree],
    groups: Sequence[str],
    method: str = "linear",
    base: Tree | None = None,
    key: Tensor | None = None,
    density: float | None = None,
) -> Space:
    """The coefficients of a merge of M models. `base` is what differences are taken from, `key` draws DARE's masks.

    They begin at equal shares, 1/M each (TIES, which averages, at 1 each), the middle of the arc, the usual density.
    Raises UsageError for a group that no leaf is in.
    """
    count, groups = len(models), tuple(groups)
    # Which leaf is in which group is known before anything is traced, which cannot read patterns.
    group_of = check_groups(models[0], groups)
    if (method == "slerp" and count != 2) or (method in FROM_BASE and base is None):
        raise ValueError(f"{method} is of two models" if method == "slerp" else f"{method} needs a base")
    every: dict[str, Any] = {str(m): one for m, one in enumerate(models)} | ({} if base is None else {"base": base})

    def made(known: Tree, leaves: Tree) -> Tree:
        def w(name: str) -> Tensor:
            own = leaves[str(group_of[name])]
            if method != "slerp":
                return own["weight"]
            place = own["place"].clamp(0, 1)
            return torch.stack([1 - place, place], -1)

        parts = [known[str(m)] for m in range(count)]
        if method == "linear":
            return merge.linear(parts, w)
        if method == "slerp":
            return merge.slerp(parts[0], parts[1], w)
        if method == "task_arithmetic":
            return merge.task_arithmetic(known["base"], parts, w)
        share = torch.sigmoid(leaves[TRIM]["logit"])
        if method == "ties":
            return merge.ties_of(known["base"], known.get("between") or _between(known, count), w, share)
        assert key is not None
        return merge.dare(known["base"], parts, w, key, share)

    def freeze(known: Tree, fixed: Tree, names: Iterable[str], dtype: torch.dtype) -> Tree:
        return known | ({"between": _between(known, count)} if method == "ties" else {})

    def model(frozen: Tree, leaves: Tree, dtype: torch.dtype) -> Tree:
        return compute_copy(made(frozen, leaves), dtype)

    makes = tree.size(models[0]) * (1 + (count if method == "ties" else 0))
    return Space("merge", _start(count, len(groups), method, density), every, freeze, model, made, makes)


def _between(known: Tree, count: int) -> merge.Differences:
    return merge.differences(known["base"], [known[str(m)] for m in range(count)])


def _start(count: int, groups: int, method: str, density: float | None) -> Tree:
    share = 1.0 if method == "ties" else 1 / count
    numbers = {"place": torch.tensor(0.5)} if method == "slerp" else {"weight": torch.full((count,), share)}
    start: Tree = {str(i): dict(numbers) for i in range(groups)}
    if method in THINNED:
        share = THINNED[method] if density is None else min(density, 0.999)
        start[TRIM] = {"logit": torch.tensor(math.log(share / (1 - share)))}
    return start


def recipe(leaves: Tree, groups: Sequence[str]) -> Recipe:
    """A candidate in words that `merge --weights ... --layer_weights ... --density` takes."""

    def numbers(own: Mapping[str, Tensor]) -> tuple[float, ...]:
        if "weight" in own:
            return tuple(float(x) for x in own["weight"])
        place = float(own["place"].clamp(0, 1))
        return (1 - place, place)

    density = float(torch.sigmoid(leaves[TRIM]["logit"])) if TRIM in leaves else None
    return Recipe({group: numbers(leaves[str(i)]) for i, group in enumerate(groups)}, density)


def grouped(params: Tree, words: str) -> tuple[str, ...]:
    """The groups that `glob;glob;...` names; `layers` stands for one of each layer. Leaves in none are the first group.

    Raises UsageError for none, and for a group that no leaf is in.
    """
    given = [word.strip() for word in words.split(";") if word.strip()]
    if not given:
        raise UsageError("--groups is empty; it is globs over leaves, ; between, or layers; all leaves are '*'")
    names = list(tree.flatten(params))
    layers = list(dict.fromkeys(".".join(name.split(".")[:3]) + ".*" for name in names if ".layers." in f".{name}"))
    found = [group for word in given for group in (layers if word == "layers" else [word])]
    check_groups(params, found)
    rest = [name for name in names if not any(tree.matcher(group)(name) for group in found)]
    return tuple((["*"] if rest else []) + found)


def check_groups(params: Tree, groups: Sequence[str]) -> dict[str, int]:
    """The number of each leaf's group, the last one that matches. Raises UsageError for a group that keeps no leaf."""
    names, matchers = list(tree.flatten(params)), [tree.matcher(group) for group in groups]
    last = {
        name: max(i for i, fits in enumerate(matchers) if fits(name))
        for name in names
        if any(fits(name) for fits in matchers)
    }
    for number, group in enumerate(groups):
        if not any(map(tree.matcher(group), names)):
            raise UsageError(f"the group {group!r} matches no leaf of the models, such as {names[0]!r}")
        if number not in last.values():
            raise UsageError(f"the group {group!r} keeps no leaf: the groups behind it have them all")
    return last
