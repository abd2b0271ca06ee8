"""EGGROLL (arXiv 2511.16652): evolution strategies whose perturbations of a matrix have rank r.

    E = A Bᵀ / √r,   A [out, r] and B [in, r] standard normal        (equation 5; Var E = 1, fourth moment 3 + 6/r)

E is never formed. A member's noise is an adapter beside the weight, `lora_A = Bᵀ`, `lora_B = A`, `lora_scale = ±σ/√r`,
which `linear`, `embed` and `unembed` add as two thin products to the base product that all members share. The update is
one product of the stacked factors: Σ wᵢ Eᵢ = [A₁w₁ ... A_Nw_N] [B₁ ... B_N]ᵀ / √r.

Vectors (norms, biases) and matrices of no more than r rows or columns have full noise, no larger than factors would
be. Matrices that no `linear` reads (an adapter's own, learned positions) have low-rank noise that is formed: they are
small.

Axes: P members, N pairs, R rank of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import UsageError
from functional_lm.evolution import gradient
from functional_lm.evolution.gradient import Perturbation, Settings, Wrap, unwrapped
from functional_lm.evolution.strategy import Shapes, Strategy
from functional_lm.model.lora import EMBEDDING
from functional_lm.training.optimizer import adamw
from functional_lm.training.transformation import Optimizer
from functional_lm.tree import Tree


def eggroll(
    settings: Settings,
    rank: int = 1,
    optimizer: Optimizer | None = None,
    numbers: Mapping[str, float] | None = None,
    wrap: Wrap = unwrapped,
) -> Strategy:
    """The strategy. Raises UsageError for a rank below 1."""
    if rank < 1:
        raise UsageError(f"the rank of the noise is {rank}; it needs at least 1")
    return gradient.estimating("eggroll", settings, low_rank(rank), optimizer or adamw(), numbers, wrap)


def low_rank(rank: int) -> Perturbation:
    """Noise of rank `rank` on every matrix."""

    def draw(key: Tensor, shapes: Shapes) -> Tree:
        return tree.unflatten(gradient.sample(key, noise_shapes(shapes, rank), torch.float32))

    def put(centre: Tree, noise: Tree, amount: Tensor) -> Tree:
        return tree.unflatten(_placed(tree.flatten(centre), tree.flatten(noise), amount, rank))

    def fixed(centre: Tree) -> Tree:
        flat = tree.flatten(centre)
        return tree.unflatten({name: leaf for name, leaf in flat.items() if beside(name, tuple(leaf.shape), rank)})

    def total(weights: Tensor, noises: Tree, shapes: Shapes) -> Tree:
        flat = tree.flatten(noises)
        return tree.unflatten({name: _summed(weights, flat, name, shape, rank) for name, shape in shapes.items()})

    def numbers(shapes: Shapes) -> int:
        return sum(math.prod(shape) for shape in noise_shapes(shapes, rank).values())

    return Perturbation(draw, put, fixed, total, numbers)


def factored(shape: tuple[int, ...], rank: int) -> bool:
    """Whether two factors are smaller than the noise that they stand for."""
    return len(shape) == 2 and min(shape) > rank


def beside(name: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether the model's own products run the noise of this leaf, as an adapter."""
    path, _, kind = name.rpartition(".")
    return kind == "weight" and factored(shape, rank) and path != "" and not path.endswith("embed_positions")


def _path(name: str, shape: tuple[int, ...], rank: int) -> str:
    """Under which the factors lie."""
    return name.rpartition(".")[0] if beside(name, shape, rank) else name


def noise_shapes(shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what is drawn, by name: two factors, or the leaf's own."""
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not factored(shape, rank):
            made[name] = shape
            continue
        path = _path(name, shape, rank)
        outputs, inputs = reversed(shape) if path.endswith(EMBEDDING) else shape
        made[f"{path}.lora_A"], made[f"{path}.lora_B"] = (rank, inputs), (outputs, rank)
    return made


def _placed(centre: Mapping[str, Tensor], noise: Mapping[str, Tensor], amount: Tensor, rank: int) -> dict[str, Tensor]:
    """The leaves of a member: adapters, and sums where the noise is added to its leaf."""
    made: dict[str, Tensor] = {}
    for name, leaf in centre.items():
        shape = tuple(leaf.shape)
        if not factored(shape, rank):
            made[name] = leaf + (amount * noise[name]).to(leaf.dtype)
            continue
        path, scale = _path(name, shape, rank), amount / math.sqrt(rank)
        a, b = noise[f"{path}.lora_A"], noise[f"{path}.lora_B"]
        if beside(name, shape, rank):
            made |= {f"{path}.lora_A": a, f"{path}.lora_B": b, f"{path}.lora_scale": scale}
        else:
            made[name] = leaf + (scale * (b @ a)).to(leaf.dtype)
    return made


def _summed(weights: Tensor, noise: Mapping[str, Tensor], name: str, shape: tuple[int, ...], rank: int) -> Tensor:
    """Σ wᵢ Eᵢ of one leaf."""
    if not factored(shape, rank):
        return torch.einsum("n,n...->...", weights, noise[name])
    path = _path(name, shape, rank)
    a, b = noise[f"{path}.lora_A"], noise[f"{path}.lora_B"]
    total = torch.einsum("nor,nri->oi", b * (weights / math.sqrt(rank))[:, None, None], a)
    return total.mT if path.endswith(EMBEDDING) else total
