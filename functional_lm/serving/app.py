"""The Flask application: who may ask, from where, under which id, and what is noted of it. The routes are in a table.

app = create(Service(engine, tokenizer, ("mine",)))
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from functools import partial
from typing import Any

from flask import Flask, Response, g, request

from functional_lm.errors import UsageError
from functional_lm.serving import errors, forms
from functional_lm.serving.metrics import Metrics
from functional_lm.serving.openapi import Route
from functional_lm.serving.routes import ROUTES
from functional_lm.serving.service import Service, unique

__all__ = ["Service", "create"]

log = logging.getLogger("functional_lm.serve")
IDS = re.compile(r"[A-Za-z0-9._-]{1,64}")  # what a client may call its request; else it gets a name here
PUBLIC = frozenset(route.path for route in ROUTES if route.public)


def create(service: Service) -> Flask:
    """The application around one service."""
    app = Flask("functional_lm", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["functional_lm"] = Metrics(service.engine)
    app.before_request(partial(_admit, service))
    app.after_request(partial(_note, app.extensions["functional_lm"], service))
    app.register_error_handler(Exception, errors.of)
    for route in ROUTES:
        view = partial(_answer, service, route)
        app.add_url_rule(route.path, route.path, view, methods=[route.method], provide_automatic_options=False)
    return app


def _answer(service: Service, route: Route, **parts: str) -> Response:
    if route.form is None:
        return route.view(service, **parts)
    return route.view(service, _body(route.form))


def _body(form: type[forms.Form]) -> Any:
    try:
        return forms.read(form, request.get_json(force=True))
    except RecursionError:
        raise UsageError("the body is nested too deeply") from None


def _admit(service: Service) -> Response | None:
    """None where the request may go on."""
    given = request.headers.get("X-Request-Id", "")
    g.id, g.began = given if IDS.fullmatch(given) else f"req-{unique()}", time.monotonic()
    if request.method == "OPTIONS" and _named(service):
        return Response(status=204)
    if request.path in PUBLIC:
        return None
    if service.api_keys and not _known(service):
        response = errors.answer(401, "the Authorization header holds no valid key", "invalid_api_key")
        if request.path == "/":  # a browser asks for the key as a password
            response.headers["WWW-Authenticate"] = 'Basic realm="the password is an API key"'
        return response
    if service.draining:
        return errors.answer(503, str(service.obstacle), "unavailable")
    return None


def _known(service: Service) -> bool:
    """Whether the request shows one of the keys. The page alone takes it as a password (RFC 7617): a browser sends such
    a one by itself, also when another site asks it to."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic" and request.path == "/" and request.authorization is not None:
        scheme, given = "bearer", request.authorization.password or ""
    shown = hashlib.sha256(given.encode()).digest()
    g.owner = shown.hex()
    equal = [hmac.compare_digest(shown, hashlib.sha256(key.encode()).digest()) for key in service.api_keys]
    return scheme.lower() == "bearer" and any(equal)


def _named(service: Service) -> bool:
    """Whether the request comes from a page of an origin that may ask."""
    origin = request.headers.get("Origin")
    return origin is not None and ("*" in service.origins or origin in service.origins)


def _note(metrics: Metrics, service: Service, response: Response) -> Response:
    """Headers, counts, and a line of the log when the last byte has gone. No text of anybody is in it."""
    response.headers["X-Request-Id"] = g.get("id", "")
    if _named(service):
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        response.headers["Access-Control-Allow-Methods"] = "GET, POST"
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-Id"
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        response.headers["Access-Control-Max-Age"] = "600"
    if service.origins:
        response.headers.add("Vary", "Origin")
    rule = request.url_rule.rule if request.url_rule is not None else "none"
    metrics.answered(request.method, rule, response.status_code)
    fields = {"id": g.get("id"), "method": request.method, "route": rule, "status": response.status_code}
    response.call_on_close(partial(_log, fields, g.get("began", time.monotonic()), g.get("answers", ())))
    return response


def _log(fields: dict[str, Any], began: float, answers: Any) -> None:
    if answers:
        fields |= {
            "prompt_tokens": sum(len(answer.handle.request.prompt) for answer in answers),
            "completion_tokens": sum(answer.tokens for answer in answers),
            "ends": [answer.handle.finish_reason for answer in answers],
        }
    log.info("answered", extra={"fields": {**fields, "ms": round(1000 * (time.monotonic() - began), 1)}})
