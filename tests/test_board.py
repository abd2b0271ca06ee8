"""TensorBoard shows what `metrics.jsonl` holds, after resuming and rewinding too, and no broken disk holds a run up."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import CODES, Failing
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import disk
from functional_lm.training.record import Recorder, read


def events(path: Path) -> Iterator[Any]:
    """The messages of an event file, checksums held against them, up to one that was cut off."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        if len(data) < 16 + length:
            return
        message = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(message)
        yield Event.FromString(message)
        data = data[16 + length :]


def shown(run: Path, name: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard has it: files by name; a session's START at step s hides what was at s and after it."""
    points: list[tuple[int, float]] = []
    for path in sorted((run / "tensorboard").iterdir()):
        for number, event in enumerate(events(path)):
            assert number or event.file_version == "brain.Event:2"
            if event.HasField("session_log"):
                points = [(step, value) for step, value in points if step < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
    return points


def told(run: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in read(run / "metrics.jsonl") if name in row]


PIECES = st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1), st.booleans()), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(PIECES)
def test_no_point_is_shown_twice_and_none_is_missing(pieces: list[tuple[int, float, bool]]) -> None:
    """A run in pieces: so many steps, then back to some share of them, by a new process or by rewinding."""
    with tempfile.TemporaryDirectory() as folder:
        run, step, loss = Path(folder), 0, 0.0
        recorder = Recorder(run)
        for steps, share, again in pieces:
            for _ in range(steps):
                step, loss = step + 1, loss + 1
                recorder.metrics(step, {"loss": loss, "grad_norm": 0.5})
            recorder.metrics(step, {"val_loss": loss})
            step = int(share * step)
            if again:
                recorder.rewind(step, "a spike")
            else:
                recorder.__exit__(None, None, None)
                recorder = Recorder(run, step)
        recorder.metrics(step + 1, {"loss": loss})
        for name in ("loss", "grad_norm", "val_loss"):
            assert shown(run, name) == told(run, name)
        assert len(shown(run, "loss")) == step + 1
        recorder.__exit__(None, None, None)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("passing", range(8, 18))
def test_a_broken_disk_costs_records_and_nothing_else(tmp_path: Path, kind: str, passing: int) -> None:
    """Many more records than any queue has room for; when the disk is well again they go on, whole."""
    said: list[OSError] = []
    with Recorder(tmp_path, trouble=said.append) as recorder:
        with disk.watched_by(Failing(kind, passing)):
            for step in range(1, 30):
                recorder.metrics(step, {"loss": float(step)})
                recorder.text(step, "sample", "written")
        assert said
        for step in range(30, 33):
            recorder.metrics(step, {"loss": float(step)})
    for points in (shown(tmp_path, "loss"), told(tmp_path, "loss")):
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))
        assert steps[-3:] == [30, 31, 32]
        assert all(value == step for step, value in points)
        assert kind == "full" or len(steps) >= 31
    log = (tmp_path / "training.log").read_text("utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in log[-3:]] == [f"step {step} loss {step}" for step in (30, 31, 32)]


def test_what_was_told_is_with_the_system_at_once(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.metrics(1, {"loss": [1.0, 2.0]})
        assert shown(tmp_path, "loss/1") == [(1, 2.0)]
