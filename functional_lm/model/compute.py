"""The copy of a model that a device computes with: cast, and products of one input fused into one.

The copy is a function of the tree, made inside the step, so that gradients flow back through the concatenation and the
cast into the float32 masters; it is never stored.
"""

from __future__ import annotations

import torch

from functional_lm import tree
from functional_lm.model import packed, quantize
from functional_lm.tree import Tree

FUSIONS = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def compute_copy(params: Tree, dtype: torch.dtype, fuse: bool = True) -> Tree:
    """Matrices in `dtype`, vectors (norms, biases) as they are, q/k/v and gate/up as one leaf each."""

    def cast(name: str, leaf: torch.Tensor) -> torch.Tensor:
        matrix = leaf.dim() > 1 or name.endswith(".scales")
        return leaf.to(dtype) if leaf.is_floating_point() and matrix else leaf

    params = tree.map_named(cast, params)
    if not fuse:
        return params
    layers = {
        name: {part: fused(child, *FUSIONS[part]) if part in FUSIONS else child for part, child in layer.items()}
        for name, layer in params["model"]["layers"].items()
    }
    return {**params, "model": {**params["model"], "layers": layers}}


def decoding_copy(params: Tree, dtype: torch.dtype) -> Tree:
    """`compute_copy` for products of few rows, without gradients: quantised matrices as the device's kernels want."""
    return quantize.each(compute_copy(params, dtype), lambda child: packed.for_decoding(child, dtype))


def fused(params: Tree, name: str, parts: tuple[str, ...]) -> Tree:
    """`parts` stacked along their outputs under `name`, where all of them are there and are plain products.

    Quantised ones are too, since their grids lie along the inputs; adapters keep their products apart.
    """
    if not all(part in params and params[part].keys() <= {"weight", "bias", *packed.LEAVES} for part in parts):
        return params
    leaves = params[parts[0]].keys()
    if any(params[part].keys() != leaves for part in parts):
        return params
    rest = {part: child for part, child in params.items() if part not in parts}
    return {**rest, name: {leaf: torch.cat([params[part][leaf] for part in parts]) for leaf in leaves}}
