"""The decoder-only transformer: `init`, `forward`, `loss`, and the cached forward that generation uses.

A model is `(params, config)`: a tree with Hugging Face's Llama names and a static description. Nothing here has state.

Axes: B batch, T time, D model width, F feed-forward width, V vocabulary, L layers, S cache slots, C cache length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.model.attention import Context, attention, visible
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import adapted, drop, embed, linear, unembed
from functional_lm.model.norm import norm, wide
from functional_lm.model.positions import restart, rotary_table, rotation, sinusoids
from functional_lm.tree import Tree

IGNORED = -100  # a target that is not predicted

# Dropout sites: each draws from fold_in(fold_in(key, layer), site), so that no site depends on another's draw.
ATTENTION_WEIGHTS, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, EMBEDDING = 0, 1, 2, 3


# One description, many uses: initialisation, shapes without storage, checks of what a file holds ----------------------


class Leaf(NamedTuple):
    """A parameter before it exists: its shape, and the mean and standard deviation of its start."""

    shape: tuple[int, ...]
    mean: float
    std: float


def describe(config: ModelConfig) -> Tree:
    """The tree of `Leaf`s that makes up a model.

    Matrices that write into the residual stream start smaller by 1/√(2L) (GPT-2's report, section 2.3).
    """
    width, heads = config.d_model, config.n_heads * config.head_dim
    shared = config.n_kv_heads * config.head_dim
    std = config.initializer_range
    into_residual = std / (2 * config.n_layers) ** 0.5

    def projection(outputs: int, inputs: int, bias: bool, std: float = std) -> Tree:
        weight = {"weight": Leaf((outputs, inputs), 0.0, std)}
        return {"bias": Leaf((outputs,), 0.0, 0.0), **weight} if bias else weight

    def scale(size: int, kind: str = config.norm) -> Tree:
        weight = {"weight": Leaf((size,), 1.0, 0.0)}
        return {"bias": Leaf((size,), 0.0, 0.0), **weight} if kind == "layernorm" and everywhere else weight

    everywhere, on_qkv, on_o = config.bias == "all", config.bias != "none", config.bias in ("all", "attention")
    layer: Tree = {
        "input_layernorm": scale(width),
        "mlp": {
            "down_proj": projection(width, config.d_ff, everywhere, into_residual),
            "up_proj": projection(config.d_ff, width, everywhere),
        },
        "post_attention_layernorm": scale(width),
        "self_attn": {
            "k_proj": projection(shared, width, on_qkv),
            "o_proj": projection(width, heads, on_o, into_residual),
            "q_proj": projection(heads, width, on_qkv),
            "v_proj": projection(shared, width, on_qkv),
        },
    }
    if config.feed_forward == "swiglu":
        layer["mlp"]["gate_proj"] = projection(config.d_ff, width, everywhere)
    if config.qk_norm:
        layer["self_attn"] |= {name: scale(config.head_dim, "rmsnorm") for name in ("k_norm", "q_norm")}
    model: Tree = {
        "embed_tokens": {"weight": Leaf((config.vocab_size, width), 0.0, std)},
        "layers": {str(i): layer for i in range(config.n_layers)},
    }
    if config.positions == "learned":
        model["embed_positions"] = {"weight": Leaf((config.max_len, width), 0.0, std)}
    if config.norm_placement == "pre":
        model["norm"] = scale(width)
    described: Tree = {"model": model}
    if not config.tie_embeddings:
        described["lm_head"] = {"weight": Leaf((config.vocab_size, width), 0.0, std)}
    return tree.unflatten(_named_leaves(described))


def _named_leaves(node: Tree | Leaf, prefix: str = "") -> dict[str, Leaf]:
    if isinstance(node, Leaf):
        return {prefix: node}
    return {
        name: leaf
        for part, child in node.items()
        for name, leaf in _named_leaves(child, f"{prefix}.{part}" if prefix else part).items()
    }


def init(config: ModelConfig, key: Tensor, dtype: torch.dtype = torch.float32) -> Tree:
    """A fresh model. Each leaf draws from the key folded with its name, so that leaves do not depend on each other."""

    def draw(name: str, leaf: Leaf) -> Tensor:
        if leaf.std == 0:
            return torch.full(leaf.shape, leaf.mean, dtype=dtype, device=key.device)
        return leaf.mean + leaf.std * keys.normal(keys.fold_in_name(key, name), leaf.shape, dtype)

    return tree.unflatten({name: draw(name, leaf) for name, leaf in _named_leaves(describe(config)).items()})


def abstract(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tree:
    """The model's tree on the meta device: names and shapes without storage."""
    named = _named_leaves(describe(config))
    return tree.unflatten({name: torch.empty(leaf.shape, dtype=dtype, device="meta") for name, leaf in named.items()})


# The forward ----------------------------------------------------------------------------------------------------------


def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GPT-2's GELU (arXiv 1606.08415, section 2): x σ(2u) is x (1 + tanh u) / 2, and cheaper to compute.

    The gate has x's dtype, because the backward pass keeps it.
    """
    y = wide(x)
    return x * torch.sigmoid((1.5957691216057308 * (y + 0.044715 * y * y * y)).to(x.dtype))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_erf": F.gelu,  # x Φ(x), which GPT-2's form approximates
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def feed_forward(params: Tree, x: Float[Tensor, "*B T D"], config: ModelConfig) -> Float[Tensor, "*B T D"]:
    """`mlp`: SwiGLU (arXiv 2002.05202) from three matrices, or an activation between two."""
    if config.feed_forward == "swiglu":
        if "gate_up_proj" in params:
            fused = linear(params["gate_up_proj"], x).chunk(2, dim=-1)
            gate, up = adapted([params.get(name, {}) for name in ("gate_proj", "up_proj")], fused, x)
        else:
            gate, up = linear(params["gate_proj"], x), linear(params["up_proj"], x)
        inner = F.silu(gate) * up
    else:
        inner = ACTIVATIONS[config.feed_forward](linear(params["up_proj"], x))
    return linear(params["down_proj"], inner)


def block(
    params: Tree,
    x: Float[Tensor, "*B T D"],
    context: Context,
    config: ModelConfig,
    key: Tensor | None = None,
    cache: Tree | None = None,
) -> tuple[Float[Tensor, "*B T D"], Tree | None]:
    """One layer: attention and feed-forward around the residual stream."""

    def site(number: int) -> Tensor | None:
        return None if key is None else keys.fold_in(key, number)

    def dropped(y: Tensor, number: int) -> Tensor:
        place = site(number)
        return y if place is None or config.dropout == 0 else drop(y, config.dropout, place)

    def attend(y: Tensor) -> tuple[Tensor, Tree | None]:
        out, written = attention(params["self_attn"], y, context, config, site(ATTENTION_WEIGHTS), cache)
        return dropped(out, ATTENTION_OUTPUT), written

    def feed(y: Tensor) -> Tensor:
        return dropped(feed_forward(params["mlp"], y, config), FEED_FORWARD_OUTPUT)

    def first(y: Tensor) -> Tensor:
        return norm(params["input_layernorm"], y, config.norm, config.norm_eps)

    def second(y: Tensor) -> Tensor:
        return norm(params["post_attention_layernorm"], y, config.norm, config.norm_eps)

    if config.norm_placement == "post":
        attended, cache = attend(x)
        x = first(x + attended)
        return second(x + feed(x)), cache
    attended, cache = attend(first(x))
    if config.parallel_residual:
        return x + attended + feed(second(x)), cache
    x = x + attended
    return x + feed(second(x)), cache


def hidden(
    params: Tree,
    tokens: Int[Tensor, "*B T"],
    config: ModelConfig,
    key: Tensor | None = None,
    documents: Int[Tensor, "*B T"] | None = None,
    cache: Tree | None = None,
    positions: Int[Tensor, "*B T"] | None = None,
) -> tuple[Float[Tensor, "*B T D"], Tree | None]:
    """The final, normalised hidden states, and the cache with these tokens written at `positions`.

    With `documents` a token sees its own document only. With a `cache`, `positions` [S, T] says where each token
    stands, and a slot sees its rows up to there. Raises UsageError for more tokens than learned positions.
    """
    model = params["model"]
    if positions is not None and cache is None:
        raise ValueError("positions belong to a cache; without one a row's tokens stand at 0, 1, 2, ...")
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if documents is not None and config.positions in ("learned", "sinusoidal"):
            positions = restart(documents)
    longest = tokens.shape[-1] if cache is None else cache["0"]["k"].shape[-2]
    context = shared(config, positions, longest, documents, cached=cache is not None)

    x = embed(model["embed_tokens"], tokens)
    if config.positions == "learned":
        x = x + F.embedding(_within(positions, config, cached=cache is not None), model["embed_positions"]["weight"])
    elif config.positions == "sinusoidal":
        x = x + sinusoids(config.d_model, longest, tokens.device)[positions].to(x.dtype)
    if key is not None and config.dropout > 0:
        x = drop(x, config.dropout, keys.fold_in(keys.fold_in(key, config.n_layers), EMBEDDING))

    new_cache: Tree = {}
    for name, layer in model["layers"].items():
        layer_key = None if key is None or config.dropout == 0 else keys.fold_in(key, int(name))
        arguments = (layer, x, context, config, layer_key, None if cache is None else cache[name])
        if config.checkpoint_activations and cache is None:
            x, _ = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x, new_cache[name] = block(*arguments)
    if "norm" in model:
        x = norm(model["norm"], x, config.norm, config.norm_eps)
    return x, None if cache is None else new_cache


def _within(positions: Int[Tensor, "*T"], config: ModelConfig, cached: bool) -> Int[Tensor, "*T"]:
    """Rows of a learned table. In a cache the padding behind a prompt may stand past its end, and is never read."""
    if cached:
        return positions.clamp(max=config.max_len - 1)
    if positions.dim() == 1 and positions.shape[0] > config.max_len:
        raise UsageError(f"{positions.shape[0]} tokens go beyond the learned positions, max_len {config.max_len}")
    return positions


def shared(
    config: ModelConfig,
    positions: Int[Tensor, "*#B T"],
    longest: int,
    documents: Int[Tensor, "*#B T"] | None,
    cached: bool,
) -> Context:
    """What all layers of one forward read: rotation, mask, rows of the cache."""
    turned = None
    if config.positions == "rope":
        turned = rotation(config, positions, longest) if cached else rotary_table(config, longest, positions.device)
    index = torch.arange(longest, device=positions.device)
    if cached:
        return Context(turned, visible(positions, index, config.sliding_window), positions)
    if documents is None and not config.sliding_window:
        return Context(turned, None)
    return Context(turned, visible(index, index, config.sliding_window, documents, documents))


def project_logits(params: Tree, x: Float[Tensor, "... D"], config: ModelConfig) -> Float[Tensor, "... V"]:
    """Hidden states to logits, through `lm_head` or, when tied, the embedding; soft-capped as Gemma 2 does."""
    if "lm_head" in params:
        logits = linear(params["lm_head"], x)
    else:
        logits = unembed(params["model"]["embed_tokens"], x)
    if config.logit_softcap:
        logits = (config.logit_softcap * torch.tanh(wide(logits) / config.logit_softcap)).to(logits.dtype)
    return logits


def forward(
    params: Tree,
    tokens: Int[Tensor, "*B T"],
    config: ModelConfig,
    key: Tensor | None = None,
    documents: Int[Tensor, "*B T"] | None = None,
) -> Float[Tensor, "*B T V"]:
    """Logits of the next token at every position.

    `tokens` are integers below V, T at most `config.max_len`; `key` turns dropout on; `documents` [B, T] numbers the
    packed documents of a row, which then do not see each other. The logits have the parameters' dtype.
    Raises UsageError for more tokens than a learned table has positions.
    """
    x, _ = hidden(params, tokens, config, key, documents)
    return project_logits(params, x, config)


def forward_cached(
    params: Tree, cache: Tree, tokens: Int[Tensor, "S T"], positions: Int[Tensor, "S"], config: ModelConfig
) -> tuple[Tree, Float[Tensor, "S T V"]]:
    """Logits of T further tokens per slot, the first of slot s standing at `positions[s]`, and the extended cache.

    Each slot has its own position; positions[s] + T may not exceed the cache's length C.
    """
    at = positions[:, None] + torch.arange(tokens.shape[-1], device=tokens.device)
    x, written = hidden(params, tokens, config, cache=cache, positions=at)
    assert written is not None
    return written, project_logits(params, x, config)


def loss(
    params: Tree, batch: Mapping[str, Tensor], config: ModelConfig, key: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Float[Tensor, ""], dict[str, Any]]:
    """Negative log-likelihood in nats, *summed* over the predicted tokens, and `{"nll", "tokens"}` to divide by.

    `batch` holds `tokens` [B, T], `targets` [B, T] (IGNORED = -100 where nothing is predicted) and, to keep packed
    documents apart, `documents` [B, T]. Sums and counts of parts add up to those of the whole, so that microbatches,
    ranks and windows combine exactly; the mean is `nll / tokens`.

    `z_loss` times the squared log of the softmax's denominator is added to the first value alone (PaLM, arXiv
    2204.02311, section 5), which keeps logits from drifting.
    """
    logits = wide(forward(params, batch["tokens"], config, key, batch.get("documents")))
    targets = batch["targets"]
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED, reduction="sum")
    sums = {"nll": nll.detach(), "tokens": (targets != IGNORED).sum()}
    if not z_loss:
        return nll, sums
    return nll + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORED)).sum(), sums
