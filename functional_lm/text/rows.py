"""One row to one document: by the fields that it has. `ROWS` is the place for more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functional_lm.errors import DataError, json_kind
from functional_lm.text import chat
from functional_lm.text.document import Document

Row = Mapping[str, Any]


def document(row: Any, where: str) -> Document:
    """The document of a row. Raises DataError, with `where` it stands, for what is none."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object was expected, not {json_kind(row)}")
    fields = fields_of(row, where)
    try:
        made = ROWS[fields](row)
        for segment in made:
            if isinstance(segment, str):
                segment.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {named(fields)} is not text ({error})") from None
    return made


def fields_of(names: Any, where: str) -> tuple[str, ...]:
    """The first entry of ROWS whose fields are all there."""
    for fields in ROWS:
        if all(field in names for field in fields):
            return fields
    raise DataError(f"{where}: no {' or '.join(map(named, ROWS))} among {sorted(names)}")


def named(fields: tuple[str, ...]) -> str:
    return f"field {' with '.join(map(repr, fields))}"


def _text(name: str) -> Callable[[Row], Document]:
    def read(row: Row) -> Document:
        return (_string(row[name]),) if row[name] != "" else ()

    return read


def _chat(name: str) -> Callable[[Row], Document]:
    return lambda row: chat.document(chat.turns(row[name]))


def _prompt_and_response(row: Row) -> Document:
    return chat.document([chat.turn("user", _string(row["prompt"])), chat.turn("assistant", _string(row["response"]))])


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it is {json_kind(value)}")
    return value


ROWS: dict[tuple[str, ...], Callable[[Row], Document]] = {
    ("text",): _text("text"),
    ("content",): _text("content"),
    ("prompt", "response"): _prompt_and_response,
    ("messages",): _chat("messages"),
    ("conversation",): _chat("conversation"),  # LMSYS-Chat-1M
    ("conversations",): _chat("conversations"),  # ShareGPT
}
