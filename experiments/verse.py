"""The README's examples of fitness that no gradient can follow, and the lines that it is measured on.

    python experiments/verse.py          writes lines.jsonl from tinyshakespeare.txt, both in the folder it runs in
    ... evolve --data lines.jsonl --fitness experiments.verse:ten
    ... evolve --data lines.jsonl --strategy nsga2 --fitness loss,experiments.verse:brief

A row is a line of Shakespeare cut behind its third word; `ten` counts syllables, and words that he never used. The
other functions are figures of which several make sense together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

TEXT, LINES = "tinyshakespeare.txt", "lines.jsonl"
EVERY = 20  # th line of the text becomes a row
WORDS, LONGEST = 3, 14  # of a prompt: words, and characters with the line break in front of them


def words_of(line: str) -> list[str]:
    return re.findall("[a-z]+", line.lower())


def syllables(word: str) -> int:
    """Groups of vowels, but for a silent e: what can be counted without a dictionary."""
    return max(1, len(re.findall("[aeiouy]+", re.sub("(?<=[a-z])e$", "", word))))


@cache
def known() -> frozenset[str]:
    return frozenset(words_of(Path(TEXT).read_text(encoding="utf-8")))


def ten(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[int]:
    """Minus how far each line is from ten syllables, minus its words that are not in the text."""
    lines = [words_of(row["prompt"] + answer) for answer, row in zip(answers, rows)]
    return [-abs(sum(map(syllables, line)) - 10) - sum(word not in known() for word in line) for line in lines]


def brief(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[int]:
    """Minus the characters of each answer."""
    return [-len(answer) for answer in answers]


def length(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[int]:
    """The characters of each answer."""
    return [len(answer) for answer in answers]


def vowels(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """The share of vowels in each answer."""
    return [sum(letter in "aeiou" for letter in answer) / max(1, len(answer)) for answer in answers]


def rows() -> Iterator[dict[str, str]]:
    for line in Path(TEXT).read_text(encoding="utf-8").splitlines()[::EVERY]:
        words = line.split(" ")
        prompt = "\n" + " ".join(words[:WORDS])
        if len(words) > WORDS and len(prompt) <= LONGEST:
            yield {"prompt": prompt, "response": line[len(prompt) - 1 :]}


if __name__ == "__main__":
    from functional_lm import files

    made = list(rows())
    files.write_text(LINES, "".join(f"{json.dumps(row)}\n" for row in made))
    print(f"{len(made)} lines in {LINES}")
