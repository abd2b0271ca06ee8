"""Conversations and preferences from files of rows, held against what they have to be before anything is learned.

A conversation is one system turn at most, then user and assistant by turns, the user first. It comes as `prompt` and
`response`, or as a list of turns in `messages`, `conversation` (LMSYS-Chat-1M) or `conversations` (ShareGPT); a
preference is `prompt`, `chosen`, `rejected`. Every refusal names the file and the line or row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from functional_lm.errors import DataError, json_kind
from functional_lm.text import chat, readers
from functional_lm.text.chat import Turn
from functional_lm.text.corpus import Corpus
from functional_lm.text.interface import Tokenizer, utf8
from functional_lm.text.rows import Row, named


class Conversation(NamedTuple):
    """Turns in order, and where they stand, in words."""

    turns: tuple[Turn, ...]
    where: str


class Preference(NamedTuple):
    """Two conversations that differ in the last answer alone; the first one is preferred."""

    chosen: Conversation
    rejected: Conversation


def _pair(row: Row) -> list[Turn]:
    return [chat.turn("user", _string(row, "prompt")), chat.turn("assistant", _string(row, "response"))]


def _list(name: str) -> Callable[[Row], list[Turn]]:
    return lambda row: chat.turns(row[name])


FIELDS: dict[tuple[str, ...], Callable[[Row], list[Turn]]] = {
    ("prompt", "response"): _pair,
    **{(name,): _list(name) for name in ("messages", "conversation", "conversations")},
}


def read(found: Corpus) -> list[Conversation]:
    """All conversations of a source. Raises DataError for a row that is none, or no good one."""
    return [_conversation(row, where) for row, where in _rows(found)]


def read_preferences(found: Corpus) -> list[Preference]:
    """All preferences of a source: texts, or lists of turns of which an answer holds one. Raises as `read` does."""
    return [_preference(row, where) for row, where in _rows(found)]


def _rows(found: Corpus) -> Iterator[tuple[Row, str]]:
    none = True
    for path, weight in found.parts:
        if weight != 1:
            raise DataError(f"{path} has the weight {weight:g}; conversations are each learned once an epoch")
        for row, where in readers.rows(path):
            none = False
            yield row, where
    if none:
        raise DataError(f"no rows in {found.source!r}; a conversation is a row of JSON")


def _conversation(row: Row, where: str) -> Conversation:
    for fields, make in FIELDS.items():
        if all(field in row for field in fields):
            try:
                turns = make(row)
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: {named(fields)} is no conversation ({error})") from None
            return checked(turns, where)
    raise DataError(f"{where}: no {' or '.join(map(named, FIELDS))} among {sorted(row)}")


def _preference(row: Row, where: str) -> Preference:
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing:
        raise DataError(
            f"{where}: no field {missing[0]!r} among {sorted(row)}; a preference has prompt, chosen, rejected"
        )
    try:
        prompt = _turns(row, "prompt", "user")
        both = [checked([*prompt, *_turns(row, name, "assistant")], where) for name in ("chosen", "rejected")]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}") from None
    if both[0].turns == both[1].turns:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same; nothing is preferred")
    for conversation in both:
        if len(conversation.turns) != len(prompt) + 1 or prompt[-1].role != "user":
            raise DataError(
                f"{where}: 'prompt' ends with a user's turn, and each answer is one turn of the assistant's"
            )
    return Preference(*both)


def _turns(row: Row, name: str, role: str) -> list[Turn]:
    value = row[name]
    if not isinstance(value, list):
        return [chat.turn(role, _string(row, name))]
    try:
        return chat.turns(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r}: {error}") from None


def _string(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"{name!r} is {json_kind(row[name])}, not text")
    return str(row[name])


def checked(turns: list[Turn], where: str) -> Conversation:
    """A conversation whose roles come in order and whose assistant says something. Raises DataError."""
    expected = "user"
    for number, (role, content) in enumerate(turns, 1):
        if role == "system" and number == 1:
            continue
        if role != expected:
            raise DataError(f"{where}: turn {number} is the {role}'s where the {expected}'s was due")
        if role == "assistant" and not content.strip():
            raise DataError(f"{where}: turn {number}, the assistant's, is empty; give it words or leave it out")
        _text(content, f"{where}: turn {number}")
        expected = "assistant" if role == "user" else "user"
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{where}: the assistant says nothing; there is nothing to learn")
    return Conversation(tuple(turns), where)


def _text(content: str, where: str) -> None:
    try:
        utf8(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def require_markers(tokenizer: Tokenizer, what: str) -> None:
    """Raise DataError for a vocabulary without the chat's special tokens: as text they would be anybody's to type."""
    missing = [name for name in (*chat.MARKERS.values(), chat.END) if name not in tokenizer.special_ids]
    if missing:
        raise DataError(
            f"the tokenizer of {what} has no {', '.join(missing)} among its special tokens; "
            "chats need a model that was trained here, whose vocabulary reserves them"
        )
