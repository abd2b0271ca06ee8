"""The loop around the pure step: batches in, records out, a clock beside it. All of training's effects meet here.

It knows nothing of files or text: data, validation and saving come in as functions.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from functional_lm.training.record import Value, Values
from functional_lm.training.step import Batch, Metrics, Training, TrainState
from functional_lm.tree import Tree

Report = Mapping[str, Tensor]
SETTLED, MEMORY = 20, 50  # losses before a spike is told from the beginning; that their running mean is over
UNTIMED = 10  # first steps that do not count towards tokens per second


class Progress(NamedTuple):
    """What the loop itself remembers, beside the state, for a run that goes on from here."""

    seconds: float = 0.0  # that the run has taken so far
    bad: int = 0  # steps in a row, up to here, that changed nothing
    losses: tuple[float, int] = (0.0, 0)  # their running mean, and how many of them are in it


NOTHING = Progress()


class Hooks(NamedTuple):
    """What the loop asks of the world outside. Values are numbers, or lists of them for a population."""

    batch: Callable[[int], Batch]  # the microbatch of this number, on the device; a pure function
    record: Callable[[int, Values], None]
    validate: Callable[[TrainState], Values]
    save: Callable[[TrainState, Progress], None]  # at the end of a step; the state is used up by the next one
    sample: Callable[[TrainState], None] = lambda state: None
    enough: Callable[[], bool] = lambda: False  # asked after a validation: whether to end here
    watch: Callable[[int], None] = lambda number: None  # after every step


@dataclass(frozen=True)
class Plan:
    """How far and how often; counted in steps, 0 for never."""

    steps: int  # 0: until the time is up
    tokens_per_step: int
    accumulation: int = 1
    eval_every: int = 0
    save_every: int = 0
    sample_every: int = 0
    log_every: int = 1
    compile: bool = True
    progress: bool = True
    seconds: float = 0.0  # wall time to train for, compiling included; 0: as long as the steps take
    before: Progress = NOTHING  # of earlier parts of this run
    ahead: int = 0  # steps' worth of batches that were passed over
    spike: float = 0.0  # a loss so many times its running mean ends the loop ("spike") unsaved; 0: none does
    save_epochs: float = 0.0  # steps an epoch has, to save after each; 0: no such checkpoints
    bad_steps: int = 10  # skipped ones in a row that end the run


@dataclass
class Outcome:
    """What the loop measured."""

    state: TrainState
    steps: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0  # of the whole run, earlier parts included
    ended: str = "steps"  # or "time", "patience", "interrupted", "spike": what made it stop
    last: int = 0  # the step that it stopped behind
    rates: list[float] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        return self.ended == "interrupted"

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps after the tenth (over all, in a shorter run)."""
        rates = self.rates[UNTIMED:] or self.rates
        return statistics.median(rates) if rates else 0.0


Step = Callable[[TrainState, int], tuple[TrainState, Report]]


def whole_step(
    functions: Training, batch: Callable[[int], Batch], accumulation: int, compile: bool, ahead: int = 0
) -> Step:
    """`(state, number of steps done) -> (state, report)`, compiled and donated.

    A single microbatch is one graph. Several are one graph that adds a microbatch's sums to a running total, called
    for each of them, and one that applies the total: nothing is unrolled.
    """
    if accumulation == 1:
        step = compiled(functions.train_step, donate=True, enabled=compile)
        return lambda state, done: step(state, batch(done + ahead))

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
            total, _ = add(total, state, batch((done + ahead) * accumulation + i), torch.tensor(i, device=device))
        return apply(state, *total)

    return several


def run(
    state: TrainState, functions: Training, plan: Plan, hooks: Hooks, stopping: Callable[[], bool] = lambda: False
) -> Outcome:
    """Train until the plan's end; once `stopping()` (`stopping_by_signal`), finish the step, save and return.

    Raises FunctionalLMError when loss or gradient were not finite for `plan.bad_steps` steps in a row.
    """
    step = whole_step(functions, hooks.batch, plan.accumulation, plan.compile, plan.ahead)
    outcome, done = Outcome(state, seconds=plan.before.seconds, last=steps_taken(state)), steps_taken(state)
    clock = _Clock(plan, done)
    if ended := clock.ending(done):
        outcome.ended = ended
        return outcome
    with (
        compilers_end_with_us(stopping),
        console.announced("compiling the training step", quiet=not plan.compile) as compiling_clock,
    ):
        outcome.state, report = step(outcome.state, done)
        compiling.synchronize(state.step.device)
    outcome.compile_seconds = compiling_clock.seconds if plan.compile else 0.0
    clock.start()
    readings = _Readings(plan, in_flight=0 if state.step.device.type == "cpu" else 1)
    with _bar(plan, done) as bar:
        for number in itertools.count(done + 1):
            if number > done + 1:
                outcome.state, report = step(outcome.state, number - 1)
            hooks.watch(number)
            readings.add(number, report)
            ended = clock.ending(number) or ("interrupted" if stopping() else "")
            validating = _due(number, plan.eval_every) and not ended
            saving = _due(number, plan.save_every) or _ends_epoch(number, plan.save_epochs) or bool(ended)
            sampling = _due(number, plan.sample_every) and not ended
            for settled, values in readings.ready(everything=validating or saving or sampling):
                _show(bar, values)
                if settled % plan.log_every == 0 or ended or "skipped" in values:
                    hooks.record(settled, values)
            if readings.spiked:
                ended = "spike"
                break
            if validating:
                hooks.record(number, hooks.validate(outcome.state))
                ended = "patience" if hooks.enough() else ""
            if sampling:
                hooks.sample(outcome.state)
            if saving or ended:
                hooks.save(outcome.state, readings.progress(clock.seconds))
            if validating or saving or sampling:
                readings.restart_clock()
                bar.unpause()
            if ended:
                break
            if (total := clock.estimate(number)) is not None:
                outcome.state = lasting(outcome.state, total)
                bar.total = total
    outcome.steps, outcome.ended, outcome.rates, outcome.last = number - done, ended, readings.rates, number
    outcome.seconds = clock.seconds
    return outcome


@contextmanager
def compilers_end_with_us(stopping: Callable[[], bool]) -> Iterator[None]:
    """A signal to all processes of a terminal or a container ends the C++ compiler in the middle of its work.

    What the package itself has to say is said. Raises KeyboardInterrupt.
    """
    try:
        yield
    except FunctionalLMError:
        raise
    except Exception as error:
        if stopping():
            raise KeyboardInterrupt from error
        raise


def steps_taken(state: TrainState) -> int:
    """How many steps a state, or each state of a population, has behind it."""
    return int(state.step.max())


def lasting(state: TrainState, total: float) -> TrainState:
    """The state in a run of `total` steps, as schedules see it."""
    numbers = {**state.numbers, "total_steps": torch.full_like(state.numbers["total_steps"], total)}
    return state._replace(numbers=numbers)


class _Clock:
    """The seconds of a run, and when a run that is limited by them is going to end."""

    EVERY = 10  # steps between estimates

    def __init__(self, plan: Plan, done: int) -> None:
        self._plan, self._began = plan, time.perf_counter()
        self._first, self._first_at = done + 1, self._began

    def start(self) -> None:
        """The first step, which compiles, is behind us."""
        self._first_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._plan.before.seconds + time.perf_counter() - self._began

    def ending(self, number: int) -> str:
        """Why the run ends after step `number`, "" if it does not."""
        if self._plan.steps and number >= self._plan.steps:
            return "steps"
        return "time" if self._plan.seconds and self.seconds >= self._plan.seconds else ""

    def estimate(self, number: int) -> int | None:
        """The length of a run limited by time, now and then; at the pace since the first step."""
        passed = number - self._first
        if not self._plan.seconds or passed < 1 or number % self.EVERY:
            return None
        pace = (time.perf_counter() - self._first_at) / passed
        total = number + max(1, round((self._plan.seconds - self.seconds) / pace))
        return min(total, self._plan.steps or total)


class _Readings:
    """The steps' numbers, read while the device already works on the next step, and the rate at which they come."""

    def __init__(self, plan: Plan, in_flight: int) -> None:
        self.rates: list[float] = []
        self._plan, self._in_flight = plan, in_flight
        self._unread: deque[tuple[int, Report]] = deque()
        self._mark: float | None = None  # None: the time since the last reading is not that of a step
        self._bad = plan.before.bad  # steps in a row that changed nothing
        self._mean, self._counted = plan.before.losses
        self.spiked = False

    def add(self, number: int, report: Report) -> None:
        self._unread.append((number, report))

    def ready(self, everything: bool) -> Iterator[tuple[int, dict[str, Value]]]:
        while len(self._unread) > (0 if everything else self._in_flight):
            number, report = self._unread.popleft()
            values: dict[str, Value] = {name: value.tolist() for name, value in report.items()}
            now = time.perf_counter()
            if self._mark is not None:
                self.rates.append(self._plan.tokens_per_step / (now - self._mark))
            self._mark = now
            skipped = self._skipped(number, report)
            self._watch(values["loss"], bool(skipped))
            yield number, {**values, "tokens_per_second": self.rates[-1] if self.rates else 0.0, **skipped}

    def _skipped(self, number: int, report: Report) -> dict[str, Value]:
        """How many members (of one, or of a population) this step left as they were and where in the data that was."""
        finite = torch.isfinite(report["loss"]) & torch.isfinite(report["grad_norm"])
        if finite.all():
            self._bad = 0
            return {}
        self._bad = 0 if finite.any() else self._bad + 1
        place = (number - 1 + self._plan.ahead) * self._plan.accumulation
        if self._bad >= self._plan.bad_steps:
            what = "gradient norm" if torch.isfinite(report["loss"]).any() else "loss"
            before = f" and in the {self._bad - 1} before it" if self._bad > 1 else ""
            raise FunctionalLMError(
                f"the {what} is not finite in step {number}{before} (microbatch {place} of the data and those after "
                "it); lower --learning_rate or raise --warmup_steps"
            )
        return {"skipped": int((~finite).sum()), "microbatch": place}

    def _watch(self, loss: Value, skipped: bool) -> None:
        """Whether the loss is out of all proportion; one that is does not enter the mean."""
        if not self._plan.spike or skipped or isinstance(loss, list):
            return
        if self._counted >= SETTLED and loss > self._plan.spike * self._mean:
            self.spiked = True
            return
        self._counted += 1
        self._mean += (loss - self._mean) / min(self._counted, MEMORY)

    def progress(self, seconds: float) -> Progress:
        return Progress(seconds, self._bad, (self._mean, self._counted))

    def restart_clock(self) -> None:
        self._mark = time.perf_counter()


def _bar(plan: Plan, done: int) -> tqdm[Any]:
    return tqdm(
        total=plan.steps or None,
        initial=done,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        disable=None if plan.progress else True,
    )


def _show(bar: tqdm[Any], values: Values) -> None:
    loss, learning_rate = _mean(values["loss"]), _mean(values["learning_rate"])
    rate = console.count(_mean(values["tokens_per_second"]))
    bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.2e}, {rate} tokens/s", refresh=False)
    bar.update()


def _mean(value: Value) -> float:
    return statistics.fmean(value) if isinstance(value, list) else value


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _ends_epoch(number: int, steps: float) -> bool:
    """Whether an epoch of so many steps (not always a whole number) ends with step `number`."""
    return steps > 0 and int(number / steps) > int((number - 1) / steps)


@contextmanager
def stopping_by_signal(hurry: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """A function that tells whether the first Ctrl-C or SIGTERM has come, which calls `hurry`; the second one ends the
    process.

    Held until the last byte is on the disk: what is saved behind the last step is not cut off by the first.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for name in before:
            signal.signal(name, leave)
        hurry()
        console.say("\nfinishing this step, then saving (once more to stop at once)")

    def leave(number: int, frame: FrameType | None) -> None:
        """Without unwinding, which waits for threads: what is on the disk is whole at every instant."""
        with suppress(RuntimeError):  # the signal may have come in the middle of another line
            console.note("interrupted")
        os._exit(130)

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
            if signal.getsignal(name) in (ask, leave):  # nobody has decided otherwise meanwhile
                signal.signal(name, handler)
