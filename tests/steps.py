"""Small training steps, their batches, and how near two trees are.

Axes: B rows, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.training import optimizer, schedule, step
from functional_lm.training.step import Training, TrainState

V, T = 17, 8
PLAIN = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "max_len": T}
CONFIGS = {
    "llama": ModelConfig(**PLAIN),
    "gpt2": ModelConfig(**PLAIN, feed_forward="gelu", bias="all", norm="layernorm", positions="learned"),
    "untied": ModelConfig(**PLAIN, tie_embeddings=False, qk_norm=True),
}
LLAMA, DROPPING = CONFIGS["llama"], ModelConfig(**PLAIN, dropout=0.3)
SHALLOW = {  # tracing takes seconds a layer
    "dropout": ModelConfig(**{**PLAIN, "n_layers": 1}, dropout=0.3),
    "untied": ModelConfig(**{**PLAIN, "n_layers": 1}, tie_embeddings=False, qk_norm=True, bias="qkv"),
    "recomputing": ModelConfig(**{**PLAIN, "n_layers": 1}, checkpoint_activations=True),
}
SEED = st.integers(0, 2**31)


def made(
    config: ModelConfig = LLAMA, dtype: torch.dtype = torch.float32, ema: bool = False, **numbers: float
) -> Training:
    adamw, warm_cosine = optimizer.optimizer("adamw"), schedule.cosine(3, 0.1)
    return step.training(
        config, adamw, warm_cosine, dtype, {"learning_rate": 1e-2, "total_steps": 20, **numbers}, ema=ema
    )


def start(functions: Training, config: ModelConfig = LLAMA, seed: int = 0) -> TrainState:
    return functions.init(transformer.init(config, keys.key(seed)), keys.key(seed + 1))


def rows(count: int, seed: int = 0, ignored: float = 0.2) -> dict[str, Tensor]:
    """[count, T] tokens and targets, a share of the targets ignored."""
    one, two, three = keys.split(keys.key(seed), 3).unbind()
    targets = keys.randint(two, (count, T), 0, V)
    hidden = keys.bernoulli(three, ignored, (count, T))
    return {
        "tokens": keys.randint(one, (count, T), 0, V),
        "targets": torch.where(hidden, transformer.IGNORED, targets),
    }


def close(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for (name, x), (other, y) in zip(tree.flatten(a).items(), tree.flatten(b).items(), strict=True):
        assert name == other
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
