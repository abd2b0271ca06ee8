"""Saving: in the background from one copy, on disks that fail at every operation, and never to the harm of the past."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faults import KINDS, Failing, Killed, lost, operations
from saved_states import CONFIG, loaded, quick, save, state

from functional_lm import disk, files, tree
from functional_lm.errors import DataError
from functional_lm.training import checkpoint
from functional_lm.training.saving import Saver, Verified
from functional_lm.training.step import TrainState

__all__ = ["quick"]  # a fixture


# In the background ----------------------------------------------------------------------------------------------------


class Held:
    """A `write` that waits until it is let go, and notes what it was handed."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.written: list[tuple[int, float, str]] = []
        self.error: Exception | None = None

    def __call__(self, now: TrainState, memory: Mapping[str, Any]) -> None:
        self.began.set()
        self.go.wait(20)
        self.written.append((int(now.step), float(now.params["w"][0, 0]), threading.current_thread().name))
        if self.error is not None:
            raise self.error


def test_what_is_saved_is_the_state_as_it_was_though_its_buffers_are_used_again() -> None:
    write, now = Held(), state(3)
    saver = Saver(write)
    saver.save(now, {})
    now.params["w"].fill_(99.0)  # what a donated step does
    write.go.set()
    saver.wait()
    assert write.written == [(3, 3.0, "saver")]


def test_the_next_save_waits_and_there_is_one_copy_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    write, copies = Held(), []
    plain = tree.map

    def counted(function: Callable[..., Any], whole: Any, *others: Any) -> Any:
        copies.append(len(write.written))
        return plain(function, whole, *others)

    monkeypatch.setattr(tree, "map", counted)
    saver = Saver(write)
    saver.save(state(1), {})
    assert write.began.wait(20)
    second = threading.Thread(target=saver.save, args=(state(2), {}))
    second.start()
    time.sleep(0.05)
    assert second.is_alive()
    assert copies == [0]
    write.go.set()
    second.join(20)
    saver.wait()
    assert copies == [0, 1]  # the second copy was made when the first was written
    assert [step for step, _, _ in write.written] == [1, 2]


@pytest.mark.parametrize("method", ["check", "wait", "save"])
def test_an_error_of_the_thread_is_raised_once_by_whatever_is_called_next(method: str) -> None:
    write = Held()
    write.error = OSError(28, "No space left on device")
    write.go.set()
    saver = Saver(write)
    saver.save(state(1), {})
    assert saver._thread is not None
    saver._thread.join(20)
    with pytest.raises(OSError, match="No space left"):
        saver.save(state(2), {}) if method == "save" else getattr(saver, method)()
    saver.wait()
    assert len(write.written) == 1


@pytest.mark.parametrize("failing", [False, True])
def test_there_is_memory_for_one_copy_whatever_is_saved(failing: bool) -> None:
    places: list[set[int]] = []

    def write(now: Any, memory: Mapping[str, Any] | None = None) -> None:
        places.append({leaf.data_ptr() for leaf in tree.leaves(now) if leaf.numel()})
        if failing:
            raise OSError(28, "No space left on device")

    saver = Saver(write)
    for now in (state(1), state(2), state(3).params, state(4)):
        saver.save(now, {}) if isinstance(now, TrainState) else saver.also(now, write)
        with suppress(OSError):
            saver.wait()
    assert places[0] == places[1] == places[3]
    assert places[2] < places[0]
    assert all(leaf.data_ptr() not in places[0] for leaf in tree.leaves(now))


# Damage ---------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {"cut": cut, "zeros": lost, "bit": flip, "gone": os.unlink}
PARTS = ("model.safetensors", "training.safetensors", "training.json", "tokenizer_bytes.json")


def part(name: str, folder: Path) -> Path:
    """A file of a checkpoint; the tokenizer's by whatever name it has."""
    if not name.startswith("tokenizer"):
        return folder / name
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith("tokenizer"))


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", PARTS)
def test_the_newest_valid_one_is_found_and_the_damaged_are_named_and_kept(tmp_path: Path, how: str, name: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), config=CONFIG)
    for step in (2, 3):
        DAMAGE[how](part(name, tmp_path / checkpoint.name(step)))
    before = sorted(tmp_path.rglob("*"))
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None
    assert loaded(found) == 1
    assert [entry.path.name for entry in damaged] == ["step-00000003", "step-00000002"]
    assert all(part(name, entry.path).name in entry.reason or how == "gone" for entry in damaged)
    assert sorted(tmp_path.rglob("*")) == before


def test_if_all_are_damaged_each_is_named_with_its_reason(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step))
    flip(tmp_path / "step-00000001" / "training.safetensors")
    cut(tmp_path / "step-00000002" / "training.json")
    with pytest.raises(DataError) as raised:
        checkpoint.newest(tmp_path)
    said = str(raised.value)
    assert "step-00000001: training.safetensors is damaged (its sha256 is another)" in said
    assert "step-00000002: training.json is damaged (it is no JSON)" in said
    assert "\n" not in said


def test_every_single_bit_of_the_notes_and_of_the_tensors_matters(tmp_path: Path) -> None:
    path = save(tmp_path, state(5))
    for name in ("training.safetensors", "training.json"):
        whole = (path / name).read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            (path / name).write_bytes(changed)
            if checkpoint.reason(path) is None:  # whitespace between the JSON's values
                assert name == "training.json"
                assert chr(whole[place]).isspace()
        (path / name).write_bytes(whole)
    assert loaded(path) == 5


def test_a_checkpoint_of_a_later_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    newer = save(tmp_path, state(2))
    notes = checkpoint.notes(newer)
    from functional_lm import seal

    seal.seal(newer, checkpoint.NOTES, 3, {k: v for k, v in notes.items() if k not in ("format", "files")})
    with pytest.raises(DataError, match="has format 3; this version reads 2; use the version that wrote it"):
        checkpoint.newest(tmp_path)


def test_valid_ones_alone_are_counted_and_damaged_ones_are_never_removed(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, state(step))
    for step in (3, 5):
        flip(tmp_path / checkpoint.name(step) / "training.safetensors")
    checkpoint.prune(tmp_path, 2, Verified(checkpoint.reason))
    assert [int(path.name[5:]) for path in checkpoint.listing(tmp_path)] == [3, 4, 5, 6]


def test_what_was_verified_is_read_again_when_somebody_has_written_to_it(tmp_path: Path) -> None:
    path, read = save(tmp_path, state(1)), []
    whole = Verified(lambda path: read.append(path) or checkpoint.reason(path))  # type: ignore[func-returns-value]
    assert [whole(path), whole(path), len(read)] == [True, True, 1]
    flip(path / "training.safetensors")
    assert [whole(path), whole(path)] == [False, False]


def test_a_damaged_one_of_the_same_step_is_kept_beside(tmp_path: Path) -> None:
    for _ in range(3):
        flip(save(tmp_path, state(4)) / "training.safetensors")
    assert loaded(save(tmp_path, state(4))) == 4
    assert sorted(path.name[13:] for path in tmp_path.iterdir()) == ["", ".damaged", ".damaged1", ".damaged2"]


# Every operation fails ------------------------------------------------------------------------------------------------


@contextmanager
def surviving() -> Iterator[None]:
    with suppress(OSError, Killed):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_whatever_operation_fails_the_old_one_is_whole_and_the_run_goes_on(
    tmp_path: Path, kind: str, again: bool
) -> None:
    """Saving a further step, or over a damaged one of the same step; then pruning."""

    def work(root: Path) -> None:
        save(root, state(2))
        checkpoint.prune(root, 1, Verified(checkpoint.reason))

    def begin(root: Path) -> Path:
        save(root, state(1))
        if again:
            flip(save(root, state(2)) / "training.safetensors")
        return root

    count = len(operations(lambda: work(begin(tmp_path / "counted"))))
    assert count > 20
    for number in range(count):
        root = begin(tmp_path / str(number))
        failing = Failing(kind, number)
        with surviving(), disk.watched_by(failing):
            work(root)
        if not failing.failed:
            continue
        if kind in ("full", "broken", "read-only"):  # the process lives: it has cleaned up after itself, if it could
            left = [path.name for path in root.rglob(".tmp-*")]
            assert not left or kind != "full", (number, left)
        found, damaged = checkpoint.newest(root)
        assert found is not None, number
        assert loaded(found) in (1, 2)
        assert all(again and entry.path.name == "step-00000002" for entry in damaged), (number, damaged)
        files.sweep(root)  # what the next process does first
        assert not list(root.rglob(".tmp-*"))
        work(root)
        assert loaded(checkpoint.newest(root)[0] or root) == 2
        if again:
            assert (root / "step-00000002.damaged").exists()
        shutil.rmtree(root)
