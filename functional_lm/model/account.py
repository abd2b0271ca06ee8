"""What a model costs before it exists: parameters, floating-point operations, bytes. Arithmetic on its description.

Axes: B batch, T time, D model width, H heads, E head width, F feed-forward width, V vocabulary, L layers, C cache.
"""

from __future__ import annotations

from typing import NamedTuple

from functional_lm.model.config import ModelConfig

FLOAT32 = 4


class Part(NamedTuple):
    """A subtree: how many parameters it has, and how many of them are multiplied with every token."""

    name: str
    parameters: int
    multiplied: int


def parts(config: ModelConfig) -> list[Part]:
    """The model by subtree; the sum of `parameters` is the size of the tree that `init` makes."""
    width, queries, shared = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    everywhere, on_qkv, on_o = config.bias == "all", config.bias != "none", config.bias in ("all", "attention")
    attention = width * (2 * queries + 2 * shared)
    attention_bias = (queries + 2 * shared) * on_qkv + width * on_o
    matrices = 3 if config.feed_forward == "swiglu" else 2
    feed_forward = matrices * width * config.d_ff
    feed_forward_bias = (config.d_ff * (matrices - 1) + width) * everywhere
    norm = width * (2 if config.norm == "layernorm" and everywhere else 1)
    norms = config.n_layers * (2 * norm + 2 * config.head_dim * config.qk_norm)
    norms += norm * (config.norm_placement == "pre")
    embedding = config.vocab_size * width
    table = config.max_len * width * (config.positions == "learned")
    untied = embedding * (not config.tie_embeddings)
    layers = config.n_layers
    return [
        Part("embed_tokens", embedding, embedding * config.tie_embeddings),
        Part("embed_positions", table, 0),
        Part("self_attn", layers * (attention + attention_bias), layers * attention),
        Part("mlp", layers * (feed_forward + feed_forward_bias), layers * feed_forward),
        Part("norms", norms, 0),
        Part("lm_head", untied, untied),
    ]


def parameters(config: ModelConfig) -> int:
    return sum(part.parameters for part in parts(config))


def flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations of a forward pass per token, in rows of `length` tokens.

    Two per multiplied parameter, and the two attention products over (length + 1) / 2 keys on average (Kaplan et al.,
    arXiv 2001.08361, section 2.1). A training step costs three times as much.
    """
    products = 2 * sum(part.multiplied for part in parts(config))
    seen = min((length + 1) / 2, config.sliding_window or length)
    return products + 4 * config.n_layers * config.n_heads * config.head_dim * seen


class Memory(NamedTuple):
    """Bytes."""

    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.activations


def training_memory(config: ModelConfig, batch: int, length: int, width: int, moments: int = 2) -> Memory:
    """An estimate for one microbatch of B x T tokens with compute copies of `width` bytes a number.

    State: float32 masters, `moments` and gradients, and the compute copy. Activations: what the backward pass reads,
    after Korthikanti et al. (arXiv 2205.05198, section 4.1), without dropout masks: per layer and token some eight
    vectors of D, what the feed-forward part keeps, and the attention weights unless the fused kernel recomputes them;
    with checkpointing one vector a layer and one layer in full; and the logits twice in float32.
    """
    count = parameters(config)
    state = count * (FLOAT32 * (2 + moments) + width)
    inner = (3 if config.feed_forward == "swiglu" else 2) * config.d_ff
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    weights = 0 if config.attention == "flash" else config.n_heads * length * (FLOAT32 + width)
    layer = width * (6 * config.d_model + heads + inner) + weights
    kept = config.n_layers * layer
    if config.checkpoint_activations:
        kept = config.n_layers * width * config.d_model + layer
    logits = 2 * FLOAT32 * config.vocab_size
    return Memory(state, batch * length * (kept + logits))


def decoding_memory(config: ModelConfig, slots: int, length: int, width: int) -> Memory:
    """Weights, and a cache of `slots` sequences of `length` tokens."""
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * length * slots
    return Memory(parameters(config) * width, cache * width)
