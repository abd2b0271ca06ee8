"""A run folder before its training: is it free, does it hold this run's beginning or its end. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import functional_lm
from functional_lm import console, disk, files, run_shape, training_flags
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.run_shape import Architecture
from functional_lm.training_flags import TrainingFlags

if TYPE_CHECKING:
    from functional_lm.model.config import ModelConfig
    from functional_lm.text.tokenizer import Tokenizer

LOCK, REPLACED = ".lock", ".replaced"
NOT_GIVEN = "not given"
STARTING_AGAIN = "--overwrite starts again, another --out starts beside it"
NAMES_FILES = ("data", "model", "tokenizer", "config", "adapter", "base")  # flags whose value names files or folders
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
TRACES = (*WEIGHTS, "run.json", "checkpoints/step-*/training.json", "checkpoints/step-*/state.json")  # of a run
PREPARED = ("text.bin", "text.index", "text.json")  # in data/: what a run that never began leaves
KINDS = {"training": "a training", "evolution": "an evolution"}  # by the word in run.json; without one the first


def holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in WEIGHTS)


def unrelated(out: Path) -> str | None:
    """The first thing in a folder that no run of ours has left there; None in a run, an empty or a missing folder."""
    if not out.is_dir() or any(any(out.glob(name)) for name in TRACES):
        return None
    return next((path.name for path in sorted(out.iterdir()) if not _ours(path)), None)


def _ours(path: Path) -> bool:
    if path.name == "data" and path.is_dir():
        return all(entry.name in PREPARED or left_over(entry) for entry in path.iterdir())
    return path.name == REPLACED or left_over(path)


def left_over(path: Path) -> bool:
    """Whether it is what a process that was killed leaves: its lock, or something half-written."""
    return path.name == LOCK or path.name.startswith((files.TEMPORARY, files.UNFINISHED))


def check_free(out: Path, kind: str) -> None:
    """Raise UsageError for a folder that holds something else than a run of this kind (of KINDS)."""
    if (name := unrelated(out)) is not None:
        raise UsageError(f"{out} holds {name} and no run; choose another --out")
    with suppress(OSError, ValueError, AttributeError):
        if (found := files.read_json(out / "run.json").get("kind", "training")) != kind:
            what = KINDS.get(f"{found}", "another kind of run")
            raise UsageError(f"{out} already holds {what}; choose another --out, or --overwrite it")


def check_overwrite(out: Path, read: Iterable[tuple[str, Any]]) -> None:
    """What `--overwrite` removes is a run, and nothing that the new one reads: the flags in `read` with their paths."""
    if (out.exists() and not out.is_dir()) or unrelated(out) is not None:
        raise UsageError(f"--overwrite replaces a run and {out} holds something else; choose another --out")
    for name, value in read:
        if value is not None and Path(value).resolve().is_relative_to(out.resolve()):
            raise UsageError(f"--overwrite would remove --{name} {value}; choose another --out")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """This process alone works in `out` as long as the block lasts. Raises DataError where another one does.

    A folder that had nothing in it has nothing in it afterwards if the call was refused before it trained. One that
    cannot be written to is not locked: whoever tries to write will be told.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_dir() and not os.access(out, os.W_OK):
        yield
        return
    made = [path for path in (out, *out.parents) if not path.exists()]
    files.make_folder(out)
    try:
        with files.locked(out / LOCK, f"another process is at work in {out}; wait for it, or choose another --out"):
            _restore(out)
            fresh = all(path.name == LOCK for path in out.iterdir())
            try:
                yield
            except (FunctionalLMError, OSError) as error:
                refused = isinstance(error, FunctionalLMError)
                if refused and fresh and out.is_dir() and not (out / "metrics.jsonl").exists():
                    _clear(out)
                _restore(out)
                raise
    finally:
        for path in made:
            with suppress(OSError):
                disk.remove_empty(path)


def checkpoint_to_resume(
    flags: TrainingFlags, overrides: Mapping[str, Any], out: Path, architecture: Architecture
) -> Path | None:
    """Where to go on from, None to start. Refuses to write over another run, or to go on as another one.

    `architecture` is what the flags describe. Damaged checkpoints are named and passed over. Raises UsageError, and
    DataError where every one is damaged.
    """
    from functional_lm.training import checkpoint

    if flags.overwrite:
        return None
    check_free(out, "training")
    newest = newest_checkpoint(out)
    if flags.resume not in ("auto", "never"):
        path = Path(flags.resume)
        if not (path / checkpoint.NOTES).is_file():
            raise UsageError(f"--resume {path} is no checkpoint; give a folder such as RUN/checkpoints/step-00001000")
        if newest and path.resolve() != newest.resolve():
            raise UsageError(f"{out} holds a run up to {newest.name}; choose another --out to go on from {path}")
        if why := checkpoint.reason(path):
            raise DataError(f"--resume {why}")
        newest = path
    elif newest is None and holds_model(out):
        raise UsageError(f"{out} already holds a model; choose another --out, or --overwrite it")
    elif newest is not None and flags.resume == "never":
        raise UsageError(f"{out} already holds a run; choose another --out, or --overwrite it")
    if earlier := _earlier(newest, out):
        if newest is not None:
            _check_shape(flags, overrides, earlier, newest, architecture)
        _compare(flags, overrides, earlier, f"{out if newest is None else newest}")
    return newest


def newest_checkpoint(out: Path) -> Path | None:
    """The newest whole one; damaged ones are named and passed over. Raises DataError where every one is damaged."""
    from functional_lm.training import checkpoint

    newest, damaged = checkpoint.newest(out / "checkpoints")
    for entry in damaged:
        console.say(f"passing over a damaged checkpoint, which is kept: {entry.reason}")
    return newest


def _earlier(checkpoint: Path | None, out: Path) -> dict[str, Any]:
    """What the run says of itself: its checkpoint, or (before the first one) run.json; {} if there is no run."""
    from functional_lm.training import checkpoint as checkpoints

    if checkpoint is not None:
        run: dict[str, Any] = checkpoints.notes(checkpoint)["run"]
        return run
    if not (out / "run.json").exists():
        return {}
    try:
        found = files.read_json(out / "run.json")
        rest = {name: found[name] for name in ("overrides", "budget", "versions")}
        if not all(isinstance(value, dict) for value in rest.values()) or "torch" not in rest["versions"]:
            raise TypeError
        return {"options": _fixed(found["options"]), **rest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{out / 'run.json'} is damaged; choose another --out, or --overwrite the run") from error


def _check_shape(
    flags: TrainingFlags,
    overrides: Mapping[str, Any],
    earlier: Mapping[str, Any],
    path: Path,
    architecture: Architecture,
) -> None:
    """Raise UsageError for flags that the tensors of the checkpoint are not made for, with `--override` or without."""
    changes = _changed(flags, overrides, earlier)
    if never := run_shape.obstacles(changes, earlier, architecture):
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(_said(changes))}), and nothing overrides {', '.join(never)}; "
            "choose another --out, or --overwrite the run"
        )


def _compare(flags: TrainingFlags, overrides: Mapping[str, Any], earlier: Mapping[str, Any], what: str) -> None:
    """Refuse, or under --override say, what would make the run another one."""
    changes = _said(_changed(flags, overrides, earlier))
    agree(f"{what} belongs to another run", changes, flags.override, STARTING_AGAIN)
    before, now = earlier["versions"]["torch"], _versions()["torch"]
    if before != now:
        console.say(
            f"the run began with torch {before} and goes on with {now}: the last bits of its numbers may differ"
        )


def agree(
    what: str, changes: Sequence[str], override: bool, others: str = "", kind: type[FunctionalLMError] = UsageError
) -> None:
    """Refuse, or under `override` say, what would make a run another one; `others` are the other ways out."""
    if changes and not override:
        remedies = "; --override goes on all the same" + (f", {others}" if others else "")
        raise kind(f"{what} ({'; '.join(changes)}){remedies}")
    if changes:
        console.say(f"going on as another run: {'; '.join(changes)}")


def _changed(
    flags: TrainingFlags, overrides: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Every flag that changes what is computed, before and now."""
    before, now = earlier["options"] | earlier["overrides"], fixed(flags) | as_json(dict(overrides))
    if flags.block_size is None:
        before, now = ({**values, "block_size": None} for values in (before, now))
    if flags.device != "cpu":
        before, now = ({**values, "threads": None} for values in (before, now))
    sometimes = {name for names in training_flags.HANGING.values() for name in names}
    names = sorted((before.keys() | now.keys()) - (sometimes - (before.keys() & now.keys())))
    return {
        name: (before.get(name, NOT_GIVEN), now.get(name, NOT_GIVEN))
        for name in names
        if not same(name, before.get(name), now.get(name))
    }


def _said(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"--{name} was {before}, is {now}" for name, (before, now) in changes.items()]


def same(name: str, before: Any, now: Any) -> bool:
    """Whether a flag says what it said; a file or folder may be written in another way."""
    if before == now or name not in NAMES_FILES or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    return _places(before) == _places(now)


def _places(value: str) -> list[str]:
    """The parts of a `PATH[=WEIGHT],...`, those that are there by their one true name."""
    parts = (part.rpartition("=") if "=" in part else (part, "", "") for part in value.split(","))
    return [f"{os.path.realpath(path) if os.path.exists(path) else path}{sign}{rest}" for path, sign, rest in parts]


def fixed(flags: TrainingFlags) -> dict[str, Any]:
    """The flags that make a run what it is, as JSON has them."""
    return _fixed(dataclasses.asdict(flags))


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name for flag, names in training_flags.HANGING.items() if options.get(flag) for name in names}
    return as_json({k: v for k, v in options.items() if k not in training_flags.FREE - kept})


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as a file gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_inputs(checkpoint: Path, record: Mapping[str, Any], override: bool) -> None:
    """Hold the architecture, the text and whatever else `record` names against what the checkpoint's run had.

    Raises DataError; under `override` it is said instead.
    """
    from functional_lm.training import checkpoint as checkpoints

    earlier = checkpoints.notes(checkpoint)["run"]
    model, had = as_json(record["model"]), earlier["model"]
    changes = [f"{name} was {had.get(name)}, is {model[name]}" for name in model if had.get(name) != model[name]]
    inputs = record["inputs"]
    changes += [f"the {name} has changed" for name in inputs if earlier["inputs"].get(name) != inputs[name]]
    agree(f"{checkpoint} belongs to another run", changes, override, kind=DataError)


def begin(
    flags: TrainingFlags,
    overrides: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    out: Path,
) -> dict[str, Any]:
    """Make the folder, with the tokenizer and a record of every flag; returns what a checkpoint keeps of it."""
    make(out, flags.overwrite)
    versions, length = _versions(), training_flags.budget(flags)
    every = {"options": dataclasses.asdict(flags), "overrides": dict(overrides), "model": config.to_json()}
    files.write_json(out / "run.json", {**every, "budget": length, "versions": versions})  # first: it makes it a run
    tokenizer.save(out)
    return {**every, "options": fixed(flags), "budget": length, "versions": versions, "inputs": {}}


def make(out: Path, overwrite: bool) -> None:
    """The folder, without what a crash left half-written; a run that is to be replaced is set aside."""
    files.make_folder(out)
    if overwrite:
        _set_aside(out)
    files.sweep(out)


def _clear(out: Path) -> None:
    """Remove everything in a folder but the lock that this process holds and a run that was set aside."""
    for path in sorted(out.iterdir()):
        if path.name not in (LOCK, REPLACED):
            files.remove(path)


def _set_aside(out: Path) -> None:
    """The run that `--overwrite` replaces is there until the new one trains: it may still be refused."""
    files.make_folder(out / REPLACED)
    for path in reversed(_entries(out)):
        if path.name not in (LOCK, REPLACED):
            disk.rename(path, out / REPLACED / path.name)


def settle(out: Path) -> None:
    """Training begins, or a generation is measured: what was replaced goes, at once, so that no half comes back."""
    if (out / REPLACED).exists():
        files.discard(out / REPLACED)


def _restore(out: Path) -> None:
    """A run that was set aside for one that has no line of records is there again."""
    if not (out / REPLACED).is_dir():
        return
    lines = out / "metrics.jsonl"
    if not (lines.exists() and lines.stat().st_size):
        for path in _entries(out / REPLACED):
            files.remove(out / path.name)
            disk.rename(path, out / path.name)
    settle(out)


def _entries(folder: Path) -> list[Path]:
    """The metrics last: as long as they are not there, what was set aside comes back."""
    return sorted(folder.iterdir(), key=lambda path: (path.name == "metrics.jsonl", path.name))


def _versions() -> dict[str, Any]:
    import torch

    return {
        "functional_lm": functional_lm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
