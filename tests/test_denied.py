"""Places that belong to somebody else: whichever operation is denied first, one line says where, and what helps.

Once a disk that denies everything from operation k on (`faults.py`), once a real folder that may not be written to.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Failing
from test_faults import EVOLVE, IMPROVE, WRITERS, at, call, moments, there

from functional_lm import disk, evolve, improve, prepare, train
from functional_lm.cli import Command

__all__ = ["at", "there"]  # fixtures
TRAIN = (
    "--data text.txt --model model --out made/out --steps 2 --save_every 1 --batch_size 2 --block_size 8 "
    "--val_fraction 0 --sample_tokens 0 --compile false --dtype float32 --device cpu"
)
COMMANDS: dict[str, tuple[Command, str]] = {
    name: WRITERS[name] for name in ("merge", "quantize", "export", "gguf", "train-tokenizer", "create-config")
} | {
    "train": (train.COMMAND, TRAIN),
    "prepare": (prepare.PREPARE, "--data text.txt --tokenizer model --threads 1 --out made/out"),
    "evolve": (evolve.COMMAND, EVOLVE.replace("--out out", "--out made/out")),
    "improve": (improve.COMMAND, IMPROVE.replace("--out out", "--out made/out").replace("--rounds 2", "--rounds 1")),
}
REMEDIES = (
    "; choose a place that you may read and write",
    "when the disk is well again",  # and, of what is gone on with, the same command
)


def check_line(said: str, what: object) -> None:
    assert said.count("\n") == 1, (what, said)
    assert said.startswith("error: "), (what, said)
    assert "Permission denied" in said, (what, said)
    assert any(remedy in said for remedy in REMEDIES), (what, said)
    assert ".tmp-" not in said, (what, said)


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_the_first_that_is_denied_one_line_says_so(
    name: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, words = COMMANDS[name]
    when = moments(lambda: call(command, words))
    shutil.rmtree("made")
    capsys.readouterr()
    for k in (0, *when[1 :: max(1, len(when) // 5)]):
        with disk.watched_by(Failing("denied", k)):
            code = call(command, words)
        said = capsys.readouterr().err
        if code or k == 0:
            assert code == 1, (k, said)
            check_line(said, k)
        assert k or not Path("made").exists()
        if Path("made").exists():
            shutil.rmtree("made")


@pytest.fixture
def nobody(there: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may read, with a `closed` one in it, for a process that is not root."""
    if not hasattr(os, "seteuid"):
        pytest.skip("no users here")
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        for path in there.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, place / path.name)
        (place / "closed").mkdir()
        for path in (place, *place.rglob("*")):
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))
        monkeypatch.chdir(place)
        yield place
    finally:
        place.chmod(0o700)
        for path in place.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(place)


@pytest.mark.parametrize("name", ["merge", "train-tokenizer", "create-config", "prepare", "evolve", "train"])
def test_a_folder_that_may_not_be_written_to(name: str, nobody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, words = COMMANDS[name]
    before = sorted(nobody.rglob("*"))
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        code = call(command, words.replace("made/", "closed/"))
    finally:
        if root:
            os.seteuid(0)
    said = capsys.readouterr().err
    assert code == 1, said
    check_line(said, name)
    assert "error: closed" in said
    assert sorted(nobody.rglob("*")) == before
