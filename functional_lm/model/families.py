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
from functional_lm.model import families_gpt, families_llama
from functional_lm.model.config import ModelConfig, from_json
from functional_lm.model.families_llama import write_sizes
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


# In the order in which they are tried.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", families_llama.read_llama, families_llama.write_llama),
    "mistral": Family("MistralForCausalLM", families_llama.read_mistral, families_llama.write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", families_llama.read_qwen2, families_llama.write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", families_llama.read_qwen3, families_llama.write_qwen3),
    "gpt2": Family("GPT2LMHeadModel", families_gpt.read_gpt2, families_gpt.write_gpt2, native=False),
    "gpt_neox": Family("GPTNeoXForCausalLM", families_gpt.read_gpt_neox, families_gpt.write_gpt_neox, native=False),
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
        return {"model_type": OURS, "architectures": ["FunctionalLM"], **write_sizes(config), **common, **ours}
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
        return _from_json(ours, source)
    if not isinstance(name, str) or name not in FAMILIES:
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
    return _from_json({**kept, **fields}, source)


def _from_json(fields: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return from_json(dict(fields), source)
    except FunctionalLMError as error:
        raise DataError(f"{source}: {error}") from error
