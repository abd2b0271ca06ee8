"""What clients send, checked: one line says which field is wrong, what it is and what it can be.

Fields that OpenAI's interface has and this server does not serve are refused by name unless they ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from functional_lm.errors import UsageError
from functional_lm.inference.requests import TooMuch

MOST_CHOICES, MOST_STOPS, MOST_PROMPTS = 16, 16, 64
SEEDS = 2**63


def _no_bool(value: Any) -> Any:
    """JSON's true is a number to Python; nobody means it as one."""
    if isinstance(value, bool):
        raise ValueError("it has to be a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Ids = list[int]


class Form(BaseModel):
    """Unknown fields are refused; numbers are not made of strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Sampled(Form):
    """How to choose tokens, as every route takes it."""

    model: str | None = Field(None, max_length=256)
    temperature: Number = Field(1.0, ge=0, le=100)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=0, le=10**9)
    min_p: Number = Field(0.0, ge=0, le=1)
    repetition_penalty: Number = Field(1.0, gt=0, le=100)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Number] | None = Field(None, max_length=1024)
    seed: Whole | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: str | list[str] | None = Field(None, max_length=1000)
    stream: bool = False
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MOST_STOPS:
            raise TooMuch(f"stop holds {len(given)} texts; it can be up to {MOST_STOPS}")
        if any(not text for text in given):
            raise UsageError("stop holds an empty text")
        return given


class StreamOptions(Form):
    include_usage: bool = False


class OpenAI(Sampled):
    """What both of OpenAI's routes have in common."""

    n: Whole = Field(1, ge=1, le=MOST_CHOICES)
    stream_options: StreamOptions | None = None
    # Refused by name unless they ask for what is done anyway.
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def refuse(self) -> None:
        """Raise UsageError for what this server does not do."""
        if self.response_format not in (None, {"type": "text"}):
            raise UsageError("response_format can only be text here")
        if self.tools or self.tool_choice not in (None, "none"):
            raise UsageError("tools are not served here")
        if self.stream_options is not None and not self.stream:
            raise UsageError("stream_options goes with stream true")

    @property
    def counting(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens to tell of; None: no logprobs. Each route spells the wish in its own way."""
        return None


class Completion(OpenAI):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids] = ""
    max_tokens: Whole = Field(16, ge=1, le=10**9)
    echo: bool = False
    best_of: Whole | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: str | None = None
    logprobs: Whole | None = Field(None, ge=0, le=20)

    @property
    def told(self) -> int | None:
        return self.logprobs

    def refuse(self) -> None:
        super().refuse()
        if self.best_of not in (None, self.n):
            raise UsageError(f"best_of is {self.best_of}; it can only be n ({self.n}) here")
        if self.suffix:
            raise UsageError("suffix is not served here")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one; each a text or its token ids."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        if not given:
            raise UsageError("prompt holds nothing; give a text, token ids, or a list of one of them")
        if len(given) > MOST_PROMPTS:
            raise TooMuch(f"prompt holds {len(given)} prompts; it can be up to {MOST_PROMPTS}")
        return given  # type: ignore[return-value]


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class Chat(OpenAI):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: Whole | None = Field(None, ge=1, le=10**9)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=10**9)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    parallel_tool_calls: bool | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse(self) -> None:
        super().refuse()
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs goes with logprobs true")


class Generate(Sampled):
    """POST /generate, the form of the original system."""

    prompt: str | None = None
    inputs: str | None = None
    max_new_tokens: Whole = Field(100, ge=1, le=10**9)

    @property
    def text(self) -> str:
        if (self.prompt is None) == (self.inputs is None):
            raise UsageError("give either prompt or inputs")
        return self.prompt if self.prompt is not None else self.inputs or ""


class Tokenize(Form):
    model: str | None = None
    prompt: str = Field(max_length=10**6)


class Detokenize(Form):
    model: str | None = None
    tokens: Ids = Field(max_length=10**6)


class LoadAdapter(Form):
    """POST /v1/load_lora_adapter, as vLLM has it; the path is one in the server's --adapter_folder."""

    lora_name: str = Field(max_length=128)
    lora_path: str = Field(max_length=1024)


class UnloadAdapter(Form):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(max_length=128)


LIMITS = ("less_than", "less_than_equal", "too_long", "string_too_long")  # pydantic's words for more than is allowed


def read(form: type[Form], value: Any) -> Any:
    """The form that a body is. Raises UsageError (TooMuch beyond a limit) naming the first wrong field."""
    if not isinstance(value, dict):
        raise UsageError("the body has to be a JSON object")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"][:2]) or "the body"
        kind = TooMuch if first["type"] in LIMITS else UsageError
        raise kind(f"{name[:80]}: {first['msg'][:200]}") from None
