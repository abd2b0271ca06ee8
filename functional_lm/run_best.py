"""The best models of a run that waits with `--patience`: sealed folders `best/step-...`.

Those stay that the run or one of its checkpoints names, so that whatever it goes on from finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from functional_lm import disk, files, seal
from functional_lm.errors import DataError
from functional_lm.training import checkpoint

FOLDER, NOTES, FORMAT = "best", "best.json", 1


def keep(out: Path, step: int, save: Callable[[Path], Any]) -> None:
    """Write the model of `step`, whole and sealed."""
    with files.writing_folder(out / FOLDER / checkpoint.name(step)) as temporary, disk.hashed() as digests:
        save(temporary)
        seal.seal(temporary, NOTES, FORMAT, {"step": step}, digests)


def kept(out: Path, step: int) -> Path:
    """The folder of that best model. Raises DataError for one that is not what was written."""
    path = out / FOLDER / checkpoint.name(step)
    try:
        seal.verified(path, NOTES, FORMAT)
    except DataError as error:
        raise DataError(f"the best model is damaged: {error}; restore it, or go on without --patience") from error
    return path


def prune(out: Path, step: int) -> None:
    """Remove the best models that neither the run, whose best is that of `step`, nor a checkpoint of it names."""
    wanted = {step}
    for path in checkpoint.listing(out / "checkpoints"):
        try:
            wanted.add(checkpoint.notes(path)["memory"]["best"]["step"])
        except (DataError, KeyError, TypeError):  # damaged, or not of such a run
            continue
    names = {checkpoint.name(one) for one in wanted}
    for path in checkpoint.listing(out / FOLDER):
        if path.name not in names:
            files.remove(path)
