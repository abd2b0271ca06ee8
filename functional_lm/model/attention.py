"""Causal self-attention: projections, rotation, cache, and two forms of the product that a test holds equal.

Axes: B batch (or cache slots), T queries, C keys (T, or the cache's length), H query heads, K key/value heads,
G = H / K queries that share a key, E head width, D model width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm import kernels
from functional_lm.model.config import LONG, ModelConfig
from functional_lm.model.linear import adapted, drop, linear
from functional_lm.model.norm import norm
from functional_lm.model.positions import Rotation, rotate
from functional_lm.tree import Tree


class Context(NamedTuple):
    """What all layers of one forward share.

    `mask` says which keys a query sees; None means causal and nothing else. `rows` are the cache rows to write.
    """

    rotation: Rotation | None
    mask: Bool[Tensor, "*B T C"] | None
    rows: Int[Tensor, "B T"] | None = None


def visible(
    query_positions: Int[Tensor, "*#B T"],
    key_positions: Int[Tensor, "*#B C"],
    window: int = 0,
    query_documents: Int[Tensor, "*#B T"] | None = None,
    key_documents: Int[Tensor, "*#B C"] | None = None,
) -> Bool[Tensor, "*#B T C"]:
    """Which keys a query may read: not after itself, within the window, of the same document."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    if query_documents is not None and key_documents is not None:
        mask = mask & (query_documents[..., :, None] == key_documents[..., None, :])
    return mask


def standard(
    query: Float[Tensor, "*B H T E"],
    key: Float[Tensor, "*B K C E"],
    value: Float[Tensor, "*B K C E"],
    mask: Bool[Tensor, "*#B T C"] | None,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
) -> Float[Tensor, "*B H T E"]:
    """softmax(q kᵀ / √E) v written out: vmaps, differentiates any number of times, drops by key.

    The G queries of a key head are rows of one product, so grouped heads copy nothing. The softmax computes in
    float32 and keeps its result, which the backward pass reads, in the inputs' dtype.
    """
    (time, width), groups = query.shape[-2:], query.shape[-3] // key.shape[-3]
    batch, heads, length = key.shape[:-3], key.shape[-3], key.shape[-2]
    scores = query.reshape(*batch, heads, groups * time, width) @ key.mT
    scores = scores.reshape(*batch, heads, groups, time, length) * (1 / math.sqrt(width))
    if mask is None:
        index = torch.arange(length, device=query.device)
        mask = visible(index[length - time :], index)
    mask = mask if mask.dim() == 2 else mask[..., None, None, :, :]
    weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
    if dropout_key is not None:
        weights = drop(weights, dropout, dropout_key)
    weights = weights.to(value.dtype).reshape(*batch, heads, groups * time, length)
    return (weights @ value).reshape(query.shape)


def flash(
    query: Float[Tensor, "*B H T E"],
    key: Float[Tensor, "*B K C E"],
    value: Float[Tensor, "*B K C E"],
    mask: Bool[Tensor, "*#B T C"] | None,
) -> Float[Tensor, "*B H T E"]:
    """The same through torch's fused kernel: no [T, C] matrix in memory; a fast path only for causal masks.

    It has no dropout: the kernel's own draws from torch's global generator.
    """
    if mask is not None and mask.dim() > 2:
        mask = mask[..., None, :, :]
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[-3] != key.shape[-3]
    )


def project(
    params: Tree, x: Float[Tensor, "*B T D"], config: ModelConfig
) -> tuple[Float[Tensor, "*B H T E"], Float[Tensor, "*B K T E"], Float[Tensor, "*B K T E"]]:
    """Queries, keys, values by head; from one fused product where the tree holds `qkv_proj`."""
    heads, shared, names = config.n_heads, config.n_kv_heads, ("q_proj", "k_proj", "v_proj")
    if "qkv_proj" in params:
        fused = linear(params["qkv_proj"], x).split([n * config.head_dim for n in (heads, shared, shared)], dim=-1)
        parts = adapted([params.get(name, {}) for name in names], fused, x)
    else:
        parts = [linear(params[name], x) for name in names]
    query, key, value = (part.unflatten(-1, (-1, config.head_dim)).transpose(-2, -3) for part in parts)
    if "q_norm" in params:
        query = norm(params["q_norm"], query, "rmsnorm", config.norm_eps)
        key = norm(params["k_norm"], key, "rmsnorm", config.norm_eps)
    return query, key, value


def attention(
    params: Tree,
    x: Float[Tensor, "*B T D"],
    context: Context,
    config: ModelConfig,
    key: Tensor | None = None,
    cache: Tree | None = None,
) -> tuple[Float[Tensor, "*B T D"], Tree | None]:
    """One layer's self-attention over `self_attn`, and its cache with the new keys and values written.

    `cache` is `{"k": [S, K, C, E], "v": [S, K, C, E]}`; row `context.rows[s, t]` of slot s takes token t.
    """
    query, new_key, value = project(params, x, config)
    if context.rotation is not None:
        query, new_key = rotate(query, context.rotation), rotate(new_key, context.rotation)
    if cache is not None:
        cache = {"k": write(cache["k"], new_key, context.rows), "v": write(cache["v"], value, context.rows)}
        new_key, value = cache["k"], cache["v"]
        if kernels.BLOCKS in params["o_proj"] and kernels.attends(query):
            assert context.rows is not None
            y = kernels.filled_rows(query[..., 0, :], new_key, value, context.rows[:, 0], config.sliding_window)
            return linear(params["o_proj"], y.flatten(-2)[..., None, :]), cache
    dropping = key is not None and config.dropout > 0
    if not dropping and use_flash(config, query):
        y = flash(query, new_key, value, context.mask)
    else:
        y = standard(query, new_key, value, context.mask, config.dropout, key if dropping else None)
    return linear(params["o_proj"], y.transpose(-2, -3).flatten(-2)), cache


def use_flash(config: ModelConfig, query: Float[Tensor, "*B H T E"]) -> bool:
    """`auto`: the fused kernel on an accelerator and for long rows; on the CPU its backward is the slower one."""
    if config.attention != "auto":
        return config.attention == "flash"
    return query.device.type != "cpu" or query.shape[-2] >= LONG


def write(
    rows: Float[Tensor, "S K C E"], new: Float[Tensor, "S K T E"], at: Int[Tensor, "S T"] | None
) -> Float[Tensor, "S K C E"]:
    """Cache rows with `new` at `at`. Out of place here; a donated step turns it into a write of T rows."""
    if at is None:
        raise ValueError("a cache needs the rows to write")
    slot = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    head = torch.arange(rows.shape[1], device=rows.device)[None, :, None]
    return rows.index_put((slot, head, at[:, None, :]), new.to(rows.dtype))
