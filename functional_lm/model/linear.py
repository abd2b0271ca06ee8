"""Matrix products that look at the leaves they are handed.

A projection is a subtree: `weight [out, in]`, or the leaves of a quantised matrix (`packed.py`), and `bias [out]`, with
any number of low-rank deltas on top (`lora_A [R, in]`, `lora_B [out, R]`, `lora_scale []`: an adapter, or one member's
noise of a population). Which leaves are there decides what is computed; there is no wrapper class and no flag.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm.model import packed
from functional_lm.tree import Tree


def linear(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """x Wᵀ + b, plus scale (x Aᵀ) Bᵀ where an adapter is attached (LoRA, arXiv 2106.09685, eq. 3)."""
    y = base(params, x)
    if "lora_A" in params:
        y = y + delta(params, x).to(y.dtype)
    return y


def base(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """The product by the weight's format."""
    bias = params.get("bias")
    if packed.is_quantized(params):
        y = packed.product(params, x)
        return y if bias is None else y + bias.to(x.dtype)
    return F.linear(x, params["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))


def precision(params: Tree) -> torch.dtype:
    """The dtype in which a matrix gives its numbers: of an embedding, that of the residual stream."""
    dtype: torch.dtype = params["scales" if packed.is_quantized(params) else "weight"].dtype
    return dtype


def delta(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    thin = F.linear(x, params["lora_A"].to(x.dtype))
    return F.linear(thin * params["lora_scale"].to(x.dtype), params["lora_B"].to(x.dtype))


def embed(params: Tree, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """Rows of `weight [V, D]`; an adapter's delta is the same product on a one-hot input: a column of A, then B.

    For an embedding the matrix is used transposed ([in=V] -> [out=D]), so `lora_A [R, V]`, `lora_B [D, R]`.
    """
    x = packed.rows(params, tokens) if packed.is_quantized(params) else F.embedding(tokens, params["weight"])
    if "lora_A" in params:
        thin = F.embedding(tokens, params["lora_A"].mT)
        x = x + F.linear(thin * params["lora_scale"], params["lora_B"]).to(x.dtype)
    return x


def unembed(params: Tree, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """The output product of tied embeddings: the transposed use of the leaves of `embed`."""
    y = base(params, x)
    if "lora_A" in params:
        thin = F.linear(x, params["lora_B"].mT.to(x.dtype)) * params["lora_scale"].to(x.dtype)
        y = y + F.linear(thin, params["lora_A"].mT.to(x.dtype))
    return y
