"""The loop around the pure step: batches in, records out, a clock beside it. All of training's effects meet here.

It knows nothing of files or text: data, validation and saving come in as functions.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from functional_lm import compile as compiling
from functional_lm import console, tree
from functional_lm.compile import compiled
from functional_lm.errors import FunctionalLMError
from functional_lm.training.step import Batch, Metrics, Training, TrainState
from functional_lm.tree import Tree

Report = Mapping[str, Tensor]
UNTIMED = 10  # first steps that do not count towards tokens per second


class Hooks(NamedTuple):
    """What the loop asks of the world outside."""

    batch: Callable[[int], Batch]  # the microbatch of this number, on the device; a pure function
    record: Callable[[int, Mapping[str, float]], None]
    validate: Callable[[TrainState], Mapping[str, float]]
    save: Callable[[TrainState], None]


@dataclass(frozen=True)
class Plan:
    """How far and how often; counted in steps, 0 for never."""

    steps: int
    tokens_per_step: int
    accumulation: int = 1
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 1
    compile: bool = True
    progress: bool = True


@dataclass
class Outcome:
    """What the loop measured."""

    state: TrainState
    steps: int = 0
    compile_seconds: float = 0.0
    interrupted: bool = False
    rates: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps after the tenth (over all, in a shorter run)."""
        rates = self.rates[UNTIMED:] or self.rates
        return statistics.median(rates) if rates else 0.0


Step = Callable[[TrainState, int], tuple[TrainState, Report]]


def whole_step(functions: Training, batch: Callable[[int], Batch], accumulation: int, compile: bool) -> Step:
    """`(state, number of steps done) -> (state, report)`, compiled and donated.

    A single microbatch is one graph. Several are one graph that adds a microbatch's sums to a running total, called
    for each of them, and one that applies the total: nothing is unrolled.
    """
    if accumulation == 1:
        step = compiled(functions.train_step, donate=True, enabled=compile)
        return lambda state, done: step(state, batch(done))

    def accumulate(total: Any, state: TrainState, batch: Batch, microbatch: Tensor) -> tuple[Any, None]:
        return tree.add(total, functions.gradients(state, batch, microbatch)), None

    add = compiled(accumulate, donate=True, enabled=compile)
    apply = compiled(functions.apply, donate=True, enabled=compile)

    def several(state: TrainState, done: int) -> tuple[TrainState, Report]:
        device = state.step.device
        total: tuple[Tree, Metrics] = (
            tree.map(lambda p: torch.zeros_like(p, dtype=torch.float32), state.params),
            Metrics(torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)),
        )
        for i in range(accumulation):
            total, _ = add(total, state, batch(done * accumulation + i), torch.tensor(i, device=device))
        return apply(state, *total)

    return several


def run(state: TrainState, functions: Training, plan: Plan, hooks: Hooks) -> Outcome:
    """Train to `plan.steps`. Ctrl-C or SIGTERM finishes the step, saves and returns; a second one ends at once.

    Raises FunctionalLMError when the loss or the gradient is not finite; that step's state is not saved.
    """
    step = whole_step(functions, hooks.batch, plan.accumulation, plan.compile)
    outcome, done = Outcome(state), int(state.step)
    if done >= plan.steps:
        return outcome
    with _stopping() as stopping:
        with console.announced("compiling the training step", quiet=not plan.compile) as clock:
            outcome.state, report = step(outcome.state, done)
            compiling.synchronize(state.step.device)
        outcome.compile_seconds = clock.seconds if plan.compile else 0.0
        readings = _Readings(plan, in_flight=0 if state.step.device.type == "cpu" else 1)
        with _bar(plan, done) as bar:
            for number in range(done + 1, plan.steps + 1):
                if number > done + 1:
                    outcome.state, report = step(outcome.state, number - 1)
                readings.add(number, report)
                last = number == plan.steps or stopping()
                validating, saving = _due(number, plan.eval_every) and not last, _due(number, plan.save_every) or last
                for settled, values in readings.ready(everything=validating or saving):
                    _show(bar, values)
                    if settled % plan.log_every == 0 or last:
                        hooks.record(settled, values)
                if validating:
                    hooks.record(number, hooks.validate(outcome.state))
                if saving:
                    hooks.save(outcome.state)
                if validating or saving:
                    readings.restart_clock()
                    bar.unpause()
                if last:
                    break
        outcome.steps, outcome.interrupted, outcome.rates = number - done, number < plan.steps, readings.rates
    return outcome


class _Readings:
    """The steps' numbers, read while the device already works on the next step, and the rate at which they come."""

    def __init__(self, plan: Plan, in_flight: int) -> None:
        self.rates: list[float] = []
        self._plan, self._in_flight = plan, in_flight
        self._unread: deque[tuple[int, Report]] = deque()
        self._mark: float | None = None  # None: the time since the last reading is not that of a step

    def add(self, number: int, report: Report) -> None:
        self._unread.append((number, report))

    def ready(self, everything: bool) -> Iterator[tuple[int, dict[str, float]]]:
        while len(self._unread) > (0 if everything else self._in_flight):
            number, report = self._unread.popleft()
            values = {name: float(value) for name, value in report.items()}
            for what, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
                if not math.isfinite(values[name]):
                    raise FunctionalLMError(
                        f"the {what} is {values[name]} at step {number}; lower --learning_rate or raise --warmup_steps"
                    )
            now = time.perf_counter()
            if self._mark is not None:
                self.rates.append(self._plan.tokens_per_step / (now - self._mark))
            self._mark = now
            yield number, values | {"tokens_per_second": self.rates[-1] if self.rates else 0.0}

    def restart_clock(self) -> None:
        self._mark = time.perf_counter()


def _bar(plan: Plan, done: int) -> tqdm[Any]:
    return tqdm(
        total=plan.steps,
        initial=done,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        disable=None if plan.progress else True,
    )


def _show(bar: tqdm[Any], values: Mapping[str, float]) -> None:
    rate = console.count(values["tokens_per_second"])
    bar.set_postfix_str(f"loss {values['loss']:.3f}, lr {values['learning_rate']:.2e}, {rate} tokens/s", refresh=False)
    bar.update()


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """A function that tells whether the first Ctrl-C or SIGTERM has come; the second one acts as always."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for name, handler in before.items():
            signal.signal(name, handler)
        console.say("\nfinishing this step, then saving (once more to stop at once)")

    before: dict[signal.Signals, Any] = {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, ask)
    except ValueError:  # not the main thread: whoever runs it handles signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
