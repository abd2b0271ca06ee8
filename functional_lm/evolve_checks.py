"""What the flags of `evolve` say against each other. Imports no torch."""

from __future__ import annotations

from functional_lm import evolve_choices
from functional_lm.errors import UsageError
from functional_lm.evolve_flags import (
    ESTIMATING,
    LEAST_STEP,
    MEASURED,
    RESTARTING,
    SCHEDULE,
    SEARCHING,
    TRAINING,
    TUNED,
    EvolveFlags,
    answers,
    figures,
    grid,
)  # fmt: skip
from functional_lm.sampling_settings import USUAL

TRAINED = ("tuned", "steps", *SCHEDULE, "spread", "exploit", "perturb", "resample", "fresh")
# Flags that are read by these strategies alone.
OWN = {
    **dict.fromkeys(("elites", "tournament", "pressure"), ("genetic",)),
    **dict.fromkeys(("crossover", "crossover_rate", "mutation", "mutation_rate", "strength"), ("genetic", "nsga2")),
    **dict.fromkeys(("de_base", "de_weight", "de_crossover"), ("differential-evolution",)),
    **dict.fromkeys(("inertia", "cognitive", "social"), ("pso",)),
    **dict.fromkeys(("bins", "ranges", "line"), ("map-elites",)),
    **dict.fromkeys(("spread", "exploit", "perturb", "resample"), ("pbt",)),
}
# Numbers of training that these optimizers alone read.
OPTIMIZING = {"beta1": ("adamw", "muon", "lion", "sgd"), "beta2": ("adamw", "muon", "lion"), "momentum": ("muon",)}
REPLAYED = ("action", "journal", "out", "model", "data", "device", "rank_timeout")  # flags of replay


def check(flags: EvolveFlags) -> None:
    """Contradictions, each flag being right by itself. Raises UsageError."""
    if flags.action == "replay" or flags.journal is not None:
        if flags.action != "replay":
            raise UsageError("--journal belongs to replay: evolve replay JOURNAL")
        if flags.journal is None:
            raise UsageError("evolve replay needs the journal: evolve replay RUN/journal.jsonl --out DIR")
        for name, usual in vars(EvolveFlags()).items():
            if name not in REPLAYED and getattr(flags, name) != usual:
                raise UsageError(f"--{name} is what the journal says; replay takes --out, --model, --data and --device")
        return
    if flags.overwrite and flags.override:
        raise UsageError("--overwrite starts again and --override goes on; give one of them")
    for name in ("data",) if flags.space == "merge" else ("model", "data"):
        if getattr(flags, name) is None:
            raise UsageError(f"--{name} is required")
    _check_merge(flags)
    _check_decode(flags)
    _check_population(flags)
    if flags.space != "lora" and flags.adapter is not None:
        raise UsageError(f"--adapter is evolved in --space lora, not in {flags.space}")
    for name in ("alpha", "targets") if flags.adapter is not None else ():
        if getattr(flags, name) != getattr(EvolveFlags, name):
            raise UsageError(f"--{name} is what the adapter in {flags.adapter} has; leave it out, or --adapter")
    if flags.space != "full" and flags.leaves != ("*",):
        other = {"lora": "--targets", "merge": "--groups"}.get(flags.space, "none")
        raise UsageError(f"--leaves chooses in --space full; {flags.space} has {other}")
    _check_trained(flags)
    if flags.noise == "regenerated" and flags.strategy not in ESTIMATING:
        raise UsageError(f"--noise regenerated is for {' and '.join(ESTIMATING)}; {flags.strategy} stores its members")
    if flags.restarts != "none" and flags.strategy not in RESTARTING:
        raise UsageError(
            f"--restarts are for {' and '.join(RESTARTING)}; {flags.strategy} does not converge as they do"
        )
    if flags.chunk_size != "auto" and not (flags.chunk_size.isdecimal() and int(flags.chunk_size) > 0):
        raise UsageError(f"--chunk_size is {flags.chunk_size!r}; it is auto or a whole number above 0")
    _check_figures(flags)
    for name, strategies in OWN.items():
        if flags.strategy not in strategies and getattr(flags, name) != getattr(EvolveFlags, name):
            raise UsageError(f"--{name} is of --strategy {' and '.join(strategies)}; {flags.strategy} has none")


def _check_population(flags: EvolveFlags) -> None:
    """Of members as many as the strategy needs, and of evaluations at least a generation."""
    if flags.population < 2:
        raise UsageError(f"--population {flags.population} is too small; give at least 2")
    if flags.population % 2 and (flags.strategy == "mezo" or (flags.strategy in ESTIMATING and flags.antithetic)):
        other = "" if flags.strategy == "mezo" else ", or --antithetic false"
        raise UsageError(f"--population {flags.population} is odd; antithetic pairs need an even one{other}")
    if flags.strategy == "genetic" and flags.elites >= flags.population:
        raise UsageError(f"--elites {flags.elites} leave no room in a --population of {flags.population}")
    if flags.strategy == "differential-evolution" and flags.population < 4:
        raise UsageError(f"--population {flags.population} is too small; a trial needs 3 members besides its own")
    if flags.evaluations is not None and flags.evaluations < flags.population:
        raise UsageError(
            f"--evaluations {flags.evaluations} are less than one generation's; give at least the --population, "
            f"{flags.population}, or a smaller one"
        )


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
    if not all(map(answers, figures(flags))):
        raise UsageError(f"--space decode changes answers alone; --fitness is {flags.fitness}: give exact or "
                         "module:function")  # fmt: skip
    if flags.temperature:
        raise UsageError("--temperature is evolved in --space decode; it begins at the model's own")
    if not flags.settings or len(set(flags.settings)) < len(flags.settings):
        raise UsageError(f"--settings is {','.join(flags.settings) or 'empty'}; name each setting once")


def _check_trained(flags: EvolveFlags) -> None:
    if flags.strategy == "pbt" and flags.space != "hyper":
        why = "architectures do not go on with each other's weights" if flags.space == "architecture" else "pbt trains"
        raise UsageError(f"--strategy pbt is for --space hyper, not {flags.space}: {why}")
    others = {
        "hyper and architecture": (TRAINING, TRAINED),
        "architecture": (("architecture",), ("choices", "max_parameters", "equal_compute")),
    }
    for what, (spaces, names) in others.items():
        for name in names:
            if flags.space not in spaces and getattr(flags, name) != getattr(EvolveFlags, name):
                raise UsageError(f"--{name} is of --space {what}, not of {flags.space}")
    if flags.space not in TRAINING:
        return
    searching = SEARCHING if flags.space == "architecture" else ("pbt", *SEARCHING)
    if flags.strategy not in searching:
        raise UsageError(f"--space {flags.space} is searched by {', '.join(searching)}, not by {flags.strategy}")
    if flags.strategy == "pbt" and flags.chunk_size != "auto":
        raise UsageError("--strategy pbt trains all members at once; leave --chunk_size out")
    for name in SCHEDULE if flags.strategy == "pbt" else ():
        if name in flags.tuned or getattr(flags, name) != getattr(EvolveFlags, name):
            raise UsageError(f"--{name} is of a schedule over --steps; pbt, which goes on after them, finds its own: "
                             "tune learning_rate")  # fmt: skip
    if len(set(flags.tuned)) < len(flags.tuned):
        raise UsageError(f"--tuned is {','.join(flags.tuned)}; name each number once")
    for name in flags.tuned:
        if flags.optimizer not in OPTIMIZING.get(name, (flags.optimizer,)):
            raise UsageError(f"--tuned {name} changes nothing of --optimizer {flags.optimizer}; it is a number of "
                             f"{', '.join(OPTIMIZING[name])}")  # fmt: skip
        if getattr(flags, name) == 0:
            raise UsageError(f"--tuned {name} is searched by factors, and begins at 0; give --{name} another")
    if flags.space == "architecture":
        _check_choices(flags)
    elif not flags.tuned:
        raise UsageError(f"--tuned is empty; name numbers of training: {', '.join(TUNED)}")


def _check_choices(flags: EvolveFlags) -> None:
    if not flags.choices:
        raise UsageError(f"--space architecture needs --choices: what may differ, such as {evolve_choices.EXAMPLE}")
    evolve_choices.parse(flags.choices)
    if flags.sigma < LEAST_STEP:
        raise UsageError(
            f"--sigma {flags.sigma:g} hardly leaves the architecture that it begins at: the next value of a choice is "
            "1 away; give 0.5 or so"
        )


def _check_figures(flags: EvolveFlags) -> None:
    objectives = tuple(flags.fitness.split(","))
    for flag, names in (("fitness", objectives), ("descriptor", flags.descriptor)):
        for name in names:
            if name not in (*MEASURED, "exact") and ":" not in name:
                raise UsageError(f"--{flag} is {name!r}; it is {', '.join(MEASURED)}, exact or module:function")
        if len(set(names)) < len(names):
            raise UsageError(f"--{flag} is {','.join(names)}; name each figure once")
    if (flags.strategy == "nsga2") != (len(objectives) > 1):
        what = "needs several" if flags.strategy == "nsga2" else "takes one"
        raise UsageError(f"{flags.strategy} {what} --fitness, and {flags.fitness!r} names {len(objectives)}")
    if (flags.strategy == "map-elites") != bool(flags.descriptor):
        raise UsageError("--descriptor and --strategy map-elites go together")
    if flags.descriptor:
        grid(flags)
