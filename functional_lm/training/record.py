"""What a run leaves behind for its readers: `metrics.jsonl`, TensorBoard, `training.log`, `loss.png`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from functional_lm import files


class Recorder:
    """Appends to a run folder's records; from `step` on, when a run goes on from a checkpoint.

    Lines of `metrics.jsonl` past that step belong to steps that will be made again, and are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step] if step else []
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._lines = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by __exit__)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        self._log = logging.getLogger(f"functional_lm.{folder}")
        self._handler = logging.FileHandler(folder / "training.log", mode="a" if step else "w", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._log.addHandler(self._handler)
        self._log.setLevel(logging.INFO)
        self._log.propagate = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.close()
        self._board.close()
        self._log.removeHandler(self._handler)
        self._handler.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line, one point in each TensorBoard curve, one line in the log."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self.note(f"step {step} " + " ".join(f"{name} {value:.6g}" for name, value in values.items()))

    def note(self, line: str) -> None:
        self._log.info("%s", line)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample of what the model writes."""
        self._board.add_text(name, text, step)
        self.note(f"step {step} {name}: {text!r}")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a crash cut off is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def plot(folder: Path) -> Path:
    """Draw `loss.png` from `metrics.jsonl`: training loss, its running mean, validation loss, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(folder / "metrics.jsonl")
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, by step")
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training, running mean")
    if validation:
        axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    files.write_with(folder / "loss.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    pyplot.close(figure)
    return folder / "loss.png"


def _smooth(values: tuple[float, ...], decay: float = 0.95) -> list[float]:
    """An exponential mean without the bias of its start."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        result.append(total / weight)
    return result
