"""The flags of `evolve`, and what several of them say together. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.errors import UsageError
from functional_lm.merge import METHODS
from functional_lm.options import option
from functional_lm.prepare import SOURCES
from functional_lm.sampling_settings import USUAL
from functional_lm.training_flags import DEVICES, OPTIMIZERS

# Names of what `evolution/` has; a test holds them equal.
STRATEGIES = ("genetic", "openai-es", "eggroll", "mezo", "snes", "xnes", "cma-es", "sep-cma-es",
              "differential-evolution", "pso", "nsga2", "map-elites", "pbt")  # fmt: skip
ESTIMATING = ("openai-es", "eggroll")  # those with a gradient, an optimizer and pairs
KEEPING = ("genetic", "differential-evolution", "pso", "map-elites", "pbt")  # members, of which the best is wanted
REMEMBERING = ("differential-evolution", "pso", "nsga2", "map-elites")  # fitness, and compare later ones with it
BASES = ("rand", "best", "current-to-best")
RESTARTING = ("cma-es", "sep-cma-es")
RESTARTS = ("none", "ipop", "bipop")
SPACES = ("full", "lora", "merge", "decode", "hyper", "architecture")
TRAINING = ("hyper", "architecture")  # spaces whose members are trainings
SEARCHING = ("snes", "xnes", "cma-es", "sep-cma-es", "differential-evolution", "pso")  # their strategies, and pbt
SCHEDULE = ("warmup", "final_rate", "bend")  # numbers of a schedule over --steps
TUNED = ("learning_rate", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", *SCHEDULE)
LEAST_STEP = 0.1  # of sigma between choices, which are 1 apart
MEASURED = ("loss", "bits", "accuracy")
SHAPINGS = ("centered_rank", "z_score", "nes")
DTYPES = ("auto", "float32", "bfloat16")
# What makes the run what it is; the rest may change when it goes on.
FIXED = (
    "model", "data", "space", "strategy", "population", "fitness", "leaves", "rank", "alpha", "targets", "adapter",
    "sigma", "learning_rate", "optimizer", "weight_decay", "beta1", "beta2", "momentum", "grad_clip", "antithetic",
    "shaping", "noise", "elites", "tournament", "pressure", "crossover", "crossover_rate", "mutation", "mutation_rate",
    "strength", "batch_size", "block_size", "val_fraction", "max_tokens", "temperature", "stop", "chat", "dtype",
    "seed", "compile", "tuned", "steps", "spread", "exploit", "perturb", "resample", "fresh",
    "restarts", "de_base", "de_weight", "de_crossover", "inertia", "cognitive", "social",
    "descriptor", "bins", "ranges", "line", "batches",
    "models", "method", "groups", "base", "density", "settings",
    "choices", "max_parameters", "equal_compute", *SCHEDULE,
)  # fmt: skip
MEASURING = ("eval_batches",)  # fixed too where members train: half of what is held out is their fitness


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
        "loss",
        "loss, bits (per byte) or accuracy, all of the next token; exact (match), or module:function of answers; "
        "for nsga2 several of them, commas between",
    )
    space: str = option(
        "lora", "what is evolved: leaves, an adapter, a merge, settings, numbers of training, a shape", choices=SPACES,
        group="Space",
    )  # fmt: skip
    leaves: tuple[str, ...] = option(("*",), "leaves to evolve, of space full: globs over paths", group="Space")
    rank: int = option(1, "rank of the adapter and of eggroll's noise", low=1, high=4096, group="Space")
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
    population: int = option(64, "members of a generation", low=1, high=10**6, group="Strategy")
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
    restarts: str = option(
        "none", "of cma-es and sep-cma-es once they converge: with twice the population, or in turns with small ones",
        choices=RESTARTS, group="Strategy",
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
    tuned: tuple[str, ...] = option(("learning_rate",), "numbers of training that differ", choices=TUNED, group="Hyper")
    steps: int = option(50, "steps of training in a generation", low=1, aliases=("train_steps",), group="Hyper")
    warmup: float = option(
        0.0, "share of --steps in which the learning rate rises; not of pbt", low=0, high=1, group="Hyper"
    )
    final_rate: float = option(1.0, "share of it that the last step has; not of pbt", low=0, high=1, group="Hyper")
    bend: float = option(
        1.0, "how it comes down to it, 1: on a line, larger: later; not of pbt", above=0, group="Hyper"
    )
    spread: float = option(10.0, "members begin within this factor of each number", low=1, group="Hyper")
    exploit: float = option(0.2, "share that goes on from the best", above=0, high=0.5, group="Hyper")
    perturb: float = option(1.2, "their numbers times or divided by this", low=1, group="Hyper")
    resample: float = option(0.25, "or drawn anew, with this probability", low=0, high=1, group="Hyper")
    fresh: bool = option(False, "begin at new weights of the model's architecture", group="Hyper")
    choices: tuple[str, ...] = option(
        (), "what may differ of the model's configuration: fields, or mlp_factor (d_ff / d_model), with their values",
        group="Architecture", metavar="NAME=A:B:C,...",
    )  # fmt: skip
    max_parameters: int | None = option(None, "largest model of them", low=1, group="Architecture")
    equal_compute: bool = option(
        False, "as many operations for each as --steps of the first one: small models make more steps",
        group="Architecture",
    )  # fmt: skip
    de_base: str = option(
        "rand", "what a scaled difference of two members is added to", choices=BASES, group="Differential evolution"
    )
    de_weight: float = option(0.5, "that scale, F", above=0, group="Differential evolution")
    de_crossover: float = option(
        0.9, "share of the numbers that a trial has of it, CR", low=0, high=1, group="Differential evolution"
    )
    inertia: float = option(0.7298, "share of the velocity that stays", low=0, below=1, group="Particle swarm")
    cognitive: float = option(1.49618, "pull of a particle's own best place", low=0, group="Particle swarm")
    social: float = option(1.49618, "pull of the swarm's best place", low=0, group="Particle swarm")
    descriptor: tuple[str, ...] = option(
        (), "figures that tell kinds apart, each as --fitness has them, commas between", group="MAP-Elites"
    )
    bins: str = option("10x10", "cells of the grid along each of them", group="MAP-Elites")
    ranges: tuple[str, ...] = option((), "LOW:HIGH of each of them, commas between", group="MAP-Elites")
    line: float = option(0.0, "step along the line to another elite, in its length", low=0, group="MAP-Elites")
    generations: int = option(100, "generations", low=1, group="Length")
    evaluations: int | None = option(None, "most evaluations of members", low=1, group="Length")
    minutes: float | None = option(None, "wall time, compiling included", above=0, group="Length")
    target: float | None = option(None, "fitness of a member that ends it", group="Length")
    timeout: float = option(
        600.0, "seconds that scoring a generation may take; 0: no limit; a call into a library that never returns to "
        "Python is not interrupted", low=0, group="Length",
    )  # fmt: skip
    batch_size: int = option(
        8, "rows (or prompts) that all members of a generation see", low=1, high=10**6, group="Data"
    )
    batches: int | None = option(
        None, "so many different ones, in turns; 0: one for each generation; if not given 0, but 1 for --restarts and "
        "strategies that keep what they measured", low=0, group="Data",
    )  # fmt: skip
    block_size: int | None = option(None, "tokens in a row; the model's max_len if not given", low=1, group="Data")
    val_fraction: float = option(0.05, "share of the data kept for validation", low=0, below=1, group="Data")
    max_tokens: int = option(64, "longest answer", low=1, group="Data")
    temperature: float = option(0.0, "of answers; 0: always the likeliest token", low=0, group="Data")
    stop: tuple[str, ...] = option(("\n",), "texts that end an answer, commas between", group="Data")
    chat: bool = option(False, "prompts are the user's turns of a chat", group="Data")
    chunk_size: str = option("auto", "members computed at once; auto: what memory holds", group="Machine")
    dtype: str = option("auto", "precision of the products", choices=DTYPES, group="Machine")
    device: str = option("auto", "where to run", choices=DEVICES, group="Machine")
    rank_timeout: float = option(
        600.0, "seconds that a rank of torchrun waits for the others", above=0, group="Machine"
    )
    compile: bool = option(True, "compile (eager where no C++ compiler is found)", group="Machine")
    seed: int = option(1337, "seed of every random draw", low=0, group="Strategy")
    eval_every: int = option(0, "generations between measurements on what was held out", low=0, group="Records")
    eval_batches: int = option(
        20, "batches of them, and of the last one; where members train, of their fitness too", low=1, group="Records"
    )
    save_every: int = option(10, "generations between checkpoints; 0: at the end only", low=0, group="Records")
    keep: int = option(2, "checkpoints to keep; 0: all", low=0, group="Records")
    resume: str = option("auto", "auto: go on with the run in --out; never", choices=("auto", "never"), group="Records")
    override: bool = option(
        False, "go on with other numbers of the strategy, or measure on other data", group="Records"
    )
    overwrite: bool = option(False, "replace a run that --out already holds", group="Records")


def fixed(flags: EvolveFlags) -> tuple[str, ...]:
    """The flags that make this run what it is."""
    return FIXED + (MEASURING if flags.space in TRAINING else ())


def origin(flags: EvolveFlags) -> str:
    """What is evolved, by its folders."""
    folders = flags.models if flags.model is None else filter(None, (flags.model, flags.adapter))
    return ", ".join(folders)


def grid(flags: EvolveFlags) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Bins, lows and highs of --bins and --ranges. Raises UsageError."""
    bins = flags.bins.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in bins):
        raise UsageError(f"--bins is {flags.bins!r}; it is whole numbers above 0 with x between, such as 10x10")
    for name, parts in (("bins", bins), ("ranges", flags.ranges)):
        if len(parts) != len(flags.descriptor):
            raise UsageError(f"--{name} has {len(parts)} parts for {len(flags.descriptor)} --descriptor; one for each")
    try:
        lows, highs = zip(*((float(low), float(high)) for low, _, high in (one.partition(":") for one in flags.ranges)))
    except ValueError:
        raise UsageError(f"--ranges is {','.join(flags.ranges)!r}; it is LOW:HIGH, commas between") from None
    return tuple(map(int, bins)), lows, highs


def figures(flags: EvolveFlags) -> tuple[str, ...]:
    """What is measured of a member: its fitness, each objective of it, or it and a descriptor."""
    return (*flags.fitness.split(","), *flags.descriptor)


def batches(flags: EvolveFlags) -> int:
    """How many minibatches there are; 0: no end of them. What restarts go by compares generations, too."""
    if flags.batches is not None:
        return flags.batches
    return int(flags.strategy in REMEMBERING or flags.restarts != "none")


def answers(name: str) -> bool:
    """Whether a figure is one of generated text."""
    return name not in MEASURED
