"""What is asked of an engine and what comes back: plain values and handles, which other threads may hold."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference.generate import ALTERNATIVES

PATIENCE = 1.0  # seconds between two looks at whether the client is still there


class Busy(FunctionalLMError):
    """The queue is full; try again later."""


class Closed(Busy):
    """The engine is going down, or has stopped."""


class StepFailed(FunctionalLMError):
    """An error inside the engine ended a request."""


class TooMuch(UsageError):
    """More than a limit allows."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how. Raises UsageError for settings that cannot be meant."""

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    seconds: float = float("inf")  # longest time from submission to end
    logprobs: int | None = None  # how many of the likeliest tokens to tell of at each place; None: tell nothing
    prompt_logprobs: bool = False  # of the prompt too
    adapter: int = 0  # number that the engine gave it; 0: the model itself
    owner: str = ""  # whose it is: what slots hold of a prompt is used for prompts of the same owner alone
    rolls: bool = False  # a text that fills the context goes on from its newer half, instead of ending there

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty; it has to hold at least one token")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it has to be at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= ALTERNATIVES:
            raise UsageError(f"logprobs is {self.logprobs}; it has to be between 0 and {ALTERNATIVES}")

    @property
    def plain(self) -> bool:
        """Whether temperature and seed are all there is: neither sorting nor counting is needed."""
        truncating = (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)
        return not truncating and not self.penalizing and self.logprobs is None

    @property
    def whose(self) -> tuple[int, str]:
        """Whom the rows of its prompt belong to."""
        return self.adapter, self.owner

    @property
    def penalizing(self) -> bool:
        off = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != off or bool(self.logit_bias)


class Scored(NamedTuple):
    """A token with its natural log-likelihood, and the likeliest ones at its place."""

    token: int
    logprob: float
    likeliest: dict[int, float]


class Handle:
    """One request on its way: iterate for its tokens; `finish_reason` is set at the end.

    "stop" (a stop id, which is not among the tokens), "length" (max_tokens, or the cache is full), "cancelled",
    "timeout", or "error".
    """

    def __init__(self, request: Request) -> None:
        self.request, self.finish_reason = request, ""
        self.error: BaseException | None = None
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # seconds after submission
        self.seconds: float | None = None  # the same of the end
        self.made = 0  # tokens said
        self.cached = 0  # tokens of the prompt that a slot held already
        self.prompt_scores: list[Scored] = []  # from the second token of the prompt on, where asked for
        self.scores: list[Scored] = []  # of what was said, where asked for; the stop id that ended it included
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._cancelled, self._ended = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[int]:
        return self.follow()

    def follow(self, gone: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """The tokens as they come; cancelled when `gone` (asked at each token, and while there is none) says so."""
        while True:
            try:
                token = self._tokens.get(timeout=PATIENCE)
            except queue.Empty:
                if gone():
                    self.cancel()
                continue
            if token is None:
                break
            if gone():
                self.cancel()
            yield token
        if self.error is not None:
            raise self.error

    @property
    def pending(self) -> bool:
        """Whether a token (or the end) is there already."""
        return not self._tokens.empty()

    def rest(self, seconds: float) -> None:
        """Wait so long, or until the end."""
        self._ended.wait(seconds)

    def cancel(self) -> None:
        """Give the slot back soon; what has been said stays."""
        self._cancelled.set()

    @property
    def overdue(self) -> str:
        """Why it has to end now, "" if it has not."""
        if self._cancelled.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() - self.submitted > self.request.seconds else ""

    def say(self, token: int) -> None:
        if self.first_token is None:
            self.first_token = time.monotonic() - self.submitted
        self.made += 1
        self._tokens.put(token)

    def end(self, reason: str, error: BaseException | None = None) -> None:
        self.finish_reason, self.error = reason, error
        self.seconds = time.monotonic() - self.submitted
        self._tokens.put(None)
        self._ended.set()
