"""Hugging Face's model folders in and out, one tensor at a time.

`load_folder` gives what a folder holds; `import_folder` makes a model folder of this project from it, and `export`
goes the other way. All three judge the whole folder first, by its `config.json`, the headers of its files and the
numbers of its vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import byte_order, files, folder, sampling_settings, tree
from functional_lm.errors import DataError
from functional_lm.folder import Model
from functional_lm.interop.layouts import Layout, canonical, layouts
from functional_lm.interop.stored import Stored, catalogue
from functional_lm.model.config import ModelConfig, read_object
from functional_lm.model.families import FAMILIES, OURS, family_of, from_hugging_face, misfit
from functional_lm.model.transformer import abstract
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer


class Foreign(NamedTuple):
    """A model folder that has been judged but not read: each leaf by name, described (meta device) and to be read."""

    config: ModelConfig
    tokenizer: Tokenizer
    described: dict[str, Tensor]
    read: Callable[[str], Tensor]


def load_folder(path: str | Path) -> Model:
    """`params, config, tokenizer` of a Hugging Face folder, in the precision that it has.

    Llama, Mistral, Qwen2, Qwen3, GPT-2 and GPT-NeoX, in one safetensors file or in shards. Raises DataError, in one
    line, for what this version cannot honour: a key of `config.json`, a missing, extra or misshapen tensor, NaN.
    """
    found = examine(path)
    params = tree.unflatten({name: found.read(name).contiguous() for name in found.described})
    return Model(params, found.config, found.tokenizer)


def import_folder(source: str | Path, out: str | Path) -> ModelConfig:
    """Make a model folder of this project at `out` from a Hugging Face folder, whole or not at all.

    Memory holds one tensor at a time. Raises what `load_folder` raises, and UsageError if `out` exists.
    """
    files.refuse_existing(out)
    found = examine(source)
    with files.writing_folder(out) as temporary:
        tree.save_each(temporary / "model.safetensors", found.described, found.read)
        folder.save_description(temporary, found.config, found.tokenizer, _dtype(found.described))
        sampling_settings.carry(source, temporary)
    return found.config


def export(source: str | Path, out: str | Path, family: str | None = None) -> str:
    """Write a model folder of this project as a Hugging Face folder of `family`, which is returned.

    By default it is the first family that computes the same function. Raises DataError if there is none, or not this.
    """
    files.refuse_existing(out)
    found = examine(source)
    name = family or fitting(found.config)
    if reason := misfit(found.config, name):
        raise DataError(f"the model in {source} is no {name}: {reason}")
    by_name = {layout.theirs: layout for layout in layouts(name, found.config)}
    described = {
        theirs: layout.join(tuple(found.described[ours] for ours in layout.ours)) for theirs, layout in by_name.items()
    }

    def joined(theirs: str) -> Tensor:
        layout = by_name[theirs]
        return layout.join(tuple(found.read(ours) for ours in layout.ours))

    with files.writing_folder(out) as temporary:
        tree.save_each(temporary / "model.safetensors", described, joined)
        folder.save_description(temporary, found.config, found.tokenizer, _dtype(described), name)
        sampling_settings.carry(source, temporary)
    return name


def export_gpt2(source: str | Path, out: str | Path) -> str:
    """`export` as a GPT-2, or not at all."""
    return export(source, out, "gpt2")


def fitting(config: ModelConfig) -> str:
    """The first of all families that an architecture is. Raises DataError with each family's reason."""
    name = family_of(config, tuple(FAMILIES))
    if name == OURS:
        reasons = "; ".join(str(misfit(config, family)) for family in FAMILIES)
        raise DataError(f"no family of Hugging Face computes this model: {reasons}")
    return name


def examine(path: str | Path) -> Foreign:
    """Judge a model folder, this project's or a foreign one, by everything but the numbers of its matrices."""
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no model folder at {path}")
    values = read_object(path / "config.json")
    if folder.QUANTIZATION in values:
        raise DataError(f"the weights in {path} are quantised; give the model that they were made from")
    config, family = from_hugging_face(values, str(path / "config.json")), str(values["model_type"])
    stored = catalogue(path)
    names = canonical(list(stored), family)
    wanted = layouts(family, config)
    by_place = {place: stored[name] for place, name in names.items()}
    described = _fit(by_place, wanted, config, path)
    if byte_order.absurd(found.as_it_lies() for found in by_place.values() if len(found.shape) == 1):
        raise DataError(f"{path} {byte_order.SAID}")
    tokenizer = tokenizers.load(path)
    folder.check_tokenizer(tokenizer, config, path)
    sources = {ours: (layout, i) for layout in wanted for i, ours in enumerate(layout.ours)}

    def read(name: str) -> Tensor:
        layout, part = sources[name]
        tensor = by_place[layout.theirs].read()
        if name == "model.embed_tokens.weight" and config.tie_embeddings:
            _check_tied(tensor, by_place)
        return layout.split(tensor)[part]

    return Foreign(config, tokenizer, described, read)


def _fit(stored: dict[str, Stored], wanted: list[Layout], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Our leaves as the files describe them. Raises DataError for a tensor that is missing, extra or misshapen."""
    shapes = tree.flatten(abstract(config))
    described: dict[str, Tensor] = {}
    for theirs, ours, _, join in wanted:
        if theirs not in stored:
            raise DataError(f"{path} lacks the tensor {theirs!r} that its config.json asks for")
        found, expected = stored[theirs], join(tuple(shapes[name] for name in ours)).shape
        if found.shape != tuple(expected):
            raise DataError(
                f"{found.path}: {found.name!r} is {list(found.shape)}; config.json asks for {list(expected)}"
            )
        described |= {name: shapes[name].to(found.dtype) for name in ours}
    extra = stored.keys() - {layout.theirs for layout in wanted} - (_heads(stored) if config.tie_embeddings else set())
    if extra:
        name = min(extra)
        raise DataError(f"{stored[name].path} holds {stored[name].name!r}, which its config.json does not ask for")
    return described


def _heads(stored: dict[str, Stored]) -> set[str]:
    return stored.keys() & {"lm_head.weight", "embed_out.weight"}


def _check_tied(embedding: Tensor, stored: dict[str, Stored]) -> None:
    """Older files hold the output matrix of tied embeddings too: it has to be the same."""
    for name in _heads(stored):
        if not torch.equal(stored[name].read(), embedding):
            raise DataError(
                f"{stored[name].path}: tie_word_embeddings is true in config.json, and {name!r} is not the embedding"
            )


def _dtype(described: dict[str, Tensor]) -> torch.dtype:
    return next(iter(described.values())).dtype
