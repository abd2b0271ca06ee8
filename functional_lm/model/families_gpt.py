"""GPT-2 and GPT-NeoX in Hugging Face's keys, both ways: LayerNorm, biases, two matrices in the feed-forward.

`read_*` gives fields of ModelConfig and raises DataError for what they cannot say; `write_*` gives keys.
"""

from __future__ import annotations

from typing import Any

from functional_lm.model.config import ModelConfig
from functional_lm.model.foreign import Keys

# Hugging Face's names of activations.
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
ACTIVATIONS |= {"relu": "relu", "relu2": "relu2"}
WRITTEN_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu", "relu2": "relu2"}


def _read_dropout(keys: Keys, names: tuple[str, ...], default: float) -> float:
    rates = [keys.take(name, default) for name in names]
    if len(set(rates)) > 1:
        raise keys.refusal(names[0], rates[0], f"{', '.join(names)} have to be equal; they matter in training only")
    rate: float = rates[0]
    return rate


def read_gpt2(keys: Keys) -> dict[str, Any]:
    longest, width = keys.take("n_positions"), keys.take("n_embd")
    keys.only("n_ctx", longest)
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": width,
        "n_layers": keys.take("n_layer"),
        "n_heads": keys.take("n_head"),
        "d_ff": keys.take("n_inner", 0),
        "max_len": longest,
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": keys.take("layer_norm_epsilon", 1e-5),
        "feed_forward": keys.choose("activation_function", ACTIVATIONS, "gelu_new"),
        "bias": "all",
        "dropout": _read_dropout(keys, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
        "tie_embeddings": keys.take("tie_word_embeddings", True),
        "initializer_range": keys.take("initializer_range", 0.02),
    }


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": WRITTEN_ACTIVATIONS.get(config.feed_forward, "gelu_new"),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def read_gpt_neox(keys: Keys) -> dict[str, Any]:
    rope = dict(keys.take("rope_parameters", {}))
    theta = rope.pop("rope_theta", keys.take("rotary_emb_base", 10000.0))
    share = rope.pop("partial_rotary_factor", keys.take("rotary_pct", 0.25))
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", share), ("attention_bias", True)):
        keys.only(key, value)
    if rope.pop("rope_type", rope.pop("type", "default")) != "default" or rope:
        raise keys.refusal("rope_parameters", rope, "a GPT-NeoX has rope_type 'default' alone")
    width, heads = keys.take("hidden_size"), keys.take("num_attention_heads")
    if int(width // heads * share) % 2:
        raise keys.refusal("rotary_pct", share, f"of a head of {width // heads} it is odd; pairs are rotated")
    return {
        "vocab_size": keys.take("vocab_size"),
        "d_model": width,
        "n_layers": keys.take("num_hidden_layers"),
        "n_heads": heads,
        "d_ff": keys.take("intermediate_size"),
        "max_len": keys.take("max_position_embeddings"),
        "positions": "rope",
        "rope_theta": theta,
        "rotary_fraction": share,
        "norm": "layernorm",
        "norm_eps": keys.take("layer_norm_eps", 1e-5),
        "feed_forward": keys.choose("hidden_act", ACTIVATIONS, "gelu"),
        "bias": "all",
        "parallel_residual": keys.take("use_parallel_residual", True),
        "dropout": _read_dropout(keys, ("hidden_dropout", "attention_dropout"), 0.0),
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "initializer_range": keys.take("initializer_range", 0.02),
    }


def write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_len,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_fraction,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": WRITTEN_ACTIVATIONS.get(config.feed_forward, "gelu"),
        "use_parallel_residual": config.parallel_residual,
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), config.dropout),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": True,
    }
