"""The journal of an evolution: cut, edited, behind its checkpoint, of another base, told again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from evolutions import WORDS, at, call, evolved, there, weights_of

from functional_lm import folder, keys, tree
from functional_lm.errors import DataError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import loop

__all__ = ["at", "there"]  # fixtures


def test_a_journal_cut_in_a_line_goes_on_from_the_line_before(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "whole", "--generations", "4") == 0
    assert evolved(at / "run", "--generations", "4") == 0
    path = at / "run" / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:20])
    shutil.rmtree(at / "run" / "checkpoints")
    assert call("replay", path, "--out", at / "two") == 0
    assert "2 generations told again" in capsys.readouterr().out
    assert evolved(at / "run", "--generations", "4") == 0
    assert "was cut off; its generation is measured again" in capsys.readouterr().out
    assert weights_of(at / "run") == weights_of(at / "whole")
    assert call("replay", path, "--out", at / "all") == 0
    assert "bit for bit" in capsys.readouterr().out


def test_an_edited_journal_is_refused_by_its_line(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    path = at / "run" / "journal.jsonl"
    lines = path.read_text().splitlines()
    entry = json.loads(lines[2])
    entry["fitness"][0] += 1.0
    cases = {
        "line 3 is not as it was written": [*lines[:2], json.dumps(entry), *lines[3:]],
        "line 2 is not as it was written; to go on from the generation before, keep the line above": [
            *(lines[0], *lines[2:])
        ],
        "line 3 is not a line of a journal; to go on from the generation before, keep the 2 lines": [*lines[:2], "{}"],
        "line 1 is not a line of a journal; without its first line it cannot be read": ["nonsense"],
    }
    for message, changed in cases.items():
        path.write_text("\n".join(changed) + "\n")
        for arguments in (["replay", path, "--out", at / "again"], None):
            code = evolved(at / "run") if arguments is None else call(*arguments)
            assert code == 1
            assert message in capsys.readouterr().err
    assert not (at / "again").exists()


def test_a_journal_that_lags_its_checkpoint_is_refused(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    path = at / "run" / "journal.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    assert evolved(at / "run") == 1
    assert "ends with generation 1 and" in capsys.readouterr().err


def test_a_journal_belongs_to_its_base(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    base = folder.load("model")
    other = tree.map(lambda leaf: leaf + 1e-3, base.params)
    folder.save(at / "other", other, base.config, base.tokenizer)
    assert call("replay", at / "run" / "journal.jsonl", "--model", at / "other", "--out", at / "again") == 1
    assert "began with another model" in capsys.readouterr().err


def test_a_journal_belongs_to_the_adapter_that_it_began_with(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """(Its folder may be written again meanwhile: the name says nothing.)"""
    for name, seed in (("adapter", "1"), ("other", "2")):
        assert evolved(at / name, "--seed", seed, "--generations", "1") == 0
    assert evolved(at / "run", "--adapter", at / "adapter") == 0
    replay = ["replay", at / "run" / "journal.jsonl", "--out", at / "again"]
    assert call(*replay) == 0
    assert "bit for bit" in capsys.readouterr().out
    shutil.rmtree(at / "adapter")
    (at / "other").rename(at / "adapter")
    assert evolved(at / "run", "--adapter", at / "adapter", "--generations", "4") == 1
    assert call(*replay[:-1], at / "third") == 1
    error = capsys.readouterr().err
    assert error.count("began with another model") == error.count(f"than the one in model, {at / 'adapter'} (") == 2


def test_a_replay_that_trains_needs_the_text_of_the_run(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "moved.txt").write_text(WORDS)
    (at / "other.txt").write_text(WORDS + "and on\n")
    trained = ["--space", "hyper", "--strategy", "pso", "--sigma", "0.5", "--steps", "1", "--val_fraction", "0.3"]
    assert evolved(at / "run", *trained, "--generations", "1", data=str(at / "moved.txt")) == 0
    (at / "moved.txt").rename(at / "here.txt")
    replay = ["replay", at / "run" / "journal.jsonl", "--out", at / "again"]
    for more, message in (
        ([], "moved.txt"),
        (["--data", at / "other.txt"], "began with another text: the one in --data has changed"),
    ):
        assert call(*replay, *more) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert call(*replay, "--data", at / "here.txt") == 0
    assert "bit for bit" in capsys.readouterr().out
    assert weights_of(at / "again") == weights_of(at / "run")


def test_replay_takes_the_journals_flags_and_no_others(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And none of which this version knows nothing."""
    assert evolved(at / "run", "--generations", "1") == 0
    path = at / "run" / "journal.jsonl"
    for more, name in (
        (["--population", "77"], "population"),
        (["--overwrite"], "overwrite"),
        (["--seed", "1"], "seed"),
    ):
        assert call("replay", path, "--out", at / "again", *more) == 2
        assert f"error: --{name} is what the journal says; replay takes --out," in capsys.readouterr().err
    old = journals.read(path)
    header = {name: value for name, value in old.header.items() if name not in ("format", "kind")}
    header["flags"]["telepathy"] = 0.5
    journals.begin(old.path, header)
    assert call("replay", path, "--out", at / "again") == 1
    assert f"{path} has --telepathy, which this version does not know" in capsys.readouterr().err
    assert not (at / "again").exists()


def test_replay_says_what_it_lacks(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("replay") == 2
    assert call("--journal", "x") == 2
    assert call("replay", at / "none.jsonl") == 1
    assert call("--data", "text.txt") == 2
    error = capsys.readouterr().err
    for part in (
        "evolve replay needs the journal",
        "--journal belongs to replay",
        "no journal at",
        "--model is required",
    ):
        assert part in error


def test_fitness_comes_back_from_a_line_as_it_was() -> None:
    values = torch.tensor([0.1, -3.25, 1e-30, float("nan"), float("inf")])
    entry = json.loads(json.dumps(journals.entry(0, [1, 2], values.tolist(), 0.0)))
    back = torch.tensor(journals.fitness_of(entry))
    assert torch.equal(back[:3], values[:3])
    assert back[3:].isnan().all()


def test_a_generation_of_another_key_is_refused(at: Path) -> None:
    from functional_lm.evolution import gradient, openai

    strategy = openai.openai_es(gradient.Settings(4))
    state = strategy.init(keys.key(0), {"x": torch.zeros(3)})
    with pytest.raises(DataError, match="drawn from another key"):
        loop.told(strategy, state, journals.entry(0, [1, 2], [0.0] * 4, 0.0))
