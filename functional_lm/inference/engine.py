"""Many texts at once: slots of one cache, a thread that fills and decodes them, and handles to wait on.

    engine = Engine(params, config, slots=8).start()
    for token in engine.submit(Request(prompt, max_tokens=50, seed=1)): ...

Each turn of the thread puts one chunk of one waiting prompt into the cache (a long prompt does not stall the others)
and then takes one step for all running slots. What a request says depends on its own tokens, seed and settings alone,
not on its slot or company (`generate.py`). The thread owns all tensors (`board.py`); others see handles and numbers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from functional_lm.compile import release_threads
from functional_lm.errors import UsageError
from functional_lm.inference.board import Board, told
from functional_lm.inference.entries import Entries
from functional_lm.inference.generate import Scores
from functional_lm.inference.prefixes import Prefixes
from functional_lm.inference.requests import Busy, Closed, Handle, Request, Scored, StepFailed, TooMuch
from functional_lm.inference.speculation import History
from functional_lm.model import lora
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

__all__ = ["Busy", "Closed", "Engine", "Handle", "Request", "Scored", "StepFailed", "TooMuch"]

log = logging.getLogger("functional_lm.engine")


@dataclass
class _Running:
    """A slot in use: what it has to read, and what it has said."""

    handle: Handle
    window: Sequence[int]  # the prompt; of a text that has filled the context, its newer half
    read: int  # tokens of the window in the cache
    history: History | None = None  # for guesses
    said: list[int] = field(default_factory=list)
    fresh: int = 0  # how many of those were said behind the window

    @property
    def left(self) -> int:
        return len(self.window) - self.read

    @property
    def length(self) -> int:
        return len(self.window) + self.fresh

    @property
    def reading(self) -> bool:
        return self.left > 0


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
        adapters: int | None = None,
        reuse: bool = True,
        guesses: int = 0,
    ) -> None:
        """`params` may be a compute copy; `bank` (`lora.stack`) holds the adapters that requests may name, from 1.

        If it has room for more (`lora.room`), `adapters` says how many it holds. `reuse` says whether a prompt may
        begin with rows that a slot holds already. `guesses` is how many tokens each step reads ahead on the chance that
        the text repeats itself (`speculation.py`), which shortens the longest text by as many.
        """
        self.config = config
        self.slots, self.waiting, self.reuse = slots, waiting, reuse
        rows = min(length or config.max_len, config.max_len)
        self.longest = rows - guesses  # tokens of prompt and text together
        if rows < 2:
            raise UsageError(f"a context of {rows} tokens has no room for a prompt and an answer; it needs 2")
        if self.longest < 2:
            raise UsageError(f"{guesses} guesses leave nothing of a context of {rows} tokens; give at most {rows - 2}")
        self.capacity = lora.entries(bank) if bank else 0
        self.board = Board(params, config, slots, rows, compile, bank, guesses)
        self.listeners: list[Callable[[Handle], None]] = []  # called at the end of each request, on the engine's thread
        self._entries = Entries(self.capacity, self.capacity if adapters is None else adapters)
        self._prefixes = Prefixes(slots, self.board.chunk)
        self._running: dict[int, _Running] = {}
        self._queue: deque[Handle] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._turns, self._turned = 0, time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.tokens = self.requests = 0  # said and finished so far
        self.failure: BaseException | None = None

    # From other threads -----------------------------------------------------------------------------------------------

    def start(
        self,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        scored: Sequence[bool] = (False, True),
        plain: Sequence[bool] = (True, False),
        sizes: Sequence[int] = (),
    ) -> Engine:
        """Run every graph (`Board.warm`) once, so that nothing compiles while somebody waits; then serve."""
        self.board.warm(phase, scored, plain, sizes)
        release_threads()
        self._thread.start()
        return self

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises Busy when the queue is full or the engine closes, UsageError for what cannot fit."""
        if len(request.prompt) >= self.longest and not request.rolls:
            raise TooMuch(
                f"the prompt has {len(request.prompt)} tokens; this model takes {self.longest - 1} and one more to say"
            )
        outside = [token for token in (*request.prompt, *request.logit_bias) if not 0 <= token < self.config.vocab_size]
        if outside:
            raise UsageError(f"token {outside[0]} is outside the vocabulary (0..{self.config.vocab_size - 1})")
        handle = Handle(request)
        with self._changed:
            self._entries.check(request.adapter)
            self._open()
            if len(self._queue) >= self.waiting:
                raise Busy(f"{self.waiting} requests are waiting already; try again later")
            if not (self._queue or self._running):
                self._turned = time.monotonic()  # it has had nothing to do
            self._queue.append(handle)
            self._changed.notify()
        return handle

    def _open(self) -> None:
        """Raise Busy (the engine's own lock is held) unless requests are taken."""
        if self.failure is not None:
            raise Closed(f"the engine has stopped: {self.failure}")
        if self._closing:
            raise Closed("the engine is going down")

    def load_adapter(self, adapter: Tree) -> int:
        """Write an adapter into a free entry of the bank; the number by which requests name it.

        Raises UsageError where no entry is free, DataError where the adapter does not fit into one.
        """
        with self._changed:
            number, row = self._entries.take({handle.request.adapter for handle in self._handles()})
        try:
            self._between_turns(lambda: self.board.put(row, adapter))
        except BaseException:
            self.unload_adapter(number)
            raise
        return number

    def unload_adapter(self, number: int) -> None:
        """Take no more requests for an adapter; its entry is free when the last of those that are here has ended."""
        with self._changed:
            self._entries.leave(number)

    def _handles(self) -> list[Handle]:
        """All requests that are here (the engine's own lock is held)."""
        return [*self._queue, *(running.handle for running in list(self._running.values()))]

    def _between_turns(self, call: Callable[[], Any]) -> Any:
        """Run `call` on the thread that owns the tensors; its result."""
        if not self._thread.is_alive():
            return call()
        future: Future[Any] = Future()
        with self._changed:
            self._open()
            self._calls.append((call, future))
            self._changed.notify()
        return future.result()

    def close(self, drain: bool = True) -> None:
        """Take no more; finish what is there (or cancel it) and end the thread."""
        with self._changed:
            self._closing = True
            if not drain:
                for handle in self._handles():
                    handle.cancel()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> dict[str, int]:
        """Slots in use and free, requests waiting and done, tokens said."""
        return {
            "slots": self.slots,
            "running": len(self._running),
            "waiting": len(self._queue),
            "requests": self.requests,
            "tokens": self.tokens,
        }

    @property
    def crowding(self) -> float:
        """Requests here for each slot: above 1 some wait."""
        return (len(self._running) + len(self._queue)) / self.slots

    @property
    def stalled(self) -> float:
        """Seconds for which there has been work and no turn has ended."""
        return time.monotonic() - self._turned if self._running or self._queue else 0.0

    # The thread -------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with torch.no_grad():
                while self._next():
                    self._turned = time.monotonic()
        except BaseException as error:  # nothing will be served any more, and nobody may wait for it
            self._stop(error)
            log.critical("the engine has stopped", exc_info=error)

    def _next(self) -> bool:
        """Wait for work and do a turn of it; False at the end."""
        with self._changed:
            while not (self._queue or self._running or self._calls or self._closing):
                self._changed.wait()
                self._turned = time.monotonic()
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
            if not (calls or self._queue or self._running):
                return False
        for call, future in calls:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        try:
            self._admit()
            self._turn()
        except Exception as error:  # every request of this turn learns of it; the next ones are served
            self._fail(error)
        return True

    def _admit(self) -> None:
        """Requests from the queue into free slots, the oldest first."""
        with self._changed:
            for handle in [handle for handle in self._queue if handle.overdue]:
                self._queue.remove(handle)
                self._end(handle, handle.overdue)
            free = [slot for slot in range(self.slots) if slot not in self._running]
            while free and self._queue:
                handle = self._queue.popleft()
                request = handle.request
                window = request.prompt[-self.longest :]
                slot, shared = self._prefixes.best(free, window, request.whose)
                handle.cached = 0 if request.prompt_logprobs or not self.reuse else shared
                free.remove(slot)
                history = History(window) if self.board.guesses else None
                self._running[slot] = _Running(handle, window, handle.cached, history)
                self._prefixes.note(slot, window[: handle.cached], request.whose)
                self.board.settle(slot, request, self._entries.row(request.adapter), handle.cached)

    def _turn(self) -> None:
        for slot, running in list(self._running.items()):
            if reason := running.handle.overdue:
                self._finish(slot, reason)
        if reading := [slot for slot, running in self._running.items() if running.reading]:
            self._read(self._whose_turn(reading))
        for slot, running in self._running.items():
            if running.length > self.longest:
                self._roll(slot)
        if writing := [slot for slot, running in self._running.items() if not running.reading]:
            self._write(writing)

    def _whose_turn(self, reading: list[int]) -> int:
        """Of the prompts that are being read, by turns the oldest and the one with the least left.

        A short one does not wait for a long one that came before it, and nobody waits for ever.
        """
        self._turns += 1
        if self._turns % 2:
            return min(reading, key=lambda slot: self._running[slot].handle.submitted)
        return min(reading, key=lambda slot: self._running[slot].left)

    def _read(self, slot: int) -> None:
        """One chunk of a window; behind the last one, a token."""
        running = self._running[slot]
        handle, request, start = running.handle, running.handle.request, running.read
        logits, scores = self.board.read(slot, running.window, start, request.prompt_logprobs)
        running.read = min(len(running.window), start + self.board.chunk)
        self._prefixes.note(slot, running.window[: running.read], request.whose)
        if scores is not None:
            following = running.window[start + 1 : running.read + 1]
            handle.prompt_scores += told(scores, range(len(following)), following, request.logprobs or 0)
        if not running.reading:
            self._say(slot, *self.board.begin(slot, logits, request, running.said), 0)

    def _write(self, writing: list[int]) -> None:
        """One more token for every slot that has read its window."""
        plain = all(self._running[slot].handle.request.plain for slot in writing)
        ahead = self.board.guesses
        histories = [history for slot in writing if (history := self._running[slot].history) is not None]
        said, scores = self.board.step(writing, plain, [history.guess(ahead) for history in histories])
        for slot, tokens in zip(writing, said):
            for column, token in enumerate(tokens):
                if slot in self._running:  # else an earlier one of these has ended it
                    self._say(slot, token, scores, slot * (ahead + 1) + column)

    def _say(self, slot: int, token: int, scores: Scores | None, row: int) -> None:
        running = self._running[slot]
        handle, request = running.handle, running.handle.request
        if running.history is not None:
            running.history.add(token)
        if request.logprobs is not None and scores is not None:
            handle.scores += told(scores, [row], [token], request.logprobs)
        if token in request.stop_ids:
            return self._finish(slot, "stop")
        handle.say(token)
        running.said.append(token)
        running.fresh += 1
        self.tokens += 1
        if handle.made == request.max_tokens or (running.length >= self.longest and not request.rolls):
            self._finish(slot, "length")
        return None

    def _roll(self, slot: int) -> None:
        """The context is full: the newer half of the text is to be read again, from the first row on."""
        running = self._running[slot]
        text = [*running.window, *running.said[len(running.said) - running.fresh :]]
        running.window, running.read, running.fresh = text[-(self.longest // 2 + 1) :], 0, 0
        self._prefixes.note(slot, (), running.handle.request.whose)
        self.board.release(slot, 0)

    def _finish(self, slot: int, reason: str, error: BaseException | None = None) -> None:
        handle = self._running.pop(slot).handle
        self.board.release(slot, self._prefixes.rows(slot))
        self._end(handle, reason, error)

    def _end(self, handle: Handle, reason: str, error: BaseException | None = None) -> None:
        self.requests += 1
        handle.end(reason, error)
        for listener in self.listeners:
            listener(handle)

    def _fail(self, error: BaseException) -> None:
        """End what runs; the cache may hold anything now."""
        for slot in list(self._running):
            handle = self._running.pop(slot).handle
            self._end(handle, "error", StepFailed(f"the step failed: {error}"))
        self.board.reset()
        self._prefixes.forget()

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            handles = self._handles()
            self._running.clear()
            self._queue.clear()
            calls = list(self._calls)
        for handle in handles:
            self._end(handle, "error", Closed(f"the engine has stopped: {error}"))
        for _, future in calls:
            future.set_exception(Closed(f"the engine has stopped: {error}"))
