"""What is evolved: a tree to begin with, and how a candidate of it becomes a model.

    space  = adapter(params, lora.init(params, targets, rank, key))
    frozen = space.freeze(space.base, fixed, names, dtype)     once a generation: the compute copy of what all share
    model  = space.model(frozen, leaves, dtype)                  inside the forward: one member in front of it
    whole  = space.whole(space.base, leaves)                     plain parameters, to be measured alone and kept

Merges are in `merging.py`, settings of decoding in `decoding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.model import lora
from functional_lm.model.compute import ADDED, FUSIONS, compute_copy
from functional_lm.tree import Tree

FUSED_PARTS = tuple(part for _, parts in FUSIONS.values() for part in parts)


class Space(NamedTuple):
    """`start` is evolved, `base` is the rest; the functions are pure.

    `makes` counts the numbers that `model` makes for each member, where it makes a whole model: memory, and work that
    is done once for all tokens of a member's answers.
    """

    name: str
    start: Tree
    base: Tree
    freeze: Callable[[Tree, Tree, Iterable[str], torch.dtype], Tree]
    model: Callable[[Tree, Tree, torch.dtype], Tree]
    whole: Callable[[Tree, Tree], Tree]
    makes: int = 0


def full(params: Tree, patterns: Sequence[str] = ("*",)) -> Space:
    """The model's own leaves, all or those that match; float32. Raises UsageError for a pattern that matches none."""
    names = list(tree.flatten(params))
    for pattern in patterns:
        if not any(map(tree.matcher(pattern), names)):
            raise UsageError(f"{pattern!r} matches no leaf of the model, such as {names[0]!r}")
    chosen = tree.matcher(patterns)
    start = tree.cast(tree.select(params, chosen), torch.float32)
    return Space("full", start, tree.select(params, lambda name: not chosen(name)), freeze, in_front, tree.overlay)


def adapter(params: Tree, start: Tree) -> Space:
    """The factors (and magnitudes) of an adapter of `params`, beside the weights, which stay."""
    trained, constant = lora.split(start)
    return Space("lora", trained, lora.attach(params, constant), freeze, in_front, tree.overlay)


# Leaves in front of a base --------------------------------------------------------------------------------------------


def freeze(base: Tree, fixed: Tree, names: Iterable[str], dtype: torch.dtype) -> Tree:
    """The compute copy of what the members share. `names` are the leaves that each has of its own.

    Products are fused unless a member has a weight or a bias of its own among the parts of one.
    """
    own = [name.split(".") for name in names]
    apart = any(len(name) > 1 and name[-2] in FUSED_PARTS and name[-1] not in ADDED for name in own)
    taken = {".".join(name) for name in own}
    rest = {name: leaf for name, leaf in tree.flatten(tree.overlay(base, fixed)).items() if name not in taken}
    return compute_copy(tree.unflatten(rest), dtype, fuse=not apart)


def in_front(frozen: Tree, leaves: Tree, dtype: torch.dtype) -> Tree:
    """A member's own leaves, as computed with, in front of the frozen rest."""
    return tree.overlay(frozen, compute_copy(leaves, dtype, fuse=False))
