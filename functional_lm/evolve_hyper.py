"""`evolve --space hyper --strategy pbt`: trainings that go on while their numbers are evolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import GENERATE, Evolution, key_of
from functional_lm.evolve_trained import functions, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution import hyper
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.strategy import Candidates, Strategy
    from functional_lm.evolve_task import Divide, Source, Task
    from functional_lm.folder import Model
    from functional_lm.tree import Tree


def evolution_of(options: EvolveFlags, model: Model, digest: str) -> Evolution:
    """P trainings of the model as a strategy whose candidates are their weights."""
    from functional_lm import evolve_override, folder, keys
    from functional_lm.evolution import hyper, spaces
    from functional_lm.model import transformer

    begins = keys.fold_in_name(key_of(options), "evolution")

    def write(path: Path, leaves: Tree) -> None:
        folder.save(path, leaves, model.config, model.tokenizer)

    def facts(journal: Journal, kept: str, leaves: Tree) -> Mapping[str, Any]:
        def at(generation: int) -> hyper.Settings:
            return settings(evolve_override.flags_of(journal.began(generation), str(journal.path)))

        return {"numbers": schedule(journal, begins, numbers(options), at, kept)}

    start, strategy = model.params, strategy_of(options, model)
    if options.fresh:  # what the first member begins with
        (start,) = hyper.newborn(begins, lambda key: transformer.init(model.config, key), 1)
    return Evolution(model, spaces.full(start), strategy, digest, write, GENERATE, "model", facts)


def strategy_of(options: EvolveFlags, model: Model) -> Strategy:
    from functional_lm.evolution import hyper
    from functional_lm.model import transformer

    def fresh(key: Tensor) -> Tree:
        return transformer.init(model.config, key)

    return hyper.pbt(
        settings(options), functions(options, model.config), numbers(options), fresh if options.fresh else None
    )


def settings(options: EvolveFlags) -> hyper.Settings:
    from functional_lm.evolution import hyper

    return hyper.Settings(options.population, options.spread, options.exploit, options.perturb, options.resample)


def schedule(
    journal: Journal,
    key: Tensor,
    numbers: Mapping[str, float],
    settings: Callable[[int], hyper.Settings],
    kept: str,
) -> dict[str, list[float]]:
    """The numbers that led to the model that is kept, generation by generation: what key and fitness say."""
    import torch

    from functional_lm.evolution import hyper
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution.shaping import usable

    measured = [torch.tensor(journals.fitness_of(entry), device=key.device) for entry in journal.generations]
    if not measured:
        return {}
    best = torch.stack([usable(values)[0].max() for values in measured])
    generation = len(measured) - 1 if kept == "centre" else int(best.argmax())
    member = int(usable(measured[generation])[0].argmax())
    return hyper.lineage(*hyper.history(key, measured, numbers, settings), generation, member)


def task_of(options: EvolveFlags, evolution: Evolution, source: Source, divide: Divide) -> Task:
    """Train on from generation to generation, and measure; all members at once."""
    from functional_lm import evolve_held
    from functional_lm.compile import compiled
    from functional_lm.evolution import hyper
    from functional_lm.evolve_task import Task

    model, part = evolution.model, divide(source.tokens * options.steps)
    decided = evolve_held.deciding(options, model, source, options.population)
    train = hyper.steps_of(
        functions(options, model.config), lambda step: compiled(step, donate=True, enabled=options.compile)
    )

    def advance(state: Any, number: int) -> Any:
        return state._replace(states=train(state.states, source.batch, number * options.steps, options.steps))

    def describe(state: Any) -> Mapping[str, list[float]]:
        return {name: state.states.numbers[name].tolist() for name in options.tuned}

    def measure(candidates: Candidates, number: int) -> Tensor:
        return decided(candidates.own)

    judged = evolve_held.judging(options, model, source)
    return Task(measure, judged, source.tokens * options.steps, part, source.digest, advance, describe)
