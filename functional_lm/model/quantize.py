"""Weight-only quantisation as a transformation of trees: which leaves, how finely, and back.

A plan applied to a tree gives a tree; applied to the abstract tree of a configuration (meta tensors) it gives the
names, shapes and dtypes that a file has to hold. `linear` computes with whichever leaves it finds (`packed.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.model import packed
from functional_lm.options import check, option
from functional_lm.tree import Tree

PROJECTIONS = "model.layers.*_proj.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class Plan:
    """What is quantised, and how: the record that a model folder keeps."""

    bits: int = option(8, "bits a weight of the projections", choices=(8, 4))
    group_size: int = option(64, "weights that share a scale, of 4 bits", low=2)
    method: str = option("rtn", "rtn: to the nearest; gptq: by what a layer's inputs are", choices=METHODS)
    embeddings: bool = option(True, "embedding and output too, in 8 bits: of a small model much of what is read")
    targets: str = option(PROJECTIONS, "names of the projections' weights to quantise", metavar="PATTERN")

    def __post_init__(self) -> None:
        check(self)
        if self.group_size % 2:
            raise UsageError(f"group_size is {self.group_size}; it has to be even, since two weights share a byte")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def from_json(values: Any, source: str) -> Plan:
    """The plan that a folder records. Raises DataError for one that this version does not know."""
    if not isinstance(values, Mapping):
        raise DataError(f"{source}: 'quantization' is {values!r}; it has to be an object of settings")
    try:
        return Plan(**values)
    except (TypeError, FunctionalLMError) as error:
        raise DataError(f"{source}: 'quantization' is not understood ({error})") from error


def bits_of(name: str, plan: Plan) -> int | None:
    """How many bits a leaf gets; None if it stays."""
    if plan.embeddings and name in EMBEDDINGS:
        return 8
    return plan.bits if tree.matcher(plan.targets)(name) else None


Quantizer = Callable[[str, Tensor, int], Tree]


def quantize(params: Tree, plan: Plan, by: Quantizer | None = None) -> Tree:
    """The tree with the plan's leaves quantised: `X.weight` becomes `X.qweight`, `X.scales` and, of 4 bits, `X.zeros`.

    `by(name, weight, bits)` gives those leaves; by default each weight goes to the nearest place. Raises UsageError
    where the targets match nothing, something that is no matrix, or one whose inputs the groups do not divide.
    """
    by = by or (lambda name, weight, bits: packed.nearest(weight, bits, plan.group_size))
    flat: dict[str, Tensor] = {}
    for name, leaf in tree.flatten(params).items():
        bits = bits_of(name, plan)
        if bits is None:
            flat[name] = leaf
            continue
        _check_target(name, leaf, bits, plan)
        place = name.removesuffix(".weight")
        flat |= {f"{place}.{part}": value for part, value in by(name, leaf, bits).items()}
    if flat.keys() == tree.flatten(params).keys():
        raise UsageError(f"targets {plan.targets!r} match no weight, such as {next(iter(flat))!r}")
    return tree.unflatten(flat)


def _check_target(name: str, leaf: Tensor, bits: int, plan: Plan) -> None:
    if leaf.dim() != 2 or not leaf.is_floating_point() or not name.endswith(".weight"):
        raise UsageError(f"targets {plan.targets!r} match {name!r}, which is no matrix of weights")
    inputs = leaf.shape[-1]
    if bits == 4 and inputs % plan.group_size:
        fitting = [size for size in range(2, min(plan.group_size, inputs + 1), 2) if inputs % size == 0]
        remedy = f"give {fitting[-1]}" if fitting else "use 8 bits"
        raise UsageError(f"group_size {plan.group_size} does not divide the {inputs} inputs of {name!r}; {remedy}")


def dequantize(params: Tree, dtype: torch.dtype = torch.float32) -> Tree:
    """The plain tree that a quantised one stands for; leaves that are not quantised stay as they are."""
    return each(params, lambda child: {**_rest(child), "weight": packed.dequantize(child, dtype)})


def is_quantized(params: Tree) -> bool:
    """Whether any matrix of a whole tree is quantised; `packed.is_quantized` asks of one."""
    return any(name.endswith(".qweight") for name in tree.flatten(params))


def each(params: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """The tree with every quantised matrix, its subtree of leaves, changed."""
    if packed.is_quantized(params):
        return dict(sorted(change(params).items()))
    return {name: each(child, change) if isinstance(child, dict) else child for name, child in params.items()}


def _rest(child: Tree) -> Tree:
    return {name: leaf for name, leaf in child.items() if name not in packed.LEAVES}
