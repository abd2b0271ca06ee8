"""Tensor names and layouts of Hugging Face's families: which of their tensors holds which of our leaves, and how.

Axes: D model width, H heads, E head width, F feed-forward width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import DataError
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import NATIVE, OURS
from functional_lm.model.transformer import abstract

Parts = tuple[Tensor, ...]


class Layout(NamedTuple):
    """One tensor of theirs and the leaves of ours that it holds; `split` and `join` are each other's inverse."""

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Parts]
    join: Callable[[Parts], Tensor]


def _same(theirs: str, ours: str) -> Layout:
    return Layout(theirs, (ours,), lambda tensor: (tensor,), lambda parts: parts[0])


def _transposed(theirs: str, ours: str) -> Layout:
    """GPT-2's `Conv1D`: weights are `[in, out]`."""
    return Layout(theirs, (ours,), lambda tensor: (tensor.mT,), lambda parts: parts[0].mT)


def _stacked(theirs: str, ours: tuple[str, ...]) -> Layout:
    """GPT-2's q, k, v one after another along the outputs: `[D, 3 D]`, or `[3 D]` for biases."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.dim() == 2 else tensor

    return Layout(theirs, ours, lambda t: turn(t).chunk(3), lambda parts: turn(torch.cat(parts)))


def _by_head(theirs: str, ours: tuple[str, ...], heads: int) -> Layout:
    """GPT-NeoX's q, k, v of one head beside each other: `[H 3 E, D]`, or `[H 3 E]` for biases."""

    def split(tensor: Tensor) -> Parts:
        return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1))

    def join(parts: Parts) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)

    return Layout(theirs, ours, split, join)


class Names(NamedTuple):
    """The words of a family: its names by ours, of the model and of a layer."""

    base: str  # what stands before all names but the output's, and is missing in files of the bare model
    layers: str
    model: Mapping[str, str]
    layer: Mapping[str, str]
    fused: str  # the tensor of q, k and v
    skipped: str  # tensors in older files that hold no weights: masks, rotary tables
    aliases: Mapping[str, str] = {}


NAMES = {
    "gpt2": Names(
        "transformer.",
        "h",
        {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "lm_head": "lm_head"},
        {
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        "attn.c_attn",
        r"\.attn\.(masked_)?bias",
    ),
    "gpt_neox": Names(
        "gpt_neox.",
        "layers",
        {"embed_tokens": "embed_in", "norm": "final_layer_norm", "lm_head": "embed_out"},
        {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        "attention.query_key_value",
        r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
        {"lm_head.weight": "embed_out.weight"},
    ),
}
NATIVE_NAMES = Names("model.", "layers", {}, {}, "", r"\.rotary_emb\.inv_freq")
FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
HEAD = {"lm_head", "embed_out"}


def layouts(family: str, config: ModelConfig) -> list[Layout]:
    """Every tensor of a model of `family`; together they hold every leaf of the tree once."""
    ours = tree.flatten(abstract(config))
    if family in (*NATIVE, OURS):
        return [_same(name, name) for name in ours]
    names = NAMES[family]
    return [layout for name in ours for layout in _foreign(name, family, names, config)]


def _foreign(name: str, family: str, names: Names, config: ModelConfig) -> list[Layout]:
    """The tensor that one of our leaves begins."""
    within = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if within is None:
        place, leaf = name.removeprefix("model.").rsplit(".", 1)
        theirs = names.model[place]
        return [_same(f"{'' if theirs in HEAD else names.base}{theirs}.{leaf}", name)]
    before = f"{names.base}{names.layers}.{within[1]}."
    if fused := FUSED.fullmatch(within[2]):
        if fused[1] != "q":
            return []
        ours = tuple(f"model.layers.{within[1]}.self_attn.{letter}_proj.{fused[2]}" for letter in "qkv")
        theirs = f"{before}{names.fused}.{fused[2]}"
        return [_stacked(theirs, ours) if family == "gpt2" else _by_head(theirs, ours, config.n_heads)]
    place, leaf = within[2].rsplit(".", 1)
    make = _transposed if family == "gpt2" and leaf == "weight" and place.endswith("proj") else _same
    return [make(f"{before}{names.layer[place]}.{leaf}", name)]


def canonical(found: list[str], family: str) -> dict[str, str]:
    """The names in a file by the names that `layouts` gives them; what holds no weights is left out.

    A file of the bare model lacks the prefix of all names but the output's. Raises DataError for two names of
    one place.
    """
    names = NAMES.get(family, NATIVE_NAMES)
    bare = not any(name.startswith(names.base) for name in found)
    result: dict[str, str] = {}
    for name in found:
        alias = names.aliases.get(name, name)
        if bare and alias.split(".")[0] not in HEAD:
            alias = names.base + alias
        if re.search(names.skipped + "$", alias):
            continue
        if alias in result:
            raise DataError(f"the tensors {result[alias]!r} and {name!r} have the same place in a {family}; remove one")
        result[alias] = name
    return result
