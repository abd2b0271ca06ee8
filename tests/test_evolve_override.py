"""An evolution under other flags than it began with: what is taken, what is refused, and what replay makes of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evolutions import WORDS, at, call, contents, evolved, there, weights_of

from functional_lm import evolve_flags, evolve_override, files, keys, tree
from functional_lm.evolution import journal as journals
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_strategies import strategy_of
from functional_lm.training import record

__all__ = ["at", "there"]  # fixtures

TRAINED = ["--space", "hyper", "--steps", "1", "--val_fraction", "0.3"]
CASES: dict[str, tuple[list[str], list[str]]] = {
    "numbers of a gradient, another text": (
        ["--rank", "2"],
        [
            *("--learning_rate", "0.1", "--sigma", "0.05", "--shaping", "z_score", "--antithetic", "false"),
            *("--batch_size", "2", "--data", "other.txt"),
        ],
    ),
    "operators of genetics": (
        ["--space", "full", "--leaves", "*norm*", "--strategy", "genetic"],
        ["--strength", "2", "--elites", "1", "--crossover", "arithmetic"],
    ),
    "trainings that go on": (
        [*TRAINED, "--strategy", "pbt"],
        ["--exploit", "0.5", "--perturb", "2", "--resample", "0.9", "--spread", "3"],
    ),
    "a swarm of trainings": ([*TRAINED, "--strategy", "pso", "--sigma", "0.5"], ["--inertia", "0.2", "--social", "3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_under_other_flags_and_replay_tells_each_generation_by_its_own(
    case: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With checkpoints and without, in one piece and in two: the same bits."""
    flags, changed = CASES[case]
    (at.parent / "other.txt").write_text(WORDS + "and on it went\n")
    changed = [str(at.parent / word) if word == "other.txt" else word for word in changed]
    usual = [] if "--batch_size" in changed else ["--batch_size", "4"]
    override = [*flags, *usual, *changed]
    assert evolved(at / "run", *flags, "--generations", "2") == 0
    shutil.copytree(at / "run", at / "parts")
    shutil.copytree(at / "run", at / "same")
    capsys.readouterr()
    before = contents(at / "run")
    assert evolved(at / "run", *override, "--generations", "4") == 2
    said = capsys.readouterr().err
    assert "; --override goes on all the same, --overwrite starts again, another --out starts beside it" in said
    assert f"{changed[0]} was " in said
    assert contents(at / "run") == before
    assert evolved(at / "run", *override, "--generations", "4", "--override") == 0
    said = capsys.readouterr().out
    assert all(f"{flag} was " in said.partition("going on as another run: ")[2] for flag in changed[::2])
    shutil.rmtree(at / "parts" / "checkpoints")
    assert evolved(at / "parts", *override, "--generations", "3", "--override") == 0
    shutil.rmtree(at / "parts" / "checkpoints")
    assert evolved(at / "parts", *override, "--generations", "4") == 0  # it is that run by now
    assert weights_of(at / "parts") == weights_of(at / "run")
    assert evolved(at / "same", *flags, "--generations", "4") == 0
    (one, other) = (journals.read(at / name / "journal.jsonl").generations[3]["fitness"] for name in ("same", "run"))
    assert one != other
    for run in ("run", "parts"):
        assert call("replay", at / run / "journal.jsonl", "--out", at / f"{run} again") == 0
        assert "the weights are those of the run, bit for bit" in capsys.readouterr().out
        assert weights_of(at / f"{run} again") == weights_of(at / "run")
    if "pbt" in flags:
        rows = [row for row in record.read(at / "parts" / "metrics.jsonl") if "learning_rate" in row]
        led = files.read_json(at / "parts" / "summary.json")["numbers"]["learning_rate"]
        assert len(led) > 2
        assert all(any(rate == pytest.approx(one) for one in row["learning_rate"]) for rate, row in zip(led, rows))
    headers = journals.read(at / "parts" / "journal.jsonl").headers
    assert [header["generation"] for header in headers] == [0, 2]
    assert evolved(at / "parts", *flags, "--generations", "5") == 2  # nor is it the first one again


REFUSED = {
    "--population": ([], "6", "(the state is made for it)"),
    "--seed": ([], "3", "(every draw follows from it)"),
    "--rank": ([], "3", "(it is what is evolved)"),
    "--fitness": ([], "bits", "(what was measured would not compare)"),
    "--optimizer": ([], "sgd", "(the state is made for it)"),
    "--sigma": (["--strategy", "pso"], "0.5", "(pso reads it once or not)"),
    "--batch_size": ([*TRAINED, "--strategy", "pso"], "3", "(members are trained and measured with it)"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_nothing_overrides_is_refused_by_name(flag: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, value, why = REFUSED[flag]
    assert evolved(at / "run", *flags, "--generations", "1") == 0
    before = contents(at / "run")
    capsys.readouterr()
    for more in ([], ["--override"]):
        assert evolved(at / "run", *flags, flag, value, *more) == 2
        error = capsys.readouterr().err
        assert f", is {value}), and nothing overrides {flag} {why}; choose another --out" in error
        assert error.count("\n") == 1
    assert contents(at / "run") == before


def test_another_text_of_the_same_name_is_taken_where_nothing_trains_on_it(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(at / "text.txt")
    Path(text).write_text(WORDS)
    assert evolved(at / "run", "--generations", "1", data=text) == 0
    assert evolved(at / "trained", *TRAINED, "--strategy", "pso", "--generations", "1", data=text) == 0
    Path(text).write_text(WORDS + "and on\n")
    capsys.readouterr()
    assert evolved(at / "run", "--generations", "2", data=text) == 1
    assert "(the text has changed); --override goes on all the same" in capsys.readouterr().err
    assert evolved(at / "run", "--generations", "2", "--override", data=text) == 0
    assert evolved(at / "run", "--generations", "3", data=text) == 0
    assert evolved(at / "trained", *TRAINED, "--strategy", "pso", "--override", data=text) == 1
    assert "began with another text: the one in --data has changed; --overwrite the run" in capsys.readouterr().err


OTHERS: dict[str, Any] = {
    "antithetic": False, "noise": "regenerated", "shaping": "nes", "crossover": "arithmetic", "mutation": "tensor",
    "elites": 1, "tournament": 2, "de_base": "best",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(evolve_override.READ.keys() - {"pbt"}))  # which is made of a model and a step
def test_what_may_be_overridden_lays_the_state_out_as_it_was(name: str) -> None:
    """And is told under the new flags from a state of the old ones."""
    flags = EvolveFlags(strategy=name, population=4, compile=False)
    if name == "map-elites":
        flags = dataclasses.replace(flags, descriptor=("bits",), bins="3", ranges=("0:1",))
    if name == "nsga2":
        flags = dataclasses.replace(flags, fitness="loss,bits")
    start, key = {"w": torch.ones(3, 2)}, keys.key(0)
    strategy = strategy_of(flags, start)
    state = strategy.init(key, start)
    for flag in evolve_override.READ[name]:
        assert flag in evolve_flags.FIXED
        value = OTHERS[flag] if flag in OTHERS else getattr(flags, flag) / 2 + 0.1
        assert value != getattr(flags, flag)
        other = strategy_of(dataclasses.replace(flags, **{flag: value}), start)
        assert other.renewed(state)._fields == state._fields
        shapes = {path: leaf.shape for path, leaf in tree.flatten(other.renewed(state)).items()}
        assert shapes == {path: leaf.shape for path, leaf in tree.flatten(other.init(key, start)).items()}
        told = other.tell(other.renewed(state), torch.rand(4) if strategy.figures == 1 else torch.rand(4, 2))
        assert int(told.generation) == 1
        if "numbers" in state._fields and flag in state.numbers:
            assert float(other.renewed(state).numbers[flag]) == pytest.approx(value)
