"""Sides of a benchmark that take turns, each in a process of its own: a slow minute of the machine then slows them all.

A worker prints a line of JSON when it is ready, and answers each line on its standard input with another: one round.
Needs Python's own library alone, because a side may run in an interpreter that has nothing else of this project.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


def timed(once: Callable[[], Any], count: int) -> list[float]:
    """The seconds of each of `count` calls."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        once()
        found.append(time.perf_counter() - start)
    return found


def serve(head: Any, round_: Callable[[], Any]) -> None:
    """The worker's part: say `head`, then what `round_` returns whenever it is asked, until nobody asks any more."""
    print(json.dumps(head), flush=True)
    for _ in sys.stdin:
        print(json.dumps(round_()), flush=True)


class Side(NamedTuple):
    process: subprocess.Popen[str]
    head: Any


def started(command: Sequence[str], quiet: bool = False) -> Side:
    """A worker that is ready, and its first line. `quiet` throws its standard error away."""
    errors = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
    )
    return Side(process, _answer(process))


def taken(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Any]]:
    """The answers of each side, a round of all after the other; then the workers end."""
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (process, _) in sides.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answers[name].append(_answer(process))
    for process, _ in sides.values():
        process.communicate()
    return answers


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(json.JSONDecodeError):  # libraries may print there
            return json.loads(line)
    raise SystemExit("a side ended before its time; run it with --worker to see why")
