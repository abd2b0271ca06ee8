"""Hugging Face's `config.json` both ways: which of its model families an architecture is, and what their keys mean.

A family has `write` (our fields as its keys) and `read` (its keys as our fields). Neither is trusted alone: a config
*is* of a family if reading what was written gives it back, so that no name is ever written that would compute
something else. Every key of a foreign `config.json` is understood, or known to change nothing, or refused by name.

The tensors of `native` families have the names of the tree; the layouts of the others are in `interop/layouts.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from functional_lm.errors import DataError, FunctionalLMError
from functional_lm.model.config import ModelConfig, from_json
from functional_lm.model.foreign import Keys

OURS = "functional_lm"
# Fields that a forward without dropout does not read.
TRAINING = ("attention", "checkpoint_activations", "dropout")


class Family(NamedTuple):
    """`read` raises DataError for what the family's keys say and ModelConfig cannot."""

    architecture: str
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    native: bool = True


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


def _write_sizes(config: ModelConfig) -> dict[str, Any]:
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
        **_write_sizes(config),
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


def _read_llama(keys: Keys) -> dict[str, Any]:
    attention, mlp = keys.take("attention_bias", False), keys.take("mlp_bias", False)
    if mlp and not attention:
        raise keys.refusal("mlp_bias", mlp, "it can only be true together with attention_bias")
    fields = _read_gated(keys, bias="all" if mlp else "attention" if attention else "none")
    if fields["d_model"] % fields["n_heads"]:
        raise keys.refusal(
            "hidden_size", fields["d_model"], f"a Llama's is a multiple of its {fields['n_heads']} heads"
        )
    return fields


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    bias = config.bias
    return {**_write_gated(config), "attention_bias": bias in ("attention", "all"), "mlp_bias": bias == "all"}


def _read_mistral(keys: Keys) -> dict[str, Any]:
    return _read_gated(keys, bias="none", sliding_window=keys.take("sliding_window", 0))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gated(config), "sliding_window": config.sliding_window or None}


def _read_qwen2(keys: Keys) -> dict[str, Any]:
    fields = _read_gated(keys, bias="qkv")
    return {**fields, "sliding_window": _read_window(keys, fields["n_layers"])}


def _read_qwen3(keys: Keys) -> dict[str, Any]:
    bias = "attention" if keys.take("attention_bias", False) else "none"
    fields = _read_gated(keys, bias=bias, qk_norm=True)
    return {**fields, "head_dim": fields["head_dim"] or 128, "sliding_window": _read_window(keys, fields["n_layers"])}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gated(config), **_write_window(config)}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_qwen(config), "attention_bias": config.bias == "attention"}


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


def _read_gpt2(keys: Keys) -> dict[str, Any]:
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


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
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


def _read_gpt_neox(keys: Keys) -> dict[str, Any]:
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


def _write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
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


# In the order in which they are tried.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2, native=False),
    "gpt_neox": Family("GPTNeoXForCausalLM", _read_gpt_neox, _write_gpt_neox, native=False),
}
NATIVE = tuple(name for name, family in FAMILIES.items() if family.native)


def misfit(config: ModelConfig, name: str) -> str | None:
    """Why a config is none of the family `name`; None if it is."""
    family = FAMILIES[name]
    try:
        back = from_json(family.read(Keys(family.write(config), name)))
    except FunctionalLMError as error:
        return str(error)
    for field in dataclasses.fields(ModelConfig):
        mine, said = getattr(config, field.name), getattr(back, field.name)
        if field.name not in TRAINING and mine != said:
            return f"{field.name} is {mine!r} and a {name} has {said!r}"
    return None


def family_of(config: ModelConfig, among: tuple[str, ...] = NATIVE) -> str:
    """The first family that computes the same function from the same numbers; "functional_lm" if none does."""
    return next((name for name in among if misfit(config, name) is None), OURS)


def to_hugging_face(
    config: ModelConfig, special: Mapping[str, int | None], dtype: str, name: str | None = None
) -> dict[str, Any]:
    """The `config.json` of a model folder: the keys of the family that the architecture is, ours always.

    `name` is the family; if not given, the native one that fits, so that the tensors need no other names. `special`
    are token ids. Raises DataError if the architecture is none of the family.
    """
    name = name or family_of(config)
    ours = {OURS: config.to_json()}
    common = {"torch_dtype": dtype, **special}
    if name == OURS:
        return {"model_type": OURS, "architectures": ["FunctionalLM"], **_write_sizes(config), **common, **ours}
    if reason := misfit(config, name):
        raise DataError(f"this model is no {name}: {reason}")
    family = FAMILIES[name]
    return {"model_type": name, "architectures": [family.architecture], **family.write(config), **common, **ours}


def from_hugging_face(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a `config.json` describes.

    The family's keys decide; what they cannot say (`TRAINING`) comes from our own, if they are there. Raises DataError
    for an unknown family and, naming it, for a key that this version cannot honour.
    """
    name, ours = values.get("model_type"), values.get(OURS, {})
    if not isinstance(ours, dict):
        raise DataError(f"{source}: {OURS!r} is {ours!r}; it has to be an object of settings")
    if name == OURS:
        return from_json(dict(ours), source)
    if name not in FAMILIES:
        raise DataError(f"{source}: model_type is {name!r}; it can be {', '.join(FAMILIES)}")
    if name == "mistral":  # whose window is off where it is null, and not where it is absent
        values = {"sliding_window": 4096, **values}
    keys = Keys({key: value for key, value in values.items() if key != OURS}, source)
    try:
        fields = FAMILIES[name].read(keys)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise DataError(f"{source} holds a value of the wrong type ({error})") from error
    keys.rest()
    kept = {field: ours[field] for field in TRAINING if field in ours and field not in fields}
    try:
        return from_json({**kept, **fields}, source)
    except FunctionalLMError as error:
        raise DataError(f"{source}: {error}") from error
