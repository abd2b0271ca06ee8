"""The other routes: the page, the models, /generate, tokens, adapters, and how the server is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Response, current_app, jsonify

from functional_lm.serving import errors, events, forms
from functional_lm.serving.events import Script
from functional_lm.serving.service import Service


def page(service: Service) -> Response:
    return Response((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), mimetype="text/html")


def health(service: Service) -> Response:
    if service.obstacle is not None:
        return errors.answer(503, service.obstacle, "unavailable")
    return jsonify(status="ok", model=service.names[0], locked=bool(service.api_keys))


def stats(service: Service) -> Response:
    return jsonify(service.engine.stats())


def metrics(service: Service) -> Response:
    return Response(current_app.extensions["functional_lm"].text(), mimetype="text/plain; version=0.0.4")


def models(service: Service) -> Response:
    return jsonify(object="list", data=[_model(service, name) for name in service.names])


def model(service: Service, name: str) -> Response:
    service.named(name)
    return jsonify(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "functional_lm",
        "parent": None if name == service.names[0] else service.names[0],
        "max_model_len": service.engine.longest,
    }


def tokenize(service: Service, form: forms.Tokenize) -> Response:
    service.named(form.model)
    ids = service.tokenizer.encode(form.prompt)
    return jsonify(tokens=ids, count=len(ids), max_model_len=service.engine.longest)


def detokenize(service: Service, form: forms.Detokenize) -> Response:
    service.named(form.model)
    return jsonify(prompt=service.tokenizer.decode(form.tokens))


def generate(service: Service, form: forms.Generate) -> Response:
    service.named(form.model)
    request = service.request(form, service.ids(form.text), form.max_new_tokens)
    (answer,) = answers = events.ask(service, [request], form.stops)
    if form.stream:
        return events.stream(
            answers,
            Script(lambda i: [], lambda i, piece: {"token": piece}, lambda i: {"finish_reason": answer.finish_reason}),
            service.breath,
        )
    (text,) = events.whole(answers, service.breath)
    return jsonify(generated_text=text, finish_reason=answer.finish_reason, tokens=answer.tokens)


def load_adapter(service: Service, form: forms.LoadAdapter) -> Response:
    service.load_adapter(form.lora_name, form.lora_path)
    return jsonify(_model(service, form.lora_name))


def unload_adapter(service: Service, form: forms.UnloadAdapter) -> Response:
    service.unload_adapter(form.lora_name)
    return jsonify(id=form.lora_name, object="model", deleted=True)
