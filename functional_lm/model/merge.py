"""Models as arithmetic on trees: soups, paths between models, and differences from a common base.

Every function is pure, computes in float32 and returns the first model's (the base's) dtypes. Weights are tensors
`[M]`, one number for each model, a mapping from name patterns to such tensors (the last pattern that matches a leaf
counts), or a function from a leaf's name to one, so that they can be mapped, differentiated and evolved:
`vmap(lambda w: linear(models, w))(w)` is a population.
No branch depends on their values.

Axes: M models, N numbers of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model.norm import wide
from functional_lm.tree import Tree

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare")
FROM_BASE = METHODS[2:]
THINNED = {"ties": 0.2, "dare": 0.5}  # density where none is given: the first is the paper's

Weights = Tensor | Mapping[str, Tensor] | Callable[[str], Tensor]
Mixture = Callable[[Float[Tensor, " M"], list[Tensor]], Tensor]


def linear(models: Sequence[Tree], weights: Weights) -> Tree:
    """Σ wₘ θₘ: a model soup where the weights sum to one (arXiv 2203.05482). Weights (1, 0) give the first model."""
    return _leafwise(models, weights, _weighted_sum)


def slerp(first: Tree, second: Tree, weights: Weights) -> Tree:
    """From `first` to `second` along the arc between them, leaf by leaf (Shoemake 1985, section 3.3).

    The place on the arc is w₂ / (w₁ + w₂): weights (1, 0) and (0, 1) give the ends. Leaves that are parallel or
    opposite have no arc of their own, and are interpolated on the line.

    mergekit's `slerp` is the same but that it takes the line already where |cosine| > 0.9995, here where the sine is
    below 1e-3: between the two the arc is at most 1e-3 of the leaf's length away from its line.
    """
    return _leafwise((first, second), weights, _on_arc)


def task_arithmetic(base: Tree, models: Sequence[Tree], weights: Weights) -> Tree:
    """θ₀ + Σ wₘ (θₘ - θ₀) (arXiv 2212.04089, section 2), as (1 - Σ wₘ) θ₀ + Σ wₘ θₘ.

    That order gives one model of weight 1 back, and the base for weights 0, to the bit.
    """

    def mix(w: Tensor, leaves: list[Tensor]) -> Tensor:
        return _weighted_sum(torch.cat([1 - w.sum(-1, keepdim=True), w]), leaves)

    return _leafwise((base, *models), weights, mix)


class Differences(NamedTuple):
    """θₘ - θ₀ of M models, and the magnitudes in each from the least to the largest, with infinity [N + 1] behind them:
    what TIES needs to know of the models, whatever the weights and the density are."""

    trees: list[Tree]
    sizes: list[Tensor]


def differences(base: Tree, models: Sequence[Tree]) -> Differences:
    """What lies between each model and the base, float32."""
    trees = [_difference(model, base) for model in models]
    return Differences(trees, [_sizes(difference) for difference in trees])


def ties(base: Tree, models: Sequence[Tree], weights: Weights, density: float | Float[Tensor, ""] = 0.2) -> Tree:
    """θ₀ plus the differences trimmed, with elected signs, merged disjointly (TIES, arXiv 2306.01708, algorithm 1).

    Of each difference the `density` share of largest magnitude is kept (over the whole model; equals at the border
    stay) and multiplied by its weight: equal weights are the paper's λ. The sign with the larger sum is elected for
    each number, and those of that sign are averaged.

    Where mergekit's `ties` differs: it trims each tensor by itself and keeps ⌊density n⌋ numbers of it; it divides what
    agrees by its weights' sum, not by its count, so that there equal weights of any size are weights of 1 here; where
    the sum is exactly 0 it elects the positive sign, and here nothing is added.
    """
    return ties_of(base, differences(base, models), weights, density)


def ties_of(base: Tree, between: Differences, weights: Weights, density: float | Float[Tensor, ""] = 0.2) -> Tree:
    """`ties` with the differences at hand: a population of weights and densities shares their order."""
    borders = [_border(sizes, density) for sizes in between.sizes]

    def mix(w: Tensor, leaves: list[Tensor]) -> Tensor:
        trimmed = [
            torch.where(leaf.abs() >= border, leaf * factor, 0.0)
            for leaf, border, factor in zip(leaves[1:], borders, w.unbind(-1), strict=True)
        ]
        stacked = torch.stack(trimmed)
        agreeing = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        return leaves[0] + torch.where(agreeing, stacked, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)

    return _leafwise((base, *between.trees), weights, mix)


def dare(
    base: Tree, models: Sequence[Tree], weights: Weights, key: Tensor, density: float | Float[Tensor, ""] = 0.5
) -> Tree:
    """θ₀ + Σ wₘ mₘ (θₘ - θ₀) / density, mₘ of ones and zeros (DARE, arXiv 2311.03099, section 3.2).

    A number of a difference is kept with probability `density` (the paper's 1 - p) and divided by it, which leaves
    its expectation as it was. Model m's draws at a leaf come from the key folded with the leaf's name and with m.
    mergekit's `dare_linear` is the same (its `normalize`, off there too, would divide by the sum of the weights); its
    `dare_ties` elects signs as well, which the paper leaves to TIES.
    """
    rate = density if isinstance(density, Tensor) else torch.tensor(density, device=key.device)

    def kept(name: str, base: Tensor, *models: Tensor) -> Tensor:
        own = keys.fold_in_name(key, name)
        w = _at(weights, name, len(models))
        result = wide(base)
        for number, model in enumerate(models):
            mask = keys.bernoulli(keys.fold_in(own, number), rate, base.shape)
            difference = wide(model) - wide(base)
            result = result + w[number] * torch.where(mask, difference / rate, 0.0)
        return result.to(base.dtype)

    return tree.map_named(kept, base, *models)


# Leaves -----------------------------------------------------------------------------------------------------------


def _leafwise(models: Sequence[Tree], weights: Weights, mix: Mixture) -> Tree:
    """`mix(weights, leaves)` of the leaves of each name, in float32."""

    def mixed(name: str, *leaves: Tensor) -> Tensor:
        return mix(_at(weights, name), [wide(leaf) for leaf in leaves]).to(leaves[0].dtype)

    return tree.map_named(mixed, models[0], *models[1:])


def _at(weights: Weights, name: str, count: int | None = None) -> Float[Tensor, " M"]:
    """The weights of a leaf. Raises ValueError where no pattern matches it."""
    if isinstance(weights, Tensor):
        return weights
    if callable(weights):
        return weights(name)
    found = [value for pattern, value in weights.items() if tree.matcher(pattern)(name)]
    if not found:
        raise ValueError(f"no pattern gives weights to {name!r}; add '*'")
    return found[-1]


def _weighted_sum(w: Float[Tensor, " M"], leaves: list[Tensor]) -> Tensor:
    factors = w.unbind(-1)
    result = factors[0] * leaves[0]
    for factor, leaf in zip(factors[1:], leaves[1:], strict=True):
        result = result + factor * leaf
    return result


def _on_arc(w: Float[Tensor, "2"], leaves: list[Tensor]) -> Tensor:
    first, second = leaves
    t = w[1] / (w[0] + w[1])
    lengths = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    cosine = ((first * second).sum() / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)
    sine = (1 - cosine.square()).sqrt()
    angle = torch.atan2(sine, cosine)
    flat = (sine < 1e-3) | (lengths == 0)  # the line is within 1e-6 of the arc, or there is no arc
    divisor = torch.where(flat, 1.0, torch.sin(angle))
    before = torch.where(flat, 1 - t, torch.sin((1 - t) * angle) / divisor)
    after = torch.where(flat, t, torch.sin(t * angle) / divisor)
    return before * first + after * second


def _difference(model: Tree, base: Tree) -> Tree:
    return tree.map(lambda theirs, ours: wide(theirs) - wide(ours), model, base)


def _sizes(difference: Tree) -> Float[Tensor, " sizes"]:
    sizes = torch.cat([leaf.abs().flatten() for leaf in tree.leaves(difference)]).sort().values
    return torch.cat([sizes, sizes.new_full((1,), torch.inf)])


def _border(sizes: Float[Tensor, " sizes"], density: float | Tensor) -> Float[Tensor, ""]:
    """The least magnitude among the `density` share of largest ones; infinite where that share is none."""
    share = density if isinstance(density, Tensor) else torch.tensor(density, dtype=torch.float64, device=sizes.device)
    kept = (share.double() * (len(sizes) - 1)).round().long().clamp(0, len(sizes) - 1)
    return sizes.gather(0, (len(sizes) - 1 - kept).view(1))[0]
