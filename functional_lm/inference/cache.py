"""The key/value cache: a tree like any other, `{"0": {"k": [S, K, C, E], "v": [S, K, C, E]}, ...}` by layer.

Keys and values are leaves of their own, because writing into a view of a larger buffer makes Inductor copy all of it
(pytorch #184542). Rows beyond a slot's position hold what was there before; causality hides them.

Axes: S slots, K key/value heads, C cache length, E head width.
"""

from __future__ import annotations

import torch

from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree


def init(config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tree:
    """An empty cache of S slots with `length` rows each."""
    shape = (slots, config.n_kv_heads, length, config.head_dim)

    def rows() -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return {str(layer): {"k": rows(), "v": rows()} for layer in range(config.n_layers)}


def length(cache: Tree) -> int:
    """C, the rows of a slot."""
    return cache["0"]["k"].shape[-2]
