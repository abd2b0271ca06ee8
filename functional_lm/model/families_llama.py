"""Llama, Mistral and Qwen in Hugging Face's keys, both ways: RMSNorm, SwiGLU, rotary positions.

`read_*` gives fields of ModelConfig and raises DataError for what they cannot say; `write_*` gives keys.
"""

from __future__ import annotations

from typing import Any

from functional_lm.model.config import ModelConfig
from functional_lm.model.foreign import Keys

# Parts that several families share ------------------------------------------------------------------------------------


def _read_rope(keys: Keys, theta: float = 10000.0) -> dict[str, Any]:
    """`rope_theta` with `rope_scaling`, or both in `rope_parameters`, as later versions write them."""
    old, new = keys.take("rope_scaling", {}), keys.take("rope_parameters", {})
    if old and new and old != new:
        raise keys.refusal("rope_scaling", old, f"and rope_parameters {new}; remove one of them")
    rope = dict(old or new)
    theta = keys.take("rope_theta", theta)
    fields: dict[str, Any] = {"positions": "rope", "rope_theta": rope.pop("rope_theta", theta)}
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope} or {"default"}
    keys.only("partial_rotary_factor", 1.0)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise keys.refusal("partial_rotary_factor", (old or new)["partial_rotary_factor"], "it can only be 1.0")
    longest = keys.take("max_position_embeddings")
    fields["max_len"] = longest
    if kinds == {"llama3"}:
        rope.setdefault("original_max_position_embeddings", longest)
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [name for name in names if name not in rope]:
            raise keys.refusal("rope_scaling", old or new, f"it lacks {missing[0]!r}")
        fields["rope_scaling"] = tuple(rope.pop(name) for name in names)
    elif kinds != {"default"}:
        raise keys.refusal("rope_type", " and ".join(sorted(map(str, kinds))), "it can be 'default' or 'llama3'")
    if rope:
        raise keys.refusal("rope_scaling", old or new, f"{next(iter(rope))!r} does not belong to its rope_type")
    return fields


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        written["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original) if original == int(original) else original,
        }
    return written


def _read_gated(keys: Keys, **fixed: Any) -> dict[str, Any]:
    """What Llama and its relatives have in common."""
    keys.only("hidden_act", "silu")
    keys.only("attention_dropout", 0.0)
    heads, width = keys.take("num_attention_heads"), keys.take("hidden_size")
    fields = {
        "vocab_size": keys.take("vocab_size"),
        "d_model": width,
        "n_layers": keys.take("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": keys.take("num_key_value_heads", heads),
        "head_dim": keys.take("head_dim", 0),
        "d_ff": keys.take("intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": keys.take("rms_norm_eps", 1e-6),
        "feed_forward": "swiglu",
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "initializer_range": keys.take("initializer_range", 0.02),
        **_read_rope(keys),
        **fixed,
    }
    size = fields["head_dim"] or width // heads
    if size % 2:
        raise keys.refusal("head_dim", size, "rotary positions need an even one")
    return fields


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_len,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def _write_gated(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        **_write_rope(config),
    }


def _read_window(keys: Keys, layers: int) -> int:
    """Qwen's sliding window: of all layers or of none, since all layers here have the same."""
    used, window = keys.take("use_sliding_window", False), keys.take("sliding_window", 0)
    first, kinds = keys.take("max_window_layers", 28), keys.take("layer_types", None)
    window = window if used else 0
    if kinds is None:
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) not in ({"full_attention"}, {"sliding_attention"}):
        raise keys.refusal("layer_types", kinds, "all layers have to attend in the same way")
    if kinds[0] == "sliding_attention" and not window:
        raise keys.refusal("sliding_window", window, "layer_types asks for a window")
    return window if kinds[0] == "sliding_attention" else 0


def _write_window(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": bool(window), "sliding_window": window or None, "max_window_layers": 0}


# The families ---------------------------------------------------------------------------------------------------------


def read_llama(keys: Keys) -> dict[str, Any]:
    attention, mlp = keys.take("attention_bias", False), keys.take("mlp_bias", False)
    if mlp and not attention:
        raise keys.refusal("mlp_bias", mlp, "it can only be true together with attention_bias")
    fields = _read_gated(keys, bias="all" if mlp else "attention" if attention else "none")
    if fields["d_model"] % fields["n_heads"]:
        raise keys.refusal(
            "hidden_size", fields["d_model"], f"a Llama's is a multiple of its {fields['n_heads']} heads"
        )
    return fields


def write_llama(config: ModelConfig) -> dict[str, Any]:
    bias = config.bias
    return {**_write_gated(config), "attention_bias": bias in ("attention", "all"), "mlp_bias": bias == "all"}


def read_mistral(keys: Keys) -> dict[str, Any]:
    return _read_gated(keys, bias="none", sliding_window=keys.take("sliding_window", 0))


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gated(config), "sliding_window": config.sliding_window or None}


def read_qwen2(keys: Keys) -> dict[str, Any]:
    fields = _read_gated(keys, bias="qkv")
    return {**fields, "sliding_window": _read_window(keys, fields["n_layers"])}


def read_qwen3(keys: Keys) -> dict[str, Any]:
    bias = "attention" if keys.take("attention_bias", False) else "none"
    fields = _read_gated(keys, bias=bias, qk_norm=True)
    return {**fields, "head_dim": fields["head_dim"] or 128, "sliding_window": _read_window(keys, fields["n_layers"])}


def write_qwen(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gated(config), **_write_window(config)}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**write_qwen(config), "attention_bias": config.bias == "attention"}
