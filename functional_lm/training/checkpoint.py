"""Checkpoints: a training state as a folder that appears whole, and is known to be whole when it is read.

checkpoints/step-00001000/   a model folder (generate from it, fine-tune it), and beside its files
    training.safetensors     everything else that the next step reads: optimizer, mean, scale, key, step, numbers
    training.json            what it is, the loop's own memory, the run's flags, length and sha256 of every file
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from functional_lm import disk, files, folder, seal, tree
from functional_lm.errors import DataError
from functional_lm.model.config import ModelConfig
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.training.step import TrainState
from functional_lm.tree import Tree

FORMAT = 2
NOTES = "training.json"
NAME = re.compile(r"step-(\d{8,})")


def name(step: int) -> str:
    """The folder of a step's checkpoint; names sort as steps do up to 99999999, `listing` sorts by number."""
    return f"step-{step:08d}"


# One ------------------------------------------------------------------------------------------------------------------


def save(
    checkpoints: str | Path,
    state: TrainState,
    config: ModelConfig | None,
    tokenizer: Tokenizer,
    memory: Mapping[str, Any],
    beside: Callable[[Path, Tree], None] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state under its step; `memory` is JSON that comes back with it, `run` says which run it belongs to.

    Without a `config` (a population, whose leaves have one more axis; an adapter) it is no model folder: parameters go
    to the rest, and `beside(folder, params)` may write a form of theirs that others read. A damaged checkpoint of the
    same step is kept under another name.
    """
    step = int(state.step.max())
    path = Path(checkpoints) / name(step)
    if path.exists() and reason(path) is not None:
        files.replace(path, aside(path))
    parts = state._asdict()
    with files.writing_folder(path) as temporary, disk.hashed() as digests:
        if config is not None:
            folder.save(temporary, parts.pop("params"), config, tokenizer)
        else:
            tokenizer.save(temporary)
            if beside is not None:
                beside(temporary, state.best_params)
        tree.save(parts, temporary / "training.safetensors")
        notes = {"step": step, "population": config is None, "memory": dict(memory), "run": dict(run or {})}
        seal.seal(temporary, NOTES, FORMAT, notes, digests)
    return path


def aside(path: Path) -> Path:
    """A free name for a damaged checkpoint, which `listing` does not take for one."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in range(1_000_000))
    return next(name for name in names if not name.exists())


def notes(path: Path) -> dict[str, Any]:
    """What training.json says; its own digest is checked and nothing else. Raises DataError."""
    return seal.read(path, NOTES, FORMAT)


def load(path: str | Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state in `template`'s structure and on its device, and the memory saved with it.

    Raises DataError if a file is missing or damaged, of a later format, or does not fit the template.
    """
    path = Path(path)
    found = seal.verified(path, NOTES, FORMAT)
    if not isinstance(found.get("memory"), dict):
        raise DataError(f"{path}: {NOTES} is damaged (it holds something else)")
    device = template.key.device
    flat: dict[str, Tensor] = {}
    if not found.get("population"):
        flat |= tree.flatten({"params": tree.load(path / "model.safetensors", device)})
    flat |= tree.flatten(tree.load(path / "training.safetensors", device))
    return tree.restore(template, flat, str(path)), found["memory"]


# Those of a run -------------------------------------------------------------------------------------------------------


class Damaged(NamedTuple):
    """A checkpoint that cannot be gone on from."""

    path: Path
    reason: str  # begins with the path


def reason(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, None if it can. Raises `seal.LaterFormat` for a later version's."""
    return seal.reason(path, NOTES, FORMAT)


def newest(checkpoints: str | Path) -> tuple[Path | None, list[Damaged]]:
    """The newest valid checkpoint, and the damaged ones that are newer.

    None if there is no checkpoint at all. Raises DataError if there are and none is valid, naming what is wrong with
    each, and where the newest is of a later version.
    """
    path, damaged = newest_whole(checkpoints, reason)
    if damaged and path is None:
        reasons = "; ".join(why for _, why in damaged)
        raise DataError(f"no checkpoint in {checkpoints} is whole: {reasons}; restore one, or --overwrite the run")
    return path, damaged


def newest_whole(checkpoints: str | Path, reason: Callable[[Path], str | None]) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint for which there is no `reason` against it, and the damaged ones that are newer."""
    damaged: list[Damaged] = []
    for path in reversed(listing(checkpoints)):
        why = reason(path)
        if why is None:
            return path, damaged
        damaged.append(Damaged(path, why))
    return None, damaged


def listing(checkpoints: str | Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first."""
    paths = sorted(Path(checkpoints).glob("step-*"))
    found = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(checkpoints: str | Path, keep: int, whole: Callable[[Path], bool]) -> None:
    """Remove all but the newest `keep` valid ones; 0 keeps all. One that is not `whole` neither counts nor goes."""
    valid = [path for path in listing(checkpoints) if whole(path)] if keep else []
    for path in valid[:-keep]:
        files.discard(path)
