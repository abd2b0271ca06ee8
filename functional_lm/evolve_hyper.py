"""`evolve --space hyper`: trainings whose numbers are evolved, by population-based training or another strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm.errors import UsageError
from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution import hyper
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolve_search import Evolution
    from functional_lm.evolve_task import Source, Task
    from functional_lm.folder import Model
    from functional_lm.training.step import Training
    from functional_lm.tree import Tree


def evolution_of(options: EvolveFlags, model: Model, digest: str, use: str) -> Evolution:
    """P trainings of the model as a strategy whose candidates are their weights; or any other over their numbers."""
    from functional_lm import folder, keys
    from functional_lm.evolution import hyper, spaces
    from functional_lm.evolve_search import Evolution, key_of, strategy_of
    from functional_lm.model import transformer

    def fresh(key: Tensor) -> Tree:
        return transformer.init(model.config, key)

    def write(path: Path, leaves: Tree) -> None:
        folder.save(path, leaves, model.config, model.tokenizer)

    if options.strategy != "pbt":
        hyper.check_numbers(numbers(options))
        start = hyper.offsets(numbers(options), options.device)
        space = spaces.full(start)

        def found(journal: Journal, kept: str, leaves: Tree) -> Mapping[str, Any]:
            return {"numbers": {name: float(value) for name, value in hyper.moved(numbers(options), leaves).items()}}

        return Evolution(model, space, strategy_of(options, start), digest, write, use, "model", found)

    def facts(journal: Journal, kept: str, leaves: Tree) -> Mapping[str, Any]:
        key = keys.fold_in_name(key_of(options), "evolution")
        return {"numbers": schedule(journal, key, numbers(options), settings(options), kept)}

    strategy = hyper.pbt(
        settings(options), functions(options, model), numbers(options), fresh if options.fresh else None
    )
    return Evolution(model, spaces.full(model.params), strategy, digest, write, use, "model", facts)


def settings(options: EvolveFlags) -> hyper.Settings:
    from functional_lm.evolution import hyper

    return hyper.Settings(options.population, options.spread, options.exploit, options.perturb, options.resample)


def numbers(options: EvolveFlags) -> dict[str, float]:
    """Where what is tuned begins."""
    return {name: float(getattr(options, name)) for name in options.tuned}


def functions(options: EvolveFlags, model: Model) -> Training:
    """The step of one member, at a constant rate."""
    import torch

    from functional_lm.training import optimizer, schedule, step

    return step.training(
        dataclasses.replace(model.config, attention="standard"),
        optimizer.optimizer(options.optimizer),
        schedule.constant(),
        getattr(torch, options.dtype),
        {name: getattr(options, name) for name in step.DEFAULTS if hasattr(options, name)},
    )


def schedule(
    journal: Journal, key: Tensor, numbers: Mapping[str, float], settings: hyper.Settings, kept: str
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


def task_of(options: EvolveFlags, evolution: Evolution, source: Source) -> Task:
    """Train, then measure on the first half of what is held out; the end is measured on the other half.

    Population-based training goes on from generation to generation. A candidate of another strategy is numbers, with
    which the same start is trained on the same batches.

    Raises UsageError where nothing is held out.
    """
    import torch

    from functional_lm import keys, tree
    from functional_lm.compile import compiled
    from functional_lm.evolution import hyper, population, spaces, task
    from functional_lm.evolution.strategy import Candidates, unmoved
    from functional_lm.evolve_search import key_of
    from functional_lm.evolve_task import Task, alone_on
    from functional_lm.model import transformer

    if not source.held:
        raise UsageError(
            f"--space hyper measures on what is held out, which is less than a row; give more text, or a larger "
            f"--val_fraction than {options.val_fraction:g}"
        )
    half = max(1, len(source.held) // 2)
    measured, last = source.held[:half], source.held[half:]
    objective, dtype = task.objective_of(options.fitness, evolution.model), getattr(torch, options.dtype)
    part = population.share(options.population)

    def wrap(donate: bool) -> Callable[..., Any]:
        return lambda function: compiled(function, donate=donate, enabled=options.compile)

    model = evolution.model
    weights, space = unmoved(options.population), spaces.full(model.params)
    evaluate = population.evaluator(weights, space, objective, dtype, None, wrap(donate=False), part)
    step = functions(options, model)
    train = hyper.steps_of(step, wrap(donate=True))

    def advance(state: Any, number: int) -> Any:
        return state._replace(states=train(state.states, source.batch, number * options.steps, options.steps))

    def describe(state: Any) -> Mapping[str, list[float]]:
        return {name: state.states.numbers[name].tolist() for name in options.tuned}

    def measure(candidates: Candidates, number: int) -> Tensor:
        return torch.stack([evaluate(candidates, batch) for batch in measured]).mean(0)

    held_out, tokens = alone_on(options, evolution._replace(space=space), last), source.tokens * options.steps
    if options.strategy == "pbt":
        return Task(measure, held_out, tokens, part, source.digest, advance, describe)
    key = keys.fold_in_name(key_of(options), "training")
    start = transformer.init(model.config, key) if options.fresh else space.start

    def trained(offsets: Tree) -> Tree:
        begun = hyper.begun(step, start, key, hyper.moved(numbers(options), offsets))
        return train(begun, source.batch, 0, options.steps).params

    def whole(leaves: Tree) -> Tree:
        """The model that is trained with these numbers, as it was when it was measured: among as many others."""
        alike = tree.map(lambda leaf: leaf.expand(options.population, 1).contiguous(), leaves)
        return tree.map(lambda leaf: leaf[0].clone(), trained(alike))

    def measured_anew(candidates: Candidates, number: int) -> Tensor:
        return measure(Candidates({}, {}, trained(candidates.own)), number)

    return Task(measured_anew, lambda leaves: held_out(whole(leaves)), tokens, part, source.digest, whole=whole)
