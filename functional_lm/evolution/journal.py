"""The journal of an evolution: what it was, and each generation's key and fitness. The weights follow from it.

    {"format": 1, "kind": "evolution", ...settings..., "check": "..."}
    {"generation": 0, "key": [k0, k1], "fitness": [f0, f1, ...], "seconds": 12.3, "check": "..."}
    ...
    {"ended": "generations", "generation": 100, "kept": "centre", "digest": "...", "check": "..."}

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

FORMAT = 1
NAME = "journal.jsonl"


class Journal(NamedTuple):
    """What a file holds: its whole lines, and how many bytes they are."""

    path: Path
    header: dict[str, Any]
    generations: list[dict[str, Any]]
    end: dict[str, Any] | None  # of the last time that the run ended
    check: str
    length: int
    cut: bool  # whether there is a last line that is no whole one


def _check(before: str, entry: Mapping[str, Any]) -> str:
    body = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256((before + body).encode()).hexdigest()[:16]


def _line(before: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    check = _check(before, entry)
    return json.dumps({**entry, "check": check}, allow_nan=False) + "\n", check


def begin(path: Path, settings: Mapping[str, Any]) -> Journal:
    """A new journal with its first line."""
    header = {"format": FORMAT, "kind": "evolution", **settings}
    line, check = _line("", header)
    files.write_text(path, line)
    return Journal(path, dict(header), [], None, check, len(line.encode()), False)


def append(journal: Journal, entry: Mapping[str, Any]) -> Journal:
    """The journal with one more line on the disk."""
    line, check = _line(journal.check, entry)
    length = files.grow(journal.path, line, journal.length)
    ended = "ended" in entry
    return journal._replace(
        generations=journal.generations if ended else [*journal.generations, dict(entry)],
        end=dict(entry) if ended else journal.end,
        check=check,
        length=length,
        cut=False,
    )


def remembered(journal: Journal, entry: Mapping[str, Any]) -> Journal:
    """The journal with one more generation, in memory alone."""
    return journal._replace(generations=[*journal.generations, dict(entry)])


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
    if entries[0].get("format") != FORMAT:
        raise DataError(f"{path} has format {entries[0].get('format')}; this version reads {FORMAT}")
    generations = [found for found in entries[1:] if "fitness" in found]
    for number, found in enumerate(generations):
        if found["generation"] != number:
            raise DataError(f"{path} has generation {found['generation']} where {number} was due")
    end = next((found for found in reversed(entries) if "ended" in found), None)
    return Journal(path, entries[0], generations, end, check, len(data) - len(rest), bool(rest))


def _remedy(number: int) -> str:
    if number == 1:
        return "without its first line it cannot be read"
    above = "line" if number == 2 else f"{number - 1} lines"
    return f"to go on from the generation before, keep the {above} above and remove the rest"
