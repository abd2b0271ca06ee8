"""Models as arithmetic on trees: soups, paths between models, and differences from a common base.

Every function is pure, computes in float32 and returns the first model's (the base's) dtypes. Weights are tensors
`[M]`, one number for each model, or a mapping from name patterns to such tensors (the last pattern that matches a leaf
counts), so that they can be mapped, differentiated and evolved: `vmap(lambda w: linear(models, w))(w)` is a population.
No branch depends on their values.

Axes: M models, N numbers of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model.norm import wide
from functional_lm.tree import Tree

Weights = Tensor | Mapping[str, Tensor]
Mixture = Callable[[Float[Tensor, " M"], list[Tensor]], Tensor]


def linear(models: Sequence[Tree], weights: Weights) -> Tree:
    """Σ wₘ θₘ: a model soup where the weights sum to one (arXiv 2203.05482). Weights (1, 0) give the first model."""
    return _leafwise(models, weights, _weighted_sum)


def slerp(first: Tree, second: Tree, weights: Weights) -> Tree:
    """From `first` to `second` along the arc between them, leaf by leaf (Shoemake 1985, section 3.3).

    The place on the arc is w₂ / (w₁ + w₂): weights (1, 0) and (0, 1) give the ends. Leaves that are parallel or
    opposite have no arc of their own, and are interpolated on the line.
    """
    return _leafwise((first, second), weights, _on_arc)


def task_arithmetic(base: Tree, models: Sequence[Tree], weights: Weights) -> Tree:
    """θ₀ + Σ wₘ (θₘ - θ₀) (arXiv 2212.04089, section 2), as (1 - Σ wₘ) θ₀ + Σ wₘ θₘ.

    That order gives one model of weight 1 back, and the base for weights 0, to the bit.
    """

    def mix(w: Tensor, leaves: list[Tensor]) -> Tensor:
        return _weighted_sum(torch.cat([1 - w.sum(-1, keepdim=True), w]), leaves)

    return _leafwise((base, *models), weights, mix)


def ties(base: Tree, models: Sequence[Tree], weights: Weights, density: float | Float[Tensor, ""] = 0.2) -> Tree:
    """θ₀ plus the differences trimmed, with elected signs, merged disjointly (TIES, arXiv 2306.01708, algorithm 1).

    Of each difference the `density` share of largest magnitude is kept (over the whole model; equals at the border
    stay) and multiplied by its weight: equal weights are the paper's λ. The sign with the larger sum is elected for
    each number, and those of that sign are averaged.
    """
    differences = [_difference(model, base) for model in models]
    borders = [_border(difference, density) for difference in differences]

    def mix(w: Tensor, leaves: list[Tensor]) -> Tensor:
        trimmed = [
            torch.where(leaf.abs() >= border, leaf * factor, 0.0)
            for leaf, border, factor in zip(leaves[1:], borders, w.unbind(-1), strict=True)
        ]
        stacked = torch.stack(trimmed)
        agreeing = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        return leaves[0] + torch.where(agreeing, stacked, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)

    return _leafwise((base, *differences), weights, mix)


def dare(
    base: Tree, models: Sequence[Tree], weights: Weights, key: Tensor, density: float | Float[Tensor, ""] = 0.5
) -> Tree:
    """θ₀ + Σ wₘ mₘ (θₘ - θ₀) / density, mₘ of ones and zeros (DARE, arXiv 2311.03099, section 3.2).

    A number of a difference is kept with probability `density` (the paper's 1 - p) and divided by it, which leaves
    its expectation as it was. Model m's draws at a leaf come from the key folded with the leaf's name and with m.
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


def _border(difference: Tree, density: float | Tensor) -> Float[Tensor, ""]:
    """The least magnitude among the `density` share of largest ones; infinite where that share is none."""
    sizes = torch.cat([leaf.abs().flatten() for leaf in tree.leaves(difference)]).sort().values
    sizes = torch.cat([sizes, sizes.new_full((1,), torch.inf)])
    share = density if isinstance(density, Tensor) else torch.tensor(density, dtype=torch.float64, device=sizes.device)
    kept = (share.double() * (len(sizes) - 1)).round().long().clamp(0, len(sizes) - 1)
    return sizes.gather(0, (len(sizes) - 1 - kept).view(1))[0]
