"""`--choices n_layers=1:2:4,d_model=64:128,norm=rmsnorm:layernorm` as choices of configuration. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

from functional_lm.errors import UsageError
from functional_lm.evolution.architectures import FACTOR, FIXED, Choice
from functional_lm.flags import Flag, convert, describe, nearest
from functional_lm.model.config import ModelConfig

EXAMPLE = "n_layers=1:2:4,d_model=64:128,feed_forward=swiglu:gelu"


@cache
def fields() -> dict[str, Flag]:
    """What may be chosen, as flags that say what a value is."""
    known = {flag.name: flag for flag in describe(ModelConfig) if flag.name not in FIXED}
    about = {"help": "d_ff in widths of the model", "above": 0}
    factor = dataclasses.replace(known["dropout"], name=FACTOR, about=about)
    return {**known, FACTOR: factor}


def parse(parts: Sequence[str]) -> tuple[Choice, ...]:
    """The choices, numbers from the least to the greatest. Raises UsageError."""
    found: dict[str, Choice] = {}
    for part in parts:
        name, equals, text = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not text:
            raise UsageError(f"--choices has {part!r}; it is NAME=VALUE:VALUE, commas between, such as {EXAMPLE}")
        if name in FIXED:
            raise UsageError(f"--choices {name} cannot differ between members: data and machine decide on it")
        if name not in fields():
            raise UsageError(f"--choices has {name!r}; {nearest(name, fields(), 'it can be ' + ', '.join(fields()))}")
        if name in found:
            raise UsageError(f"--choices names {name} twice; give all of its values once, colons between")
        options = [_value(fields()[name], value) for value in text.split(":")]
        if len(set(options)) < len(options):
            raise UsageError(f"--choices {part} has a value twice")
        choice = Choice(name, tuple(options))
        found[name] = choice._replace(options=tuple(sorted(options))) if choice.ordered else choice
    if FACTOR in found and "d_ff" in found:
        raise UsageError(f"--choices names d_ff and {FACTOR}, which is d_ff / d_model; give one of them")
    return tuple(found.values())


def _value(flag: Flag, text: str) -> object:
    try:
        return convert(flag, text.strip())
    except UsageError as error:
        raise UsageError(f"--choices {str(error).removeprefix('--')}") from None
