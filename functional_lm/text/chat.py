"""Chats as documents: who speaks is told by special tokens, which nobody can type.

    <|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|>

Nothing stands between a marker and its text; a document's delimiter follows the last `<|end|>`. `layout` says of each
segment whether the assistant writes it: pretraining learns all of them, fine-tuning those alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from functional_lm.errors import json_kind
from functional_lm.text import document as documents
from functional_lm.text.document import Segment, Special
from functional_lm.text.interface import ASSISTANT, END, SYSTEM, USER, Tokenizer

MARKERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
# What data sets call them: OpenAI's, ShareGPT's with its various assistants.
ALIASES = {
    **{"developer": "system", "human": "user", "prompter": "user"},
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "model", "bot"), "assistant"),
}
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")


class Turn(NamedTuple):
    """Who speaks, and what."""

    role: str  # a key of MARKERS
    content: str


class Spoken(NamedTuple):
    """A segment of a chat, and whether it is the assistant's to write (its words and the end after them)."""

    segment: Segment
    learned: bool


def turn(role: str, content: str) -> Turn:
    """Raises ValueError for a role that is none of MARKERS and ALIASES."""
    known = ALIASES.get(role, role)
    if known not in MARKERS:
        raise ValueError(f"unknown role {role!r}; there are {', '.join([*MARKERS, *ALIASES])}")
    return Turn(known, content)


def turns(rows: Any) -> list[Turn]:
    """Turns from a list of `{role, content}` or `{from, value}`. Raises TypeError or ValueError naming the turn."""
    if not isinstance(rows, list):
        raise TypeError(f"it is {json_kind(rows)}, not a list of turns")
    return [_turn(row, f"turn {number}") for number, row in enumerate(rows, 1)]


def _turn(row: Any, where: str) -> Turn:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} is {json_kind(row)}, not an object")
    role, content = (
        next((row[name] for name in names if name in row), None) for names in (ROLE_FIELDS, CONTENT_FIELDS)
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where} needs texts as 'role' and 'content', or 'from' and 'value'")
    try:
        return turn(role, content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def layout(turns: Iterable[Turn]) -> list[Spoken]:
    """The segments of a chat in order."""
    spoken: list[Spoken] = []
    for role, content in turns:
        learned = role == "assistant"
        spoken.append(Spoken(Special(MARKERS[role]), False))
        spoken += [Spoken(content, learned)] if content else []
        spoken.append(Spoken(Special(END), learned))
    return spoken


def document(turns: Iterable[Turn]) -> tuple[Segment, ...]:
    """A chat as a document; one without turns is empty."""
    return tuple(segment for segment, _ in layout(turns))


def prompt(tokenizer: Tokenizer, turns: Iterable[Turn]) -> list[int]:
    """The ids of a chat that the assistant has to go on from: the delimiter, the turns, the assistant's marker."""
    ids, _ = documents.encode(tokenizer, [[*document(turns), Special(ASSISTANT)]])
    return [tokenizer.bos_id, *ids.tolist()]


def latest(tokenizer: Tokenizer, turns: list[Turn], room: int) -> list[Turn]:
    """The turns whose `prompt` has at most `room` ids: all, or without the oldest exchanges; a system turn stays.

    Raises ValueError if not even the last turn fits.
    """
    first = int(bool(turns) and turns[0].role == "system")
    for start in range(first, len(turns), 2):
        kept = [*turns[:first], *turns[start:]]
        if len(prompt(tokenizer, kept)) <= room:
            return kept
    raise ValueError(f"the last turn is longer than {room} tokens")


def stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer."""
    return (tokenizer.special_ids[END], tokenizer.eos_id)
