"""Hugging Face's `config.json` both ways: what is written is read, and what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs

from functional_lm.errors import DataError
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import (
    FAMILIES,
    NATIVE,
    OURS,
    TRAINING,
    family_of,
    from_hugging_face,
    misfit,
    to_hugging_face,
)

GATED: dict[str, Any] = {
    "positions": "rope",
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "feed_forward": "swiglu",
    "rotary_fraction": 1.0,
    "parallel_residual": False,
    "logit_softcap": 0.0,
}
WIDTHS = ("d_model", "head_dim", "rotary_fraction")  # of which the strategy knows more than one may fix
PLAIN = {"sliding_window": 0, "qk_norm": False}
OLD: dict[str, Any] = {
    "norm": "layernorm",
    "norm_placement": "pre",
    "bias": "all",
    "head_dim": 0,
    "rope_scaling": None,
    "logit_softcap": 0.0,
    **PLAIN,
}


@st.composite
def members(draw: st.DrawFn, name: str, **more: Any) -> ModelConfig:
    """A config of a family."""
    even = draw(st.sampled_from([2, 4, 6, 8]))
    if name in NATIVE:
        fixed = {**GATED, **PLAIN, "head_dim": even}
        heads, shared = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
        fixed |= {"n_heads": heads, "n_kv_heads": shared}
        fixed["d_model"] = (2 * heads if name == "llama" else 2) * draw(st.integers(1, 5))
        if name == "llama":
            fixed["bias"] = draw(st.sampled_from(["none", "attention", "all"]))
        elif name == "mistral":
            fixed |= {"bias": "none", "sliding_window": draw(st.integers(0, 6))}
        else:
            fixed["sliding_window"] = draw(st.sampled_from([0, 3]))
            fixed["bias"] = "qkv" if name == "qwen2" else draw(st.sampled_from(["none", "attention"]))
            fixed["qk_norm"] = name == "qwen3"
    else:
        heads = draw(st.integers(1, 3))
        fixed = {**OLD, "n_heads": heads, "n_kv_heads": heads, "d_model": heads * even}
        fixed["feed_forward"] = draw(st.sampled_from(["gelu", "gelu_erf", "relu", "relu2"]))
        fixed["positions"] = "learned" if name == "gpt2" else "rope"
        whole = {"rotary_fraction": 1.0, "rope_theta": 10000.0, "parallel_residual": False}
        share = draw(st.sampled_from([2 / even, 1.0]))
        fixed |= whole if name == "gpt2" else {"rotary_fraction": share}
    fixed.update(more)
    drawn = draw(configs(**{key: value for key, value in fixed.items() if key not in WIDTHS}))
    return dataclasses.replace(drawn, **fixed)


def neutral(config: ModelConfig) -> ModelConfig:
    """The config with everything that only training reads at its default."""
    return dataclasses.replace(config, **{name: getattr(ModelConfig(), name) for name in TRAINING})


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(data=st.data())
def test_a_family_reads_what_it_writes(name: str, data: st.DataObject) -> None:
    config = data.draw(members(name))
    assert misfit(config, name) is None
    written = to_hugging_face(config, {"bos_token_id": 1}, "float32", name)
    assert written["model_type"] == name
    assert written["architectures"] == [FAMILIES[name].architecture]
    assert from_hugging_face(written) == config
    assert neutral(from_hugging_face({**written, OURS: {}})) == neutral(config)


@given(config=configs())
def test_the_name_that_is_written_is_the_one_that_is_read(config: ModelConfig) -> None:
    written = to_hugging_face(config, {}, "float32")
    assert written["model_type"] in (*NATIVE, OURS)
    assert from_hugging_face(written) == config
    if written["model_type"] != OURS:
        assert neutral(from_hugging_face({**written, OURS: {}})) == neutral(config)
        for name in NATIVE:  # no other reading of the same keys computes something else unseen
            if misfit(config, name) is None:
                again = to_hugging_face(config, {}, "float32", name)
                assert neutral(from_hugging_face({**again, OURS: {}})) == neutral(config)


def test_the_names_of_some_trees() -> None:
    base = ModelConfig()
    cases: dict[str, list[dict[str, Any]]] = {
        "llama": [{}, {"bias": "all"}, {"bias": "attention"}, {"rope_scaling": (8, 1, 4, 64)}, {"dropout": 0.1}],
        "mistral": [{"sliding_window": 7}, {"d_model": 250, "head_dim": 32}],
        "qwen2": [{"bias": "qkv"}, {"bias": "qkv", "sliding_window": 7}],
        "qwen3": [{"qk_norm": True}, {"qk_norm": True, "bias": "attention"}],
        OURS: [
            {"logit_softcap": 30.0},
            {"rotary_fraction": 0.5},
            {"feed_forward": "gelu"},
            {"qk_norm": True, "bias": "qkv"},
            {"bias": "all", "sliding_window": 7},
            {"d_model": 24, "head_dim": 5},
            {"parallel_residual": True},
            {"positions": "learned"},
        ],
    }
    for name, changes in cases.items():
        for change in changes:
            assert family_of(dataclasses.replace(base, **change)) == name, change


LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
QWEN = {**LLAMA, "model_type": "qwen2"}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
GPT2 = {"model_type": "gpt2", "vocab_size": 9, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_old_and_new_spellings_of_rotary_settings_mean_the_same() -> None:
    new = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", **SCALED}}
    for old in ({"rope_type": "llama3", **SCALED}, {"type": "llama3", **SCALED}):
        expected = from_hugging_face({**LLAMA, "rope_theta": 500.0, "rope_scaling": old})
        assert from_hugging_face({**LLAMA, **new}) == expected
        assert expected.rope_scaling == (8.0, 1.0, 4.0, 64.0)
        assert expected.rope_theta == 500.0
    neox = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    assert from_hugging_face({**NEOX, **neox}) == from_hugging_face({**NEOX, "rotary_emb_base": 500, "rotary_pct": 0.5})


def test_what_is_left_out_means_what_it_means_there() -> None:
    assert from_hugging_face(LLAMA).norm_eps == 1e-6
    assert from_hugging_face({**LLAMA, "num_key_value_heads": None}).n_kv_heads == 2
    assert from_hugging_face({**LLAMA, "model_type": "mistral"}).sliding_window == 4096
    assert from_hugging_face({**LLAMA, "model_type": "mistral", "sliding_window": None}).sliding_window == 0
    assert from_hugging_face({**QWEN, "sliding_window": 4, "max_window_layers": 0}).sliding_window == 0
    window = {"use_sliding_window": True, "sliding_window": 4}
    assert from_hugging_face({**QWEN, **window, "max_window_layers": 0}).sliding_window == 4
    assert from_hugging_face({**QWEN, **window, "max_window_layers": 2}).sliding_window == 0
    assert from_hugging_face({**GPT2}).d_ff == 32
    assert from_hugging_face({**GPT2}).dropout == 0.1
    assert from_hugging_face({**NEOX, "hidden_size": 16}).rotary_fraction == 0.25
    assert from_hugging_face({**LLAMA, "bos_token_id": 1, "eos_token_id": [1, 2], "unknown": None}) is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert"}, "model_type is 'bert'; it can be llama, mistral"),
    ({"model_type": None}, "model_type is None"),
    ({**LLAMA, "hidden_act": "gelu"}, "'hidden_act' is 'gelu'; it can only be 'silu'"),
    ({**LLAMA, "attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
    ({**LLAMA, "mlp_bias": True}, "'mlp_bias'"),
    ({**LLAMA, "some_new_thing": 3}, "'some_new_thing' is 3; this version does not know what it changes"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "'quantization_config' .* quantised weights are not read"),
    ({**LLAMA, "auto_map": {"A": "b"}}, "'auto_map' .* never run"),
    ({**LLAMA, "is_encoder_decoder": True}, "'is_encoder_decoder' is True; it can only be False"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_type' is 'linear'; it can be 'default'"),
    ({**LLAMA, "rope_scaling": {"rope_type": "yarn"}}, "'rope_type' is 'yarn'"),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "it lacks 'low_freq_factor'"),
    ({**LLAMA, "rope_scaling": {"rope_type": "default", "factor": 2.0}}, "'factor' does not belong"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
    ({**LLAMA, "rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
    ({**LLAMA, "head_dim": 3}, "'head_dim' is 3"),
    ({**LLAMA, "hidden_size": 9, "head_dim": 4}, "'hidden_size' is 9; a Llama's is a multiple of its 2 heads"),
    ({**LLAMA, "num_key_value_heads": 3}, "n_heads 2 is not a multiple of n_kv_heads 3"),
    ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "lacks 'hidden_size'"),
    ({**LLAMA, "hidden_size": "8"}, "'hidden_size' is '8'; it has to be a whole number"),
    ({**LLAMA, "num_attention_heads": 0}, "'num_attention_heads' is 0; it has to be above 0"),
    ({**LLAMA, "vocab_size": "10"}, "'vocab_size' is '10'; it has to be a whole number"),
    ({**LLAMA, "rope_theta": "big"}, "'rope_theta' is 'big'; it has to be a number"),
    ({**LLAMA, OURS: 3}, "'functional_lm' is 3"),
    ({**LLAMA, "sliding_window": 8}, "'sliding_window' is 8"),
    ({**QWEN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "'layer_types'"),
    ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
    ({**QWEN, "layer_types": ["sliding_attention"] * 2}, "'sliding_window' is 0; layer_types asks for a window"),
    ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
    ({**GPT2, "activation_function": "swish"}, "'activation_function' is 'swish'; it can be 'gelu_new'"),
    ({**GPT2, "resid_pdrop": 0.2}, "'resid_pdrop' is 0.2; resid_pdrop, embd_pdrop, attn_pdrop have to be equal"),
    ({**GPT2, "n_ctx": 4}, "'n_ctx' is 4"),
    ({**NEOX, "attention_bias": False}, "'attention_bias' is False"),
    ({**NEOX, "rotary_pct": 0.25}, "'rotary_pct' is 0.25; of a head of 4 it is odd"),
    ({**NEOX, "hidden_size": 16, "rope_scaling": {"type": "linear"}}, "'rope_scaling'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        from_hugging_face(values, "there/config.json")
    assert str(caught.value).startswith("there/config.json")
    assert "\n" not in str(caught.value)


def test_a_family_that_does_not_fit_is_refused_with_the_field() -> None:
    with pytest.raises(DataError, match=r"this model is no gpt2: feed_forward is 'swiglu' and a gpt2 has"):
        to_hugging_face(dataclasses.replace(ModelConfig(), positions="learned", norm="layernorm"), {}, "f", "gpt2")
