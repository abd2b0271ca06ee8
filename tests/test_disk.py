"""One door to the disk: nothing in the package changes it elsewhere, and behind the door every operation may fail."""

from __future__ import annotations

import ast
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import KINDS, Failing, Killed, operations

from functional_lm import disk, files, seal, tree
from functional_lm.errors import DataError
from functional_lm.text import dataset
from functional_lm.training.record import read

PACKAGE = Path(__file__).parents[1] / "functional_lm"
# Only reads, or (tempfile) writes where nothing has to survive, or writes to standard output's descriptor.
HARMLESS = {"cli.py": {"os.open"}, "disk.py": {"*"}}
OS = ("open", "replace", "rename", "renames", "remove", "unlink", "rmdir", "removedirs", "mkdir", "makedirs", "fsync")
OS += ("truncate", "ftruncate", "write", "link", "symlink")
METHODS = ("write_text", "write_bytes", "unlink", "rmdir", "mkdir", "touch", "rename", "symlink_to", "hardlink_to")
LIBRARIES = ("save_file", "FileHandler", "savez", "tofile", "memmap", "SummaryWriter", "EventFileWriter")
MODULES = {"shutil": ("rmtree", "copy", "copy2", "copyfile", "copytree", "move"), "os": OS}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: None)


def doors(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every call that changes the disk by itself."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        reads = all(isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rbt") for mode in modes)
        if isinstance(called, ast.Name) and called.id == "open" and not reads:
            yield node.lineno, "open"
        if isinstance(called, ast.Name) and called.id in LIBRARIES:
            yield node.lineno, called.id
        if isinstance(called, ast.Attribute):
            base = called.value.id if isinstance(called.value, ast.Name) else ""
            if base in ("disk", "files"):
                continue
            if called.attr in MODULES.get(base, ()):
                yield node.lineno, f"{base}.{called.attr}"
            elif called.attr in METHODS:
                yield node.lineno, called.attr
            elif called.attr in LIBRARIES:
                maps = called.attr == "memmap" and any(
                    isinstance(a, ast.Constant) and a.value == "r" for a in node.args
                )
                if not maps:
                    yield node.lineno, called.attr


def test_the_package_changes_the_disk_through_one_door() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        allowed = HARMLESS.get(path.name, set()) if path.parent == PACKAGE else set()
        found += [
            f"{path.relative_to(PACKAGE)}:{line}: {what}"
            for line, what in doors(path.read_text("utf-8"))
            if what not in allowed and "*" not in allowed
        ]
    assert found == []


def test_the_walk_sees_what_it_should() -> None:
    bad = (
        "open(p, 'w'); open(p, mode='ab'); os.replace(a, b); p.write_text(t); shutil.rmtree(p); p.unlink(); f.tofile(p)"
        "; SummaryWriter(p)"
    )
    assert len(list(doors(bad))) == 8
    assert not list(
        doors("""open(p); open(p, "rb"); p.read_text(); np.memmap(p, t, "r", 0, (n,)); "a".replace("b", "")""")
    )


# Every operation of what is not a checkpoint --------------------------------------------------------------------------

OLD, NEW = ([1, 2, 3], [4]), ([5, 6], [7, 8, 9], [1])


def write(path: Path, documents: tuple[list[int], ...]) -> None:
    with dataset.writing(path, 10, 0, "ab" * 32, f"{documents}") as writer:
        for number, ids in enumerate(documents):
            writer.append(np.array(ids))
            if number == 0:
                writer.journal.commit({"done": 1})


def contents(path: Path) -> tuple[list[int], ...]:
    data = dataset.open_dataset(path)
    dataset.verify(data)
    return tuple(data.document(i).tolist() for i in range(data.documents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_the_old_one_the_new_one_or_refused(tmp_path: Path, kind: str) -> None:
    """Refused is the moment between two files; then and always the same call makes it whole."""
    count = len(operations(lambda: write(tmp_path / "counted", NEW)))
    refused = 0
    for number in range(count + 3):
        path = tmp_path / str(number) / "text"
        write(path, OLD)
        failing = Failing(kind, number)
        with suppress(OSError, Killed), disk.watched_by(failing):
            write(path, NEW)
        try:
            assert contents(path) in (OLD, NEW), number
        except DataError:
            refused += 1
        again(path)
        assert contents(path) == NEW
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["text.bin", "text.index"]
        shutil.rmtree(path.parent)
    assert refused < count / 2


def again(path: Path) -> None:
    """The next process: what the one before had committed is there, and it goes on behind it."""
    with dataset.writing(path, 10, 0, "ab" * 32, f"{NEW}") as writer:
        done = 1 if writer.journal.memory else 0
        for number, ids in enumerate(NEW[done:], done):
            writer.append(np.array(ids))
            if number == 0:
                writer.journal.commit({"done": 1})


def export(path: Path) -> None:
    """What exports, merges and imports do: a folder of a tensor file and JSON."""
    with files.writing_folder(path) as folder:
        tree.save({"a": torch.ones(3), "b": {"c": torch.zeros(2, 2)}}, folder / "model.safetensors")
        files.write_json(folder / "config.json", {"of": path.name})


def single(path: Path) -> None:
    files.write_with(path, lambda temporary: temporary.write_text("written by a library\n" * 9) and None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", [export, single])
def test_an_export_is_whole_or_not_there(tmp_path: Path, kind: str, work: Callable[[Path], None]) -> None:
    work(tmp_path / "whole")

    def bytes_of(path: Path) -> dict[str, bytes]:
        there = [path] if path.is_file() else sorted(path.rglob("*"))
        return {str(p.relative_to(path)): p.read_bytes().replace(path.name.encode(), b"") for p in there}

    count = len(operations(lambda: work(tmp_path / "counted")))
    for number in range(count):
        path, failing = tmp_path / f"n{number}", Failing(kind, number)
        with suppress(OSError, Killed), disk.watched_by(failing):
            work(path)
        if path.exists():
            assert bytes_of(path) == bytes_of(tmp_path / "whole"), number
        files.sweep(tmp_path)
        assert not list(tmp_path.rglob(".tmp-*"))


def test_lines_that_a_full_disk_cut_off_are_left_out_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(
        b'{"step": 1, "loss": 2}\n{"step": 2, "lo\n[3]\n\xff\n{"step": 4}\n{"step": "5"}\n{"st'
    )
    assert [row["step"] for row in read(tmp_path / "lines")] == [1, 4]


def test_what_a_thread_writes_is_hashed_by_its_last_name(tmp_path: Path) -> None:
    """From its beginning to its end; what is added to, or cut, has to be read."""
    (tmp_path / "old.txt").write_text("old")
    with disk.hashed() as digests:
        with files.writing(tmp_path / "whole.bin") as file:
            file.write(b"a" * 2_000_000)
            file.write(b"b")
        with files.append(tmp_path / "old.txt") as file:
            file.write("er")
        with disk.create(tmp_path / "cut.bin") as file:
            file.write(b"abc")
            file.truncate(1)
        other = threading.Thread(target=files.write_text, args=(tmp_path / "other.txt", "other"))
        other.start()
        other.join()
    assert digests == {tmp_path / "whole.bin": seal.sha256(tmp_path / "whole.bin")}
    files.write_text(tmp_path / "later.txt", "later")
    assert len(digests) == 1


def test_a_seal_is_of_what_was_to_be_written(tmp_path: Path) -> None:
    """A disk that says that it has written, and has not, is found out when the folder is read."""

    def forgetful(operation: disk.Operation) -> Any:
        return operation.act(0.5 if operation.kind == "write" and operation.path.name.endswith("a.bin") else 1.0)

    with disk.hashed() as digests, disk.watched_by(forgetful):
        with files.writing(tmp_path / "a.bin") as file:
            file.write(b"abcd")
        seal.seal(tmp_path, "notes.json", 1, {}, digests)
    with pytest.raises(DataError, match="damaged"):
        seal.verified(tmp_path, "notes.json", 1)
