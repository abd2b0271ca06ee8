"""How a dataclass field tells its meaning and its limits: the one place that flags, help and the README's table read.

Imports no more than dataclasses, so that every module, torch or not, can describe its settings with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any

REQUIRED: Any = MISSING


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
) -> Any:
    """A dataclass field with its one-line meaning; `default=REQUIRED` makes it a required flag.

    `low` and `high` belong to the range, `above` and `below` do not; limits and `choices` hold for each element of a
    tuple. `aliases` are further spellings of the flag, `group` its heading in the help, `metavar` the word there for
    its value.
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
    }
    return field(default=default, metadata={name: value for name, value in about.items() if value not in (None, ())})
