"""A table of wrong calls thrown at every verb: one clear line, the right exit code, nothing written, no traceback.

`data/wrong_calls.txt` has a line for each: exit code, call, beginning of the message. The calls are made in a folder
of everything that can be wrong with a file (`wrong_world.py`).
"""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import wrong_world

from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main

TABLE = Path(__file__).parent / "data" / "wrong_calls.txt"
SHORT = {
    "$Q": "--compile false --dtype float32 --device cpu --steps 1 --batch_size 2 --sample_tokens 0 --warmup_steps 1 "
    "--val_fraction 0",
    "$T": "--d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --max_len 32",
    "$W": "--compile false --dtype float32 --device cpu --max_tokens 2",
}


class Call(NamedTuple):
    code: int
    words: str
    message: str


def calls() -> list[Call]:
    rows = [line.split(" | ", 2) for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return [Call(int(code), words, message) for code, words, message in rows]


def flags(words: list[str]) -> set[str]:
    return {word.replace("_", "-").partition("=")[0] for word in words if word.startswith("--")}


def expanded(line: str) -> list[str]:
    """The words of a call. A short form gives way to what the call says itself, so that nothing is given twice."""
    words = shlex.split(line.replace("$P", str(free_port())))
    own, made = flags(words), []
    for word in words:
        usual = shlex.split(SHORT.get(word, ""))
        pairs = [usual[i : i + 2] for i in range(0, len(usual), 2)]
        made += [part for pair in pairs if not flags(pair) & own for part in pair] if usual else [word]
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def snapshot(root: Path) -> dict[str, tuple[int, int] | None]:
    """Every file with its length and time, every folder."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    wrong_world.make(root)
    return root


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.words)
def test_a_wrong_call_is_refused(
    call: Call, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    before = snapshot(world)
    code = main(COMMANDS, expanded(call.words))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"error: {call.message}"), said[0]
    assert code == call.code
    assert "--debug" not in said[0]
    assert snapshot(world) == before


def test_every_verb_is_in_the_table() -> None:
    assert {call.words.split()[0] for call in calls()} >= {command.name for command in COMMANDS}
    assert len(calls()) > 200


def test_twice_is_what_a_call_itself_says_twice() -> None:
    """Not what it and a short form say: the refusal that is meant would not be reached."""
    for call in calls():
        named = [word for word in call.words.replace("-", "_").split() if word.startswith("__")]
        assert (" is given twice" in call.message) == (len(set(named)) < len(named)), call
        twice = [word for word in expanded(call.words) if word.startswith("--")]
        assert len(set(twice)) == len(twice) or " is given twice" in call.message, call


def test_a_traceback_comes_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMANDS, ["inspect", "--model", "missing", "--debug"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.splitlines()[-1].startswith("error: no configuration at missing")
