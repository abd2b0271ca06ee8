"""Whatever goes wrong while a file or folder is written: under its name lies the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_lm import disk, files

OLD, NEW = "the old one\n", "the new one, longer\n" * 50
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Broken(BaseException):
    """Not an Exception: a Ctrl-C has to be cleaned up after as well."""


# The ways to write, each as `write(path, content)` and as what then lies at the path.


def through_handle(path: Path, content: str) -> None:
    with files.writing(path) as file:
        file.write(content.encode())


def through_path(path: Path, content: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(content)

    files.write_with(path, write)


def as_folder(path: Path, content: str) -> None:
    with files.writing_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(content)
        (folder / "b").write_text(content)


WAYS: dict[str, Callable[[Path, str], None]] = {
    "writing": through_handle,
    "write_with": through_path,
    "write_text": files.write_text,
    "writing_folder": as_folder,
}


def content(path: Path) -> Any:
    """The text of a file, the texts of a folder by name, None where nothing is."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_text() if path.exists() else None


def whole(way: str, text: str) -> Any:
    return {"b": text, "inner/a": text} if way == "writing_folder" else text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_lies_under_its_name_alone(tmp_path: Path, way: str) -> None:
    path = tmp_path / "made" / "on the way" / "name"
    for text in (OLD, NEW):
        WAYS[way](path, text)
        assert content(path) == whole(way, text)
        assert names(path.parent) == ["name"]


def broken_off(way: str, path: Path) -> None:
    """Write a half and fail."""

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise Broken

    if way == "write_with":
        files.write_with(path, fail)
    elif way == "writing_folder":
        with files.writing_folder(path) as folder:
            fail(folder / "half")
    else:
        with files.writing(path, "w" if way == "write_text" else "wb") as file:
            file.write("half" if way == "write_text" else b"half")
            raise Broken


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_failure_inside_leaves_the_old_one_and_nothing_else(tmp_path: Path, way: str, existing: bool) -> None:
    path = tmp_path / "name"
    if existing:
        WAYS[way](path, OLD)
    before = content(path)
    with pytest.raises(Broken):
        broken_off(way, path)
    assert content(path) == before
    assert names(tmp_path) == (["name"] if existing else [])


class Failing:
    """Lets `limit` operations on the disk pass and refuses the next one, as a full or broken disk does."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int) -> None:
        self.calls, self.limit = 0, limit
        for name in ("replace", "fsync"):
            patch.setattr(files.os, name, self.counted(getattr(os, name)))

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.limit + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return operation(*arguments)

        return call


@pytest.mark.parametrize("way", WAYS)
def test_each_operation_may_fail_and_old_or_new_is_whole(tmp_path: Path, way: str) -> None:
    failed = 0
    for limit in range(50):
        path = tmp_path / str(limit) / "name"
        WAYS[way](path, OLD)
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, limit)
            try:
                WAYS[way](path, NEW)
            except OSError:
                failed += 1
            else:
                break
        assert content(path) in (whole(way, OLD), whole(way, NEW)), limit
        assert names(path.parent) == ["name"], limit
    assert failed >= 3  # sync of the file, the rename, sync of the folder at least


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    events: list[int | str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), sync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("renamed"), rename(a, b)))
    WAYS[way](tmp_path / "name", NEW)
    written = [tmp_path / "name", *(tmp_path / "name").rglob("*")]
    at = events.index("renamed")
    assert {path.stat().st_ino for path in written} == set(events[:at])
    assert events[at + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("begun", [b"", b"line 1\n", b"line 1\nhalf a li"])
def test_lines_that_grow_are_on_the_disk_before_the_return(tmp_path: Path, begun: bytes) -> None:
    """And so is the name of a file that was not there; what a crash left behind the last whole line goes."""
    path, length = tmp_path / "lines", begun.rfind(b"\n") + 1
    if begun:
        path.write_bytes(begun)
    watching = faults.Failing()
    with disk.watched_by(watching):
        grown = files.grow(path, "line 2\n", length if begun else None)
    assert path.read_bytes() == begun[:length] + b"line 2\n"
    assert watching.unsynced == {path: path.stat().st_size}
    assert grown == path.stat().st_size
    assert watching.done[-1] == ("sync", path if begun else tmp_path)


CRASH = """
import os, sys
from pathlib import Path
from functional_lm import files

way, path, content, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls = 0

def counted(operation):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls > limit:
            os._exit(9)
        return operation(*arguments, **named)
    return call

for name in ("replace", "fsync", "open", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
if way == "write_text":
    files.write_text(path, content)
else:
    with files.writing_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(content)
        (folder / "b").write_text(content)
"""


@pytest.mark.parametrize("way", ["write_text", "writing_folder"])
def test_a_process_that_dies_leaves_old_or_new(tmp_path: Path, way: str) -> None:
    """It exits before its k-th rename, sync, open. Between a folder's two renames the old one lies beside its name."""
    for limit in range(50):
        path = tmp_path / str(limit) / "name"
        WAYS[way](path, OLD)
        command = [sys.executable, "-c", CRASH, way, str(path), NEW, str(limit)]
        code = subprocess.run(command, check=False, cwd=Path(files.__file__).parents[1]).returncode
        if code == 0:
            break
        assert code == 9
        left = [content(p) for p in path.parent.iterdir() if p == path or p.name.startswith(".tmp-old-")]
        assert whole(way, OLD) in left or whole(way, NEW) in left, limit
        assert content(path) in (whole(way, OLD), whole(way, NEW), None if way == "writing_folder" else OLD), limit
    assert content(path) == whole(way, NEW)
    assert limit >= 4  # it died at several places


def test_a_folder_is_replaced_not_merged(tmp_path: Path) -> None:
    with files.writing_folder(tmp_path / "name") as folder:
        (folder / "only in the old one").touch()
    as_folder(tmp_path / "name", NEW)
    assert content(tmp_path / "name") == whole("writing_folder", NEW)


def test_text_keeps_its_line_ends_and_characters(tmp_path: Path) -> None:
    text = "a\r\nb\nc\ré\U0001f600\u2028"
    files.write_text(tmp_path / "name", text)
    assert (tmp_path / "name").read_bytes() == text.encode()


@given(value=JSON)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": object()}])
def test_what_is_not_json_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    files.write_json(tmp_path / "name", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        files.write_json(tmp_path / "name", value)
    assert json.loads((tmp_path / "name").read_text()) == {"old": 1}
    assert names(tmp_path) == ["name"]


def test_remove_takes_files_folders_links_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    as_folder(tmp_path / "folder", OLD)
    as_folder(tmp_path / "kept", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("file", "folder", "link", "absent"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert content(tmp_path / "kept") == whole("writing_folder", OLD)
