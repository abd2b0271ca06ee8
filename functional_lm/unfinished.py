"""Work that goes on after a kill: files that grow in a folder beside what they will be, and how far they are valid."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from functional_lm import disk, files, seal


class Journal:
    """Append-only files in a folder, and a note of how far they are valid: what a killed writer goes on from.

    `memory` is what the last `commit` noted (JSON, not None): None in a fresh one, or where the note was made for
    another `key` or no longer fits the files.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.memory: Any = None
        self._lengths: dict[str, int] = {}
        self._streams: dict[str, IO[bytes]] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            note = files.read_json(folder / "journal.json")
            intact = note.pop("check") == seal.own(note)
            held = all((folder / name).stat().st_size >= length for name, length in note["lengths"].items())
            if intact and note["key"] == key and held:
                self.memory, self._lengths = note["memory"], note["lengths"]

    def open(self, name: str) -> IO[bytes]:
        """A file of the folder to read and to write, cut to its valid length, at its end."""
        stream: IO[bytes] = disk.create(self.folder / name, "a+b" if name in self._lengths else "w+b")
        stream.truncate(self._lengths.get(name, 0))
        stream.seek(0, os.SEEK_END)
        self._streams[name] = stream
        return stream

    def commit(self, memory: Any) -> None:
        """What is written by now is valid, and `memory` belongs to it."""
        for stream in self._streams.values():
            disk.sync_file(stream)
        self._lengths = {name: os.fstat(stream.fileno()).st_size for name, stream in self._streams.items()}
        note = {"key": self._key, "lengths": self._lengths, "memory": memory}
        files.write_json(self.folder / "journal.json", {**note, "check": seal.own(note)})
        self.memory = memory

    def discard(self) -> None:
        """There is nothing to go on from."""
        self.memory = None

    def finish(self, name: str, path: Path) -> None:
        """A file of the folder is whole: it is synced and takes the place of `path`."""
        stream = self._streams.pop(name)
        disk.sync_file(stream)
        stream.close()
        files.replace(self.folder / name, path)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


@contextmanager
def journal(path: Path, key: str) -> Iterator[Journal]:
    """The journal of what will be `path`, in a folder beside it, held by one process at a time.

    The folder goes when the block ends; when it ends with an error, what was committed stays, and the next call with
    the same key goes on from there. Raises DataError while another process holds it.
    """
    folder = path.parent / f"{files.UNFINISHED}{path.name}"
    disk.make_folder(folder)
    with files.locked(folder / "lock", f"another process is writing {path}; wait for it, or choose another place"):
        disk.make_folder(folder)
        made = Journal(folder, key)
        try:
            yield made
        except BaseException:
            made.close()
            if made.memory is None:
                with suppress(OSError):
                    disk.remove(folder)
            raise
        made.close()
        disk.remove(folder)
