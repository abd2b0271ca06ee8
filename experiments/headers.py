"""The README's example of settings of decoding: headers of Python, and how much of what is written below them parses.

    python experiments/headers.py        writes headers.jsonl from the standard library, in the folder it runs in
    ... evolve --space decode --data headers.jsonl --fitness experiments.headers:parses

What parses need not make sense.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = "headers.jsonl"
HEADER = re.compile(r"^(?:def|class) \w+.*:$", re.MULTILINE)
LONGEST = 40  # characters of a header
COUNT = 600


def parses(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of each header and its answer the share of characters before the first line that does not parse."""
    return [share(row["prompt"] + answer) for answer, row in zip(answers, rows)]


def share(text: str) -> float:
    lines = text.split("\n")
    for count in range(len(lines), 0, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes
                ast.parse("\n".join(lines[:count]))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        return sum(map(len, lines[:count])) / len(text)
    return 0.0


def headers() -> list[str]:
    """`def` and `class` lines of the library's modules, each once, evenly from all of them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    found = dict.fromkeys(line for text in texts for line in HEADER.findall(text) if len(line) <= LONGEST)
    return list(found)[:: max(1, len(found) // COUNT)][:COUNT]


if __name__ == "__main__":
    from functional_lm import files

    made = headers()
    files.write_text(ROWS, "".join(f"{json.dumps({'prompt': line + chr(10), 'response': ''})}\n" for line in made))
    print(f"{len(made)} headers in {ROWS}")
