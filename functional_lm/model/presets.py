"""Named architectures, and configuration files in the keys of the two systems that this project reimplements."""

from __future__ import annotations

from typing import Any

from functional_lm.errors import UsageError

_LLMODEL = {"vocab_size": 32000, "feed_forward": "swiglu", "tie_embeddings": True}
_GPT2 = {
    "vocab_size": 50257,
    "max_len": 1024,
    "positions": "learned",
    "norm": "layernorm",
    "feed_forward": "gelu",
    "bias": "all",
    "tie_embeddings": True,
}


def _sizes(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"d_model": width, "n_layers": layers, "n_heads": heads, **more}


PRESETS: dict[str, dict[str, Any]] = {
    # what two cores train in minutes
    "nano": _sizes(256, 6, 4, d_ff=704, max_len=256, vocab_size=4096),
    # LLModel's five sizes
    "tiny": _sizes(512, 8, 8, d_ff=1024, max_len=512, **_LLMODEL),
    "small": _sizes(1024, 12, 16, d_ff=2048, max_len=1024, **_LLMODEL),
    "base": _sizes(2048, 24, 16, d_ff=5504, max_len=2048, **_LLMODEL),
    "large": _sizes(2560, 32, 32, d_ff=6912, max_len=4096, checkpoint_activations=True, **_LLMODEL),
    "xl": _sizes(4096, 64, 32, d_ff=11008, max_len=4096, checkpoint_activations=True, **_LLMODEL),
    # LLM-FROM-ZERO's transformer
    "from-zero": _sizes(
        64, 8, 4, d_ff=256, max_len=16, vocab_size=2048, positions="sinusoidal", feed_forward="relu",
        norm="layernorm", bias="all", tie_embeddings=False, dropout=0.1,
    ),
    # GPT-2 (Radford et al. 2019, table 2)
    "gpt2": _sizes(768, 12, 12, **_GPT2),
    "gpt2-medium": _sizes(1024, 24, 16, **_GPT2),
    "gpt2-large": _sizes(1280, 36, 20, **_GPT2),
    "gpt2-xl": _sizes(1600, 48, 25, **_GPT2),
}  # fmt: skip


def preset_values(name: str) -> dict[str, Any]:
    """The fields that a named architecture sets."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


# The originals' keys -------------------------------------------------------------------------------------------------

_RENAMED = {
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "use_gradient_checkpointing": "checkpoint_activations",
    "use_parallel_ffn": "parallel_residual",
}
# key: {its value: the fields that it means}
_MEANINGS: dict[str, dict[Any, dict[str, Any]]] = {
    "use_rope": {True: {"positions": "rope"}, False: {}},
    "pos_type": {
        "rope": {"positions": "rope"},
        "rotary": {"positions": "rope"},
        "sinusoidal": {"positions": "sinusoidal"},
        "learned": {"positions": "learned"},
        "absolute": {"positions": "learned"},
        "none": {"positions": "none"},
    },
    "attention_type": {
        "mha": {},
        "gqa": {},
        "standard": {"attention": "standard"},
        "flash": {"attention": "flash"},
        "auto": {"attention": "auto"},
    },
    "use_flash_mha": {True: {"attention": "flash"}, False: {"attention": "standard"}},
    "use_rms_norm": {True: {"norm": "rmsnorm"}, False: {"norm": "layernorm"}},
    "use_biasless_norm": {True: {"bias": "none"}, False: {}},
    "use_fused_swiglu": {True: {"feed_forward": "swiglu"}, False: {"feed_forward": "gelu"}},
    "norm_first": {True: {"norm_placement": "pre"}, False: {"norm_placement": "post"}},
}
# Matters of the tokenizer and of the machine, which have their own files and flags: read, checked, and left to them.
_ELSEWHERE = {"pad_token_id": int, "bos_token_id": int, "eos_token_id": int, "device": str}
ORIGINAL_KEYS = frozenset({*_RENAMED, *_MEANINGS, *_ELSEWHERE})


def translate(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A configuration with the originals' keys in this project's names; others pass unchanged.

    Raises UsageError naming the key whose value is not understood, or the two keys that contradict each other.
    """
    result: dict[str, Any] = {}
    said_by: dict[str, str] = {}

    def put(field: str, value: Any, key: str) -> None:
        if field in result and result[field] != value:
            raise UsageError(
                f"{source}: {key!r} means {field} {value!r} and {said_by[field]!r} means {result[field]!r}; drop one"
            )
        result[field], said_by[field] = value, key

    for key, value in values.items():
        if key in _MEANINGS:
            meanings = _MEANINGS[key]
            if not isinstance(value, type(next(iter(meanings)))) or value not in meanings:
                raise UsageError(f"{source}: {key!r} is {value!r}; it can be {', '.join(map(repr, meanings))}")
            for field, meant in meanings[value].items():
                put(field, meant, key)
        elif key in _ELSEWHERE:
            if value is not None and (not isinstance(value, _ELSEWHERE[key]) or isinstance(value, bool)):
                raise UsageError(f"{source}: {key!r} is {value!r}; it has to be {_ELSEWHERE[key].__name__}")
        else:
            put(_RENAMED.get(key, key), value, key)
    if values.get("use_rope") is False and result.get("positions", "rope") == "rope":
        put("positions", "learned", "use_rope")
    heads, shared = result.get("n_heads"), result.get("n_kv_heads")
    if values.get("attention_type") == "mha" and heads and shared and heads != shared:
        raise UsageError(
            f"{source}: 'attention_type' 'mha' has as many key heads as query heads and 'n_kv_heads' is {shared!r} of "
            f"{heads!r}; drop one"
        )
    return result
