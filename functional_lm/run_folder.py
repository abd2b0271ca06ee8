"""A run folder before its training: is it free, does it hold this run's beginning or its end. Imports no torch."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import functional_lm
from functional_lm import console, files, training_flags
from functional_lm.errors import UsageError
from functional_lm.training_flags import TrainingFlags

if TYPE_CHECKING:
    from functional_lm.model.config import ModelConfig
    from functional_lm.text.tokenizer import Tokenizer

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHTS)


def check_overwrite(out: Path, read: Iterable[tuple[str, Any]]) -> None:
    """What `--overwrite` removes is a run, and nothing that the new one reads: the flags in `read` with their paths."""
    if out.exists() and any(out.iterdir()) and not holds_model(out) and not (out / "run.json").exists():
        raise UsageError(f"--overwrite replaces a run and {out} holds something else; choose another --out")
    for name, value in read:
        if value is not None and Path(value).resolve().is_relative_to(out.resolve()):
            raise UsageError(f"--overwrite would remove --{name} {value}; choose another --out")


def checkpoint_to_resume(
    flags: TrainingFlags, overrides: Mapping[str, Any], out: Path, fixed: Iterable[str]
) -> Path | None:
    """Where to go on from, None to start; refuses to write over another run.

    The flags in `fixed`, and the overrides, have to be those that the run began with.
    """
    from functional_lm.training import checkpoint

    if flags.overwrite:
        return None
    found = checkpoint.listing(out / "checkpoints")
    if flags.resume not in ("auto", "never"):
        path = Path(flags.resume)
        if not (path / "training.json").is_file():
            raise UsageError(f"--resume {path} is no checkpoint; give a folder such as RUN/checkpoints/step-00001000")
        if found and path.resolve() != found[-1].resolve():
            raise UsageError(f"{out} holds a run up to {found[-1].name}; choose another --out to go on from {path}")
        return path
    if not found and not holds_model(out):
        return None
    if not found or flags.resume == "never":
        what = "run" if found else "model"
        raise UsageError(f"{out} already holds a {what}; choose another --out, or --overwrite it")
    earlier = files.read_json(out / "run.json")
    if changes := _differences(flags, overrides, earlier, fixed):
        raise UsageError(f"{out} holds another run ({'; '.join(changes)}); choose another --out, or --overwrite it")
    if earlier["options"]["compile"] != flags.compile:
        console.say("compiled and eager steps differ in the last bits: this run is going to have both")
    return found[-1]


def _differences(
    flags: TrainingFlags, overrides: Mapping[str, Any], earlier: dict[str, Any], fixed: Iterable[str]
) -> list[str]:
    """Flags that would make the resumed run another one."""
    before = {name: earlier["options"].get(name) for name in fixed} | earlier["overrides"]
    now = {name: getattr(flags, name) for name in fixed} | dict(overrides)
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}  # as JSON has it
    if flags.block_size is None:
        before.pop("block_size")
        now.pop("block_size")
    names = sorted(before.keys() | now.keys())
    return [
        f"--{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def is_complete(flags: TrainingFlags, checkpoint: Path, out: Path) -> bool:
    """Whether there is nothing left to do; says so."""
    if not (out / "summary.json").exists():
        return False
    done, summary = files.read_json(checkpoint / "training.json")["step"], files.read_json(out / "summary.json")
    steps = None if flags.epochs or flags.minutes else flags.steps or training_flags.STEPS
    if summary.get("budget") != training_flags.budget(flags) and (steps is None or done < steps):
        return False
    loss = summary["val_loss"]
    measured = "" if loss is None else f", validation loss {loss:.4f}"
    console.say(f"{out} is trained already: {done} steps{measured}")
    console.say("more --steps go on from there, --overwrite starts again, another --out starts beside it")
    return True


def begin(
    flags: TrainingFlags, overrides: Mapping[str, Any], config: ModelConfig, tokenizer: Tokenizer, out: Path
) -> None:
    """Make the folder, with the tokenizer and a record of every flag."""
    if flags.overwrite:
        files.remove(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    record = {"options": dataclasses.asdict(flags), "overrides": dict(overrides), "model": config.to_json()}
    files.write_json(out / "run.json", {**record, "versions": _versions()})


def _versions() -> dict[str, Any]:
    import torch

    return {
        "functional_lm": functional_lm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
