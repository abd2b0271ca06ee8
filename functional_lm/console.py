"""What a person sees in the terminal: lines, and a clock beside whatever takes long without a bar of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


def say(line: str = "") -> None:
    """Print a line without disturbing a progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def note(line: str) -> None:
    """Print a line about the work beside its output: on stderr."""
    print(line, file=sys.stderr, flush=True)


class Clock:
    """Seconds of a phase; read `seconds` when it has ended."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def announced(what: str, quiet: bool = False, file: TextIO | None = None) -> Iterator[Clock]:
    """`what ... 12.3 s`: the start is printed at once, on a terminal the seconds tick, the end stays on the line."""
    file = file or sys.stdout
    clock, done, start = Clock(), threading.Event(), time.perf_counter()
    ticking = file.isatty() and not quiet

    def tick() -> None:
        while not done.wait(1.0):
            file.write(f"\r{what} ... {time.perf_counter() - start:.0f} s")
            file.flush()

    if not quiet:
        file.write(f"{what} ... ")
        file.flush()
    ticker = threading.Thread(target=tick, daemon=True)
    if ticking:
        ticker.start()
    try:
        yield clock
    finally:
        clock.seconds = time.perf_counter() - start
        done.set()
        if ticking:
            ticker.join()
            file.write(f"\r{what} ... ")
        if not quiet:
            file.write(f"{clock.seconds:.1f} s\n")
            file.flush()


def count(number: float) -> str:
    """1234567 as `1.23M`."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * limit:  # 999500 rounds to 1M
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: 1536 as `1.5 KiB`."""
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 0.9995 * 1024**exponent:
            value = number / 1024**exponent
            return f"{value:.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
    return f"{number:.0f} B"


def moment(seconds: float) -> str:
    """0.1434 as `143 ms`, 2.44 as `2.44 s`; a minute and more as a duration."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 59.95 else duration(seconds)


def duration(seconds: float) -> str:
    """75 as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
