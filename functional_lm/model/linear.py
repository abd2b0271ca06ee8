"""Matrix products that look at the leaves they are handed.

A projection is a subtree: `weight [out, in]`, or the leaves of a quantised matrix (`packed.py`), and `bias [out]`, with
or without an adapter beside it:

    lora_A [R, in], lora_B [out, R], lora_scale []     a low-rank delta (an adapter, or one population member's noise)
    lora_magnitude [out]                               DoRA: the length of each row of the adapted weight
    lora_dropout [], lora_key [2]                      dropout on the adapter's input, while there is a key
    lora_index [B]                                     a bank: the other leaves have an axis N in front, and row b of
                                                       the input takes entry `lora_index[b]` (`lora_gain [N, out]`
                                                       stands for the magnitudes)

    blocks [N, in/p, 32, p], outputs [out, 0]          instead of `weight`: the order of the kernels of `kernels`
    thin_A [R, in], thin_B [out, R]                    instead of `lora_A`, `lora_B`: for a kernel of those

Which leaves are there decides what is computed; there is no wrapper class and no flag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import kernels, keys
from functional_lm.model import packed
from functional_lm.tree import Tree


def linear(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """x Wᵀ + b, plus scale (x Aᵀ) Bᵀ where an adapter is attached (LoRA, arXiv 2106.09685, eq. 3).

    With magnitudes it is g (x Wᵀ + scale (x Aᵀ) Bᵀ) + b, g = m / |W + scale B A| by rows (DoRA, arXiv 2402.09353,
    eq. 5).
    """
    gain = row_gain(params)
    if gain is None:
        return adapted([params], [base(params, x)], x)[0]
    y = base({name: leaf for name, leaf in params.items() if name != "bias"}, x)
    y = gain.to(y.dtype) * (y + delta(params, x).to(y.dtype))
    return y + params["bias"].to(y.dtype) if "bias" in params else y


def base(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """The product by the weight's format."""
    bias = params.get("bias")
    if kernels.BLOCKS in params or packed.is_quantized(params):
        y = kernels.multiplied(params, x) if kernels.BLOCKS in params else packed.product(params, x)
        return y if bias is None else y + bias.to(x.dtype)
    return F.linear(x, params["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))


def precision(params: Tree) -> torch.dtype:
    """The dtype in which a matrix gives its numbers: of an embedding, that of the residual stream."""
    name = next(name for name in ("scales", kernels.BLOCKS, "weight") if name in params)
    dtype: torch.dtype = params[name].dtype
    return dtype


def adapted(params: Sequence[Tree], products: Sequence[Tensor], x: Float[Tensor, "... in"]) -> list[Tensor]:
    """Products of one input, each with what the adapter leaves of its part add.

    Where several parts have an adapter of the plain kind, the input is read once: (x [A1 A2 ...]ᵀ), then each B. At
    rank 1 each is a sum, and those the compiler makes in one loop by itself.
    """
    plain = [
        part
        for part in params
        if part.keys() & {"lora_A", "lora_index", "lora_key"} == {"lora_A"} and part["lora_A"].shape[-2] > 1
    ]
    if len(plain) < 2:
        return [changed(part, y, x) for part, y in zip(params, products, strict=True)]
    together = F.linear(x, torch.cat([part["lora_A"].to(x.dtype) for part in plain]))
    thin = iter(together.split([part["lora_A"].shape[-2] for part in plain], dim=-1))
    return [
        y + widen(part, next(thin)).to(y.dtype) if any(part is other for other in plain) else changed(part, y, x)
        for part, y in zip(params, products, strict=True)
    ]


def changed(params: Tree, y: Float[Tensor, "... out"], x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """A product with what its adapter adds, if it has one."""
    if kernels.THIN[0] in params:
        return kernels.low_rank(x, y, params)
    return y + delta(params, x).to(y.dtype) if "lora_A" in params else y


def delta(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """What the adapter adds: scale (x Aᵀ) Bᵀ."""
    if "lora_key" in params:
        x = drop(x, params["lora_dropout"], params["lora_key"])
    if "lora_index" in params:
        a, b, scale = chosen(params)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return (((rows @ a.mT.to(x.dtype)) * scale.to(x.dtype)) @ b.mT.to(x.dtype)).reshape(*x.shape[:-1], -1)
    return widen(params, F.linear(x, params["lora_A"].to(x.dtype)))


def widen(params: Tree, thin: Float[Tensor, "... R"]) -> Float[Tensor, "... out"]:
    """Behind A: the scale and B."""
    return F.linear(thin * params["lora_scale"].to(thin.dtype), params["lora_B"].to(thin.dtype))


def chosen(params: Tree) -> tuple[Float[Tensor, "B R in"], Float[Tensor, "B out R"], Float[Tensor, "B 1 1"]]:
    """Each row's own A, B and scale from a bank."""
    index = params["lora_index"]
    return params["lora_A"][index], params["lora_B"][index], params["lora_scale"][index][:, None, None]


def row_gain(params: Tree) -> Tensor | None:
    """DoRA's factor of each output, [out] (of a bank [B, ..., out]); None without magnitudes.

    The norm is a constant to the gradient (arXiv 2402.09353, section 4.3).
    """
    if "lora_magnitude" in params:
        return params["lora_magnitude"].float() / row_norm(params).detach()
    if "lora_gain" in params:
        return params["lora_gain"][params["lora_index"]][:, None]
    return None


def row_norm(params: Tree) -> Float[Tensor, "out"]:
    """The Euclidean length of each row of W + scale B A, float32."""
    return (matrix(params) + product(params)).norm(dim=-1)


def matrix(params: Tree) -> Float[Tensor, "out in"]:
    """W in float32, in whatever form the leaves hold it."""
    if kernels.BLOCKS in params:
        whole = kernels.whole(params[kernels.BLOCKS], outputs := params[kernels.OUTPUTS].shape[0]).float()
        return whole * params["scales"][:outputs, None].float() if "scales" in params else whole
    return packed.dequantize(params) if packed.is_quantized(params) else params["weight"].float()


def product(params: Tree) -> Float[Tensor, "out in"]:
    """scale B A, float32."""
    return params["lora_scale"].float() * (params["lora_B"].float() @ params["lora_A"].float())


def drop(x: Float[Tensor, "..."], probability: float | Float[Tensor, ""], key: Tensor) -> Float[Tensor, "..."]:
    """Inverted dropout (arXiv 1207.0580): zero with `probability`, scale the rest by 1 / (1 - probability)."""
    kept = keys.bernoulli(key, 1 - probability, x.shape)
    return torch.where(kept, x * (1 / (1 - probability)), torch.zeros((), dtype=x.dtype, device=x.device))


# Embeddings -----------------------------------------------------------------------------------------------------------


def embed(params: Tree, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
    """Rows of `weight [V, D]`; an adapter's delta is the same product on a one-hot input: a column of A, then B.

    For an embedding the matrix is used transposed ([in=V] -> [out=D]), so `lora_A [R, V]`, `lora_B [D, R]`.
    """
    if kernels.BLOCKS in params:
        x = kernels.rows(params, tokens)
    else:
        x = packed.rows(params, tokens) if packed.is_quantized(params) else F.embedding(tokens, params["weight"])
    if "lora_index" in params:
        _, b, scale = chosen(params)
        row = params["lora_index"].reshape(-1, *[1] * (tokens.dim() - 1))
        thin = params["lora_A"][row, :, tokens].reshape(tokens.shape[0], -1, b.shape[-1])
        return x + ((thin * scale) @ b.mT).reshape(x.shape).to(x.dtype)
    if "lora_A" in params:
        thin = F.embedding(tokens, params["lora_A"].mT)
        x = x + F.linear(thin * params["lora_scale"], params["lora_B"]).to(x.dtype)
    if kernels.THIN[0] in params:
        a, b = (params[name] for name in kernels.THIN)
        x = x + F.linear(F.embedding(tokens, a.mT) * params["lora_scale"], b).to(x.dtype)
    return x


def unembed(params: Tree, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """The output product of tied embeddings: the transposed use of the leaves of `embed`."""
    y = base(params, x)
    if "lora_index" in params:
        a, b, scale = chosen(params)
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return y + (((rows @ b.to(x.dtype)) * scale.to(x.dtype)) @ a.to(x.dtype)).reshape(y.shape)
    if "lora_A" in params:
        thin = F.linear(x, params["lora_B"].mT.to(x.dtype)) * params["lora_scale"].to(x.dtype)
        y = y + F.linear(thin, params["lora_A"].mT.to(x.dtype))
    if kernels.THIN[0] in params:
        y = kernels.low_rank(x, y, params, transposed=True)
    return y
