"""Parsers take whatever bytes there are, or refuse them: what was found once, and a few inputs more of each kind."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fuzz
import fuzz_parsers


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        parser.name: (parser, parser.sound.read_bytes())
        for parser in fuzz_parsers.parsers(tmp_path_factory.mktemp("sound"))
    }


@pytest.fixture(autouse=True)
def no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "alarm", lambda seconds: None)


def test_sound_files_are_read(parsers: dict[str, Any]) -> None:
    """Otherwise the fuzzer would look at nothing but refusals."""
    for parser, sound in parsers.values():
        parser.sound.write_bytes(sound)
        parser.read(parser.sound)
        assert parser.mend is None or parser.mend(sound)
    assert len(parsers) >= 20


def test_an_input_is_a_function_of_its_number(parsers: dict[str, Any]) -> None:
    parser, sound = parsers["index"]
    made = [fuzz.mutated(parser, number, sound) for number in range(50)]
    assert made == [fuzz.mutated(parser, number, sound) for number in range(50)]
    assert len(set(made)) > 40


def test_what_was_found_once_is_found_no_more(parsers: dict[str, Any]) -> None:
    kept = {name for name, *_ in fuzz.kept()}
    assert kept <= parsers.keys()
    for name in kept:
        assert fuzz.again(*parsers[name]) == [], name


def test_a_seed_keeps_its_bytes(parsers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, sound = parsers["journal"]
    (tmp_path / "seeds").write_text(f"# a word\n{fuzz.seed(parser, 7, sound)}\n")
    monkeypatch.setattr(fuzz, "SEEDS", tmp_path / "seeds")
    assert fuzz.kept() == [("journal", 7, fuzz.mutated(parser, 7, sound))]
    tried: list[bytes] = []
    fuzz.again(parser._replace(read=lambda path: tried.append(path.read_bytes())), sound + b"of today")
    assert tried == [fuzz.mutated(parser, 7, sound), fuzz.mutated(parser, 7, sound + b"of today")]
    parser.sound.write_bytes(sound)


def test_inputs_of_every_kind(parsers: dict[str, Any]) -> None:
    for parser, sound in parsers.values():
        for number in range(60):
            assert fuzz.attempt(parser, fuzz.mutated(parser, number, sound)) is None, (parser.name, number)
        parser.sound.write_bytes(sound)


def test_an_error_of_another_kind_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "sound").write_bytes(b"sound")
    parser = fuzz_parsers.Parser("broken", tmp_path / "sound", lambda path: {}["nothing"])
    assert "KeyError: 'nothing'" in (fuzz.attempt(parser, b"sound") or "")
