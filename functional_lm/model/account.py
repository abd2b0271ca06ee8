"""What a model costs before it exists: parameters, floating-point operations, bytes. Arithmetic on its description.

Axes: B batch, T time, D model width, H heads, E head width, F feed-forward width, V vocabulary, L layers, C cache.
"""

from __future__ import annotations

from typing import NamedTuple

from functional_lm.model.config import LONG, ModelConfig

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes a number
FLOAT32 = WIDTHS["float32"]
# Numbers that an eager step keeps for each of F; measured.
EAGER = {"swiglu": 13, "gelu": 13, "gelu_erf": 3, "relu": 3, "relu2": 6}


class Part(NamedTuple):
    """A subtree: its parameters, in all and in each layer, and how many of them are multiplied with every token."""

    name: str
    parameters: int
    multiplied: int
    per_layer: int = 0


def parts(config: ModelConfig) -> list[Part]:
    """The model by subtree; the sum of `parameters` is the size of the tree that `init` makes.

    A tied output has no parameters of its own, and is multiplied all the same.
    """
    width, queries, shared = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    everywhere, on_qkv, on_o = config.bias == "all", config.bias != "none", config.bias in ("all", "attention")
    attention = width * (2 * queries + 2 * shared)
    attention_bias = (queries + 2 * shared) * on_qkv + width * on_o
    matrices = 3 if config.feed_forward == "swiglu" else 2
    feed_forward = matrices * width * config.d_ff
    feed_forward_bias = (config.d_ff * (matrices - 1) + width) * everywhere
    norm = width * (2 if config.norm == "layernorm" and everywhere else 1)
    layer_norms = 2 * norm + 2 * config.head_dim * config.qk_norm
    embedding = config.vocab_size * width
    table = config.max_len * width * (config.positions == "learned")
    layers = config.n_layers
    attention_all, feed_forward_all = attention + attention_bias, feed_forward + feed_forward_bias
    return [
        Part("embed_tokens", embedding, 0),
        Part("embed_positions", table, 0),
        Part("self_attn", layers * attention_all, layers * attention, attention_all),
        Part("mlp", layers * feed_forward_all, layers * feed_forward, feed_forward_all),
        Part("norms", layers * layer_norms + norm * (config.norm_placement == "pre"), 0, layer_norms),
        Part("lm_head", embedding * (not config.tie_embeddings), embedding),
    ]


def parameters(config: ModelConfig) -> int:
    """How many numbers the tree holds that `init` makes; a tied output is counted once."""
    return sum(part.parameters for part in parts(config))


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of q kᵀ and weights v, over the keys that a token of such a row sees on average."""
    seen = (length + 1) / 2
    if config.sliding_window:
        window = min(config.sliding_window, length)
        seen = window - window * (window - 1) / (2 * length)  # the first ones of a row see fewer
    return 4 * config.n_layers * config.n_heads * config.head_dim * seen


def flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations of a forward pass per token, in rows of `length` tokens.

    Two per multiplied parameter, and the two attention products over (length + 1) / 2 keys on average (Kaplan et al.,
    arXiv 2001.08361, section 2.1). Norms, activations and the softmax are left out.
    """
    return 2 * sum(part.multiplied for part in parts(config)) + attention_flops(config, length)


def training_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of a training step: the backward pass costs two forwards, checkpointing one of the layers."""
    again = flops(config, length) - 2 * config.vocab_size * config.d_model if config.checkpoint_activations else 0
    return 3 * flops(config, length) + again


class TrainingMemory(NamedTuple):
    """Bytes. `gradients` and `update` stand where the forward pass's last three fields stood, and not beside them."""

    parameters: int
    optimizer: int
    accumulated: int
    copy: int
    activations: int
    logits: int
    gradients: int
    update: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        held = self.parameters + self.optimizer + self.accumulated
        return held + max(self.copy + self.activations + self.logits, self.gradients + self.update)


class DecodingMemory(NamedTuple):
    """Bytes."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(
    config: ModelConfig,
    batch: int,
    length: int,
    width: int,
    moments: int = 2,
    *,
    microbatches: int = 1,
    device: str = "cpu",
    compiled: bool = True,
) -> TrainingMemory:
    """An estimate of what a step over microbatches of B x T tokens holds, its products of `width` bytes a number.

    Held throughout: float32 parameters, `moments` of them in the optimizer, and with several microbatches the sum of
    their gradients. Until the backward pass has read them: the compute copy, the activations (`_kept`; with
    checkpointing one vector a layer and one layer in full), and the logits. Then: the gradients, and in an eager step
    the new state beside the old one with every intermediate of the update. Left out: the process itself (torch,
    compiled code: some 300 MiB, and a compilation that is still going on), the data, validation.

    Constants are fitted to the growth of a process over 3 steps on the CPU (torch 2.13, D 128-512, L 3-12, T 64-1024,
    float32 and bfloat16). Estimate over measurement: eager 0.87-1.12 over 42 measurements, 0.89-1.12 over the six of
    shapes that the fit had not seen; compiled 0.92-1.12 over 14, two of them unseen, with dropout at a single point.
    Accelerators, microbatches and checkpointing were not measured.
    """
    count, tokens = parameters(config), batch * length
    layer = tokens * _kept(config, length, width, device, compiled)
    activations = config.n_layers * layer
    if config.checkpoint_activations:
        activations = config.n_layers * tokens * width * config.d_model + layer
    masters = count * FLOAT32
    return TrainingMemory(
        parameters=masters,
        optimizer=moments * masters,
        accumulated=masters if microbatches > 1 else 0,
        copy=count * width,
        activations=activations,
        logits=tokens * config.vocab_size * (width if compiled else 3 * FLOAT32),
        gradients=masters,
        update=0 if compiled else (5 + moments) * masters,
    )


def _kept(config: ModelConfig, length: int, width: int, device: str, compiled: bool) -> int:
    """Bytes a token that a layer keeps for its backward pass.

    Compiled: the inputs of its products and norms, and the attention weights unless the fused kernel recomputes them
    (after Korthikanti et al., arXiv 2205.05198, section 4.1). Eager: every intermediate, a part of them in float32,
    and those of the backward pass too, because `torch.func.grad` stays differentiable; measured.
    """
    flash = config.attention == "flash" or (config.attention == "auto" and (device != "cpu" or length >= LONG))
    flash = flash and not config.dropout  # which the kernel does not have
    weights = 0 if flash else config.n_heads * length
    if not compiled:
        inner = EAGER[config.feed_forward] * config.d_ff
        return round((FLOAT32 + 2 * width) / 3 * (46 * config.d_model + inner + 3.7 * weights))
    inner = (3 if config.feed_forward == "swiglu" else 2) * config.d_ff
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    if flash:  # the kernel's own inputs, output and their gradients, side by side with those of the products
        heads += 7 * config.n_heads * config.head_dim
    dropped = 2 * FLOAT32 if config.dropout else 0
    return width * (6 * config.d_model + heads + inner) + weights * (FLOAT32 + width + dropped)


def decoding_memory(config: ModelConfig, slots: int, length: int, width: int) -> DecodingMemory:
    """Weights, and a cache of `slots` sequences of `length` tokens, `width` bytes a number."""
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * length * slots
    return DecodingMemory(parameters(config) * width, cache * width)
