"""Normalisation over the last axis, in float32 whatever comes in.

The leaves decide: `weight` alone is scale, `bias` beside it shift; the kind (RMS or mean and variance) is static.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm.tree import Tree


def norm(params: Tree, x: Float[Tensor, "... D"], kind: str, eps: float) -> Float[Tensor, "... D"]:
    """`rmsnorm` (arXiv 1910.07467) or `layernorm` (arXiv 1607.06450); returns x's dtype."""
    wide = x.float()
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * params["weight"].float()
    if "bias" in params:
        wide = wide + params["bias"].float()
    return wide.to(x.dtype)
