"""All routes of the server, in one table from which the application and /openapi.json are made."""

from __future__ import annotations

from flask import Response, jsonify

from functional_lm.cli import version
from functional_lm.serving import completions, forms, openapi, plain, replies
from functional_lm.serving.openapi import Route
from functional_lm.serving.service import Service


def document(service: Service) -> Response:
    return jsonify(openapi.document(ROUTES, version().rpartition(" ")[2], bool(service.api_keys)))


ROUTES: tuple[Route, ...] = (
    Route("GET", "/", plain.page, "A page for people", media="text/html"),
    Route("GET", "/health", plain.health, "Whether requests are served", reply=replies.Health, public=True),
    Route("GET", "/stats", plain.stats, "Slots, queue and counts", reply=replies.Stats),
    Route("GET", "/metrics", plain.metrics, "The same and more for Prometheus", media="text/plain"),
    Route("GET", "/openapi.json", document, "This document"),
    Route("GET", "/v1/models", plain.models, "The model and its adapters", reply=replies.Models),
    Route("GET", "/v1/models/<path:name>", plain.model, "One of them", reply=replies.Model),
    Route(
        "POST", "/v1/completions", completions.completions, "Continue texts or token ids",
        forms.Completion, replies.Completion, streams=True,
    ),
    Route(
        "POST", "/v1/chat/completions", completions.chats, "Answer a conversation",
        forms.Chat, replies.Chat, streams=True,
    ),
    Route(
        "POST", "/generate", plain.generate, "Continue a text, in the original system's form",
        forms.Generate, replies.Generated, streams=True,
    ),
    Route("POST", "/tokenize", plain.tokenize, "A text's token ids", forms.Tokenize, replies.Tokens),
    Route("POST", "/detokenize", plain.detokenize, "The text of token ids", forms.Detokenize, replies.Text),
    Route(
        "POST", "/v1/load_lora_adapter", plain.load_adapter, "Serve an adapter from the server's folder",
        forms.LoadAdapter, replies.Model,
    ),
    Route(
        "POST", "/v1/unload_lora_adapter", plain.unload_adapter, "Serve an adapter no more",
        forms.UnloadAdapter, replies.Deleted,
    ),
)  # fmt: skip
