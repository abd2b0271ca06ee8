"""Many texts at once: slots of one cache, a thread that fills and decodes them, and handles to wait on.

    engine = Engine(params, config, slots=8).start()
    for token in engine.submit(Request(prompt, max_tokens=50, seed=1)): ...

Each turn of the thread puts one chunk of one waiting prompt into the cache (a long prompt does not stall the others)
and then takes one step for all running slots. What a request says depends on its own tokens, seed and settings alone,
not on its slot or company (`generate.py`). The thread owns all tensors (`board.py`); others see handles and numbers.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import torch

from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference.board import Board, told
from functional_lm.inference.generate import Scores
from functional_lm.inference.requests import Busy, Handle, Request, Scored
from functional_lm.model import lora
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

__all__ = ["Busy", "Engine", "Handle", "Request", "Scored"]


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
        self.config = config
        self.slots, self.waiting = slots, waiting
        self.longest = min(length or config.max_len, config.max_len)  # tokens of prompt and text together
        self.adapters = lora.entries(bank) if bank else 0
        self.board = Board(params, config, slots, self.longest, compile, bank)
        self._running: dict[int, _Running] = {}
        self._queue: deque[Handle] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.tokens = self.requests = 0  # said and finished so far
        self.failure: BaseException | None = None

    # From other threads -----------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Run every graph once, so that nothing compiles while somebody waits, then serve."""
        self.board.warm()
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
            handle.end(handle.overdue)
        for slot in range(self.slots):
            if slot not in self._running and self._queue:
                self._running[slot] = _Running(self._queue.popleft())
                self.board.settle(slot, self._running[slot].handle.request)

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
        logits, scores = self.board.read(slot, request.prompt, start, request.prompt_logprobs)
        running.read = min(len(request.prompt), start + self.board.chunk)
        if scores is not None:
            following = request.prompt[start + 1 : running.read + 1]
            handle.prompt_scores += told(scores, range(len(following)), following, request.logprobs or 0)
        if not running.reading:
            self._say(slot, *self.board.begin(slot, logits, request), 0)

    def _write(self, writing: list[int]) -> None:
        """One more token for every slot that has read its prompt."""
        plain = all(self._running[slot].handle.request.plain for slot in writing)
        tokens, scores = self.board.step(writing, plain)
        for slot, token in zip(writing, tokens):
            self._say(slot, token, scores, slot)

    def _say(self, slot: int, token: int, scores: Scores | None, row: int) -> None:
        running = self._running[slot]
        request = running.handle.request
        if request.logprobs is not None and scores is not None:
            running.handle.scores += told(scores, [row], [token], request.logprobs)
        if token in request.stop_ids:
            return self._finish(slot, "stop")
        running.handle.say(token)
        running.made += 1
        self.tokens += 1
        if running.made == request.max_tokens or len(request.prompt) + running.made >= self.longest:
            self._finish(slot, "length")
        return None

    def _finish(self, slot: int, reason: str, error: BaseException | None = None) -> None:
        self.requests += 1
        self._running.pop(slot).handle.end(reason, error)
        self.board.release(slot)

    def _fail(self, error: BaseException) -> None:
        for slot in list(self._running):
            self._finish(slot, "error", FunctionalLMError(f"the step failed: {error}"))
        self.board.reset()
        if not isinstance(error, Exception):
            self.failure = error
            raise error
