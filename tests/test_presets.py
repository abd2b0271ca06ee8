"""Named architectures have their published sizes, accounts agree with trees, the originals' files are understood."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LONGEST, configs
from torch.utils.flop_counter import FlopCounterMode

from functional_lm import tree
from functional_lm.errors import DataError, UsageError
from functional_lm.model import account, config, transformer
from functional_lm.model.config import PRESETS, ModelConfig, preset
from functional_lm.model.families import to_hugging_face
from functional_lm.model.presets import translate


@given(configs())
def test_parameters_are_those_of_the_tree(some: ModelConfig) -> None:
    assert account.parameters(some) == tree.size(transformer.abstract(some))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_exist_as_shapes(name: str) -> None:
    some = preset(name)
    assert account.parameters(some) == tree.size(transformer.abstract(some))
    assert account.training_memory(some, 2, some.max_len, 2).total > account.decoding_memory(some, 1, 8, 2).total


PUBLISHED = {  # width, layers, heads, feed-forward width, length, vocabulary
    "nano": (256, 6, 4, 704, 256, 4096),
    "tiny": (512, 8, 8, 1024, 512, 32000),
    "small": (1024, 12, 16, 2048, 1024, 32000),
    "base": (2048, 24, 16, 5504, 2048, 32000),
    "large": (2560, 32, 32, 6912, 4096, 32000),
    "xl": (4096, 64, 32, 11008, 4096, 32000),
    "gpt2": (768, 12, 12, 3072, 1024, 50257),
    "gpt2-medium": (1024, 24, 16, 4096, 1024, 50257),
    "gpt2-large": (1280, 36, 20, 5120, 1024, 50257),
    "gpt2-xl": (1600, 48, 25, 6400, 1024, 50257),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_as_published(name: str) -> None:
    some = preset(name)
    found = (some.d_model, some.n_layers, some.n_heads, some.d_ff, some.max_len, some.vocab_size)
    assert found == PUBLISHED[name]
    assert some.checkpoint_activations == (name in ("large", "xl"))


def test_from_zero_is_the_second_originals_transformer() -> None:
    some = preset("from-zero")
    assert (some.d_model, some.n_layers, some.n_heads, some.max_len, some.dropout) == (64, 8, 4, 16, 0.1)
    assert (some.positions, some.feed_forward, some.norm) == ("sinusoidal", "relu", "layernorm")
    assert PRESETS.keys() == PUBLISHED.keys() | {"from-zero"}


def test_gpt2_has_its_published_size() -> None:
    assert account.parameters(preset("gpt2")) == 124_439_808


def test_operations_are_two_a_multiplied_parameter_and_the_attention() -> None:
    some = ModelConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16, tie_embeddings=False)
    matrices = 4 * 8 * 8 + 3 * 8 * 16 + 10 * 8
    assert account.flops(some, 1) == 2 * matrices + 4 * 8  # one token attends to itself: q k and w v, 8 wide


@settings(max_examples=50, deadline=None)
@given(configs(attention="standard", dropout=0.0), st.integers(1, LONGEST), st.integers(1, 3))
def test_operations_are_those_that_torch_counts(some: ModelConfig, length: int, batch: int) -> None:
    """Which counts the products of queries with keys that they may not see, too."""
    tokens = torch.zeros((batch, length), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        transformer.forward(transformer.abstract(some), tokens, some)
    unseen = 4 * some.n_layers * some.n_heads * some.head_dim * length - account.attention_flops(some, length)
    assert counter.get_total_flops() == pytest.approx(batch * length * (account.flops(some, length) + unseen))


@given(st.integers(1, 40), st.integers(0, 50))
def test_attention_is_counted_over_the_keys_that_are_seen(length: int, window: int) -> None:
    some = ModelConfig(d_model=8, n_heads=2, n_layers=1, sliding_window=window)
    seen = sum(min(at, window or at) for at in range(1, length + 1)) / length
    assert account.attention_flops(some, length) == pytest.approx(4 * 8 * seen)


@given(configs(), st.integers(1, 64), st.integers(1, 4), st.booleans())
def test_memory_grows_with_all_that_asks_for_it(some: ModelConfig, length: int, batch: int, compiled: bool) -> None:
    def total(config: ModelConfig = some, rows: int = batch, width: int = 2, **how: Any) -> int:
        return account.training_memory(config, rows, length, width, **{"compiled": compiled, **how}).total

    assert total() <= min(total(rows=batch + 1), total(width=4), total(moments=3), total(microbatches=2))
    deeper = dataclasses.replace(some, n_layers=some.n_layers + 4)
    assert total() < total(deeper)
    assert total(dataclasses.replace(deeper, checkpoint_activations=True)) <= total(deeper)


def test_the_main_job_needs_what_was_measured() -> None:
    """MiB on 2026-11-21: the growth of a process over the steps of `nano`, 8 rows of 256 tokens."""
    measured = {("float32", True): 434, ("bfloat16", True): 258, ("float32", False): 1356, ("bfloat16", False): 934}
    for (dtype, compiled), expected in measured.items():
        need = account.training_memory(preset("nano"), 8, 256, account.WIDTHS[dtype], compiled=compiled)
        assert need.total / 2**20 == pytest.approx(expected, rel=0.1)


def test_the_originals_keys_become_ours() -> None:
    original = {
        "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128, "max_len": 32, "vocab_size": 100, "dropout": 0.1,
        "use_rope": True, "pos_type": "rope", "use_flash_mha": False, "use_rms_norm": True, "use_fused_swiglu": True,
        "use_parallel_ffn": False, "use_gradient_checkpointing": False, "norm_first": True, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "device": "cpu",
    }  # fmt: skip
    some = config.from_json(translate(original, "FILE"))
    assert (some.positions, some.norm, some.norm_eps, some.attention) == ("rope", "rmsnorm", 1e-6, "standard")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"use_rope": True, "pos_type": "sinusoidal"}, ["use_rope", "pos_type"]),
        ({"use_flash_mha": True, "attention_type": "standard"}, ["use_flash_mha", "attention_type"]),
        ({"pos_type": "spiral"}, ["pos_type", "spiral"]),
        ({"use_rms_norm": "yes"}, ["use_rms_norm", "yes"]),
        ({"eos_token_id": "two"}, ["eos_token_id", "two"]),
        ({"use_rope": False, "positions": "rope"}, ["use_rope", "positions"]),
        ({"rms_norm_eps": 1e-6, "norm_eps": 1e-5}, ["rms_norm_eps", "norm_eps"]),
        ({"attention_type": "mha", "n_heads": 4, "n_kv_heads": 2}, ["attention_type", "n_kv_heads"]),
    ],
)
def test_contradictions_are_refused_by_name(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        translate(values, "FILE")
    assert all(word in str(refused.value) for word in [*named, "FILE"])
    assert "\n" not in str(refused.value)


def read(path: Path, values: Any) -> ModelConfig:
    path.write_text(json.dumps(values))
    return config.read(path)


def test_files_of_either_kind_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    some = read(path, {"d_model": 64, "n_heads": 4, "use_rope": False, "use_rms_norm": False, "dropout": 0.1})
    assert some == ModelConfig(d_model=64, n_heads=4, positions="learned", norm="layernorm", dropout=0.1)
    assert read(path, to_hugging_face(some, {"eos_token_id": 1}, "float32")) == some
    with pytest.raises(DataError, match=r"config.json has an unknown key 'use_rop'; did you mean 'use_rope'"):
        read(path, {"use_rop": True})
    with pytest.raises(DataError, match="'use_rope' means positions 'rope' and 'pos_type' means 'learned'"):
        read(path, {"pos_type": "learned", "use_rope": True})
    with pytest.raises(DataError, match="holds a list, not an object"):
        read(path, {"functional_lm": [1]})
