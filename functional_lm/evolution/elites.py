"""MAP-Elites (Mouret and Clune, "Illuminating search spaces by mapping elites", arXiv 1504.04909): the best of a kind.

What kind a member is of says its descriptor, K numbers that are measured beside its fitness. A grid divides them into C
cells, and an archive keeps the best member of each. Children are elites of random cells with noise, and with `line` a
step towards or from another elite (Vassiliades and Mouret, arXiv 1804.03906, equation 3).

A row of fitness is the fitness and then the descriptor. A row with anything that is not finite is left out.

Axes: P members, C cells, K numbers of a descriptor, J = 1 + K of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import members
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.tree import Tree

CELLS = 1 << 20  # more would be a mistake: each one holds a tree


@dataclass(frozen=True)
class Grid:
    """`bins` equal parts of [low, high) for each number of a descriptor; what lies outside counts to the last ones."""

    bins: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def cells(self) -> int:
        return math.prod(self.bins)


@dataclass(frozen=True)
class Settings:
    """`sigma` is the deviation of the noise, `line` that of the step along the line to another elite."""

    grid: Grid
    population: int = 32
    sigma: float = 0.02
    line: float = 0.0


class Archive(NamedTuple):
    """The state: an elite [C, ...], its fitness (-inf: an empty cell) and descriptor for each cell.

    `centre` is the best of the elites, which is the best of all.
    """

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    elites: Tree
    fitness: Float[Tensor, "C"]
    descriptors: Float[Tensor, "C K"]


def map_elites(settings: Settings, wrap: Wrap = unwrapped) -> Strategy:
    """The strategy; `wrap` (`compiled`, say) goes around its heavy parts. Raises UsageError for bad settings."""
    check(settings)
    grid, count = settings.grid, settings.population

    def first(key: Tensor, start: Tree) -> Tree:
        return members.scattered(key, start, count, settings.sigma)

    def born(key: Tensor, elites: Tree, fitness: Tensor) -> Tree:
        return torch.vmap(lambda own: child(own, elites, fitness, settings))(common.member_keys(key, count))

    first, born = wrap(first), wrap(born)

    def init(key: Tensor, start: Tree) -> Archive:
        head = common.begun(key, start, torch.float64)
        elites = tree.map(lambda leaf: leaf.expand(grid.cells, *leaf.shape).clone(), start)
        empty = members.unmeasured(key, grid.cells)
        kinds = torch.zeros((grid.cells, len(grid.bins)), dtype=torch.float64, device=key.device)
        return Archive(*head, elites, empty, kinds)

    def asked(state: Archive) -> Tree:
        if not bool(torch.isfinite(state.fitness).any()):
            return first(common.generation_key(state), state.centre)
        return born(common.generation_key(state), state.elites, state.fitness)

    def ask(state: Archive) -> Candidates:
        return Candidates({}, {}, asked(state))

    def tell(state: Archive, fitness: Float[Tensor, "P J"]) -> Archive:
        children, rows = asked(state), fitness.to(state.fitness)
        known = torch.where(torch.isfinite(rows).all(1), rows[:, 0], -math.inf)
        best, best_fitness = common.improved(state, known, lambda i: members.member(children, i))
        index, value = winners(cells(rows[:, 1:], grid), known, grid.cells)
        better = value > state.fitness
        elites = members.chosen(better, tree.map(lambda leaf: leaf[index], children), state.elites)
        kinds = torch.where(better[:, None], rows[index, 1:], state.descriptors)
        filled = torch.where(better, value, state.fitness)
        return Archive(state.key, state.generation + 1, best, best, best_fitness, elites, filled, kinds)

    def told(state: Archive) -> dict[str, float]:
        return figures(state.fitness)

    return Strategy("map-elites", count, init, ask, tell, figures=1 + len(grid.bins), told=told)


def figures(fitness: Float[Tensor, "C"]) -> dict[str, float]:
    """How many cells are filled, and the sum of their fitness (the QD-score of Pugh et al. 2016 without an offset)."""
    filled = torch.isfinite(fitness)
    return {"cells": int(filled.sum()), "cells_fitness": float(torch.where(filled, fitness, 0.0).sum())}


def cells(descriptors: Float[Tensor, "P K"], grid: Grid) -> Int[Tensor, "P"]:
    """The number of the cell of each descriptor, the last number of it counting fastest; 0 for what is not finite."""
    bins, low, high = (torch.tensor(of, dtype=torch.float64) for of in (grid.bins, grid.low, grid.high))
    bins, low, high = (of.to(descriptors.device) for of in (bins, low, high))
    place = ((descriptors - low) / (high - low) * bins).floor().clamp(min=torch.zeros_like(bins), max=bins - 1)
    known = torch.where(torch.isfinite(descriptors).all(1, keepdim=True), place, 0.0).long()
    number = torch.zeros_like(known[:, 0])
    for column, size in zip(known.unbind(1), grid.bins, strict=True):
        number = number * size + column
    return number


def winners(
    cell: Int[Tensor, "P"], fitness: Float[Tensor, "P"], count: int
) -> tuple[Int[Tensor, "C"], Float[Tensor, "C"]]:
    """For each cell the best member in it (the first of equals) and its fitness, -inf where there is none."""
    known, _ = common.usable(fitness)
    value = known.new_full((count,), -math.inf).scatter_reduce(0, cell, known, "amax")
    numbers = torch.arange(len(cell), device=cell.device)
    able = torch.where(known == value[cell], numbers, len(cell))
    index = torch.full((count,), len(cell), device=cell.device).scatter_reduce(0, cell, able, "amin")
    return index.clamp(max=len(cell) - 1), value


def child(key: Tensor, elites: Tree, fitness: Float[Tensor, "C"], settings: Settings) -> Tree:
    """An elite of a random filled cell, moved."""
    parent_key, other_key, noise_key, step_key = keys.split(key, 4).unbind()
    filled = torch.isfinite(fitness)
    places = filled.long().argsort(descending=True, stable=True)  # those of filled cells first
    parent, other = (
        members.member(elites, places[keys.randint(k, (), 0, filled.sum(), torch.int64)])
        for k in (parent_key, other_key)
    )
    noise = tree.unflatten(common.drawn(noise_key, common.shapes_of(parent)))
    step = settings.line * keys.normal(step_key)

    def moved(x: Tensor, y: Tensor, e: Tensor) -> Tensor:
        return x + (settings.sigma * e + step * (y - x)).to(x.dtype)

    return tree.map(moved, parent, other, noise)


def check(settings: Settings) -> None:
    common.check_population(settings.population, 1)
    grid = settings.grid
    if not grid.bins or not len(grid.bins) == len(grid.low) == len(grid.high):
        raise UsageError(
            f"a grid has bins and a range for each number of a descriptor; here are {len(grid.bins)} and "
            f"{len(grid.low)}"
        )
    if min(grid.bins) < 1 or grid.cells > CELLS:
        raise UsageError(f"{'x'.join(map(str, grid.bins))} bins are no grid of 1 to {CELLS} cells")
    for low, high in zip(grid.low, grid.high):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"the range {low:g}:{high:g} is empty or has no end; give LOW:HIGH, two numbers that rise")
    if settings.line < 0:
        raise UsageError(f"the step along a line is {settings.line}; it has to be at least 0")
