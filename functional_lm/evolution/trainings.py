"""Candidates that are trainings: numbers of training and choices of architecture, one mechanism for both.

    start  = begin(search, device)                      what is evolved: real numbers, all 0
    plan   = jobs(places(search, own), chunk, search)   members of one architecture are one vmapped training, a bucket
    owner  = divided(costs, ranks)                      which rank trains which job

Without choices there is one architecture, and the buckets are chunks of the population. A job is computed at a size
that comes again (the whole chunk, or a power of two where architectures differ), filled up with its last member, so
that a graph serves it in all generations. What a job is does not depend on how many ranks there are.

Axes: P members, C most members of a job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm.evolution import hyper
from functional_lm.evolution.architectures import Grid, Place, decoded
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree


class Search(NamedTuple):
    """Where the numbers begin, and the architectures that there are."""

    numbers: Mapping[str, float]
    grid: Grid

    @property
    def alone(self) -> bool:
        """Whether there is but one architecture."""
        return len(self.grid.able) == 1


class Job(NamedTuple):
    """Members that are trained together; `rows` are those that are computed, value i is that of row min(i, last)."""

    place: Place
    members: tuple[int, ...]
    rows: tuple[int, ...]


def begin(search: Search, device: torch.device | str) -> Tree:
    """Where the numbers and the choices begin; [1] each, [options] for words."""
    chosen = {choice.name: torch.zeros(choice.size, device=device) for choice in search.grid.choices}
    return {**hyper.offsets(search.numbers, device), **chosen}


def places(search: Search, own: Tree) -> list[Place]:
    """The architecture of each member [P, ...], which is a possible one."""
    columns = [own[choice.name].cpu().double().tolist() for choice in search.grid.choices]
    count = len(next(iter(own.values())))
    grid = search.grid
    wanted = [
        tuple(decoded(choice, column[i], at) for choice, column, at in zip(grid.choices, columns, grid.start))
        for i in range(count)
    ]
    return [grid.nearest(place) for place in wanted]


def jobs(found: Sequence[Place], chunk: int, search: Search) -> list[Job]:
    """The trainings of a generation, architectures in the order in which they first come.

    Where no number of training differs, the members of an architecture are one training.
    """
    buckets: dict[Place, list[int]] = {}
    for member, place in enumerate(found):
        buckets.setdefault(place, []).append(member)
    if not search.numbers:
        return [Job(place, tuple(members), (members[0],)) for place, members in buckets.items()]
    made = []
    for place, members in buckets.items():
        for first in range(0, len(members), chunk):
            part = tuple(members[first : first + chunk])
            size = chunk if search.alone else min(chunk, 1 << (len(part) - 1).bit_length())
            made.append(Job(place, part, part + part[-1:] * (size - len(part))))
    return made


def divided(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each job: from the dearest on, each to the rank that has least to do."""
    load, owner = [0.0] * ranks, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owner[job] = min(range(ranks), key=load.__getitem__)
        load[owner[job]] += costs[job]
    return owner


def of_rank(plan: Sequence[Job], owner: Sequence[int], rank: int) -> list[Job]:
    return [job for job, its in zip(plan, owner) if its == rank]


def in_order(values: Tensor, plan: Sequence[Job], owner: Sequence[int]) -> Tensor:
    """What the ranks measured, rank by rank and job by job, as the values of members 0 to P-1."""
    order = [member for rank in range(max(owner) + 1) for job in of_rank(plan, owner, rank) for member in job.members]
    return torch.empty_like(values).index_copy(0, torch.tensor(order, device=values.device), values)


def values_of(job: Job, measured: Tensor) -> Tensor:
    """The values of a job's members, given those of its rows."""
    last = len(job.rows) - 1
    return measured[[min(i, last) for i in range(len(job.members))]]


def equal_steps(steps: int, cost: float, other: float) -> int:
    """How many steps of a cost are as many operations as `steps` of another; at least one."""
    return max(1, round(steps * other / cost))


def told(search: Search, found: Sequence[Place], sizes: Mapping[ModelConfig, int]) -> dict[str, list[float]]:
    """The members' choices for the records; words as the number of their option."""
    made: dict[str, list[float]] = {}
    for column, choice in enumerate(search.grid.choices):
        made[choice.name] = [
            float(choice.options[place[column]]) if choice.ordered else float(place[column]) for place in found
        ]
    if search.grid.choices:
        made["parameters"] = [float(sizes[search.grid.able[place]]) for place in found]
    return made


def values(search: Search, leaves: Tree) -> dict[str, Any]:
    """What one tree of numbers stands for."""
    found = {name: float(value) for name, value in hyper.moved(search.numbers, leaves).items()}
    (place,) = places(search, {name: leaf[None] for name, leaf in leaves.items()})
    return {"numbers": found, "architecture": search.grid.values(place)}
