"""What a run leaves beside its winner: the front, the archive, or the architectures tried; numbers and a picture."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, evolve_choices, evolve_flags
from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from functional_lm.evolution.elites import Archive
    from functional_lm.evolution.pareto import Population


WIDTH = 6.0  # of its pictures, in inches


def report(options: EvolveFlags, state: Any, out: Path) -> dict[str, Any]:
    """More for summary.json; `front.png`, `archive.png` or `architectures.png`. Nothing of other runs."""
    if options.space == "architecture":
        return _architectures(options, out)
    if options.strategy == "nsga2":
        return _front(options, state, out)
    return _archive(options, state, out) if options.strategy == "map-elites" else {}


def _front(options: EvolveFlags, state: Population, out: Path) -> dict[str, Any]:
    """The figures of the members of the front, from the best to the worst in the first one; which one is kept."""
    from functional_lm.evolution import pareto
    from functional_lm.training import record

    names = evolve_flags.figures(options)
    inside = pareto.front(state.figures)
    if not bool(inside.any()):
        return {"front": []}
    middle = dict(zip(names, state.figures[int(pareto.compromise(state.figures))].tolist()))
    rows = sorted(set(map(tuple, state.figures[inside].tolist())), reverse=True)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in middle.items())
    console.say(f"{int(inside.sum())} members on the front; the kept one is its compromise, {shown}")

    known = [row for row in state.figures[~inside].tolist() if math.isfinite(row[0])]

    def draw(axes: Axes) -> None:
        points = ((known, "the others", ".", 30), (rows, "front", "o", 24), ([[*middle.values()]], "kept", "*", 160))
        for some, label, marker, size in points:
            axes.scatter([row[0] for row in some], [row[1] for row in some], s=size, marker=marker, label=label)
        axes.set(xlabel=names[0], ylabel=names[1], title=out.name)
        axes.grid(alpha=0.3)
        axes.legend()

    record.picture(out / "front.png", draw, WIDTH)
    return {"front": [dict(zip(names, row)) for row in rows], "kept_figures": middle}


def _archive(options: EvolveFlags, state: Archive, out: Path) -> dict[str, Any]:
    """The elite of each filled cell: its place on the grid, its fitness and its descriptor."""
    import torch

    from functional_lm.training import record

    bins, low, high = evolve_flags.grid(options)
    filled = torch.isfinite(state.fitness).nonzero()[:, 0].tolist()
    cells = [
        {
            "cell": [int(place) for place in torch.unravel_index(torch.tensor(number), bins)],
            options.fitness: float(state.fitness[number]),
            **dict(zip(options.descriptor, state.descriptors[number].tolist())),
        }
        for number in filled
    ]
    console.say(f"{len(filled)} of {len(state.fitness)} kinds found; the best of them all is kept")

    def draw(axes: Axes) -> None:
        grid = torch.where(torch.isfinite(state.fitness), state.fitness, torch.nan).view(bins[0], -1)
        edges = (low[0], high[0], *((low[1], high[1]) if len(bins) == 2 else (0.0, float(grid.shape[1]))))
        image = axes.imshow(grid.mT.cpu().numpy(), origin="lower", aspect="auto", extent=edges)
        rest = " x ".join(options.descriptor[1:])
        axes.set(xlabel=options.descriptor[0], ylabel=rest, title=f"{out.name}: {options.fitness}")
        axes.figure.colorbar(image)

    record.picture(out / "archive.png", draw, WIDTH)
    return {"cells": len(state.fitness), "archive": cells}


def _architectures(options: EvolveFlags, out: Path) -> dict[str, Any]:
    """Every architecture that was tried, the best first, with its best fitness and how often it was trained."""
    from functional_lm.evolution import journal as journals
    from functional_lm.training import record

    choices = evolve_choices.parse(options.choices)
    generations = [journals.fitness_of(entry) for entry in journals.read(out / journals.NAME).generations]
    points: list[tuple[int, float, int]] = []
    best: dict[tuple[Any, ...], float] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for row in record.read(out / "metrics.jsonl"):
        for member, value in enumerate(generations[row["generation"] - 1]):
            size = int(row["parameters"][member])
            name = (size, *(choice.shown(row[choice.name][member]) for choice in choices))
            times[name] += 1
            if math.isfinite(value):
                points.append((size, value, row["generation"]))
                best[name] = max(value, best.get(name, -math.inf))
    order = sorted(best, key=lambda name: -best[name])

    def draw(axes: Axes) -> None:
        sizes, values, numbers = zip(*points)
        dots = axes.scatter(sizes, values, c=numbers, s=14)
        axes.set(xscale="log", xlabel="parameters", ylabel=options.fitness, title=out.name)
        axes.grid(alpha=0.3)
        axes.figure.colorbar(dots, label="generation")

    if points:
        record.picture(out / "architectures.png", draw, WIDTH)
    names = ("parameters", *(choice.name for choice in choices))
    return {
        "tried": len(times),
        "architectures": [{**dict(zip(names, one)), "fitness": best[one], "times": times[one]} for one in order],
    }
