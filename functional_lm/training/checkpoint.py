"""Checkpoints: a training state as a folder that appears whole.

checkpoints/step-00001000/   a model folder (generate from it, fine-tune it), and beside its files
    training.safetensors     everything else that the next step reads: optimizer, key, step, numbers
    training.json            what it is, and the loop's own memory
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from functional_lm import files, folder, tree
from functional_lm.errors import DataError
from functional_lm.model.config import ModelConfig
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.training.step import TrainState
from functional_lm.tree import Tree

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")


def name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    checkpoints: str | Path,
    state: TrainState,
    config: ModelConfig | None,
    tokenizer: Tokenizer,
    memory: dict[str, Any],
    beside: Callable[[Path, Tree], None] | None = None,
) -> Path:
    """Write the state under its step; `memory` is JSON that comes back with it.

    Without a `config` (a population, whose leaves have one more axis; an adapter) it is no model folder: parameters go
    to the rest, and `beside(folder, params)` may write a form of theirs that others read.
    """
    step = int(state.step.max())
    path = Path(checkpoints) / name(step)
    parts = state._asdict()
    with files.writing_folder(path) as temporary:
        if config is not None:
            folder.save(temporary, parts.pop("params"), config, tokenizer)
        else:
            tokenizer.save(temporary)
            if beside is not None:
                beside(temporary, state.best_params)
        tree.save(parts, temporary / "training.safetensors")
        files.write_json(
            temporary / "training.json",
            {"format": FORMAT, "step": step, "population": config is None, "memory": memory},
        )
    return path


def load(path: str | Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state in `template`'s structure and on its device, and the memory saved with it.

    Raises DataError if a file is missing or damaged, of a later format, or does not fit the template.
    """
    path = Path(path)
    try:
        notes = files.read_json(path / "training.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no training checkpoint ({error})") from error
    if not isinstance(notes, dict) or not {"format", "memory"} <= notes.keys():
        raise DataError(f"{path} is no training checkpoint (its training.json holds something else)")
    if notes["format"] != FORMAT:
        raise DataError(f"{path} has format {notes['format']}; this version reads {FORMAT}")
    device = template.key.device
    flat: dict[str, Tensor] = {}
    if (path / "model.safetensors").exists() or not notes.get("population"):
        flat |= tree.flatten({"params": tree.load(path / "model.safetensors", device)})
    flat |= tree.flatten(tree.load(path / "training.safetensors", device))
    return tree.restore(template, flat, str(path)), notes["memory"]


def listing(checkpoints: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in Path(checkpoints).glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune(checkpoints: str | Path, keep: int) -> None:
    """Remove all but the newest `keep`; 0 keeps all."""
    for path in listing(checkpoints)[: -keep or None] if keep else []:
        files.remove(path)
