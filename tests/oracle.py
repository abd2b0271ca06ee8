"""The transformer once more, as slowly and plainly as it can be said: numpy, float64, one token and one head at a time.

It shares no line with the package and uses no trick that the package uses (no masks, no batches, no halves, no grouped
products), so that the two agree only if both compute what the papers say.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from functional_lm import tree
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

Array = NDArray[np.float64]


def logits(params: Tree, tokens: list[int], config: ModelConfig) -> Array:
    """[T, V] of one document."""
    w: dict[str, Array] = {name: leaf.double().numpy() for name, leaf in tree.flatten(params).items()}
    table = w["model.embed_tokens.weight"]
    x = np.stack([table[token] + place(w, t, config) for t, token in enumerate(tokens)])
    for i in range(config.n_layers):
        layer = {name[len(f"model.layers.{i}.") :]: leaf for name, leaf in w.items() if f".layers.{i}." in name}
        x = block(layer, x, config)
    if config.norm_placement == "pre":
        x = np.stack([norm(w, "model.norm", row, config) for row in x])
    y = x @ w.get("lm_head.weight", table).T
    return config.logit_softcap * np.tanh(y / config.logit_softcap) if config.logit_softcap else y


def place(w: dict[str, Array], t: int, config: ModelConfig) -> Array | float:
    """What the position adds to the embedding."""
    if config.positions == "learned":
        return w["model.embed_positions.weight"][t]
    if config.positions == "sinusoidal":
        angles = [t / 10000 ** (2 * (d // 2) / config.d_model) for d in range(config.d_model)]
        return np.array([math.cos(angle) if d % 2 else math.sin(angle) for d, angle in enumerate(angles)])
    return 0.0


def block(w: dict[str, Array], x: Array, config: ModelConfig) -> Array:
    def first(rows: Array) -> Array:
        return np.stack([norm(w, "input_layernorm", row, config) for row in rows])

    def second(rows: Array) -> Array:
        return np.stack([norm(w, "post_attention_layernorm", row, config) for row in rows])

    if config.norm_placement == "post":
        x = first(x + attention(w, x, config))
        return second(x + feed_forward(w, x, config))
    if config.parallel_residual:
        return x + attention(w, first(x), config) + feed_forward(w, second(x), config)
    x = x + attention(w, first(x), config)
    return x + feed_forward(w, second(x), config)


def attention(w: dict[str, Array], x: Array, config: ModelConfig) -> Array:
    size = config.head_dim
    out = np.zeros((len(x), config.n_heads * size))
    query, key, value = (linear(w, f"self_attn.{name}_proj", x) for name in "qkv")
    for head in range(config.n_heads):
        own = slice(head * size, (head + 1) * size)
        shared_head = head // (config.n_heads // config.n_kv_heads)
        shared = slice(shared_head * size, (shared_head + 1) * size)
        q = [turn(w, "self_attn.q_norm", query[t, own], t, config) for t in range(len(x))]
        k = [turn(w, "self_attn.k_norm", key[t, shared], t, config) for t in range(len(x))]
        for t in range(len(x)):
            start = max(0, t - config.sliding_window + 1) if config.sliding_window else 0
            score = [math.exp(q[t] @ k[s] / math.sqrt(size)) for s in range(start, t + 1)]
            out[t, own] = sum(e * value[s, shared] for s, e in enumerate(score, start)) / sum(score)
    return linear(w, "self_attn.o_proj", out)


def turn(w: dict[str, Array], name: str, x: Array, t: int, config: ModelConfig) -> Array:
    """A query or key of one head, normalised where asked and rotated as complex numbers."""
    if config.qk_norm:
        x = x / math.sqrt((x**2).mean() + config.norm_eps) * w[f"{name}.weight"]
    if config.positions != "rope":
        return x
    pairs, y = config.rotary_width // 2, x.copy()
    for i in range(pairs):
        z = complex(x[i], x[i + pairs]) * np.exp(1j * t * frequency(i, config))
        y[i], y[i + pairs] = z.real, z.imag
    return y


def frequency(i: int, config: ModelConfig) -> float:
    """Of pair i; Llama 3.1's rule, case by case."""
    plain = config.rope_theta ** (-2 * i / config.rotary_width)
    if config.rope_scaling is None:
        return plain
    factor, low, high, original = config.rope_scaling
    wavelength = 2 * math.pi / plain
    if wavelength < original / high:
        return plain
    if wavelength > original / low:
        return plain / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * plain / factor + smooth * plain


def feed_forward(w: dict[str, Array], x: Array, config: ModelConfig) -> Array:
    up = linear(w, "mlp.up_proj", x)
    if config.feed_forward == "swiglu":
        gate = linear(w, "mlp.gate_proj", x)
        inner = gate / (1 + np.exp(-gate)) * up
    elif config.feed_forward == "gelu":
        inner = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    elif config.feed_forward == "gelu_erf":
        inner = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
    else:
        inner = np.maximum(up, 0) ** (2 if config.feed_forward == "relu2" else 1)
    return linear(w, "mlp.down_proj", inner)


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    bias: Any = w.get(f"{name}.bias", 0.0)
    return x @ w[f"{name}.weight"].T + bias


def norm(w: dict[str, Array], name: str, x: Array, config: ModelConfig) -> Array:
    if config.norm == "layernorm":
        x = x - x.mean()
    bias: Any = w.get(f"{name}.bias", 0.0)
    return x / math.sqrt((x**2).mean() + config.norm_eps) * w[f"{name}.weight"] + bias
