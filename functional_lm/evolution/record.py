"""What an evolution leaves for its readers beside the records that every run has: `fitness.png`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from functional_lm.training import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(folder: Path, label: str) -> Path:
    """Draw `fitness.png` from `metrics.jsonl`: best, mean and spread of each generation, and what was held out."""
    rows = [row for row in record.read(folder / "metrics.jsonl") if row.get("fitness_mean") is not None]
    at = [row["generation"] for row in rows]
    mean, spread = [row["fitness_mean"] for row in rows], [row["fitness_std"] for row in rows]
    low, high = [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)]
    held = [(row["generation"], row["val_fitness"]) for row in rows if row.get("val_fitness") is not None]

    def draw(axes: Axes) -> None:
        axes.fill_between(at, low, high, alpha=0.2, label="± spread")
        axes.plot(at, mean, label="mean")
        axes.plot(at, [row["fitness_best"] for row in rows], linewidth=0.8, label="best of the generation")
        if held:
            axes.plot(*zip(*held), marker="o", markersize=3, label="centre, held out")
        axes.set(xlabel="generation", ylabel=label, title=folder.name)
        axes.grid(alpha=0.3)
        axes.legend()

    return record.picture(folder / "fitness.png", draw)
