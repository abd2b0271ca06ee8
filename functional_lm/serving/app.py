"""The Flask application: routes, errors in OpenAI's shape, keys and limits around one engine.

app = create(Service(engine, tokenizer, "mine"))
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference.engine import Busy, Engine, Request
from functional_lm.serving import forms, logprobs
from functional_lm.serving.answer import Answer
from functional_lm.text import chat
from functional_lm.text.interface import ASSISTANT
from functional_lm.text.tokenizer import Tokenizer

log = logging.getLogger("functional_lm.serve")
OPEN = ("/health",)  # routes that need no key


class NotFound(FunctionalLMError):
    """A model of that name is not served."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        super().__init__(f"there is no model {name[:80]!r}; there is {', '.join(names)}")


_numbers = itertools.count()


def unique() -> str:
    """A name that no other request has: 15 hexadecimal digits of the clock, the process and a count. Not a secret."""
    return hashlib.sha256(f"{time.time_ns()} {os.getpid()} {next(_numbers)}".encode()).hexdigest()[:15]


@dataclass
class Service:
    """What the routes know: the engine, its tokenizer, the names of its model and its adapters, and the limits."""

    engine: Engine
    tokenizer: Tokenizer
    names: tuple[str, ...]  # of the model, then of the entries of the engine's bank
    api_keys: Sequence[str] = ()
    seconds: float = 300.0  # longest time of a request
    body_bytes: int = 4 << 20
    started: int = field(default_factory=lambda: int(time.time()))

    def named(self, given: str | None) -> int:
        """Which entry of the bank a request means. Raises NotFound."""
        if given is None:
            return 0
        if given not in self.names:
            raise NotFound(given, self.names)
        return self.names.index(given)

    def ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Token ids of a prompt; an empty one is the beginning of a document."""
        found = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return tuple(found) or (self.tokenizer.bos_id,)

    def chat_ids(self, messages: Sequence[forms.Message]) -> tuple[int, ...]:
        """The messages as the model has learned chats, up to where the assistant begins."""
        self.chat_stops()
        return tuple(chat.prompt(self.tokenizer, [chat.turn(one.role, one.content) for one in messages]))

    def chat_stops(self) -> tuple[int, ...]:
        """What ends an answer. Raises UsageError where the tokenizer has no tokens for roles."""
        if ASSISTANT not in self.tokenizer.special_ids:
            raise UsageError("this model's tokenizer has no tokens for the roles of a chat")
        return chat.stops(self.tokenizer)

    def submit(
        self,
        form: forms.Sampled,
        prompt: tuple[int, ...],
        max_tokens: int,
        choice: int = 0,
        ends: Sequence[int] = (),
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Answer:
        """Ask the engine; `choice` numbers the answers to one prompt, which differ by their seeds."""
        seed = form.seed if form.seed is not None else int(unique(), 16)
        room = self.engine.longest - len(prompt)
        handle = self.engine.submit(
            Request(
                prompt,
                max(1, min(max_tokens, room)),
                form.temperature,
                form.top_k,
                form.top_p,
                form.min_p,
                form.repetition_penalty,
                form.presence_penalty,
                form.frequency_penalty,
                {self._token(name): value for name, value in (form.logit_bias or {}).items()},
                (seed + choice) % 2**63,
                (self.tokenizer.eos_id, *ends),
                self.seconds,
                logprobs,
                echo and logprobs is not None,
                self.named(form.model),
            )
        )
        return Answer(handle, self.tokenizer, form.stops)

    @staticmethod
    def _token(name: str) -> int:
        if not (name.isascii() and name.isdecimal() and len(name) < 12):
            raise UsageError(f"logit_bias: {name[:40]!r} is no token id")
        return int(name)


def create(service: Service) -> Flask:
    """The application. It holds no state of its own."""
    app = Flask("functional_lm")
    app.config["MAX_CONTENT_LENGTH"] = service.body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]

    @app.before_request
    def admit() -> Response | None:
        g.id, g.began = f"req-{unique()}", time.monotonic()
        if not service.api_keys or request.path in OPEN:
            return None
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        equal = [hmac.compare_digest(given, key.encode()) for key in service.api_keys]  # all of them, for constant time
        if not any(equal):
            return _error(401, "the Authorization header holds no valid key", "invalid_api_key")
        return None

    @app.after_request
    def note(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("id", "")
        milliseconds = 1000 * (time.monotonic() - g.get("began", time.monotonic()))
        log.info("%s %s %s %d %.0f ms", g.get("id"), request.method, request.path, response.status_code, milliseconds)
        return response

    @app.errorhandler(Exception)
    def refused(error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _error(error.code or 500, error.description or error.name)
        if isinstance(error, Busy):
            response = _error(429, str(error), "rate_limit_exceeded")
            response.headers["Retry-After"] = "1"
            return response
        if isinstance(error, FunctionalLMError):
            return _error(400, str(error))
        log.exception("%s failed", g.get("id"))
        return _error(500, "something went wrong inside; the server's log has it under this request's id")

    def body(form: type[forms.Form]) -> Any:
        try:
            return forms.read(form, request.get_json(force=True))
        except RecursionError:
            raise UsageError("the body is nested too deeply") from None

    @app.errorhandler(NotFound)
    def unknown(error: NotFound) -> Response:
        return _error(404, str(error), "model_not_found")

    @app.get("/health")
    def health() -> Response:
        if service.engine.failure is not None:
            return _error(503, f"the engine has stopped: {service.engine.failure}")
        return jsonify(status="ok", model=service.names[0])

    @app.get("/stats")
    def stats() -> Response:
        return jsonify(service.engine.stats())

    @app.get("/")
    def page() -> Response:
        return Response((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), mimetype="text/html")

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify(object="list", data=[_model(service, name) for name in service.names])

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        service.named(name)
        return jsonify(_model(service, name))

    @app.post("/tokenize")
    def tokenize() -> Response:
        form = body(forms.Tokenize)
        service.named(form.model)
        ids = service.tokenizer.encode(form.prompt)
        return jsonify(tokens=ids, count=len(ids), max_model_len=service.engine.longest)

    @app.post("/detokenize")
    def detokenize() -> Response:
        form = body(forms.Detokenize)
        service.named(form.model)
        return jsonify(prompt=service.tokenizer.decode(form.tokens))

    @app.post("/generate")
    def generate() -> Response:
        form = body(forms.Generate)
        service.named(form.model)
        answer = service.submit(form, service.ids(form.text), form.max_new_tokens)
        if form.stream:
            return _stream(
                [answer], lambda i, piece: {"token": piece}, lambda i: {"finish_reason": answer.finish_reason}
            )
        text = _whole(answer)
        return jsonify(generated_text=text, finish_reason=answer.finish_reason, tokens=answer.tokens)

    @app.post("/v1/completions")
    def completions() -> Response:
        form: forms.Completion = body(forms.Completion)
        form.refuse()
        service.named(form.model)
        prompts = [service.ids(prompt) for prompt in form.prompts]
        echoes = [service.tokenizer.decode(prompt) if form.echo else "" for prompt in prompts]
        with ExitStack() as undo:
            answers = [
                _undone(undo, service.submit(form, prompt, form.max_tokens, choice, (), form.told, form.echo))
                for prompt in prompts
                for choice in range(form.n)
            ]
            undo.pop_all()
        head = {
            "id": f"cmpl-{g.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": form.model or service.names[0],
        }
        read = sum(map(len, prompts))

        def choice(i: int, text: str, reason: str | None) -> dict[str, Any]:
            return {"index": i, "text": text, "logprobs": None, "finish_reason": reason}

        if form.stream:
            usage = (
                (lambda: _usage(read, answers)) if form.stream_options and form.stream_options.include_usage else None
            )
            return _stream(
                answers,
                lambda i, piece: {**head, "choices": [choice(i, piece, None)]},
                lambda i: {**head, "choices": [choice(i, "", answers[i].finish_reason)]},
                [{**head, "choices": [choice(i, echoes[i // form.n], None)]} for i in range(len(answers)) if form.echo],
                usage and (lambda: {**head, "choices": [], "usage": usage()}),
            )
        texts = _all(answers)
        choices = [choice(i, echoes[i // form.n] + text, answers[i].finish_reason) for i, text in enumerate(texts)]
        if form.told is not None:
            for i, made in enumerate(choices):
                made["logprobs"] = logprobs.of_completion(answers[i], service.tokenizer, form.echo)
        return jsonify({**head, "choices": choices, "usage": _usage(read, answers)})

    @app.post("/v1/chat/completions")
    def chats() -> Response:
        form: forms.Chat = body(forms.Chat)
        form.refuse()
        service.named(form.model)
        prompt = service.chat_ids(form.messages)
        most = form.max_completion_tokens or form.max_tokens or service.engine.longest
        ends = service.chat_stops()
        with ExitStack() as undo:
            answers = [_undone(undo, service.submit(form, prompt, most, i, ends, form.told)) for i in range(form.n)]
            undo.pop_all()
        head = {"id": f"chatcmpl-{g.id}", "created": int(time.time()), "model": form.model or service.names[0]}

        def delta(i: int, change: dict[str, str], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": i, "delta": change, "logprobs": None, "finish_reason": reason}
            return {**head, "object": "chat.completion.chunk", "choices": [choice]}

        if form.stream:
            usage = form.stream_options is not None and form.stream_options.include_usage
            return _stream(
                answers,
                lambda i, piece: delta(i, {"content": piece}),
                lambda i: delta(i, {}, answers[i].finish_reason),
                [delta(i, {"role": "assistant", "content": ""}) for i in range(form.n)],
                (lambda: {**delta(0, {}), "choices": [], "usage": _usage(len(prompt), answers)}) if usage else None,
            )
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "logprobs": None if form.told is None else logprobs.of_chat(answers[i], service.tokenizer),
                "finish_reason": answers[i].finish_reason,
            }
            for i, text in enumerate(_all(answers))
        ]
        usage_ = _usage(len(prompt), answers)
        return jsonify({**head, "object": "chat.completion", "choices": choices, "usage": usage_})

    return app


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "functional_lm",
        "parent": None if name == service.names[0] else service.names[0],
        "max_model_len": service.engine.longest,
    }


def _error(code: int, message: str, kind: str | None = None) -> Response:
    """OpenAI's shape."""
    family = "server_error" if code >= 500 else "invalid_request_error"
    response = jsonify(error={"message": message, "type": family, "param": None, "code": kind})
    response.status_code = code
    return response


def _usage(read: int, answers: Sequence[Answer]) -> dict[str, int]:
    said = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def _undone(undo: ExitStack, answer: Answer) -> Answer:
    """If one of several cannot be asked for, the others are taken back."""
    undo.callback(answer.handle.cancel)
    return answer


def _whole(answer: Answer) -> str:
    try:
        return "".join(answer)
    finally:
        answer.handle.cancel()


def _all(answers: Sequence[Answer]) -> list[str]:
    """The engine works on all of them while the first is waited for."""
    try:
        return [_whole(answer) for answer in answers]
    finally:
        for answer in answers:
            answer.handle.cancel()


def _stream(
    answers: Sequence[Answer],
    piece: Callable[[int, str], dict[str, Any]],
    end: Callable[[int], dict[str, Any]],
    begin: Sequence[dict[str, Any]] = (),
    last: Callable[[], dict[str, Any]] | None = None,
) -> Response:
    """Server-sent events, one answer after the other; a client that leaves gives the slots back."""

    def events() -> Iterator[str]:
        try:
            yield from map(_event, begin)
            for i, answer in enumerate(answers):
                for text in answer:
                    yield _event(piece(i, text))
                yield _event(end(i))
            if last is not None:
                yield _event(last())
        except FunctionalLMError as error:
            yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        finally:
            for answer in answers:
                answer.handle.cancel()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(events(), mimetype="text/event-stream", headers=headers)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
