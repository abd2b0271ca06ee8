"""Flags from dataclass fields, and values from the words of a command line: strict, typed, before anything runs.

Every refusal is a UsageError of one line. Nothing here prints, and nothing imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from functional_lm.errors import UsageError
from functional_lm.options import LARGEST, REQUIRED, refusal

NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
PLURALS = {bool: "words true or false", int: "whole numbers", float: "numbers", str: "texts"}
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NONE = ("none", "null", "None")
# Where an empty text would mean the folder that one happens to be in.
PLACES = {"out", "output", "model", "models", "data", "tokenizer", "adapter", "config", "source", "base", "resume"}
# A word that can only be meant as a flag. "-1", "-inf", "-", "---" and "- an item" are values.
FLAG = re.compile(r"(?!-(?i:inf|infinity|nan)\Z)(--?)([A-Za-z][^\s=]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """One flag: the field `name` of dataclass number `owner` (0 is the command's own, the others its extra groups)."""

    name: str
    kind: type  # bool, int, float or str: of the value, or of each element of a tuple
    count: int | None  # None: a single value; 0: a tuple of any length; n: a tuple of n
    optional: bool  # whether `none` is a value
    default: Any
    about: Mapping[str, Any]  # what `option` noted
    heading: str = "Options"
    default_text: str = ""
    owner: int = 0

    @property
    def typed(self) -> str:
        """How it is written, where that is no name of a field (`from`)."""
        return str(self.about.get("typed", self.name))

    @property
    def spellings(self) -> tuple[str, ...]:
        others = (self.name, *(alias.replace("-", "_") for alias in self.about.get("aliases", ())))
        return (self.typed, *(other for other in others if other != self.typed))

    @property
    def switch(self) -> bool:
        """Whether the flag may stand without a value."""
        return self.kind is bool and self.count is None

    @property
    def noun(self) -> str:
        """What a value has to be, for an error."""
        many = f"{self.count} {PLURALS[self.kind]}" if self.count else PLURALS[self.kind]
        return (NOUNS[self.kind] if self.count is None else f"{many} separated by commas") + (
            ", or none" if self.optional else ""
        )


# Fields to flags --------------------------------------------------------------------------------------------------


def describe(options: type) -> list[Flag]:
    """The flags of a dataclass, one for each field. Raises TypeError for a type that no flag can hold."""
    hints = get_type_hints(options)
    return [_describe(field, hints[field.name]) for field in dataclasses.fields(options) if field.init]


def _describe(field: dataclasses.Field[Any], annotation: Any) -> Flag:
    kind, count, optional = _kind(annotation)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    heading = field.metadata.get("group", "Options")
    text = "required" if default is REQUIRED else show(default)
    return Flag(field.name, kind, count, optional, default, field.metadata, heading, text)


def _kind(annotation: Any) -> tuple[type, int | None, bool]:
    """(type of the value or of its elements, how many of them, whether None is a value)."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType) and len(inner) == 2 and NoneType in inner:
        kind, count, _ = _kind(inner[0] if inner[1] is NoneType else inner[1])
        return kind, count, True
    if origin is tuple and inner[0] in NOUNS and set(inner) <= {inner[0], Ellipsis}:
        return inner[0], 0 if Ellipsis in inner else len(inner), False
    if annotation in NOUNS:
        return annotation, None, False
    raise TypeError(f"no flag can hold {annotation!r}: use bool, int, float, str, a tuple of one of them, or `| None`")


def show(value: Any) -> str:
    """A default as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(show, value)) or "empty"
    return value if isinstance(value, str) and value.strip() else repr(value)


# Words to values --------------------------------------------------------------------------------------------------


def parse(flags: Sequence[Flag], argv: Iterable[str], positional: Sequence[str] = ()) -> dict[str, Any]:
    """The values that `argv` gives, by name of the flag. Raises UsageError.

    `--name value` and `--name=value` are the same, and so are `-` and `_` in a name. A bool needs no value and has
    the opposite `--noname`. A word that belongs to no flag goes to the next of `positional`; after `--` all words do.
    """
    spellings = {spelling: flag for flag in flags for spelling in flag.spellings}
    words, only_positional = deque(argv), False
    given: dict[str, Any] = {}
    while words:
        word = words.popleft()
        match = FLAG.fullmatch(word)
        if only_positional or (match is None and word != "--"):
            flag, text = _next_position(word, [spellings[name] for name in positional if name not in given]), word
        elif match is None:
            only_positional = True
            continue
        else:
            flag, text = _named(match, spellings, words)
        if flag.name in given:
            raise UsageError(f"--{flag.typed} is given twice; give it once")
        given[flag.name] = convert(flag, text)
    missing = [flag for flag in flags if flag.default is REQUIRED and flag.name not in given]
    if missing:
        meaning = f" ({missing[0].about['help']})" if len(missing) == 1 and "help" in missing[0].about else ""
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{', '.join(f'--{flag.typed}' for flag in missing)} {verb} required{meaning}")
    return given


def _next_position(word: str, free: list[Flag]) -> Flag:
    if not free:
        shown = repr(_short(word))
        raise UsageError(f"unexpected argument {shown}; write --name value, and quote a value that holds spaces")
    return free[0]


def _named(match: re.Match[str], spellings: Mapping[str, Flag], words: deque[str]) -> tuple[Flag, str]:
    """The flag that a word names and the text of its value, which may be the next of `words`."""
    dashes, typed, text = match.groups()
    key = typed.replace("-", "_")
    flag = spellings.get(key) if dashes == "--" else None
    opposite = spellings.get(key[2:].lstrip("_")) if dashes == "--" and key.startswith("no") else None
    if flag is None and opposite is not None and opposite.switch:
        if text is not None:
            raise UsageError(f"--{typed} takes no value; write --{opposite.typed} true or --{opposite.typed} false")
        return opposite, "false"
    if flag is None:
        near = nearest(key, spellings, "--help lists the flags", "--")
        raise UsageError(f"unknown flag {dashes}{_short(typed)}; {near}")
    if text is not None:
        return flag, text
    if words and words[0] != "--" and not FLAG.fullmatch(words[0]):
        return flag, words.popleft()
    if flag.switch:
        return flag, "true"
    dashed = f"; if it starts with a dash, --{typed}={_short(words[0])}" if words and flag.kind is str else ""
    raise UsageError(f"--{typed} needs a value: {flag.noun}{dashed}")


def nearest(word: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """The question after the nearest known word, or `otherwise`."""
    names = list(known)
    near = difflib.get_close_matches(word.lower(), names, 1)
    initials = {"".join(part[:1] for part in name.split("_")): name for name in reversed(names) if "_" in name}
    near = near or [name for letters, name in initials.items() if letters == word.lower()]
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def convert(flag: Flag, text: str) -> Any:
    """The value of a text, by the type, choices and limits of the flag. Raises UsageError."""
    if flag.optional and text in NONE:
        return None
    if flag.count is None:
        return _scalar(flag, text)
    parts = _parts(flag.kind, text)
    if flag.count and len(parts) != flag.count:
        raise UsageError(f"--{flag.typed} is {_short(text)!r}; it is {flag.noun}")
    return tuple(_scalar(flag, part) for part in parts)


def _parts(kind: type, text: str) -> list[str]:
    """The elements of `a,b`, of `[1, 2]`, and of `["a,b", "c"]` for texts that hold commas themselves."""
    if kind is str:
        if text[:2] in ('["', "['"):
            try:
                listed = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                listed = None
            if isinstance(listed, list) and all(isinstance(part, str) for part in listed):
                return listed
        return text.split(",") if text else []
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1].strip()
    return [part.strip() for part in inner.split(",")] if inner else []


def _scalar(flag: Flag, text: str) -> Any:
    value: Any = text
    shown = _short(text.strip()) if flag.kind in (int, float) else repr(_short(text))
    if flag.kind is bool:
        value = BOOLEANS.get(text.lower())
        if value is None:
            raise UsageError(f"--{flag.typed} is {shown}; it is {flag.noun}")
    elif flag.kind is not str:
        value = _number(flag, text, shown)
    if flag.name in PLACES and not str(value).strip():
        raise UsageError(f"--{flag.typed} is empty; name a file or folder")
    if reason := refusal(value, flag.about):
        none = ", none" if flag.optional and "choices" in flag.about else ""
        raise UsageError(f"--{flag.typed} is {shown}; {reason}{none}")
    return value


def _number(flag: Flag, text: str, shown: str) -> int | float:
    try:
        approximate, exact = float(text), Decimal(text)
    except (ValueError, ArithmeticError):
        raise UsageError(f"--{flag.typed} is {_short(text)!r}; it is {flag.noun}") from None
    if flag.kind is float:
        if not abs(approximate) <= LARGEST:  # NaN is not either
            raise UsageError(f"--{flag.typed} is {shown}; it has to be finite and below 3.4e38")
        return approximate
    # Not int(float): 2**53 + 1 has to arrive as itself.
    if not exact.is_finite() or (exact.copy_abs() < 2**63 and exact != exact.to_integral_value()):
        raise UsageError(f"--{flag.typed} is {shown}; it is {flag.noun}")
    if not -(2**63) <= exact < 2**63:
        raise UsageError(f"--{flag.typed} is {shown}; it does not fit 64 bits")
    return int(exact)


def _short(text: str) -> str:
    """A text that leaves an error one readable line."""
    return text if len(text) <= 60 else text[:57] + "..."
