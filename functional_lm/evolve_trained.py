"""`evolve --space hyper` and `--space architecture`: each candidate is a training of its own.

A candidate stands for numbers of training, for choices of architecture, or for both. The same start is trained with
them on the same batches, and measured on the first half of what is held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console, evolve_choices
from functional_lm.evolution import architectures
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import GENERATE, Evolution, key_of
from functional_lm.evolve_strategies import strategy_of
from functional_lm.model import account
from functional_lm.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.architectures import Grid, Place
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.strategy import Candidates
    from functional_lm.evolution.trainings import Job, Search
    from functional_lm.evolve_task import Divide, Source, Task
    from functional_lm.folder import Model
    from functional_lm.training.step import Training
    from functional_lm.tree import Tree

GRAPHS = 64  # compiled trainings that are kept
KEPT = 3  # trained models that are kept: of start, centre and best


class Trained(NamedTuple):
    """What is written: a model of an architecture of its own."""

    params: Tree
    config: ModelConfig


class Bench(NamedTuple):
    """The compiled functions of one architecture and size."""

    train: Callable[..., Any]
    measure: Callable[[Tree], Tensor]


def numbers(options: EvolveFlags) -> dict[str, float]:
    """Where what is tuned begins."""
    return {name: float(getattr(options, name)) for name in options.tuned}


@lru_cache(1)
def grid_of(options: EvolveFlags, base: ModelConfig) -> Grid:
    """The possible architectures. Raises UsageError."""
    return architectures.grid(evolve_choices.parse(options.choices), base, options.max_parameters)


def search_of(options: EvolveFlags, model: Model) -> Search:
    from functional_lm.evolution import hyper
    from functional_lm.evolution.trainings import Search

    hyper.check_numbers(numbers(options))
    return Search(numbers(options), grid_of(options, model.config))


def evolution_of(options: EvolveFlags, model: Model, digest: str) -> Evolution:
    from functional_lm import folder
    from functional_lm.evolution import spaces, trainings

    search = search_of(options, model)
    start = trainings.begin(search, options.device)
    if search.grid.choices:
        console.say(_possible(options, search.grid))

    def write(path: Path, made: Any) -> None:
        folder.save(path, made.params, made.config, model.tokenizer)

    def facts(journal: Journal, kept: str, leaves: Tree) -> Mapping[str, Any]:
        found = trainings.values(search, leaves)
        if not search.grid.choices:
            return {"numbers": found["numbers"]}
        config = _config(search, leaves)
        steps = steps_of(options, search, config, options.block_size or config.max_len)
        counted = {"tokens": None} if options.equal_compute else {}  # the members' differ
        return {**found, "parameters": account.parameters(config), "steps": steps, **counted}

    return Evolution(model, spaces.full(start), strategy_of(options, start), digest, write, GENERATE, "model", facts)


def _possible(options: EvolveFlags, grid: Grid) -> str:
    import math

    total, able = math.prod(len(choice.options) for choice in grid.choices), len(grid.able)
    limit = "" if options.max_parameters is None else f" of at most {options.max_parameters:,} parameters"
    sizes = sorted(map(account.parameters, grid.able.values()))
    line = f"{able} of {total} architectures are possible{limit}, {sizes[0]:,} to {sizes[-1]:,} parameters"
    if able < total:
        line += "; one that is not becomes the nearest that is"
    if missing := grid.missing():
        line += "; in none of them: " + ", ".join(f"{name} {value}" for name, value in missing)
    return line


def _config(search: Search, leaves: Tree) -> ModelConfig:
    from functional_lm.evolution import trainings

    (place,) = trainings.places(search, {name: leaf[None] for name, leaf in leaves.items()})
    return search.grid.able[place]


def steps_of(options: EvolveFlags, search: Search, config: ModelConfig, length: int) -> int:
    """Steps of a training: as many for all, or as many operations as the first architecture's have."""
    from functional_lm.evolution import trainings

    if not options.equal_compute:
        return options.steps
    first = search.grid.able[search.grid.start]
    cost, other = (account.training_flops(one, length) for one in (config, first))
    return trainings.equal_steps(options.steps, cost, other)


def functions(options: EvolveFlags, config: ModelConfig, steps: int | None = None) -> Training:
    """The step of one member: of a training of `steps` along a schedule that is numbers, else at a constant rate."""
    import torch

    from functional_lm.evolution import hyper
    from functional_lm.training import optimizer, schedule, step

    chosen = optimizer.optimizer(options.optimizer)
    known = {name: float(getattr(options, name)) for name in step.DEFAULTS if hasattr(options, name)}
    if steps is not None:
        chosen = hyper.scheduled(chosen)
        known |= {name: float(getattr(options, name)) for name in hyper.SCHEDULE} | {"total_steps": float(steps)}
    return step.training(
        dataclasses.replace(config, attention="standard", checkpoint_activations=False),
        chosen,
        schedule.constant(),
        getattr(torch, options.dtype),
        known,
    )


def task_of(options: EvolveFlags, evolution: Evolution, source: Source, length: int, divide: Divide) -> Task:
    """Train, then measure. `held_out` trains what it is given, and measures on the other half of what is held out."""
    import torch

    from functional_lm import evolve_held, keys, tree
    from functional_lm.evolution import hyper, trainings
    from functional_lm.evolve_task import Task
    from functional_lm.model import transformer

    model, search = evolution.model, search_of(options, evolution.model)
    part = divide(source.tokens * options.steps)
    key = keys.fold_in_name(key_of(options), "training")
    sizes = {config: account.parameters(config) for config in search.grid.able.values()}
    benches: dict[tuple[Place, int], Bench] = {}

    def steps(place: Place) -> int:
        return steps_of(options, search, search.grid.able[place], length)

    def begun(place: Place) -> Tree:
        if options.fresh or options.space == "architecture":
            return transformer.init(search.grid.able[place], key)
        return tree.cast(model.params, torch.float32)

    def bench(place: Place, size: int) -> Bench:
        if (place, size) not in benches:
            if len(benches) >= GRAPHS:
                benches.clear()
                _forget(options)
            benches[place, size] = _bench(options, model._replace(config=search.grid.able[place]), size, source)
        return benches[place, size]

    def trained(place: Place, rows: Tree, size: int) -> Tree:
        step = functions(options, search.grid.able[place], steps(place))
        states = hyper.begun(step, begun(place), key, hyper.moved(search.numbers, rows), size)
        return bench(place, size).train(states, source.batch, 0, steps(place)).params

    def scored(job: Job, own: Tree) -> Tensor:
        rows = tree.map(lambda leaf: leaf[list(job.rows)], own)
        params = trained(job.place, rows, len(job.rows))
        return trainings.values_of(job, bench(job.place, len(job.rows)).measure(params))

    def planned(own: Tree) -> tuple[list[Job], list[int]]:
        plan = trainings.jobs(trainings.places(search, own), part.size, search)
        costs = [
            len(job.rows) * steps(job.place) * account.training_flops(search.grid.able[job.place], length)
            for job in plan
        ]
        return plan, trainings.divided(costs, part.ranks)

    def measure(candidates: Candidates, number: int) -> Tensor:
        mine = trainings.of_rank(*planned(candidates.own), part.rank)
        device = tree.leaves(candidates.own)[0].device
        return torch.cat([torch.empty(0, device=device), *(scored(job, candidates.own) for job in mine)])

    def placed(values: Tensor, candidates: Candidates) -> Tensor:
        return trainings.in_order(values, *planned(candidates.own))

    def describe(state: Any) -> Mapping[str, list[float]]:
        own = evolution.strategy.ask(state).own
        tuned = {name: value.tolist() for name, value in hyper.moved(search.numbers, own).items()}
        return {**tuned, **trainings.told(search, trainings.places(search, own), sizes)}

    kept: dict[str, Trained] = {}

    def whole(leaves: Tree) -> Trained:
        """The model that is trained with these numbers: of one architecture as it was when it was measured, among as
        many others; of several alone."""
        name = tree.digest(leaves)
        if name not in kept:
            size = part.size if search.alone else 1
            alike = tree.map(lambda leaf: leaf.expand(size, *leaf.shape).contiguous(), leaves)
            (place, *_) = trainings.places(search, alike)
            params = tree.map(lambda leaf: leaf[0].clone(), trained(place, alike, size))
            if len(kept) == KEPT:
                kept.pop(next(iter(kept)))
            kept[name] = Trained(params, search.grid.able[place])
        return kept[name]

    def held_out(leaves: Tree) -> float:
        made = whole(leaves)
        return evolve_held.judging(options, model._replace(config=made.config), source)(made.params)

    return Task(
        measure,
        held_out,
        source.tokens * options.steps,
        part,
        source.digest,
        describe=describe,
        whole=whole,
        placed=placed,
    )


def _bench(options: EvolveFlags, model: Model, size: int, source: Source) -> Bench:
    from functional_lm import evolve_held
    from functional_lm.compile import compiled
    from functional_lm.evolution import hyper

    train = hyper.steps_of(
        functions(options, model.config, options.steps),
        lambda step: compiled(step, donate=True, enabled=options.compile),
    )
    return Bench(train, evolve_held.deciding(options, model, source, size))


def _forget(options: EvolveFlags) -> None:
    from functional_lm import compile as compiling

    if options.compile:
        compiling.forget()
