"""What an evolution leaves for its readers beside the records that every run has: `fitness.png`."""

from __future__ import annotations

from pathlib import Path

from functional_lm import files
from functional_lm.training import record


def plot(folder: Path, label: str) -> Path:
    """Draw `fitness.png` from `metrics.jsonl`: best, mean and spread of each generation, and what was held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record.read(folder / "metrics.jsonl") if row.get("fitness_mean") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    at = [row["generation"] for row in rows]
    mean = [row["fitness_mean"] for row in rows]
    spread = [row["fitness_std"] for row in rows]
    axes.fill_between(
        at, [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)], alpha=0.2, label="± spread"
    )
    axes.plot(at, mean, label="mean")
    axes.plot(at, [row["fitness_best"] for row in rows], linewidth=0.8, label="best of the generation")
    held = [(row["generation"], row["val_fitness"]) for row in rows if row.get("val_fitness") is not None]
    if held:
        axes.plot(*zip(*held), marker="o", markersize=3, label="centre, held out")
    axes.set(xlabel="generation", ylabel=label, title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    files.write_with(folder / "fitness.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    pyplot.close(figure)
    return folder / "fitness.png"
