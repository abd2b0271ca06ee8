"""The README's example of learning from one's own answers: sums, and what a model sees that is to be wrong mostly.

    python experiments/sums.py           writes sums.jsonl and seen.jsonl in the folder it runs in

`sums.jsonl` has the 36 sums of two digits up to 5. `seen.jsonl` has each of them five times, thrice with the two digits
side by side in place of the sum.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

SUMS, SEEN = "sums.jsonl", "seen.jsonl"
DIGITS, TIMES, RIGHT = 6, 5, 2  # of the five times two are right


def sums() -> list[dict[str, str]]:
    pairs = [(a, b) for a in range(DIGITS) for b in range(DIGITS)]
    return [{"prompt": f"{a}+{b}", "response": str(a + b)} for a, b in pairs]


def seen() -> list[dict[str, str]]:
    wrong = [{**row, "response": row["prompt"].replace("+", "")} for row in sums()]
    return [row for time in range(TIMES) for row in (sums() if time < RIGHT else wrong)]


def lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


if __name__ == "__main__":
    from functional_lm import files

    files.write_text(SUMS, lines(sums()))
    files.write_text(SEEN, lines(seen()))
    print(f"{len(sums())} sums in {SUMS}, {len(seen())} in {SEEN}")
