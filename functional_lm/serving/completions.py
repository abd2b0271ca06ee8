"""OpenAI's two routes: POST /v1/completions and POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from flask import Response, g, jsonify

from functional_lm.serving import events, forms, logprobs
from functional_lm.serving.events import Script
from functional_lm.serving.service import Service


def completions(service: Service, form: forms.Completion) -> Response:
    form.refuse()
    service.named(form.model)
    prompts = [service.ids(prompt) for prompt in form.prompts]
    service.room(len(prompts) * form.n)
    echoes = [service.tokenizer.decode(prompt) if form.echo else "" for prompt in prompts]
    requests = [
        service.request(form, prompt, form.max_tokens, choice, (), form.told, form.echo)
        for prompt in prompts
        for choice in range(form.n)
    ]
    answers = events.ask(service, requests, form.stops)
    head = _head(service, form, "cmpl", "text_completion")
    lists = [logprobs.Lists(service.tokenizer) for _ in answers] if form.told is not None else []

    def choice(i: int, text: str, reason: str | None = None, prompt: bool = False) -> dict[str, Any]:
        told = None
        if lists:
            told = lists[i].prompt(answers[i].handle) if prompt else lists[i].said(answers[i].news())
        return {"index": i, "text": text, "logprobs": told, "finish_reason": reason}

    def chunk(*choices: dict[str, Any]) -> dict[str, Any]:
        return {**head, "choices": list(choices)}

    if form.stream:
        script = Script(
            lambda i: [chunk(choice(i, echoes[i // form.n], prompt=True))] if form.echo else [],
            lambda i, piece: chunk(choice(i, piece)),
            lambda i: chunk(choice(i, "", answers[i].finish_reason)),
            (lambda: {**chunk(), "usage": events.usage(prompts, answers)}) if form.counting else None,
            late=form.echo and bool(lists),
        )
        return events.stream(answers, script, service.breath)
    choices = []
    for i, text in enumerate(events.whole(answers, service.breath)):
        before = choice(i, "", prompt=True)["logprobs"] if form.echo else None
        made = choice(i, echoes[i // form.n] + text, answers[i].finish_reason)
        choices.append({**made, "logprobs": logprobs.joined(before, made["logprobs"])} if before else made)
    return jsonify({**chunk(*choices), "usage": events.usage(prompts, answers)})


def chats(service: Service, form: forms.Chat) -> Response:
    form.refuse()
    service.named(form.model)
    prompt = service.chat_ids(form.messages)
    ends = service.chat_stops()
    requests = [service.request(form, prompt, form.most, i, ends, form.told) for i in range(form.n)]
    answers = events.ask(service, requests, form.stops)

    def told(i: int) -> dict[str, Any] | None:
        if form.told is None:
            return None
        return logprobs.of_chat(answers[i].news(), answers[i].handle.request.stop_ids, service.tokenizer)

    if form.stream:
        head = _head(service, form, "chatcmpl", "chat.completion.chunk")

        def delta(i: int, change: dict[str, str], reason: str | None = None, scored: bool = True) -> dict[str, Any]:
            scores = told(i) if scored else None
            return {**head, "choices": [{"index": i, "delta": change, "logprobs": scores, "finish_reason": reason}]}

        script = Script(
            lambda i: [delta(i, {"role": "assistant", "content": ""}, scored=False)],
            lambda i, piece: delta(i, {"content": piece}),
            lambda i: delta(i, {}, answers[i].finish_reason),
            (lambda: {**head, "choices": [], "usage": events.usage([prompt], answers)}) if form.counting else None,
        )
        return events.stream(answers, script, service.breath)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text},
            "logprobs": told(i),
            "finish_reason": answers[i].finish_reason,
        }
        for i, text in enumerate(events.whole(answers, service.breath))
    ]
    head = _head(service, form, "chatcmpl", "chat.completion")
    return jsonify({**head, "choices": choices, "usage": events.usage([prompt], answers)})


def _head(service: Service, form: forms.OpenAI, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{g.id}",
        "object": kind,
        "created": int(time.time()),
        "model": form.model or service.names[0],
    }
