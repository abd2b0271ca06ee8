"""What a run leaves behind for its readers: `metrics.jsonl`, TensorBoard, `training.log`, `loss.png`."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from functional_lm import disk, files
from functional_lm.errors import UsageError
from functional_lm.training.board import Board

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = float | list[float]
Values = Mapping[str, Value]


class Sink(Protocol):
    """A further place for the records."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Appends to a run folder's records; from `step` on, when a run goes on from a checkpoint.

    Lines of `metrics.jsonl` past that step belong to steps that will be made again, and are dropped. What goes wrong
    with the disk is handed to `trouble`, which raises or lets the run go on without the line.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        also: Sink | None = None,
        trouble: Callable[[OSError], None] | None = None,
    ) -> None:
        self._also, self._trouble = also, trouble
        self._torn: set[IO[str]] = set()  # those whose last line was cut off
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self._begin(step)
        self._board = Board(folder / "tensorboard")
        self._log = files.append(folder / "training.log", anew=not step)
        self._try(lambda: self._board.forget(step))

    def _begin(self, step: int) -> None:
        kept = [row for row in read(self.path) if row["step"] <= step] if step else []
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._lines = files.append(self.path)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.close()
        self._board.close()
        if self._also is not None:
            self._also.close()
        self._log.close()

    def rewind(self, step: int, why: str) -> None:
        """The steps past this one have not been. Their lines are cut off in their place, which a full disk allows."""
        length = _length(self.path, step)
        if length < os.fstat(self._lines.fileno()).st_size and self._try(lambda: self._lines.truncate(length)):
            self._torn.discard(self._lines)
        self._try(lambda: self._board.forget(step))
        self.note(why)

    def metrics(self, step: int, values: Values) -> None:
        """One line, one point in each TensorBoard curve, one line in the log; a list has a curve for each entry."""
        row = json.dumps({"step": step, **{name: _plain(value) for name, value in values.items()}})
        self._append(self._lines, row)
        flat = _flat(values)
        self._try(lambda: self._board.scalars(step, flat))
        if self._also is not None:
            self._also.metrics(step, flat)
        self.note(f"step {step} " + " ".join(f"{name} {value:.6g}" for name, value in flat.items()))

    def sync(self) -> None:
        """The lines of the metrics survive a power cut: they are not written again once what follows them is saved."""
        self._try(lambda: disk.sync_file(self._lines))

    def note(self, line: str) -> None:
        self._append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def _append(self, file: IO[str], line: str) -> None:
        """A line; what is left of one that failed before is ended first."""
        before = os.fstat(file.fileno()).st_size
        if self._try(lambda: file.write(("\n" if file in self._torn else "") + line + "\n")):
            self._torn.discard(file)
        elif os.fstat(file.fileno()).st_size > before:
            self._torn.add(file)

    def _try(self, write: Callable[[], object]) -> bool:
        """Whether it was written."""
        try:
            write()
        except OSError as error:
            if self._trouble is None:
                raise
            self._trouble(error)
            return False
        return True

    def text(self, step: int, name: str, text: str) -> None:
        """A sample of what the model writes."""
        self._try(lambda: self._board.text(step, name, text))
        if self._also is not None:
            self._also.text(step, name, text)
        self.note(f"step {step} {name}: {text!r}")


class WandbSink:
    """The same records for Weights & Biases, through its own package and its own environment variables.

    Raises UsageError where the package is not installed.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("--wandb needs a package: pip install 'functional_lm[wandb]'") from error
        self._run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(settings), id=_id(folder), resume="allow"
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


def _id(folder: Path) -> str:
    """The run's name there: the same for the same folder, so that a resumed run goes on in its curves."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def _plain(value: Value) -> Any:
    """A value as JSON has it: what is not finite is null."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value if math.isfinite(value) else None


def _flat(values: Values) -> dict[str, float]:
    """Lists taken apart: `loss` of two members is `loss/0` and `loss/1`."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}/{i}": entry for i, entry in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that a crash or a full disk cut off is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for what is no whole line."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _length(path: Path, step: int) -> int:
    """Bytes of a `metrics.jsonl` before its first line past `step`."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row(line)
        if row is not None and row["step"] > step:
            break
        length += len(line)
    return length


def plot(folder: Path) -> Path:
    """Draw `loss.png` from `metrics.jsonl`: training loss, its running mean, validation loss, over steps."""
    rows = read(folder / "metrics.jsonl")
    train, validation = _curves(rows, "loss"), _curves(rows, "val_loss")

    def draw(axes: Axes) -> None:
        for member, (steps, losses) in enumerate(train):
            color, name = f"C{member}", f"member {member}" if len(train) > 1 else "training, running mean"
            if len(train) == 1:
                axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8, label="training, by step")
            axes.plot(steps, _smooth(losses), color=color, label=name)
        for member, (steps, losses) in enumerate(validation):
            color, name = ("C1", "validation") if len(validation) == 1 else (f"C{member}", "")
            axes.plot(steps, losses, color=color, marker="o", markersize=3, label=name or None)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
        axes.grid(alpha=0.3)
        if train or validation:
            axes.legend()

    return picture(folder / "loss.png", draw)


def picture(path: Path, draw: Callable[[Axes], None], width: float = 8.0) -> Path:
    """Write what `draw` puts into one frame as a PNG of `width` x 4.5 inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, 4.5), layout="constrained")
    draw(axes)
    files.write_with(path, lambda place: figure.savefig(place, dpi=120, format="png"))
    pyplot.close(figure)
    return path


def _curves(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[list[int], list[float]]]:
    """Steps and values of one curve, or of one for each member of a population; gaps are left out."""
    found = [(row["step"], row[name] if isinstance(row[name], list) else [row[name]]) for row in rows if name in row]
    members = range(len(found[0][1])) if found else ()
    points = [[(step, values[i]) for step, values in found if values[i] is not None] for i in members]
    return [([step for step, _ in curve], [value for _, value in curve]) for curve in points]


def _smooth(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """An exponential mean without the bias of its start."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        result.append(total / weight)
    return result
