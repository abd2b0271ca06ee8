"""TensorBoard's event files: the curves of a run, each point with the system as soon as it is told.

tensorboardX brings the messages; its own writer hands them to a thread that a full disk ends, after which the next
call waits for ever, and keeps them back for minutes. A record is the length of a message (8 bytes), the checksum of
those, the message and its checksum, little-endian.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functional_lm import disk, files


class Board:
    """A new event file in `folder`, behind those that are there."""

    def __init__(self, folder: Path) -> None:
        files.make_folder(folder)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        names = (f"{stem}.{number}" if number else stem for number in itertools.count())
        self._file = disk.create(next(folder / name for name in names if not (folder / name).exists()), "ab")
        self._length = 0  # of whole records
        self._torn = False
        self._headed = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(step=step, summary=Summary(value=points))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX import summary

        self._event(step=step, summary=summary.text(name, text))

    def forget(self, step: int) -> None:
        """What was recorded past this step, here and in the files before, is not shown any more."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        self._file.close()

    def _event(self, **what: Any) -> None:
        """One record in one write. Raises OSError; the next one then takes the place of what was torn."""
        from tensorboardX.proto.event_pb2 import Event

        version = b"" if self._headed else _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        record = version + _record(Event(wall_time=time.time(), **what))
        if self._torn:
            self._file.truncate(self._length)
        self._torn = True
        self._file.write(record)
        self._length, self._torn, self._headed = self._length + len(record), False, True


def _record(event: Any) -> bytes:
    message = event.SerializeToString()
    length = struct.pack("<Q", len(message))
    return length + _checksum(length) + message + _checksum(message)


def _checksum(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    return struct.pack("<I", masked_crc32c(data))
