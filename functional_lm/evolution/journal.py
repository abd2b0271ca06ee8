"""The journal of an evolution: what it was, and each generation's key and fitness. The weights follow from it.

    {"format": 2, "kind": "evolution", "generation": 0, ...settings..., "check": "..."}
    {"generation": 0, "key": [k0, k1], "fitness": [f0, f1, ...], "seconds": 12.3, "check": "..."}
    ...
    {"ended": "generations", "generation": 100, "kept": "centre", "digest": "...", "check": "..."}

A run that goes on as another one (with other flags, say) has one more line like the first: its settings hold from that
generation on. Format 1 had no such lines.

One JSON object a line, appended and synced before anything is made of it. `check` is a hash over the line and the
`check` of the line before, so that a line that was changed, removed or put elsewhere is noticed, and where. A last line
that was cut off belongs to a generation that had not been told yet: it is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from functional_lm import files
from functional_lm.errors import DataError

FORMAT, READABLE = 2, (1, 2)
NAME = "journal.jsonl"


class Journal(NamedTuple):
    """What a file holds: its whole lines, and how many bytes they are."""

    path: Path
    headers: list[dict[str, Any]]  # what the run is, from which generation on
    generations: list[dict[str, Any]]
    end: dict[str, Any] | None  # of the last time that the run ended
    check: str
    length: int
    cut: bool  # whether there is a last line that is no whole one

    @property
    def header(self) -> dict[str, Any]:
        """What the run is by now."""
        return self.headers[-1]

    def began(self, generation: int) -> dict[str, Any]:
        """What the run was when it measured this generation."""
        return next(one for one in reversed(self.headers) if one.get("generation", 0) <= generation)


def _check(before: str, entry: Mapping[str, Any]) -> str:
    body = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256((before + body).encode()).hexdigest()[:16]


def _line(before: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    check = _check(before, entry)
    return json.dumps({**entry, "check": check}, allow_nan=False) + "\n", check


def begin(path: Path, settings: Mapping[str, Any]) -> Journal:
    """A new journal with its first line."""
    header = header_of(settings)
    line, check = _line("", header)
    files.write_text(path, line)
    return Journal(path, [header], [], None, check, len(line.encode()), False)


def append(journal: Journal, entry: Mapping[str, Any]) -> Journal:
    """The journal with one more line on the disk."""
    line, check = _line(journal.check, entry)
    length = files.grow(journal.path, line, journal.length)
    return remembered(journal, entry)._replace(check=check, length=length, cut=False)


def remembered(journal: Journal, entry: Mapping[str, Any]) -> Journal:
    """The journal with one more line, in memory alone."""
    if "kind" in entry:
        return journal._replace(headers=[*journal.headers, dict(entry)])
    if "ended" in entry:
        return journal._replace(end=dict(entry))
    return journal._replace(generations=[*journal.generations, dict(entry)])


def header_of(settings: Mapping[str, Any], generation: int = 0) -> dict[str, Any]:
    """The line of settings that hold from a generation on."""
    return {"format": FORMAT, "kind": "evolution", **settings, "generation": generation}


def entry(generation: int, key: Sequence[int], fitness: Sequence[Any], seconds: float) -> dict[str, Any]:
    """The line of a generation; what is not finite is null. Members with several figures have a list of them each."""

    def known(value: Any) -> Any:
        return [known(one) for one in value] if isinstance(value, list) else value if math.isfinite(value) else None

    shown = [known(value) for value in fitness]
    return {"generation": generation, "key": list(key), "fitness": shown, "seconds": round(seconds, 3)}


def fitness_of(entry: Mapping[str, Any]) -> list[Any]:
    """The fitness in a line, NaN where it was not finite."""

    def known(value: Any) -> Any:
        return [known(one) for one in value] if isinstance(value, list) else math.nan if value is None else float(value)

    return [known(value) for value in entry["fitness"]]


def read(path: str | Path) -> Journal:
    """The journal in a file. Raises DataError for a missing or foreign one, and for a line that was changed."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no journal at {path}")
    data = path.read_bytes()
    *whole, rest = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    check = ""
    for number, raw in enumerate(whole, 1):
        try:
            found = json.loads(raw)
            given = found.pop("check")
            due = _check(check, found)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise DataError(f"{path}, line {number} is not a line of a journal; {_remedy(number)}") from None
        if given != due:
            raise DataError(f"{path}, line {number} is not as it was written; {_remedy(number)}")
        check = due
        entries.append(found)
    if not entries or entries[0].get("kind") != "evolution":
        raise DataError(f"{path} is no journal of an evolution")
    if entries[0].get("format") not in READABLE:
        raise DataError(f"{path} has format {entries[0].get('format')}; this version reads {FORMAT}")
    generations = [found for found in entries[1:] if "fitness" in found]
    for number, found in enumerate(generations):
        if found["generation"] != number:
            raise DataError(f"{path} has generation {found['generation']} where {number} was due")
    headers = [found for found in entries if "kind" in found]
    end = next((found for found in reversed(entries) if "ended" in found), None)
    return Journal(path, headers, generations, end, check, len(data) - len(rest), bool(rest))


def _remedy(number: int) -> str:
    if number == 1:
        return "without its first line it cannot be read"
    above = "line" if number == 2 else f"{number - 1} lines"
    return f"to go on from the generation before, keep the {above} above and remove the rest"
