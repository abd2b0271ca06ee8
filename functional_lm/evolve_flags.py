"""The flags of `evolve`, and what they say against each other. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.errors import UsageError
from functional_lm.merge import METHODS
from functional_lm.options import option
from functional_lm.prepare import SOURCES
from functional_lm.sampling_settings import USUAL
from functional_lm.training_flags import DEVICES, OPTIMIZERS

# Names of what `evolution/` has; a test holds them equal.
STRATEGIES = ("genetic", "openai-es", "eggroll", "mezo", "snes", "xnes", "cma-es", "sep-cma-es")
ESTIMATING = ("openai-es", "eggroll")  # those with a gradient, an optimizer and pairs
ANTITHETIC = ("openai-es", "eggroll")
SPACES = ("full", "lora", "merge", "decode")
MEASURED = ("loss", "bits", "accuracy")
SHAPINGS = ("centered_rank", "z_score", "nes")
DTYPES = ("auto", "float32", "bfloat16")
# What makes the run what it is; the rest may change when it goes on.
FIXED = (
    "model", "data", "space", "strategy", "population", "fitness", "leaves", "rank", "alpha", "targets", "adapter",
    "sigma", "learning_rate", "optimizer", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", "antithetic",
    "shaping", "noise", "elites", "tournament", "pressure", "crossover", "crossover_rate", "mutation", "mutation_rate",
    "strength", "batch_size", "block_size", "val_fraction", "max_tokens", "temperature", "stop", "chat", "dtype",
    "seed", "compile", "models", "method", "groups", "base", "density",
    "settings",
)  # fmt: skip


@dataclass(frozen=True)
class EvolveFlags:
    """Flags of `evolve`."""

    action: str | None = option(None, "replay: rebuild the weights of a JOURNAL", choices=("replay",), metavar="replay")
    journal: str | None = option(None, "journal.jsonl of a run, to replay")
    model: str | None = option(None, "model folder to evolve", aliases=("model_path",))
    data: str | None = option(
        None,
        f"text that fitness is measured on: {SOURCES}; or JSON rows of prompt and response, to answer",
        aliases=("data_path",),
    )
    out: str = option("runs/evolve", "run folder to write", aliases=("output_dir",))
    fitness: str = option(
        "loss", "loss, bits (per byte) or accuracy, all of the next token; exact (match), or module:function of answers"
    )
    space: str = option("lora", "what is evolved: the model's leaves, or an adapter", choices=SPACES, group="Space")
    leaves: tuple[str, ...] = option(("*",), "leaves to evolve, of space full: globs over paths", group="Space")
    rank: int = option(1, "rank of the adapter and of eggroll's noise", low=1, group="Space")
    alpha: float | None = option(
        None, "the adapter's scale is alpha / rank; the rank if not given", above=0, group="Space"
    )
    targets: tuple[str, ...] = option(
        ("all-linear",), "what it adapts: ends of paths, globs over paths, or all-linear", group="Space"
    )
    adapter: str | None = option(None, "adapter folder to begin with", group="Space")
    models: tuple[str, ...] = option(
        (),
        "model folders (or adapter folders of --base) to merge, of space merge",
        group="Space",
        metavar="DIR,DIR,...",
    )
    method: str = option("linear", "how they are merged, as in merge", choices=METHODS, group="Space")
    groups: str = option(
        "*", "leaves with coefficients of their own: globs, or layers", group="Space", metavar="'GLOB;GLOB'"
    )
    base: str | None = option(None, "model folder that the models came from, for differences", group="Space")
    density: float | None = option(
        None, "share of each difference to begin with; 0.2 of ties, 0.5 of dare", above=0, high=1, group="Space"
    )
    settings: tuple[str, ...] = option(
        tuple(USUAL), "what of sampling is evolved, of space decode", choices=tuple(USUAL), group="Space",
        metavar="NAME,NAME,...",
    )  # fmt: skip
    strategy: str = option("eggroll", "how it is evolved", choices=STRATEGIES, group="Strategy")
    population: int = option(64, "members of a generation", low=1, group="Strategy")
    sigma: float = option(0.02, "standard deviation of the noise on each number", above=0, group="Strategy")
    learning_rate: float = option(0.01, "of the optimizer that takes the estimate", above=0, group="Strategy")
    optimizer: str = option("adamw", "what takes the estimated gradient", choices=OPTIMIZERS, group="Strategy")
    weight_decay: float = option(0.0, "decoupled decay of matrices", low=0, group="Strategy")
    beta1: float = option(0.9, "decay of the first moment", low=0, below=1, group="Strategy")
    beta2: float = option(0.95, "decay of the second moment", low=0, below=1, group="Strategy")
    momentum: float = option(0.95, "decay of Muon's momentum", low=0, below=1, group="Strategy")
    grad_clip: float = option(0.0, "largest global norm of the estimate; 0: off", low=0, group="Strategy")
    antithetic: bool = option(True, "members in pairs of opposite noise", group="Strategy")
    shaping: str = option("centered_rank", "what of the fitness is listened to", choices=SHAPINGS, group="Strategy")
    noise: str = option(
        "stored", "regenerated: drawn inside the forward, in no memory", choices=("stored", "regenerated"),
        group="Strategy",
    )  # fmt: skip
    elites: int = option(2, "members that stay as they are", low=0, group="Genetic")
    tournament: int = option(3, "entrants of a tournament", low=1, group="Genetic")
    pressure: float = option(0.9, "probability that its best one wins", low=0, high=1, group="Genetic")
    crossover: str = option(
        "uniform", "numbers from either parent, or a mean", choices=("uniform", "arithmetic"), group="Genetic"
    )
    crossover_rate: float = option(0.7, "share of the children with two parents", low=0, high=1, group="Genetic")
    mutation: str = option("element", "noise on numbers, or on tensors", choices=("element", "tensor"), group="Genetic")
    mutation_rate: float = option(0.1, "share of them", low=0, high=1, group="Genetic")
    strength: float = option(0.1, "size of the noise, in spreads of the tensor", above=0, group="Genetic")
    generations: int = option(100, "generations", low=1, group="Length")
    evaluations: int | None = option(None, "most evaluations of members", low=1, group="Length")
    minutes: float | None = option(None, "wall time, compiling included", above=0, group="Length")
    target: float | None = option(None, "fitness of a member that ends it", group="Length")
    timeout: float = option(0.0, "seconds that scoring a generation may take; 0: no limit", low=0, group="Length")
    batch_size: int = option(8, "rows (or prompts) that all members of a generation see", low=1, group="Data")
    block_size: int | None = option(None, "tokens in a row; the model's max_len if not given", low=1, group="Data")
    val_fraction: float = option(0.05, "share of the data kept for validation", low=0, below=1, group="Data")
    max_tokens: int = option(64, "longest answer", low=1, group="Data")
    temperature: float = option(0.0, "of answers; 0: always the likeliest token", low=0, group="Data")
    stop: tuple[str, ...] = option(("\n",), "texts that end an answer, commas between", group="Data")
    chat: bool = option(False, "prompts are the user's turns of a chat", group="Data")
    chunk_size: str = option("auto", "members computed at once; auto: what memory holds", group="Machine")
    dtype: str = option("auto", "precision of the products", choices=DTYPES, group="Machine")
    device: str = option("auto", "where to run", choices=DEVICES, group="Machine")
    compile: bool = option(True, "compile (eager where no C++ compiler is found)", group="Machine")
    seed: int = option(1337, "seed of every random draw", low=0, group="Strategy")
    eval_every: int = option(0, "generations between measurements on what was held out", low=0, group="Records")
    eval_batches: int = option(20, "batches of them, and of the last one", low=1, group="Records")
    save_every: int = option(10, "generations between checkpoints; 0: at the end only", low=0, group="Records")
    keep: int = option(2, "checkpoints to keep; 0: all", low=0, group="Records")
    resume: str = option("auto", "auto: go on with the run in --out; never", choices=("auto", "never"), group="Records")
    overwrite: bool = option(False, "replace a run that --out already holds", group="Records")


def check(flags: EvolveFlags) -> None:
    """Contradictions, each flag being right by itself. Raises UsageError."""
    if flags.action == "replay" or flags.journal is not None:
        if flags.action != "replay":
            raise UsageError("--journal belongs to replay: evolve replay JOURNAL")
        if flags.journal is None:
            raise UsageError("evolve replay needs the journal: evolve replay RUN/journal.jsonl --out DIR")
        return
    for name in ("data",) if flags.space == "merge" else ("model", "data"):
        if getattr(flags, name) is None:
            raise UsageError(f"--{name} is required")
    _check_merge(flags)
    _check_decode(flags)
    paired = flags.strategy == "mezo" or (flags.strategy in ANTITHETIC and flags.antithetic)
    if flags.population < 2 or (paired and flags.population % 2):
        what = "odd; antithetic pairs need an even one, or --antithetic false" if flags.population > 1 else "too small"
        raise UsageError(f"--population {flags.population} is {what}")
    if flags.strategy == "genetic" and flags.elites >= flags.population:
        raise UsageError(f"--elites {flags.elites} leave no room in a --population of {flags.population}")
    if flags.space != "lora" and flags.adapter is not None:
        raise UsageError(f"--adapter is evolved in --space lora, not in {flags.space}")
    if flags.space != "full" and flags.leaves != ("*",):
        other = {"lora": "--targets", "merge": "--groups"}.get(flags.space, "none")
        raise UsageError(f"--leaves chooses in --space full; {flags.space} has {other}")
    if flags.noise == "regenerated" and flags.strategy not in ESTIMATING:
        raise UsageError(f"--noise regenerated is for {' and '.join(ESTIMATING)}; {flags.strategy} stores its members")
    if flags.chunk_size != "auto" and not (flags.chunk_size.isdecimal() and int(flags.chunk_size) > 0):
        raise UsageError(f"--chunk_size is {flags.chunk_size!r}; it is auto or a whole number above 0")
    if flags.fitness not in (*MEASURED, "exact") and ":" not in flags.fitness:
        raise UsageError(f"--fitness is {flags.fitness!r}; it is {', '.join(MEASURED)}, exact or module:function")


def _check_merge(flags: EvolveFlags) -> None:
    if flags.space == "merge":
        if flags.model is not None:
            raise UsageError("--space merge takes --models A,B and no --model")
        if not flags.models:
            raise UsageError("--space merge needs --models A,B: the folders to merge")
        return
    for name, usual in (("models", ()), ("method", "linear"), ("groups", "*"), ("base", None), ("density", None)):
        if getattr(flags, name) != usual:
            raise UsageError(f"--{name} belongs to --space merge, not to {flags.space}")


def _check_decode(flags: EvolveFlags) -> None:
    if flags.space != "decode":
        if flags.settings != tuple(USUAL):
            raise UsageError(f"--settings belongs to --space decode, not to {flags.space}")
        return
    if not answers(flags):
        raise UsageError(f"--space decode changes answers alone; --fitness is {flags.fitness}: give exact or "
                         "module:function")  # fmt: skip
    if flags.temperature:
        raise UsageError("--temperature is evolved in --space decode; it begins at the model's own")
    if not flags.settings or len(set(flags.settings)) < len(flags.settings):
        raise UsageError(f"--settings is {','.join(flags.settings) or 'empty'}; name each setting once")


def origin(flags: EvolveFlags) -> str:
    """What is evolved, by its folders."""
    return str(flags.model) if flags.model is not None else ", ".join(flags.models)


def answers(flags: EvolveFlags) -> bool:
    """Whether fitness is that of generated text."""
    return flags.fitness not in MEASURED
