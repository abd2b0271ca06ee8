"""What the routes answer, as /openapi.json describes it; a test holds the answers to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Details(Reply):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Error(Reply):
    error: Details


class Health(Reply):
    status: Literal["ok"]
    model: str
    locked: bool  # whether the other routes ask for a key


class Stats(Reply):
    slots: int
    running: int
    waiting: int
    requests: int
    tokens: int


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Deleted(Reply):
    id: str
    object: Literal["model"]
    deleted: bool


class Tokens(Reply):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(Reply):
    prompt: str


class Generated(Reply):
    generated_text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


class PromptDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Logprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Reply):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Message(Reply):
    role: Literal["assistant"]
    content: str


class Top(Reply):
    token: str
    logprob: float
    bytes: list[int]


class Scored(Top):
    top_logprobs: list[Top]


class ChatLogprobs(Reply):
    content: list[Scored]
    refusal: None


class ChatChoice(Reply):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Chat(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The name under which /openapi.json has a form or a reply."""
    return {"$ref": f"#/components/schemas/{kind.__module__.rpartition('.')[2]}.{kind.__name__}"}
