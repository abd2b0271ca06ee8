"""Answers on their way: whole, or as server-sent events while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from flask import Response, g, request

from functional_lm.errors import FunctionalLMError
from functional_lm.inference.engine import Request
from functional_lm.serving.answer import Answer
from functional_lm.serving.service import Service

Event = dict[str, Any]
_json = json.JSONEncoder(ensure_ascii=False).encode


def ask(service: Service, requests: Sequence[Request], stops: Sequence[str]) -> list[Answer]:
    """Submit all or none; the answers are given up when the client leaves."""
    service.room(len(requests))
    gone = request.environ.get("waitress.client_disconnected")
    owner: str = g.get("owner", "")
    answers: list[Answer] = []
    with ExitStack() as undo:
        for one in requests:
            answers.append(Answer(service.engine.submit(replace(one, owner=owner)), service.tokenizer, stops))
            undo.callback(answers[-1].handle.cancel)
            if gone is not None:
                answers[-1].gone = gone
        undo.pop_all()
    g.answers = answers
    return answers


def whole(answers: Sequence[Answer], breath: Callable[[], float]) -> list[str]:
    """The texts; the engine works on all of them while the first is waited for, which is looked at now and then."""

    def pieces(answer: Answer) -> Iterator[str]:
        for text in answer:
            yield text
            if not answer.handle.pending:
                answer.handle.rest(breath())

    try:
        return ["".join(pieces(answer)) for answer in answers]
    finally:
        for answer in answers:
            answer.handle.cancel()


def usage(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens read and said; each prompt counts once, and so does what a slot held of it for its first answer."""
    read, said = sum(map(len, prompts)), sum(answer.tokens for answer in answers)
    cached = sum(answer.handle.cached for answer in answers[:: len(answers) // len(prompts)])
    return {
        "prompt_tokens": read,
        "completion_tokens": said,
        "total_tokens": read + said,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(frozen=True)
class Script:
    """The events of each answer, numbered, and of all of them."""

    begin: Callable[[int], list[Event]]
    piece: Callable[[int, str], Event]
    end: Callable[[int], Event]
    last: Callable[[], Event] | None = None
    late: bool = False  # the beginning tells what is known with the first token only


def stream(answers: Sequence[Answer], script: Script, breath: Callable[[], float]) -> Response:
    """Server-sent events, one answer after the other; a client that leaves gives the slots back.

    `breath()` seconds at least are between two pieces of a text: an event costs the processors that write the tokens
    more than the token in it.
    """

    def told(i: int, answer: Answer) -> Generator[str, None, str]:
        """Yields what goes out while the answer is written, returns what is left to tell of it."""
        pieces = iter(answer)
        first = next(pieces, None) if script.late else None
        yield from map(_line, script.begin(i))
        held = first or ""
        for text in pieces:
            held += text
            if not answer.handle.pending:  # what is there already goes out together: a lagging stream costs less
                yield _line(script.piece(i, held))
                held = ""
                answer.handle.rest(breath())
        return (_line(script.piece(i, held)) if held else "") + _line(script.end(i))

    def events() -> Iterator[str]:
        left = ""
        try:
            for i, answer in enumerate(answers):
                if left:
                    yield left
                left = ""
                left = yield from told(i, answer)
            if script.last is not None:
                left += _line(script.last())
        except FunctionalLMError as error:
            left += _line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        yield left + "data: [DONE]\n\n"

    def give_up() -> None:
        for answer in answers:
            answer.handle.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = Response(events(), mimetype="text/event-stream", headers=headers)
    response.call_on_close(give_up)  # also where the events have never begun
    return response


def _line(value: Event) -> str:
    return f"data: {_json(value)}\n\n"
