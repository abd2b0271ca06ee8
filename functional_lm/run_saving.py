"""How a run saves: in the background, the newest valid ones kept, and what a full or broken disk does to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, disk
from functional_lm.errors import FunctionalLMError
from functional_lm.training_flags import TrainingFlags

if TYPE_CHECKING:
    from functional_lm.trainer import Job
    from functional_lm.training.saving import Saver
    from functional_lm.training.step import TrainState


class Trouble:
    """What `--on_save_error` says to do about a disk that is full, broken or gone; each kind is said once."""

    def __init__(self, flags: TrainingFlags, what: str) -> None:
        self._stop, self._what = flags.on_save_error == "stop", what
        self._said: set[str] = set()

    def __call__(self, error: OSError) -> None:
        line = f"{self._what} ({_reason(error)})"
        if self._stop:
            raise FunctionalLMError(
                f"{line}; what was saved before is whole: the same command goes on from there when the disk is well "
                "again, and --on_save_error continue trains on without"
            ) from error
        if line not in self._said:
            console.say(f"{line}; training goes on without it")
        self._said.add(line)


@contextmanager
def saving(flags: TrainingFlags, job: Job, out: Path, trouble: Trouble) -> Iterator[Saver]:
    """What saves this job in the background; at the end, and after an error, what is being saved is finished.

    After a second Ctrl-C nothing is waited for.
    """
    from functional_lm.training import checkpoint
    from functional_lm.training.saving import Saver, Verified

    whole = Verified(checkpoint.reason)

    def write(state: TrainState, memory: Mapping[str, Any]) -> None:
        config = None if job.members or job.written else job.config
        beside = job.written.save if job.written else None
        path = checkpoint.save(out / "checkpoints", state, config, job.tokenizer, memory, beside, job.record)
        whole.add(path)
        checkpoint.prune(out / "checkpoints", flags.keep, whole)

    saver = Saver(write)
    with disk.never_made(out):
        try:
            yield saver
        except Exception:
            with suppress(Exception):  # the first error is the one to tell
                saver.wait()
            raise
        with troubled(trouble):
            saver.wait()


@contextmanager
def troubled(trouble: Trouble) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        trouble(error)


@contextmanager
def finishing() -> Iterator[None]:
    """What is trained and cannot be written is not lost. Raises FunctionalLMError."""
    try:
        yield
    except OSError as error:
        raise FunctionalLMError(
            f"the model was not written ({_reason(error)}); the same command goes on from the last checkpoint when the "
            "disk is well again"
        ) from error


@contextmanager
def unwritten(what: str) -> Iterator[None]:
    """Of a run that stops at every error of the disk. Raises FunctionalLMError."""
    try:
        yield
    except OSError as error:
        raise FunctionalLMError(
            f"{what} ({_reason(error)}); what was written before is whole: the same command goes on from there when "
            "the disk is well again"
        ) from error


def _reason(error: OSError) -> str:
    folder = disk.gone(error.filename) if error.filename else None
    if folder is not None:  # whichever file of it was missed first
        return f"{folder}: {disk.GONE}"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
