"""What strategies share whose state is members, each with what was measured of it.

Such a fitness is not measured again: where it is noisy (a minibatch of its own for each generation) a lucky member
stays until a luckier one comes. So the data should be the same in all generations.

Axes: P members.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.evolution import strategy as common
from functional_lm.tree import Tree


def scattered(key: Tensor, start: Tree, population: int, sigma: float) -> Tree:
    """The first members [P, ...]: the start itself, and the start with normal noise of deviation `sigma`."""
    own = common.member_keys(keys.fold_in_name(key, "start"), population)
    shapes = common.shapes_of(start)
    noise = torch.vmap(lambda each: tree.unflatten(common.drawn(each, shapes)))(own)
    amount = sigma * (torch.arange(population, device=key.device) > 0)
    return tree.map(lambda leaf, e: leaf + (per_member(amount, e) * e).to(leaf.dtype), start, noise)


def per_member(values: Tensor, leaf: Tensor) -> Tensor:
    """A number of each member, shaped to go with a leaf [P, ...]."""
    return values.view(-1, *[1] * (leaf.dim() - 1))


def chosen(which: Bool[Tensor, "P"], first: Tree, second: Tree) -> Tree:
    """Of each member the first where `which`, else the second."""
    return tree.map(lambda a, b: torch.where(per_member(which, a), a, b), first, second)


def member(members: Tree, index: Int[Tensor, ""]) -> Tree:
    """One member, by an index that may be traced (one without an axis would be read as a Python number)."""
    return tree.map(lambda leaf: leaf[index[None]][0], members)


def mean(members: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.mean(0, dtype=torch.float64).to(leaf.dtype), members)


def unmeasured(like: Tensor, *shape: int) -> Float[Tensor, "..."]:
    """The fitness of members that nothing is known of: less than any."""
    return torch.full(shape, -math.inf, dtype=torch.float64, device=like.device)
