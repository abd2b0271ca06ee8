"""Configurations: what is meant is kept through JSON and files, what cannot be meant is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from strategies import configs

from functional_lm.errors import DataError, UsageError
from functional_lm.model.config import CHOICES, ModelConfig, from_json, preset, read
from functional_lm.model.families import family_of, to_hugging_face


@given(config=configs())
def test_a_config_survives_json_and_is_hashable(config: ModelConfig) -> None:
    back = from_json(json.loads(json.dumps(config.to_json())))
    assert back == config
    assert hash(back) == hash(config)
    assert dataclasses.replace(config) == config  # derived widths are fixed points


@given(config=configs())
def test_a_config_survives_its_file(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    written = to_hugging_face(config, {"bos_token_id": 1}, "float32")
    path.write_text(json.dumps(written))
    assert read(path) == config
    assert written["model_type"] == family_of(config)
    path.write_text(json.dumps(config.to_json()))
    assert read(path) == config


def test_widths_left_open_are_derived() -> None:
    config = ModelConfig(d_model=96, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (6, 16, 256)
    assert ModelConfig(d_model=96, n_heads=6, feed_forward="gelu").d_ff == 384
    assert ModelConfig(d_model=100, n_heads=10).d_ff == 288  # 8/3 of 100, rounded up to a multiple of 32
    assert preset("nano", vocab_size=65).vocab_size == 65


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_len")),
    *(({name: -1}, name) for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "n_layers", "sliding_window")),
    *(({name: 2.5}, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "max_len")),
    *(({name: "8"}, name) for name in ("d_model", "dropout", "tie_embeddings", "rope_theta")),
    *(({name: "other"}, name) for name in CHOICES),
    *(({name: True}, name) for name in ("n_layers", "dropout")),
    *(({name: math.nan}, name) for name in ("dropout", "norm_eps", "rotary_fraction", "logit_softcap")),
    *(({name: math.inf}, name) for name in ("norm_eps", "rope_theta", "initializer_range", "logit_softcap")),
    *(({name: 0.0}, name) for name in ("norm_eps", "rope_theta", "rotary_fraction")),
    ({"initializer_range": -0.1}, "initializer_range"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"rotary_fraction": 1.1}, "rotary_fraction"),
    ({"d_model": 30, "n_heads": 4}, "d_model 30 is not a multiple of n_heads 4"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"n_heads": 4, "n_kv_heads": 8}, "n_kv_heads 8"),
    ({"head_dim": 4, "rotary_fraction": 0.25}, "rotary_fraction"),
    ({"d_model": 15, "n_heads": 3, "positions": "sinusoidal"}, "d_model 15 is odd"),
    ({"parallel_residual": True, "norm_placement": "post"}, "parallel_residual"),
    ({"rope_scaling": (8, 1, 4)}, "rope_scaling"),
    *(({"rope_scaling": (8, 1, 4, last)}, "rope_scaling") for last in (0, -1, math.nan, math.inf)),
    ({"rope_scaling": (8, 4, 4, 64)}, "the second less than the third"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    for make in (lambda: ModelConfig(**values), lambda: from_json(values)):
        with pytest.raises(UsageError) as caught:
            make()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_key_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="the file has an unknown key 'n_layer'; did you mean 'n_layers'"):
        from_json({"n_layer": 3}, "the file")
    with pytest.raises(UsageError, match="there is no preset 'huge'"):
        preset("huge")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no configuration at"):
        read(tmp_path / "config.json")
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list"), ("\xff", "is not JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("latin1"))
        with pytest.raises(DataError, match=message):
            read(tmp_path / "config.json")
