"""Normalisation over the last axis, in float32 at least.

The leaves decide: `weight` alone is scale, `bias` beside it shift; the kind (RMS or mean and variance) is static.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm.tree import Tree


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in float32, or in float64 if that is what it is: what norms, softmaxes and losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def norm(params: Tree, x: Float[Tensor, "... D"], kind: str, eps: float) -> Float[Tensor, "... D"]:
    """`rmsnorm` (arXiv 1910.07467) or `layernorm` (arXiv 1607.06450); returns x's dtype."""
    y = wide(x)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(params["weight"])
    if "bias" in params:
        y = y + wide(params["bias"])
    return y.to(x.dtype)
