"""What `evolve` may go on with under `--override`, and which strategy each generation had then. Imports no torch.

A journal has a line of flags for each time that they changed, so that replay tells every generation by those of its
time. So what may change is what the strategy reads anew in every generation, and, where replay only tells what was
measured, what it was measured on. What is evolved and how the state is laid out may not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import evolve_flags, run_folder, surroundings
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution
from functional_lm.evolve_strategies import strategy_of

if TYPE_CHECKING:
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.strategy import Strategy

MEASURED_ON = (
    "data", "batch_size", "batches", "block_size", "val_fraction", "max_tokens", "temperature", "stop", "chat", "dtype",
    "compile",
)  # fmt: skip
SAYS = {"flags": dict, "digest": str, "chunk": int, "versions": dict}  # what a journal has of each run
ESTIMATE = ("sigma", "learning_rate", "weight_decay", "beta1", "beta2", "momentum", "grad_clip")
BREEDING = (
    "elites", "tournament", "pressure", "crossover", "crossover_rate", "mutation", "mutation_rate", "strength",
)  # fmt: skip
# What strategies read anew in every generation; the others adapt what they began with.
READ = {
    "openai-es": (*ESTIMATE, "antithetic", "shaping", "noise"),
    "eggroll": (*ESTIMATE, "antithetic", "shaping", "noise"),
    "mezo": ESTIMATE,
    "genetic": BREEDING,
    "nsga2": BREEDING,
    "differential-evolution": ("de_base", "de_weight", "de_crossover"),
    "pso": ("inertia", "cognitive", "social"),
    "map-elites": ("sigma", "line"),
    "pbt": ("exploit", "perturb", "resample", "spread"),
}
WHY = {
    "it is what is evolved": (
        "model", "models", "adapter", "base", "method", "groups", "density", "space", "leaves", "targets", "rank",
        "alpha", "settings", "tuned", "choices", "max_parameters", "fresh",
    ),
    "the state is made for it": ("strategy", "population", "optimizer", "restarts"),
    "what was measured would not compare": ("fitness", "descriptor", "bins", "ranges"),
    "every draw follows from it": ("seed",),
}  # fmt: skip


def changes(options: EvolveFlags, journal: Journal, out: Path) -> list[str]:
    """What makes it another run than the journal's, where that may be: flags, and functions of fitness.

    Raises UsageError, without `--override` for any, and always for those that cannot change.
    """
    # A flag that is younger than the journal was what it is where it is not given.
    before, now = (run_folder.as_json(dataclasses.asdict(flags)) for flags in (EvolveFlags(), options))
    before |= journal.header["flags"]
    names = [name for name in evolve_flags.fixed(options) if not run_folder.same(name, before[name], now[name])]
    found = [f"--{name} was {before[name]}, is {now[name]}" for name in names]
    found += surroundings.changed_functions(surroundings.functions(options), journal.header)
    if never := [f"--{name} ({why})" for name in names if (why := obstacle(name, options))]:
        raise UsageError(
            f"{out} holds another run ({'; '.join(found)}), and nothing overrides {', '.join(never)}; choose another "
            "--out, or --overwrite it"
        )
    run_folder.agree(f"{out} holds another run", found, options.override, run_folder.STARTING_AGAIN)
    return found


def obstacle(name: str, options: EvolveFlags) -> str | None:
    """Why a flag cannot change in a run; None if it can."""
    trains = options.space in evolve_flags.TRAINING
    if name in READ.get(options.strategy, ()) or (name in MEASURED_ON and not trains):
        return None
    other = "members are trained and measured with it" if trains else f"{options.strategy} reads it once or not"
    return next((why for why, names in WHY.items() if name in names), other)


def journal_of(path: str | Path) -> Journal:
    """The journal of a run of `evolve`. Raises DataError, for one that does not say what the run was too."""
    from functional_lm.evolution import journal as journals

    journal = journals.read(path)
    for header in journal.headers:
        for name, kind in SAYS.items():
            if not isinstance(header.get(name), kind):
                raise DataError(f"{path} has no {name!r} in its line of settings; evolve did not write it")
    return journal


def flags_of(header: Mapping[str, Any], what: str) -> EvolveFlags:
    """The flags in a line of the journal `what`. Raises DataError for those of a later version."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header["flags"].items()}
    if unknown := values.keys() - vars(EvolveFlags()).keys():
        raise DataError(f"{what} has --{min(unknown)}, which this version does not know; use the one that wrote it")
    return EvolveFlags(**values)


def _strategy(options: EvolveFlags, evolution: Evolution) -> Strategy:
    from functional_lm import evolve_hyper

    if options.strategy == "pbt":
        return evolve_hyper.strategy_of(options, evolution.model)
    return strategy_of(options, evolution.space.start)


def strategies(options: EvolveFlags, evolution: Evolution, journal: Journal) -> Callable[[int], Strategy]:
    """The strategy of each generation of a journal, on this machine; `options` are those of `evolution`."""
    from functional_lm import compile as compiling

    names = (*READ.get(options.strategy, ()), "compile")
    compiles = compiling.obstacle(options.device) is None

    @cache
    def of(values: tuple[Any, ...]) -> Strategy:
        then = dataclasses.replace(options, **dict(zip(names, values)))
        then = dataclasses.replace(then, compile=then.compile and compiles)
        return evolution.strategy if then == options else _strategy(then, evolution)

    def at(number: int) -> Strategy:
        flags = flags_of(journal.began(number), str(journal.path))
        return of(tuple(getattr(flags, name) for name in names))

    return at
