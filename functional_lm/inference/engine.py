"""Many texts at once: slots of one cache, a thread that fills and decodes them, and handles to wait on.

    engine = Engine(params, config, slots=8).start()
    for token in engine.submit(Request(prompt, max_tokens=50, seed=1)): ...

Each turn of the thread puts one chunk of one waiting prompt into the cache (a long prompt does not stall the others)
and then takes one step for all running slots. What a request says depends on its own tokens, seed and settings alone,
not on its slot or company (`generate.py`). The thread owns all tensors; others see handles and numbers.

Axes: S slots, V vocabulary, C cache length.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference import cache as kv
from functional_lm.inference.generate import (
    ALTERNATIVES,
    CHUNK,
    Scores,
    Slots,
    choose,
    decode_scored,
    decode_step,
    prefill_scored,
    prefill_slot,
    score,
)
from functional_lm.inference.sampling import Penalties, Sampling
from functional_lm.model import lora
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import precision
from functional_lm.tree import Tree


class Busy(FunctionalLMError):
    """The queue is full, or the engine is going down; try again later."""


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
    adapter: int = 0  # entry of the engine's bank; 0: the model itself

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
        self.prompt_scores: list[Scored] = []  # from the second token of the prompt on, where asked for
        self.scores: list[Scored] = []  # of what was said, where asked for; the stop id that ended it included
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            yield token
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Give the slot back soon; what has been said stays."""
        self._cancelled.set()

    @property
    def overdue(self) -> str:
        """Why it has to end now, "" if it has not."""
        if self._cancelled.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() - self.submitted > self.request.seconds else ""

    def _say(self, token: int) -> None:
        if self.first_token is None:
            self.first_token = time.monotonic() - self.submitted
        self._tokens.put(token)

    def _end(self, reason: str, error: BaseException | None = None) -> None:
        self.finish_reason, self.error = reason, error
        self._tokens.put(None)


@dataclass
class _Running:
    """A slot in use."""

    handle: Handle
    read: int = 0  # prompt tokens in the cache
    made: int = 0  # tokens said

    @property
    def reading(self) -> bool:
        return self.read < len(self.handle.request.prompt)


class Engine:
    """Continuous batching over one model. `start` compiles; then `submit` from any thread; `close` drains."""

    def __init__(
        self,
        params: Tree,
        config: ModelConfig,
        slots: int = 8,
        length: int | None = None,
        waiting: int = 64,
        compile: bool = True,
        bank: Tree | None = None,
    ) -> None:
        """`params` may be a compute copy; `bank` (`lora.stack`) holds the adapters that requests may name, from 1."""
        self.config = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)
        self.slots, self.waiting = slots, waiting
        self.chunk = min(CHUNK, config.max_len)
        self.length = -(-min(length or config.max_len, config.max_len) // self.chunk) * self.chunk
        self.longest = min(length or config.max_len, config.max_len)  # tokens of prompt and text together
        self.adapters = lora.entries(bank) if bank else 0
        self._params = (params, bank or {})
        self._device = tree.leaves(params)[0].device
        dtype = precision(params["model"]["embed_tokens"])
        self._cache = kv.init(self.config, slots, self.length, dtype, self._device)
        self._state = self._empty()
        self._running: dict[int, _Running] = {}
        self._queue: deque[Handle] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.tokens = self.requests = 0  # said and finished so far
        self.failure: BaseException | None = None
        self._fill = compiled(partial(_fill, config=self.config), donate=True, enabled=compile)
        self._fill_scored = compiled(partial(_fill_scored, config=self.config), donate=True, enabled=compile)
        self._steps: dict[bool, Callable[..., Any]] = {
            plain: compiled(partial(_step, config=self.config, plain=plain), donate=True, enabled=compile)
            for plain in (True, False)
        }

    def _empty(self) -> Slots:
        def whole(value: float, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.full((self.slots,), value, dtype=kind, device=self._device)

        sampling = Sampling.uniform(self.slots, 1.0, device=self._device)
        penalties = Penalties.none(self.slots, self.config.vocab_size, self._device)
        own = keys.key(0, self._device).expand(self.slots, 2).clone()
        return Slots(whole(0), whole(0), whole(0), own, sampling, penalties, whole(0))

    # From other threads -----------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Run every graph once, so that nothing compiles while somebody waits, then serve."""
        with torch.inference_mode(False), torch.no_grad():
            self._read_chunk(0, (0, 0), 0, scored=False)
            self._read_chunk(0, (0, 0), 0, scored=True)
            for step in self._steps.values():
                (self._cache, self._state), _ = step((self._cache, self._state), self._params)
        self._state = self._empty()
        self._thread.start()
        return self

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises Busy when the queue is full or the engine closes, UsageError for what cannot fit."""
        if len(request.prompt) >= self.longest:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens; this model takes {self.longest - 1} and one more to say"
            )
        outside = [token for token in (*request.prompt, *request.logit_bias) if not 0 <= token < self.config.vocab_size]
        if outside:
            raise UsageError(f"token {outside[0]} is outside the vocabulary (0..{self.config.vocab_size - 1})")
        if not 0 <= request.adapter <= self.adapters:
            raise UsageError(f"adapter {request.adapter} is none of the {self.adapters} that are here")
        handle = Handle(request)
        with self._changed:
            if self.failure is not None:
                raise Busy(f"the engine has stopped: {self.failure}")
            if self._closing:
                raise Busy("the engine is going down")
            if len(self._queue) >= self.waiting:
                raise Busy(f"{self.waiting} requests are waiting already; try again later")
            self._queue.append(handle)
            self._changed.notify()
        return handle

    def close(self, drain: bool = True) -> None:
        """Take no more; finish what is there (or cancel it) and end the thread."""
        with self._changed:
            self._closing = True
            if not drain:
                for handle in (*self._queue, *(running.handle for running in self._running.values())):
                    handle.cancel()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> dict[str, int]:
        """Slots in use and free, requests waiting and done, tokens said."""
        running = len(self._running)
        return {
            "slots": self.slots,
            "running": running,
            "waiting": len(self._queue),
            "requests": self.requests,
            "tokens": self.tokens,
        }

    # The thread -------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    while not self._queue and not self._running and not self._closing:
                        self._changed.wait()
                    if self._closing and not self._queue and not self._running:
                        return
                    self._admit()
                try:
                    self._turn()
                except BaseException as error:  # every request of this turn learns of it; the next ones are served
                    self._fail(error)

    def _admit(self) -> None:
        """Requests from the queue into free slots, the oldest first."""
        for handle in [handle for handle in self._queue if handle.overdue]:
            self._queue.remove(handle)
            handle._end(handle.overdue)
        for slot in range(self.slots):
            if slot not in self._running and self._queue:
                self._running[slot] = _Running(self._queue.popleft())
                self._settle(slot, self._running[slot].handle.request)

    def _settle(self, slot: int, request: Request) -> None:
        """Write a request's settings into its slot."""
        state = self._state
        assert state.penalties
        assert isinstance(state.adapters, Tensor)
        state.tokens[slot] = state.positions[slot] = state.drawn[slot] = 0
        state.keys[slot] = keys.key(request.seed, self._device)
        for name in ("temperature", "top_k", "top_p"):
            getattr(state.sampling, name)[slot] = getattr(request, name)
        state.adapters[slot] = request.adapter
        by = state.penalties
        by.min_p[slot], by.repetition[slot] = request.min_p, request.repetition_penalty
        by.presence[slot], by.frequency[slot] = request.presence_penalty, request.frequency_penalty
        by.bias[slot], by.prompted[slot], by.counts[slot] = 0.0, False, 0
        by.prompted[slot, list(request.prompt)] = True
        for token, value in request.logit_bias.items():
            by.bias[slot, token] = value

    def _turn(self) -> None:
        for slot, running in list(self._running.items()):
            if reason := running.handle.overdue:
                self._finish(slot, reason)
        reading = [slot for slot, running in self._running.items() if running.reading]
        if reading:
            self._read(min(reading, key=lambda slot: self._running[slot].handle.submitted))
        writing = [slot for slot, running in self._running.items() if not running.reading]
        if writing:
            self._write(writing)

    def _read(self, slot: int) -> None:
        """One chunk of a prompt; behind the last one, the first token."""
        running = self._running[slot]
        handle, request, start = running.handle, running.handle.request, running.read
        logits, scores = self._read_chunk(slot, request.prompt, start, request.prompt_logprobs)
        running.read = min(len(request.prompt), start + self.chunk)
        self._state.positions[slot] = running.read  # where a step of the others may write without harm
        if scores is not None:
            following = request.prompt[start + 1 : running.read + 1]
            handle.prompt_scores += _told(scores, range(len(following)), following, request.logprobs or 0)
        if not running.reading:
            assert self._state.penalties
            self._state.penalties.counts[slot] = 0  # steps of the others have counted here too
            own = tree.map(lambda rows: rows[slot : slot + 1], self._state)
            token = choose(logits, own, truncating=not request.plain)
            self._state.tokens[slot] = token[0]
            self._state.drawn[slot] = 1
            self._state.penalties.counts[slot, token] = 1
            self._say(slot, int(token), score(logits, token) if request.logprobs is not None else None, 0)

    def _read_chunk(self, slot: int, prompt: Sequence[int], start: int, scored: bool) -> tuple[Tensor, Scores | None]:
        """Logits behind the chunk of `prompt` that begins at `start`."""

        def whole(*values: int) -> Tensor:
            return torch.tensor(values, device=self._device)

        part, following = (list(prompt[begin : begin + self.chunk]) for begin in (start, start + 1))
        assert isinstance(self._state.adapters, Tensor)
        place = (whole(slot), whole(start), whole(len(part) - 1), self._state.adapters[slot : slot + 1].clone())
        padded, following = (ids + [0] * (self.chunk - len(ids)) for ids in (part, following))
        if scored:
            self._cache, (logits, scores) = self._fill_scored(
                self._cache, self._params, whole(*padded)[None], whole(*following), *place
            )
            return logits, scores
        self._cache, logits = self._fill(self._cache, self._params, whole(*padded)[None], *place)
        return logits, None

    def _write(self, writing: list[int]) -> None:
        """One more token for every slot that has read its prompt; what the others compute is not looked at."""
        idle = [slot for slot in range(self.slots) if slot not in writing]
        kept = [rows[idle] for rows in (self._state.tokens, self._state.positions, self._state.drawn)]
        plain = all(self._running[slot].handle.request.plain for slot in writing)
        (self._cache, self._state), said = self._steps[plain]((self._cache, self._state), self._params)
        tokens, scores = (said, None) if plain else said
        for rows, before in zip((self._state.tokens, self._state.positions, self._state.drawn), kept):
            rows[idle] = before
        for slot, token in zip(writing, tokens[writing].tolist()):
            self._say(slot, token, scores, slot)

    def _say(self, slot: int, token: int, scores: Scores | None, row: int) -> None:
        running = self._running[slot]
        request = running.handle.request
        if request.logprobs is not None and scores is not None:
            running.handle.scores += _told(scores, [row], [token], request.logprobs)
        if token in request.stop_ids:
            return self._finish(slot, "stop")
        running.handle._say(token)
        running.made += 1
        self.tokens += 1
        if running.made == request.max_tokens or len(request.prompt) + running.made >= self.longest:
            self._finish(slot, "length")
        return None

    def _finish(self, slot: int, reason: str, error: BaseException | None = None) -> None:
        self.requests += 1
        self._running.pop(slot).handle._end(reason, error)
        self._state.positions[slot] = 0

    def _fail(self, error: BaseException) -> None:
        for slot in list(self._running):
            self._finish(slot, "error", FunctionalLMError(f"the step failed: {error}"))
        self._state = self._empty()
        if not isinstance(error, Exception):
            self.failure = error
            raise error


def _told(scores: Scores, rows: Iterable[int], tokens: Iterable[int], count: int) -> list[Scored]:
    """Rows of scores as numbers, each with its `count` likeliest tokens."""
    chosen, values, ids = (part.tolist() for part in scores)
    return [
        Scored(token, chosen[row], dict(zip(ids[row][:count], values[row][:count]))) for row, token in zip(rows, tokens)
    ]


Weights = tuple[Tree, Tree]  # a model and a bank of adapters, empty without any


def _whole(weights: Weights, index: Tensor) -> Tree:
    """The model in which row i goes through entry `index[i]` of the bank."""
    params, adapters = weights
    return lora.attach(params, lora.select(adapters, index)) if adapters else params


def _fill(
    cache: Tree,
    weights: Weights,
    tokens: Tensor,
    slot: Tensor,
    position: Tensor,
    last: Tensor,
    adapter: Tensor,
    config: ModelConfig,
) -> tuple[Tree, Tensor]:
    return prefill_slot(_whole(weights, adapter), cache, tokens, slot, position, last, config)


def _fill_scored(
    cache: Tree,
    weights: Weights,
    tokens: Tensor,
    following: Tensor,
    slot: Tensor,
    position: Tensor,
    last: Tensor,
    adapter: Tensor,
    config: ModelConfig,
) -> tuple[Tree, tuple[Tensor, Scores]]:
    return prefill_scored(_whole(weights, adapter), cache, tokens, following, slot, position, last, config)


def _step(
    state: tuple[Tree, Slots], weights: Weights, config: ModelConfig, plain: bool
) -> tuple[tuple[Tree, Slots], Any]:
    """Tokens of a step; their scores too, unless all slots are `plain`: then the penalties (off) stay as they are."""
    cache, slots = state
    assert isinstance(slots.adapters, Tensor)
    params = _whole(weights, slots.adapters)
    if not plain:
        return decode_scored(state, params, config, truncating=True)
    (cache, after), tokens = decode_step((cache, slots._replace(penalties=())), params, config, truncating=False)
    return (cache, after._replace(penalties=slots.penalties)), tokens
