"""/openapi.json: the routes as an OpenAPI 3.1 document, made of their forms and replies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from functional_lm.serving import replies
from functional_lm.serving.forms import Form

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Response

MEANINGS = {
    400: "The request cannot be meant; the message says why",
    401: "No valid API key",
    404: "No such model",
    413: "The body is too large",
    422: "More than a limit allows",
    429: "The queue is full; Retry-After says when to come back",
    500: "An error inside; the request's id is in the server's log",
    503: "Loading, going down, or not delivering",
}


@dataclass(frozen=True)
class Route:
    """A method and a path (Flask's rule), what answers, and what goes in and out."""

    method: str
    path: str
    view: Callable[..., Response]
    summary: str
    form: type[Form] | None = None
    reply: type[BaseModel] | None = None
    media: str = "application/json"
    public: bool = False
    streams: bool = False

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", self.path)


def document(routes: Iterable[Route], version: str, locked: bool) -> dict[str, Any]:
    """The document of `routes`; `locked` says that they ask for a key."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, locked)
        kinds: tuple[type[BaseModel] | None, ...] = (route.form, route.reply, replies.Error)
        for kind in kinds:
            schemas |= _schemas(kind) if kind else {}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "functional_lm", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if locked:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made


def _operation(route: Route, locked: bool) -> dict[str, Any]:
    content: dict[str, Any] = {route.media: {"schema": replies.schema(route.reply) if route.reply else {}}}
    if route.media != "application/json":
        content[route.media]["schema"] = {"type": "string"}
    if route.streams:
        content["text/event-stream"] = {"schema": {"description": "With stream true: an event for each piece"}}
    answers: dict[str, Any] = {"200": {"description": "As asked", "content": content}}
    for code in _refusals(route, locked):
        refusal = {"application/json": {"schema": replies.schema(replies.Error)}}
        answers[str(code)] = {"description": MEANINGS[code], "content": refusal}
    name = re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_")
    made: dict[str, Any] = {"operationId": name, "summary": route.summary, "responses": answers}
    if locked and not route.public:
        made["security"] = [{"key": []}]
    if parameters := re.findall(r"{(\w+)}", route.template):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in parameters
        ]
    if route.form:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": replies.schema(route.form)}},
        }
    return made


def _refusals(route: Route, locked: bool) -> Iterator[int]:
    for code in MEANINGS:
        if code == 401 and not (locked and not route.public):
            continue
        if code in (400, 413, 422, 429) and route.form is None:
            continue
        if code == 404 and route.form is None and "{" not in route.template:
            continue
        if code == 500 and route.form is None:
            continue
        yield code


def _schemas(kind: type[BaseModel]) -> dict[str, Any]:
    """A model and those that it consists of, under `module.Name`, so that forms and replies keep apart."""
    room = kind.__module__.rpartition(".")[2]
    made = kind.model_json_schema(ref_template=f"#/components/schemas/{room}.{{model}}")
    parts = made.pop("$defs", {})
    return {f"{room}.{name}": part for name, part in {kind.__name__: made, **parts}.items()}
