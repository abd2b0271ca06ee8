"""What every command that trains does once it has functions, a state and batches: hooks, records, checkpoints, ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console, files, run_folder
from functional_lm.errors import FunctionalLMError
from functional_lm.run_saving import Trouble, saving, troubled
from functional_lm.training_flags import UNTRACED, TrainingFlags

if TYPE_CHECKING:
    from functional_lm.evaluation.likelihood import Likelihood
    from functional_lm.model.config import ModelConfig
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.training import loop
    from functional_lm.training.loop import Outcome
    from functional_lm.training.record import Recorder, Values
    from functional_lm.training.step import Batch, Training, TrainState
    from functional_lm.tree import Tree

REWINDS = 5  # of one run, before it gives up


class Written(NamedTuple):
    """How parameters lie in a folder where they are no whole model: `save(folder, params)` and `load(folder)`."""

    save: Callable[[Path, Tree], None]
    load: Callable[[Path], Tree]
    use: str  # the command that goes on from there, without its prompt


class Job(NamedTuple):
    """What is trained: functions and batches, how it is measured and how it writes."""

    config: ModelConfig
    tokenizer: Tokenizer
    functions: Training
    batch: Callable[[int], Batch]
    measure: Callable[[Tree, int | None], Likelihood]  # over so many batches of the validation text, None: all of it
    validates: bool  # whether there is such a text
    sample: Callable[[Tree], Iterator[str]]  # in pieces, as it writes
    steps_per_epoch: float
    members: int = 0  # of a population; 0: one model
    written: Written | None = None  # None: as a model folder
    record: Mapping[str, Any] = {}  # which run this is: what a checkpoint keeps of it (`run_folder.record`)
    unit: str = "tokens"  # what the loss is a mean over
    sampled: str = "16 tokens of the validation text"  # what a sample goes on from


@dataclass
class Best:
    """The best validation so far, and how many have come since."""

    value: float | None = None
    step: int = 0
    waited: int = 0

    def observe(self, step: int, value: float) -> bool:
        """Whether this one is better (one that is not finite never is)."""
        better = math.isfinite(value) and (self.value is None or value < self.value)
        if better:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better


@contextmanager
def recording(flags: TrainingFlags, out: Path, step: int) -> Iterator[Recorder]:
    """The records of the run in `out`, from `step` on."""
    from functional_lm.training.record import Recorder, WandbSink

    run_folder.settle(out)
    settings = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
    also = WandbSink(out, flags.wandb_project, settings) if flags.wandb else None
    with Recorder(out, step, also, Trouble(flags, "a record of the run was lost")) as recorder:
        yield recorder


def resumed(
    state: TrainState, checkpoint: Path | None, record: Mapping[str, Any], override: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """The state to begin with and its memory: that of the checkpoint, with the numbers (flags) of this call.

    Raises DataError where what is learned, or what it is learned beside, is no longer what the run began with.
    """
    from functional_lm.training import checkpoint as checkpoints

    if checkpoint is None:
        return state, {}
    saved, memory = checkpoints.load(checkpoint, state)
    run_folder.check_inputs(checkpoint, record, override)
    console.say(f"going on from {checkpoint}")
    return saved._replace(numbers=state.numbers), memory


def train(
    flags: TrainingFlags, job: Job, state: TrainState, memory: Mapping[str, Any], out: Path, recorder: Recorder
) -> tuple[Outcome, Best]:
    """Train to the end of the flags' budget; `memory` is what the checkpoint that `state` comes from remembered.

    Raises KeyboardInterrupt after a signal (the state is saved), FunctionalLMError out of memory, when the loss is
    not finite any more, and when the disk takes no checkpoint.
    """
    while True:
        outcome, best = _train(flags, job, state, memory, out, recorder)
        if outcome.ended != "spike":
            break
        rewinds = 1 + memory.get("rewinds", 0)
        if rewinds > REWINDS:
            raise FunctionalLMError(
                f"the loss spiked {rewinds} times (the last time in step {outcome.last}); lower --learning_rate, or "
                f"raise --spike above {flags.spike:g}"
            )
        state, memory = _rewound(outcome, job, state, out, recorder)
        memory = {**memory, "rewinds": rewinds}
    if outcome.interrupted:
        console.say(f"stopped; the same command goes on from {_newest(out)}")
        raise KeyboardInterrupt  # the exit code of a stopped run, 130
    return outcome, best


def _train(
    flags: TrainingFlags, job: Job, state: TrainState, memory: Mapping[str, Any], out: Path, recorder: Recorder
) -> tuple[Outcome, Best]:
    """To the end, or to a spike."""
    from functional_lm import run_best
    from functional_lm.training import loop

    best, trouble = Best(**memory.get("best", {})), Trouble(flags, "the checkpoint was not written")
    plan = _plan(flags, job, memory)

    def record(step: int, values: Values) -> None:
        recorder.metrics(step, values)
        if "val_loss" in values:
            console.say(f"step {step}: validation loss {_shown(values['val_loss'])}")
        if "skipped" in values:
            place = f"microbatch {values['microbatch']} of the data and those after it"
            console.say(f"step {step} changed nothing: its loss or gradient was not finite ({place})")

    def validate(state: TrainState) -> Values:
        losses = [job.measure(params, flags.eval_batches).loss for params in members(state, job)]
        if flags.patience:
            with troubled(trouble):
                saver.wait()  # one that could not be kept is the best no more
            before = best.value, best.step
            if best.observe(loop.steps_taken(state), losses[0]):
                saver.also(state.best_params, partial(keep, best.step, before))
        return {"val_loss": losses if job.members else losses[0]}

    def keep(step: int, before: tuple[float | None, int], params: Tree) -> None:
        """On the saver's thread."""
        try:
            run_best.keep(out, step, lambda path: _save(path, params, job))
        except OSError:
            best.value, best.step = before  # what is not on the disk cannot be the model in the end
            raise

    def save(state: TrainState, progress: loop.Progress) -> None:
        with troubled(trouble):
            saver.wait()  # an error of the save before costs that one, and says what the best is
        kept: dict[str, Any] = {"best": dataclasses.asdict(best), "bad": progress.bad, "ahead": plan.ahead}
        kept["losses"], kept["rewinds"] = progress.losses, memory.get("rewinds", 0)
        kept["position"] = (loop.steps_taken(state) + plan.ahead) * plan.accumulation  # the next microbatch
        recorder.sync()
        if flags.minutes:  # the one case in which the clock decides what comes
            kept["seconds"] = progress.seconds
        with troubled(trouble):
            saver.save(state, kept)
            if flags.patience:
                run_best.prune(out, best.step)

    def sample(state: TrainState) -> None:
        recorder.text(loop.steps_taken(state), "sample", "".join(job.sample(members(state, job)[0])))

    def watch(number: int) -> None:
        with troubled(trouble):
            saver.check()
        trace(number)

    hooks = loop.Hooks(job.batch, record, validate, save, sample, lambda: 0 < flags.patience <= best.waited, watch)
    with loop.stopping_by_signal() as stopping:
        with saving(flags, job, out, trouble) as saver, _tracing(flags, out, recorder) as trace:
            try:
                outcome = loop.run(state, job.functions, plan, hooks, stopping)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise FunctionalLMError(_advice(flags)) from error
        if stopping():
            outcome.ended = "interrupted"
    return outcome, best


def _rewound(
    outcome: Outcome, job: Job, template: TrainState, out: Path, recorder: Recorder
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, and the batches since then passed over. Raises FunctionalLMError if there is none."""
    from functional_lm.training import checkpoint

    path = run_folder.newest_checkpoint(out)
    if path is None:
        raise FunctionalLMError(
            f"the loss spiked in step {outcome.last}, before the first checkpoint; lower --save_every or the rate"
        )
    state, memory = checkpoint.load(path, template)
    step = int(state.step)
    memory = {**memory, "ahead": memory["ahead"] + outcome.last - step}
    why = f"the loss spiked in step {outcome.last}: back to step {step}, past the batches of the steps between"
    console.say(why)
    recorder.rewind(step, why)
    return state, memory


def functions(flags: TrainingFlags, config: ModelConfig, **more: Any) -> Training:
    """The step that the flags describe; `more` goes to `step.training` as it is."""
    import torch

    from functional_lm.training import optimizer, schedule, step

    last = flags.learning_rate / 10 if flags.min_learning_rate is None else flags.min_learning_rate
    floor = last / flags.learning_rate
    return step.training(
        config,
        optimizer.optimizer(flags.optimizer),
        schedule.schedule(flags.schedule, flags.warmup_steps, floor, flags.cooldown),
        getattr(torch, flags.dtype),
        {name: getattr(flags, name) for name in step.DEFAULTS if hasattr(flags, name)}
        | {"total_steps": flags.steps or step.DEFAULTS["total_steps"]},
        z_loss=flags.z_loss,
        ema=flags.ema_decay > 0,
        **more,
    )


def members(state: TrainState, job: Job) -> list[Tree]:
    """The parameters to measure and to keep: of each member of a population, or of the one model."""
    from functional_lm import tree

    return tree.unstack(state.best_params) if job.members else [state.best_params]


def _plan(flags: TrainingFlags, job: Job, memory: Mapping[str, Any]) -> Any:
    from functional_lm.training.loop import Plan, Progress

    assert flags.block_size is not None
    microbatches = flags.gradient_accumulation_steps
    return Plan(
        steps=flags.steps or 0,
        tokens_per_step=flags.batch_size * flags.block_size * microbatches * max(1, job.members),
        accumulation=microbatches,
        eval_every=flags.eval_every if job.validates else 0,
        save_every=flags.save_every,
        sample_every=flags.sample_every if flags.sample_tokens else 0,
        log_every=flags.log_every,
        compile=flags.compile,
        seconds=60 * (flags.minutes or 0),
        before=Progress(memory.get("seconds", 0.0), memory.get("bad", 0), tuple(memory.get("losses", (0.0, 0)))),
        ahead=memory.get("ahead", 0),
        spike=flags.spike,
        save_epochs=job.steps_per_epoch if flags.save_epochs else 0,
        bad_steps=flags.bad_steps,
    )


def _shown(value: float | list[float]) -> str:
    return ", ".join(f"{entry:.4f}" for entry in (value if isinstance(value, list) else [value]))


def _save(path: Path, params: Tree, job: Job) -> None:
    from functional_lm import folder

    if job.written is not None:
        job.written.save(path, params)
    else:
        folder.save(path, params, job.config, job.tokenizer)


def _newest(out: Path) -> str:
    from functional_lm.training import checkpoint

    found = checkpoint.listing(out / "checkpoints")
    return str(found[-1]) if found else "the beginning: nothing was saved"


# Trouble and its traces -----------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    import torch

    words = ("can't allocate memory", "out of memory", "DefaultCPUAllocator")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _advice(flags: TrainingFlags) -> str:
    smaller, more = max(1, flags.batch_size // 2), 2 * flags.gradient_accumulation_steps
    same = f"--batch_size {smaller} with --gradient_accumulation_steps {more} makes the same steps in less"
    return (
        f"out of memory with {flags.batch_size} rows of {flags.block_size} tokens; "
        f"{same if flags.batch_size > 1 else 'a smaller --block_size needs less'}, "
        "--checkpoint_activations true trades time for it, --optimizer adafactor keeps less"
    )


@contextmanager
def _tracing(flags: TrainingFlags, out: Path, recorder: Recorder) -> Iterator[Callable[[int], None]]:
    """A watcher that traces `--profile` steps, after the first ones of a call, into trace.json and the log."""
    if not flags.profile:
        with nullcontext():
            yield lambda number: None
        return
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    untraced, made = Trouble(flags, "the trace was not written"), 0

    def ready(profiler: Any) -> None:
        """Behind the last of its steps, or of the run's."""
        if (count := min(flags.profile, made - UNTRACED)) < 1:
            return
        with troubled(untraced):
            files.write_with(out / "trace.json", lambda path: profiler.export_chrome_trace(str(path)))
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            recorder.note("profile\n" + profiler.key_averages().table(sort_by=by, row_limit=25))
            steps = "1 step" if count == 1 else f"{count} steps"
            console.say(f"the trace of {steps} is in {out / 'trace.json'}, its summary in training.log")

    def watch(number: int) -> None:
        nonlocal made
        made += 1
        profiler.step()

    schedule = torch.profiler.schedule(wait=UNTRACED - 1, warmup=1, active=flags.profile, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=ready) as profiler:
        yield watch
    if made <= UNTRACED:
        console.say(f"--profile traced nothing: it begins after {UNTRACED} steps of a call, and this one made {made}")
