"""How a dataclass field tells its meaning and its limits: the one place that flags, help, files and the README read.

Imports no torch, so that every module can describe its settings with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from functools import cache
from typing import Any, get_args, get_type_hints

from functional_lm.errors import UsageError

REQUIRED: Any = MISSING
LARGEST = 3.4028234663852886e38  # of float32: what is computed with is not wider


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    aliases: Sequence[str] = (),
    group: str | None = None,
    metavar: str | None = None,
    typed: str | None = None,
) -> Any:
    """A dataclass field with its one-line meaning; `default=REQUIRED` makes it a required flag.

    `low` and `high` belong to the range, `above` and `below` do not; limits and `choices` hold for each element of a
    tuple. `aliases` are further spellings of the flag, `group` its heading in the help, `metavar` the word there for
    its value, `typed` what is written for a field whose name is none that one would type.
    """
    about = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "aliases": tuple(aliases),
        "group": group,
        "metavar": metavar,
        "typed": typed,
    }
    return field(default=default, metadata={name: value for name, value in about.items() if value not in (None, ())})


def limits(about: Mapping[str, Any]) -> str:
    """The range of a field in words, "" without one."""
    low, high, above, below = (about.get(name) for name in ("low", "high", "above", "below"))
    if low is not None and high is not None:
        return f"between {low} and {high}"
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def refusal(value: Any, about: Mapping[str, Any]) -> str | None:
    """What a value (of the right type) should be instead, None if it may stand."""
    if value not in about.get("choices", (value,)):
        return f"it can be {', '.join(map(str, about['choices']))}"
    low, high, above, below = (about.get(name) for name in ("low", "high", "above", "below"))
    outside = (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )
    return f"it has to be {limits(about)}" if outside else None


NOUNS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def check(settings: Any) -> None:
    """Hold every field of a dataclass against its type, choices and limits. Raises UsageError naming the field."""
    kind_of: Any = type(settings)
    hints = _hints(kind_of)
    for about in dataclasses.fields(settings):
        value, kind = getattr(settings, about.name), hints[about.name]
        inner = get_args(kind)
        if len(inner) == 2 and inner[1] is type(None) and inner[0] in NOUNS and value is not None:
            kind = inner[0]
        if kind not in NOUNS:  # tuples are checked by who reads them
            assert inner, f"{about.name} has a type that no file or flag can give"
            continue
        accepted = (int, float) if kind is float else kind
        right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not right or (kind is float and not abs(value) <= LARGEST):
            raise UsageError(f"{about.name} is {value!r}; it has to be {NOUNS[kind]}")
        if reason := refusal(value, about.metadata):
            raise UsageError(f"{about.name} is {value!r}; {reason}")
