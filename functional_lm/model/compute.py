"""The copy of a model that a device computes with: cast, and products of one input fused into one.

The copy is a function of the tree, made inside the step, so that gradients flow back through the concatenation and the
cast into the float32 masters; it is never stored.
"""

from __future__ import annotations

import torch

from functional_lm import kernels, tree
from functional_lm.model import packed, quantize
from functional_lm.tree import Tree

FUSIONS = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}
FUSED = frozenset({"weight", "bias", *packed.LEAVES})
ADDED = frozenset({"lora_A", "lora_B", "lora_scale", "lora_dropout", "lora_key", "lora_index"})


def compute_copy(params: Tree, dtype: torch.dtype, fuse: bool = True) -> Tree:
    """Matrices in `dtype`, vectors (norms, biases) and what a kernel reads as it is as they are, q/k/v and gate/up as
    one leaf each."""

    def cast(name: str, leaf: torch.Tensor) -> torch.Tensor:
        matrix = (leaf.dim() > 1 and not name.endswith(kernels.THIN)) or name.endswith(".scales")
        return leaf.to(dtype) if leaf.is_floating_point() and matrix else leaf

    params = tree.map_named(cast, params)
    if not fuse:
        return params
    layers = {
        name: {part: fused(child, *FUSIONS[part]) if part in FUSIONS else child for part, child in layer.items()}
        for name, layer in params["model"]["layers"].items()
    }
    return {**params, "model": {**params["model"], "layers": layers}}


def decoding_copy(params: Tree, dtype: torch.dtype, fuse: bool = True) -> Tree:
    """`compute_copy` for products of few rows, without gradients: quantised matrices as the device's kernels want."""
    return quantize.each(compute_copy(params, dtype, fuse), lambda child: packed.for_decoding(child, dtype))


def freeze(params: Tree, trained: Tree, dtype: torch.dtype, fuse: bool = True) -> Tree:
    """The compute copy of what `trained` does not hold, made once; `overlay(freeze(...), trained)` is the whole model.

    Products are fused if only adapters are trained, of the kind that hangs on the parts of a fused product.
    """
    names = tree.flatten(trained).keys()
    rest = tree.unflatten({name: leaf for name, leaf in tree.flatten(params).items() if name not in names})
    return compute_copy(rest, dtype, fuse and {name.rpartition(".")[2] for name in names} <= ADDED)


def fused(params: Tree, name: str, parts: tuple[str, ...]) -> Tree:
    """`parts` stacked along their outputs under `name`, where all of them are there and are products of a weight.

    Quantised ones are too, since their grids lie along the inputs. Adapters stay under the names of their parts, where
    `linear.adapted` finds them. Magnitudes (DoRA) keep the products apart: what the leaves are decides.
    """
    if not all(
        params.get(part, {}).keys() & {"weight", "qweight"} and params[part].keys() <= FUSED | ADDED for part in parts
    ):
        return params
    leaves = params[parts[0]].keys() & FUSED
    if any(params[part].keys() & FUSED != leaves for part in parts):
        return params
    made = {part: child for part, child in params.items() if part not in parts}
    for part in parts:
        if added := {leaf: value for leaf, value in params[part].items() if leaf in ADDED}:
            made[part] = added
    return {**made, name: {leaf: torch.cat([params[part][leaf] for part in parts]) for leaf in sorted(leaves)}}
