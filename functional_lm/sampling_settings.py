"""How a model wants its tokens chosen: the numbers in a folder's `generation_config.json`. Imports no torch.

`generate`, `chat` and `api` go by them where a flag or a request says nothing. The names are Hugging Face's, and
OpenAI's for the two penalties that Hugging Face has no name for; a file's other fields are other people's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_lm import files
from functional_lm.errors import DataError

NAME = "generation_config.json"
# What a command does where nobody says anything: the temperature of `generate`, and everything else off.
USUAL: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
LIMITS = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 10**9),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def of_folder(folder: str | Path) -> dict[str, float]:
    """The settings that a model folder has of its own. Raises DataError for one that cannot be meant."""
    path = Path(folder) / NAME
    if not path.is_file():
        return {}
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object")
    return {name: _number(found[name], name, path) for name in USUAL if found.get(name) is not None}


def _number(value: Any, name: str, path: Path) -> float:
    low, high = LIMITS[name]
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not right or (name == "top_k" and value != int(value)):
        raise DataError(f"{path}: {name} is {value!r:.60}; it has to be a number from {low:g} to {high:g}")
    return int(value) if name == "top_k" else float(value)


def resolved(given: Any, folder: str | Path) -> dict[str, float]:
    """All settings: what the flags in `given` say, else the folder, else the usual."""
    flags = {name: getattr(given, name, None) for name in USUAL}
    return {**USUAL, **of_folder(folder), **{name: value for name, value in flags.items() if value is not None}}


def carry(source: str | Path, folder: Path) -> None:
    """Take the settings of one folder over into another."""
    if found := of_folder(source):
        write(folder, found)


def write(folder: Path, settings: Mapping[str, float]) -> None:
    """Put settings into a folder's file, whose other fields stay."""
    files.write_json(folder / NAME, {**files.read_json(folder / NAME), "do_sample": True, **settings})
