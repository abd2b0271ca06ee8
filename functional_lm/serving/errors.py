"""Errors as clients read them: OpenAI's shape, and which status each kind has."""

from __future__ import annotations

import logging

from flask import Response, g, jsonify
from werkzeug.exceptions import HTTPException

from functional_lm.errors import FunctionalLMError
from functional_lm.inference.engine import Busy, Closed, StepFailed, TooMuch
from functional_lm.serving.service import NotFound

MOST = 300  # characters of a message, which may quote what a client wrote
log = logging.getLogger("functional_lm.serve")


def answer(code: int, message: str, kind: str | None = None) -> Response:
    """OpenAI's shape; what is worth another try says when."""
    family = "server_error" if code >= 500 else "invalid_request_error"
    response = jsonify(error={"message": " ".join(message.split())[:MOST], "type": family, "param": None, "code": kind})
    response.status_code = code
    if code in (429, 503):
        response.headers["Retry-After"] = "1" if code == 429 else "5"
    if code == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


KINDS: tuple[tuple[type[FunctionalLMError], int, str | None], ...] = (
    (Closed, 503, "unavailable"),
    (Busy, 429, "rate_limit_exceeded"),
    (NotFound, 404, "model_not_found"),
    (TooMuch, 422, "limit_exceeded"),
    (StepFailed, 500, "step_failed"),
    (FunctionalLMError, 400, None),
)


def of(error: Exception) -> Response:
    """The answer to what went wrong; what nobody has foreseen is logged, and the client learns its request's id."""
    if isinstance(error, HTTPException):
        return answer(error.code or 500, error.description or error.name)
    for kind, code, word in KINDS:
        if isinstance(error, kind):
            return answer(code, str(error), word)
    log.error("a request failed", exc_info=error, extra={"fields": {"id": g.get("id")}})
    return answer(500, "something went wrong inside; the server's log has it under this request's id", "internal")
