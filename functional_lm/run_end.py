"""A run folder whose training has come to an end: whether the flags of now ask for more. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_lm import console, files, training_flags
from functional_lm.errors import UsageError
from functional_lm.training_flags import TrainingFlags

MORE = {  # by the word in summary.json for what ended a run
    "steps": "more --steps (or --epochs) go on",
    "time": "more --minutes go on",
    "patience": "a larger --patience (0: none) goes on",
}


def is_complete(flags: TrainingFlags, path: Path, out: Path) -> bool:
    """Whether there is nothing left to do; says so. Refuses another length of a run that has not come to its end."""
    from functional_lm.training import checkpoint

    notes, summary = checkpoint.notes(path), _summary(out)
    done = notes["step"]
    ended = summary is not None and summary.get("budget") == notes["run"]["budget"] and summary.get("steps") == done
    if not ended:
        _check_length(flags, notes["run"]["budget"], path)
        return False
    assert summary is not None
    if _goes_on(flags, summary, notes):
        return False
    files.sweep(out)  # of a kill between the summary and the end
    loss = summary.get("val_loss")
    measured = f", validation loss {loss:.4f}" if isinstance(loss, float) else ""
    early = f", ended by --patience {flags.patience}" if summary.get("ended") == "patience" else ""
    console.say(f"{out} is trained already: {done} steps{measured}{early}")
    more = MORE.get(f"{summary.get('ended')}", MORE["steps"])
    console.say(f"{more} from there, --overwrite starts again, another --out starts beside it")
    return True


def _goes_on(flags: TrainingFlags, summary: Mapping[str, Any], notes: Mapping[str, Any]) -> bool:
    """Whether a run that has come to an end has not by the flags of now: more of what ended it is asked for."""
    before, asked, ended = summary["budget"], training_flags.budget(flags), summary.get("ended")
    if ended == "patience" and not 0 < flags.patience <= notes["memory"]["best"]["waited"]:
        return True
    steps = flags.steps or (None if flags.epochs or flags.minutes else training_flags.STEPS)
    if before == asked or (steps is not None and steps <= notes["step"]):
        return False
    limit = "minutes" if ended == "time" else "epochs"
    return asked[limit] is None or before.get(limit) is None or asked[limit] > before[limit]


def _check_length(flags: TrainingFlags, before: Mapping[str, Any], path: Path) -> None:
    """The learning rate of an unfinished run comes from its length, which may not change on the way."""
    now = training_flags.budget(flags)
    changes = [f"--{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if not changes or not (flags.cooldown or flags.schedule in training_flags.SCHEDULES_OF_LENGTH):
        return
    if not flags.override:
        raise UsageError(
            f"{path} belongs to a run of another length ({'; '.join(changes)}), from which its learning rates come; "
            "finish it first, or --override"
        )
    console.say(f"going on with learning rates of another length: {'; '.join(changes)}")


def _summary(out: Path) -> dict[str, Any] | None:
    try:
        found = files.read_json(out / "summary.json")
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None
