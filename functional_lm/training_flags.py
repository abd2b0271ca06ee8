"""The flags that every command that trains has, and what follows from them alone. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from functional_lm import console
from functional_lm.errors import UsageError
from functional_lm.options import option

# Names of what `training/` has; a test holds them equal.
OPTIMIZERS = ("adamw", "muon", "lion", "sgd", "adafactor")
SCHEDULES = ("cosine", "wsd", "linear", "constant", "inverse_sqrt")
SCHEDULES_OF_LENGTH = ("cosine", "wsd", "linear")  # whose rates come from the number of steps
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
UNTRACED = 3  # steps of a call before those of --profile
STEPS = 900  # where no length is given
# What may change when a run goes on: its length, its ends, its records. Every other flag changes what is computed.
FREE = frozenset(
    [
        "out",
        "steps",
        "epochs",
        "minutes",
        "patience",
        "bad_steps",
        "eval_every",
        "eval_batches",
        "save_every",
        "save_epochs",
        "keep",
        "on_save_error",
        "log_every",
        "sample_every",
        "sample_tokens",
        "wandb",
        "wandb_project",
        "profile",
        "resume",
        "override",
        "overwrite",
        "max_download",
        "download_folder",
        "use_lmsys_dataset",
    ]
)

# Unless something hangs on them: which model is the best one, and where a spike goes back to.
HANGING = {"patience": ("eval_every", "eval_batches"), "spike": ("save_every", "save_epochs")}

AnyFlags = TypeVar("AnyFlags")  # with --device, --dtype and --compile
Flags = TypeVar("Flags", bound="TrainingFlags")


@dataclass(frozen=True)
class TrainingFlags:
    """How long, by which rule, on which machine, with which records."""

    steps: int | None = option(None, f"optimizer steps; {STEPS} if no length is given", low=1, group="Length")
    epochs: float | None = option(None, "passes over the text, instead of --steps", above=0, group="Length")
    minutes: float | None = option(
        None, "wall time, compiling included, instead of (or as a limit beside) --steps", above=0, group="Length"
    )
    patience: int = option(
        0, "end after so many validations without a better one and keep the best model; 0: off", low=0, group="Length"
    )
    batch_size: int = option(8, "rows in a microbatch", low=1, high=10**9, group="Batch")
    block_size: int | None = option(None, "tokens in a row; the model's max_len if not given", low=1, group="Batch")
    gradient_accumulation_steps: int = option(1, "microbatches in a step", low=1, high=100_000, group="Batch")
    optimizer: str = option("adamw", "optimizer", choices=OPTIMIZERS, group="Optimizer")
    learning_rate: float = option(3e-3, "peak learning rate", above=0, group="Optimizer")
    min_learning_rate: float | None = option(
        None, "last learning rate; a tenth of the peak if not given", low=0, group="Optimizer"
    )
    schedule: str = option("cosine", "learning rate over time", choices=SCHEDULES, group="Optimizer")
    warmup_steps: int = option(50, "steps of linear warm-up", low=0, group="Optimizer")
    cooldown: float | None = option(
        None, "last share of the run, in which the rate falls on a line; 0.2 for wsd", low=0, high=1, group="Optimizer"
    )
    weight_decay: float = option(0.1, "decoupled decay of matrices", low=0, group="Optimizer")
    beta1: float = option(0.9, "decay of the first moment", low=0, below=1, group="Optimizer")
    beta2: float = option(0.95, "decay of the second moment", low=0, below=1, group="Optimizer")
    momentum: float = option(0.95, "decay of Muon's momentum", low=0, below=1, group="Optimizer")
    grad_clip: float = option(1.0, "largest global gradient norm; 0: off", low=0, group="Optimizer")
    z_loss: float = option(0.0, "weight of the squared log-partition function; 0: off", low=0, group="Optimizer")
    ema_decay: float = option(
        0.0, "measure and keep an exponential mean of the weights of this decay; 0: off", low=0, below=1,
        group="Optimizer",
    )  # fmt: skip
    bad_steps: int = option(
        10, "steps in a row whose loss or gradient may be not finite (they change nothing)", low=1, group="Optimizer"
    )
    spike: float = option(
        0.0, "a loss so many times its mean sends the run back to its last checkpoint, past those batches; 0: off",
        low=0, group="Optimizer",
    )  # fmt: skip
    dtype: str = option("auto", "precision of the products", choices=DTYPES, group="Machine")
    device: str = option("auto", "where to train", choices=DEVICES, group="Machine")
    compile: bool = option(True, "compile the step (eager where no C++ compiler is found)", group="Machine")
    threads: int | None = option(
        None, "threads on the CPU; torch's choice if not given", low=1, high=1024, group="Machine"
    )
    seed: int = option(1337, "seed of every random draw", low=0, group="Optimizer")
    eval_every: int = option(250, "steps between validations; 0: at the end only", low=0, group="Records")
    eval_batches: int = option(
        20, "batches of such a validation; the last one reads the whole split", low=1, group="Records"
    )
    save_every: int = option(250, "steps between checkpoints; 0: at the end only", low=0, group="Records")
    save_epochs: bool = option(False, "a checkpoint after every epoch too", group="Records")
    keep: int = option(2, "checkpoints to keep; 0: all", low=0, group="Records")
    on_save_error: str = option(
        "stop", "what a full or broken disk does to the run", choices=("stop", "continue"), group="Records"
    )
    log_every: int = option(1, "steps between lines of metrics.jsonl", low=1, group="Records")
    sample_every: int = option(0, "steps between samples in training.log; 0: at the end only", low=0, group="Records")
    sample_tokens: int = option(120, "tokens of a sample; 0: no samples", low=0, group="Records")
    wandb: bool = option(False, "send the records to Weights & Biases too", group="Records")
    wandb_project: str = option("functional_lm", "its project", group="Records")
    profile: int = option(
        0, f"steps to trace into trace.json, after the first {UNTRACED} of a call; 0: none", low=0, group="Records"
    )
    resume: str = option(
        "auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint", group="Records"
    )
    override: bool = option(False, "go on with flags that change the mathematics of the run", group="Records")
    overwrite: bool = option(False, "replace a run that --out already holds", group="Records")


def check(flags: TrainingFlags) -> None:
    """Contradictions between flags, each of which has been checked by itself. Raises UsageError."""
    if flags.steps is not None and flags.epochs is not None:
        raise UsageError("--steps and --epochs both give the length; give one of them")
    if flags.min_learning_rate is not None and flags.min_learning_rate > flags.learning_rate:
        raise UsageError(
            f"--min_learning_rate {flags.min_learning_rate} is above --learning_rate {flags.learning_rate}"
        )
    if flags.patience and not flags.eval_every:
        raise UsageError(f"--patience {flags.patience} counts validations; give --eval_every above 0")
    if 0 < flags.spike <= 1:
        raise UsageError(f"--spike {flags.spike} is no spike; give a number above 1, such as 1.5, or 0")
    if flags.spike and not flags.save_every:
        raise UsageError(f"--spike {flags.spike} goes back to a checkpoint; give --save_every above 0")
    if flags.profile and flags.steps is not None and flags.steps <= UNTRACED:
        raise UsageError(
            f"--profile {flags.profile} traces steps after the first {UNTRACED}, and --steps is {flags.steps}; give "
            f"--steps above {UNTRACED}"
        )
    if flags.overwrite and flags.override:
        raise UsageError("--overwrite starts again and --override goes on; give one of them")
    if flags.overwrite and flags.resume not in ("auto", "never"):
        raise UsageError("--overwrite starts again and --resume goes on; give one of them")


def on_this_machine(flags: AnyFlags) -> AnyFlags:
    """`auto` of --device and --dtype replaced by what this machine has, and a word where it lacks a compiler."""
    from functional_lm import compile as compiling

    given: Any = flags
    device = compiling.resolve_device(given.device)
    dtype = str(compiling.resolve_dtype(given.dtype, device)).removeprefix("torch.")
    obstacle = compiling.obstacle(device) if given.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    found: AnyFlags = dataclasses.replace(
        given, device=str(device), dtype=dtype, compile=given.compile and obstacle is None
    )
    return found


def resolve_machine(flags: Flags) -> Flags:
    """`on_this_machine`, and so many threads."""
    from functional_lm import compile as compiling

    found = on_this_machine(flags)
    return dataclasses.replace(found, threads=compiling.use_threads(flags.threads))


def resolve_length(flags: Flags, steps_per_epoch: float) -> Flags:
    """`steps` from whatever gives the length; it stays None where only the time does."""
    steps = flags.steps
    if flags.epochs is not None:
        steps = max(1, round(min(flags.epochs * steps_per_epoch, 2.0**63)))
        if steps >= 2**63:
            raise UsageError(f"--epochs is {flags.epochs:g}, which is more steps than 64 bits hold; give fewer")
    elif steps is None and flags.minutes is None:
        steps = STEPS
    return dataclasses.replace(flags, steps=steps)


def budget(flags: TrainingFlags) -> dict[str, float | None]:
    """What a finished run was given, to tell whether the same is asked for again."""
    return {"steps": flags.steps, "epochs": flags.epochs, "minutes": flags.minutes}
