"""The loop: every hook when it is due and with the right numbers, an end that saves, a clock that counts steps alone.

The steps here are arithmetic on one number, so that what the loop adds is all that there is to see.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import FunctionalLMError
from functional_lm.training import loop
from functional_lm.training.loop import Hooks, Outcome, Plan, Progress
from functional_lm.training.step import Batch, Metrics, Training, TrainState

EAGER = {"tokens_per_step": 10, "compile": False, "progress": False}
KEYS = {"loss", "grad_norm", "learning_rate", "tokens_per_second"}


def counting() -> Training:
    """The "gradient" is the batch, so that the parameter is the sum of all batches seen; the loss is the batch."""

    def init(params: Any, key: Tensor) -> TrainState:
        return TrainState(torch.tensor(0), torch.tensor(0), {"sum": torch.tensor(0.0)}, {}, {}, {}, key, {})

    def gradients(state: TrainState, batch: Batch, microbatch: Any = 0) -> tuple[Any, Metrics]:
        return {"sum": batch["x"]}, Metrics(batch["x"], torch.tensor(1))

    def apply(state: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, dict[str, Tensor]]:
        norm = torch.where(grads["sum"] == UNSTABLE, torch.inf, 1.0)
        report = {"loss": metrics.nll / metrics.tokens, "grad_norm": norm, "learning_rate": torch.tensor(0.5)}
        return state._replace(step=state.step + 1, params=tree.add(state.params, grads)), report

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        return apply(state, *gradients(state, batch))

    return Training(init, gradients, apply, train_step)


UNSTABLE = -7.0  # a batch with a finite loss and an infinite gradient


class World:
    """Hooks that note every call in order; `on_batch(number)` gives the batch's value."""

    def __init__(self, on_batch: Callable[[int], float] = float) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.records: list[tuple[int, dict[str, float]]] = []
        self.on_batch = on_batch

    def hooks(self) -> Hooks:
        return Hooks(self.batch, self.record, self.validate, self.save)

    def batch(self, number: int) -> Batch:
        self.events.append(("batch", number))
        return {"x": torch.tensor(self.on_batch(number))}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self.events.append(("validated" if "val_loss" in values else "record", step))
        self.records.append((step, dict(values)))

    def validate(self, state: TrainState) -> Mapping[str, float]:
        self.events.append(("validate", int(state.step)))
        return {"val_loss": 1.0}

    def save(self, state: TrainState, progress: Progress) -> None:
        self.events.append(("save", int(state.step)))
        self.progress = progress

    def of(self, *kinds: str) -> list[int]:
        return [event[1] for event in self.events if event[0] in kinds]


def run(world: World, start: int = 0, **plan: Any) -> Outcome:
    functions = counting()
    state = functions.init({}, keys.key(0))._replace(step=torch.tensor(start))
    with loop.stopping_by_signal() as stopping:
        return loop.run(state, functions, Plan(**{**EAGER, **plan}), world.hooks(), stopping)


# When -----------------------------------------------------------------------------------------------------------------


EVERY = st.integers(0, 7)


@given(
    steps=st.integers(1, 20),
    start=st.integers(0, 21),
    eval_every=EVERY,
    save_every=EVERY,
    log_every=st.integers(1, 7),
    accumulation=st.integers(1, 3),
)
@settings(max_examples=80)
def test_hooks_are_called_when_due(
    steps: int, start: int, eval_every: int, save_every: int, log_every: int, accumulation: int
) -> None:
    world = World()
    outcome = run(
        world,
        start,
        steps=steps,
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        accumulation=accumulation,
    )
    numbers = range(start + 1, steps + 1)
    last = [steps] if start < steps else []

    def due(every: int) -> list[int]:
        return [number for number in numbers if every and number % every == 0]

    assert world.of("batch") == list(range(start * accumulation, steps * accumulation))
    assert world.of("validate") == world.of("validated") == [n for n in due(eval_every) if n != steps]
    assert world.of("save") == sorted({*due(save_every), *last})
    assert world.of("record") == sorted({*due(log_every), *last})
    assert (outcome.steps, outcome.interrupted) == (max(0, steps - start), False)
    assert int(outcome.state.step) == max(steps, start)
    assert float(outcome.state.params["sum"]) == sum(world.of("batch"))
    assert len(outcome.rates) == max(0, steps - start - 1)


def test_a_step_is_recorded_before_it_is_validated_and_saved() -> None:
    world = World()
    run(world, steps=4, eval_every=2, save_every=2)
    assert world.events[1:7] == [
        ("record", 1),
        ("batch", 1),
        ("record", 2),
        ("validate", 2),
        ("validated", 2),
        ("save", 2),
    ]


def test_records_carry_the_steps_numbers() -> None:
    world = World(lambda number: 100.0 + number)
    run(world, start=3, steps=6)
    assert [step for step, _ in world.records] == [4, 5, 6]
    for step, values in world.records:
        assert set(values) == KEYS
        assert all(isinstance(value, float) for value in values.values())
        assert (values["loss"], values["grad_norm"], values["learning_rate"]) == (100.0 + step - 1, 1.0, 0.5)
    assert [values["tokens_per_second"] > 0 for _, values in world.records] == [False, True, True]


def test_microbatches_are_numbered_through_and_averaged() -> None:
    world = World()
    run(world, steps=3, accumulation=4)
    assert [values["loss"] for _, values in world.records] == [1.5, 5.5, 9.5]


# The clock ------------------------------------------------------------------------------------------------------------


def test_neither_the_first_step_nor_validating_nor_saving_counts_as_training_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that moves by 2 s a batch, by 30 s in the first one, and by minutes while validating and saving."""
    now = 0.0

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def batch(number: int) -> float:
        wait(30.0 if number == 0 else 2.0)
        return 0.0

    world = World(batch)
    monkeypatch.setattr(loop, "time", Clock)
    monkeypatch.setattr(world, "validate", lambda state: wait(100.0) or {"val_loss": 1.0})
    monkeypatch.setattr(world, "save", lambda state, seconds: wait(1000.0))
    outcome = run(world, steps=12, eval_every=3, save_every=4)
    assert outcome.rates == [5.0] * 11
    assert outcome.tokens_per_second == 5.0
    assert [values["tokens_per_second"] for _, values in world.records if "loss" in values] == [0.0, *[5.0] * 11]


def test_the_rate_is_the_median_over_the_steps_after_the_tenth() -> None:
    state = counting().init({}, keys.key(0))
    assert Outcome(state, rates=[1.0] * 10 + [5.0, 7.0, 600.0]).tokens_per_second == 7.0
    assert Outcome(state, rates=[1.0, 2.0, 9.0]).tokens_per_second == 2.0
    assert Outcome(state).tokens_per_second == 0.0


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """The handler that Python installs, which a process that was started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_finishes_the_step_saves_and_returns(name: signal.Signals, at: int) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def batch(number: int) -> float:
        if number == at:
            os.kill(os.getpid(), name)
        return float(number)

    world = World(batch)
    outcome = run(world, steps=8, eval_every=1, log_every=5)
    assert (outcome.interrupted, outcome.steps, int(outcome.state.step)) == (True, at + 1, at + 1)
    assert world.events[-2:] == [("record", at + 1), ("save", at + 1)]
    assert world.of("save") == [at + 1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_in_the_last_step_is_no_interruption() -> None:
    world = World(lambda number: float(os.kill(os.getpid(), signal.SIGINT) or number) if number == 2 else 0.0)
    assert not run(world, steps=3).interrupted
    assert world.of("save") == [3]


def test_the_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The process itself, which here is an exception; test_signals has a real one."""

    def left(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(loop.os, "_exit", left)

    def batch(number: int) -> float:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    handler = signal.getsignal(signal.SIGINT)
    world = World(batch)
    with pytest.raises(SystemExit, match="130"):
        run(world, steps=8)
    assert capfd.readouterr().err == "interrupted\n"
    assert world.events[-1] == ("batch", 1)
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize(("signalled", "raised"), [(True, KeyboardInterrupt), (False, RuntimeError)])
def test_a_signal_that_ends_the_compiler_too_is_an_interruption_and_no_error(signalled: bool, raised: type) -> None:
    def broken(number: int) -> float:
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the C++ compiler was killed")

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(raised):
            run(World(broken), steps=3)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_it_runs_without_handling_signals() -> None:
    world = World()
    thread = threading.Thread(target=run, args=(world,), kwargs={"steps": 3})
    thread.start()
    thread.join()
    assert world.of("save") == [3]


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "the loss"), (math.inf, "the loss"), (UNSTABLE, "the gradient norm")]
)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("limit", [1, 3])
def test_steps_that_are_not_finite_are_recorded_and_end_the_run_when_too_many(
    value: float, message: str, accumulation: int, limit: int
) -> None:
    first = 2 * accumulation  # the first microbatch of the third step
    bad = {first + i * accumulation: value for i in range(limit)}
    world = World(lambda number: bad.get(number, 0.0))
    last = 2 + limit
    with pytest.raises(FunctionalLMError, match=f"^{message} is not finite in step {last}.*; lower --learning_rate"):
        run(world, steps=9, accumulation=accumulation, bad_steps=limit)
    assert world.of("record") == list(range(1, last))
    assert world.of("save") == []
    assert [values.get("skipped") for _, values in world.records] == [None, None, *[1] * (limit - 1)]
    places = [values["microbatch"] for _, values in world.records if "skipped" in values]
    assert places == list(bad)[: limit - 1]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_steps_in_a_row_that_changed_nothing_are_counted_across_a_resume(stop: int) -> None:
    """Those of step 4 and 5 and 6 end the run, whichever of them another process has made."""
    bad = dict.fromkeys((3, 4, 5), math.nan)
    world = World(lambda number: bad.get(number, 0.0))
    run(world, steps=stop, bad_steps=3)
    with pytest.raises(FunctionalLMError, match="is not finite in step 6 and in the 2 before it"):
        run(World(world.on_batch), start=stop, steps=9, bad_steps=3, before=world.progress)


def test_batches_that_were_passed_over_are_not_seen() -> None:
    world = World()
    run(world, steps=4, accumulation=2, ahead=3)
    assert world.of("batch") == list(range(6, 14))


def test_a_spike_ends_the_loop_unsaved_and_behind_its_step() -> None:
    """As soon as there are losses enough to know what is usual; it is the same with a resume in between."""
    losses = [4.0, 40.0, *[4.0] * 30, 9.0, *[4.0] * 10]
    world = World(lambda number: losses[number])
    outcome = run(world, steps=40, spike=1.5, save_every=5)
    assert (outcome.ended, outcome.last) == ("spike", 33)
    assert world.of("save") == [5, 10, 15, 20, 25, 30]
    again = World(world.on_batch)
    outcome = run(again, start=30, steps=40, spike=1.5, before=world.progress)
    assert (outcome.ended, outcome.last) == ("spike", 33)
    assert run(World(world.on_batch), start=30, steps=40, spike=1.5, before=world.progress, ahead=3).ended == "steps"
    assert run(World(world.on_batch), steps=40).ended == "steps"


def test_bad_steps_with_good_ones_between_them_do_not_end_a_run() -> None:
    world = World(lambda number: math.nan if number % 2 else 1.0)
    assert run(world, steps=9, bad_steps=2).ended == "steps"
    assert [step for step, values in world.records if "skipped" in values] == [2, 4, 6, 8]


# Other ends -----------------------------------------------------------------------------------------------------------


class Clock:
    """Each batch takes two seconds, and nothing else takes any."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def batch(self, number: int) -> float:
        self.now += 2.0
        return 0.0


@pytest.mark.parametrize(("before", "expected"), [(0.0, 30), (20.0, 20), (60.0, 0)])
def test_a_run_limited_by_time_ends_with_it_and_schedules_see_its_length(
    monkeypatch: pytest.MonkeyPatch, before: float, expected: int
) -> None:
    clock = Clock()
    world = World(clock.batch)
    monkeypatch.setattr(loop, "time", clock)
    functions = counting()
    state = functions.init({}, keys.key(0))._replace(numbers={"total_steps": torch.tensor(7.0)})
    plan = Plan(**{**EAGER, "steps": 0, "seconds": 60.0, "before": Progress(before)})
    outcome = loop.run(state, functions, plan, world.hooks())
    assert (outcome.steps, outcome.ended) == (expected, "time")
    assert outcome.seconds == 60.0
    if expected:
        assert float(outcome.state.numbers["total_steps"]) == expected
        assert world.of("save") == [expected]


def test_enough_after_a_validation_ends_the_run() -> None:
    world = World()
    hooks = world.hooks()._replace(enough=lambda: world.of("validate")[-1] == 6)
    functions = counting()
    outcome = loop.run(
        functions.init({}, keys.key(0)), functions, Plan(**{**EAGER, "steps": 20, "eval_every": 3}), hooks
    )
    assert (outcome.steps, outcome.ended) == (6, "patience")
    assert world.of("validate") == [3, 6]
    assert world.of("save") == [6]


@given(steps=st.integers(1, 40), epoch=st.floats(0.3, 50))
@settings(max_examples=30)
def test_a_checkpoint_after_every_epoch(steps: int, epoch: float) -> None:
    world = World()
    run(world, steps=steps, save_epochs=epoch)
    ends = {math.ceil(number * epoch) for number in range(1, int(steps / epoch) + 2)}
    assert set(world.of("save")) >= {end for end in ends if end <= steps} - {steps}
    assert set(world.of("save")) <= {*ends, *(end + 1 for end in ends), steps}  # a rounding may be one step late


def test_samples_and_watchers_are_called() -> None:
    world, watched = World(), []
    hooks = world.hooks()._replace(
        sample=lambda state: world.events.append(("sample", int(state.step))), watch=watched.append
    )
    functions = counting()
    loop.run(functions.init({}, keys.key(0)), functions, Plan(**{**EAGER, "steps": 7, "sample_every": 3}), hooks)
    assert world.of("sample") == [3, 6]
    assert watched == list(range(1, 8))
