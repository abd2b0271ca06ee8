"""Every way to call the command wrong, and functions of fitness that fail."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from evolutions import at, call, evolved, there

from functional_lm import evolve_flags, evolve_override, surroundings
from functional_lm.evolution import journal as journals

__all__ = ["at", "there"]  # fixtures


def test_a_function_that_fails_on_the_way_loses_nothing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--fitness", "scores:later", "--max_tokens", "4"]
    assert evolved(at / "run", *more, data="rows.jsonl") == 0
    Path("broken").touch()
    try:
        assert evolved(at / "run", *more, "--generations", "5", data="rows.jsonl") == 1
        assert "error: the fitness scores:later raised ValueError: broken by now" in capsys.readouterr().err
    finally:
        Path("broken").unlink()
    assert evolved(at / "run", *more, "--generations", "5", data="rows.jsonl") == 0
    assert "from generation 3" in capsys.readouterr().out
    assert len(journals.read(at / "run" / "journal.jsonl").generations) == 5


REFUSED = {
    "odd": (["--population", "5"], "--population 5 is odd; antithetic pairs need an even one"),
    "nobody": (["--population", "0"], "--population is 0; it has to be between 1 and 1000000"),
    "alone": (["--population", "1"], "--population 1 is too small; give at least 2"),
    "odd, of pairs always": (
        ["--strategy", "mezo", "--population", "5"],
        "--population 5 is odd; antithetic pairs need an even one\n",
    ),
    "less than a generation": (
        ["--evaluations", "3"],
        "--evaluations 3 are less than one generation's; give at least the --population, 4, or a smaller one",
    ),
    "another's flag": (["--tournament", "5"], "--tournament is of --strategy genetic; eggroll has none"),
    "another's flag, of two": (
        ["--strategy", "pso", "--mutation_rate", "0.5"],
        "--mutation_rate is of --strategy genetic and nsga2; pso has none",
    ),
    "ranges of nothing": (["--ranges", "0:1"], "--ranges is of --strategy map-elites; eggroll has none"),
    "explored by a swarm": (
        ["--space", "hyper", "--strategy", "pso", "--perturb", "2"],
        "--perturb is of --strategy pbt; pso has none",
    ),
    "an adapter's own targets": (["--adapter", "x", "--targets", "q_proj"], "--targets is what the adapter in x has"),
    "a descriptor twice": (
        ["--strategy", "map-elites", "--descriptor", "bits,bits", "--bins", "2x2", "--ranges", "0:1,0:1"],
        "--descriptor is bits,bits; name each figure once",
    ),
    "tuned for nothing": (
        ["--space", "hyper", "--strategy", "pbt", "--tuned", "momentum"],
        "--tuned momentum changes nothing of --optimizer adamw; it is a number of muon",
    ),
    "answers of trained members": (
        [
            "--space",
            "hyper",
            "--strategy",
            "pbt",
            "--fitness",
            "scores:fails",
            "--max_tokens",
            "4",
            "--steps",
            "1",
            "--val_fraction",
            "0.5",
        ],
        "the fitness scores:fails raised ValueError: on purpose",
    ),
    "answers of trained members too long": (
        ["--space", "hyper", "--strategy", "pbt", "--fitness", "exact", "--max_tokens", "30", "--val_fraction", "0.5"],
        "exceed the model's max_len 32",
    ),
    "strategy": (["--strategy", "magic"], "--strategy is 'magic'; it can be genetic, openai-es, eggroll, mezo"),
    "fitness": (["--fitness", "beauty"], "--fitness is 'beauty'; it is loss, bits, accuracy, exact or module:function"),
    "function": (["--fitness", "scores:none", "--max_tokens", "4"], "the fitness 'scores:none' cannot be imported"),
    "raises": (
        ["--fitness", "scores:fails", "--max_tokens", "4"],
        "the fitness scores:fails raised ValueError: on purpose",
    ),
    "exits": (["--fitness", "scores:leaves", "--max_tokens", "4"], "the fitness scores:leaves raised SystemExit: 0"),
    "nothing": (
        ["--fitness", "scores:nothing", "--max_tokens", "4"],
        "the fitness scores:nothing returned NoneType; one number for each answer",
    ),
    "nested": (
        ["--fitness", "scores:nested", "--max_tokens", "4"],
        "the fitness scores:nested returned list of list; one number for each answer",
    ),
    "hangs": (
        ["--fitness", "scores:sleeps", "--max_tokens", "4", "--timeout", "0.3"],
        "the fitness scores:sleeps of a generation took more than 0.3 s; give --timeout more",
    ),
    "hangs and goes on": (
        ["--fitness", "scores:goes_on", "--max_tokens", "4", "--timeout", "0.3"],
        "the fitness scores:goes_on of a generation took more than 0.3 s; give --timeout more",
    ),
    "timeout of its own": (
        ["--fitness", "scores:waits", "--max_tokens", "4", "--timeout", "60"],
        "the fitness scores:waits raised TimeoutError: timed out",
    ),
    "nan": (
        ["--fitness", "scores:nan", "--generations", "9", "--max_tokens", "4"],
        "no member of 5 generations in a row had a finite",
    ),
    "nan beside": (
        ["--strategy", "nsga2", "--fitness", "loss,scores:nan", "--generations", "9", "--max_tokens", "4"],
        "no member of 5 generations in a row had a finite",
    ),
    "elites": (["--strategy", "genetic", "--elites", "4"], "--elites 4 leave no room in a --population of 4"),
    "few": (
        ["--strategy", "differential-evolution", "--population", "3"],
        "--population 3 is too small; a trial needs 3",
    ),
    "one objective": (["--strategy", "nsga2"], "nsga2 needs several --fitness, and 'loss' names 1"),
    "two objectives": (["--fitness", "loss,bits"], "eggroll takes one --fitness, and 'loss,bits' names 2"),
    "objective": (["--strategy", "nsga2", "--fitness", "loss,beauty"], "--fitness is 'beauty'; it is loss"),
    "no descriptor": (["--strategy", "map-elites"], "--descriptor and --strategy map-elites go together"),
    "bins": (
        ["--strategy", "map-elites", "--descriptor", "bits", "--ranges", "0:1"],
        "--bins has 2 parts for 1 --descriptor",
    ),
    "ranges": (
        ["--strategy", "map-elites", "--descriptor", "bits", "--bins", "4", "--ranges", "low"],
        "--ranges is 'low'; it is LOW:HIGH",
    ),
    "empty range": (
        ["--strategy", "map-elites", "--descriptor", "bits", "--bins", "4", "--ranges", "1:0"],
        "the range 1:0 is empty or has no end; give LOW:HIGH, two numbers that rise",
    ),
    "endless range": (
        ["--strategy", "map-elites", "--descriptor", "bits", "--bins", "4", "--ranges", "0:inf"],
        "the range 0:inf is empty or has no end",
    ),
    "restarts": (["--restarts", "ipop"], "--restarts are for cma-es and sep-cma-es; eggroll does not"),
    "chunk": (["--chunk_size", "0"], "--chunk_size is '0'; it is auto or a whole number above 0"),
    "noise": (["--strategy", "genetic", "--noise", "regenerated"], "--noise regenerated is for openai-es and eggroll"),
    "long": (["--fitness", "exact", "--max_tokens", "30"], "exceed the model's max_len 32"),
    "leaves": (["--space", "full", "--leaves", "*nose*"], "'*nose*' matches no leaf of the model"),
    "targets": (["--targets", "nose"], "the target 'nose' matches nothing"),
    "adapter": (["--space", "full", "--adapter", "x"], "--adapter is evolved in --space lora, not in full"),
    "pbt": (["--strategy", "pbt"], "--strategy pbt is for --space hyper, not lora: pbt trains"),
    "steps": (["--steps", "9"], "--steps is of --space hyper and architecture, not of lora"),
    "tuned": (
        ["--space", "hyper", "--strategy", "pbt", "--tuned", "weight_decay"],
        "--tuned weight_decay is searched by factors, and begins at 0; give --weight_decay another",
    ),
    "a schedule of pbt": (
        ["--space", "hyper", "--strategy", "pbt", "--tuned", "learning_rate,warmup"],
        "--warmup is of a schedule over --steps; pbt, which goes on after them, finds its own: tune learning_rate",
    ),
    "a warm-up of nothing": (
        ["--space", "hyper", "--strategy", "pso", "--tuned", "warmup"],
        "--tuned warmup is searched by factors, and begins at 0; give --warmup another",
    ),
    "architectures by pbt": (
        ["--space", "architecture", "--strategy", "pbt"],
        "--strategy pbt is for --space hyper, not architecture",
    ),
    "architectures of nothing": (
        ["--space", "architecture", "--strategy", "pso"],
        "--space architecture needs --choices: what may differ, such as n_layers=1:2:4",
    ),
    "architectures a step apart": (
        ["--space", "architecture", "--strategy", "pso", "--choices", "n_layers=1:2"],
        "--sigma 0.02 hardly leaves the architecture that it begins at",
    ),
    "heads that never divide": (
        ["--space", "architecture", "--strategy", "pso", "--sigma", "1", "--choices", "n_heads=3:5"],
        "no architecture of --choices is possible: d_model 16 is not a multiple of n_heads 3",
    ),
    "too large": (
        [
            "--space",
            "architecture",
            "--strategy",
            "pso",
            "--sigma",
            "1",
            "--choices",
            "n_layers=1:2",
            "--max_parameters",
            "100",
        ],
        "parameters, more than --max_parameters 100",
    ),
    "choices elsewhere": (["--choices", "n_layers=1:2"], "--choices is of --space architecture, not of lora"),
    "nothing tuned": (["--space", "hyper", "--strategy", "pso", "--tuned", ""], "--tuned is empty; name numbers"),
    "nothing held out": (
        ["--space", "hyper", "--strategy", "pbt", "--val_fraction", "0"],
        "--space hyper measures on what is held out, which is less than a row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_line(case: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[case]
    assert evolved(at / "run", *flags, data="rows.jsonl") in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (at / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("missing", sorted(evolve_override.SAYS))
def test_a_journal_that_evolve_did_not_write_is_named(
    missing: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines are whole, and their checks right."""
    assert evolved(at / "run") == 0
    written = journals.read(at / "run" / journals.NAME)
    header = {name: value for name, value in written.header.items() if name not in ("format", "kind", missing)}
    journal = journals.begin(written.path, header)
    for entry in written.generations:
        journal = journals.append(journal, entry)
    capsys.readouterr()
    said = f"error: {written.path} has no {missing!r} in its line of settings; evolve did not write it\n"
    assert call("replay", written.path, "--out", at / "again") == 1
    assert evolved(at / "run") == 1
    assert capsys.readouterr().err == 2 * said
    assert not (at / "again").exists()


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"a": "b"}, "\ud800"])
@pytest.mark.parametrize("name", ["prompt", "response"])
def test_rows_of_something_else_than_text_are_named(
    name: str, wrong: Any, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "the cat ", "response": "sat"}, {"prompt": "the dog ", "response": "sat", name: wrong}]
    (at / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evolved(at / "run", "--fitness", "exact", "--max_tokens", "4", data=str(at / "odd.jsonl")) == 1
    error = capsys.readouterr().err
    assert "odd.jsonl, line 2: field 'prompt' with 'response' is not text (" in error
    assert not (at / "run").exists()


def test_answers_need_rows(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run", "--fitness", "exact") == 1
    assert "--data text.txt has no rows of prompt and response" in capsys.readouterr().err


def test_another_run_is_not_gone_on_with(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    assert evolved(at / "run", "--sigma", "0.5") == 2
    assert "--sigma was 0.02, is 0.5" in capsys.readouterr().err
    assert evolved(at / "run", "--resume", "never") == 2
    assert evolved(at / "run", "--sigma", "0.5", "--overwrite") == 0
    assert journals.read(at / "run" / "journal.jsonl").header["flags"]["sigma"] == 0.5


@pytest.mark.parametrize("space", evolve_flags.SPACES)
def test_what_trained_members_are_measured_on_is_the_runs(space: str) -> None:
    """Elsewhere the same flag says what is measured beside the run."""
    fixed = evolve_flags.fixed(evolve_flags.EvolveFlags(space=space))
    assert set(evolve_flags.FIXED) <= set(fixed)
    assert ("eval_batches" in fixed) == (space in ("hyper", "architecture"))


def test_a_function_that_was_changed_makes_another_run(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a generation was measured; before, what fails may be mended. Another processor is said."""

    def scored(value: str, *more: str) -> int:
        (at / "fairness.py").write_text(f"def score(texts, rows):\n    return [float({value}) for text in texts]\n")
        sys.modules.pop("fairness", None)
        importlib.invalidate_caches()
        named = ["--fitness", "fairness:score", "--max_tokens", "4", "--generations", "1"]
        return evolved(at / "run", *(named[:-2] if more else named), *more, data="rows.jsonl")

    monkeypatch.syspath_prepend(at)
    assert scored("'x'") == 1
    assert scored("len(text)") == 0
    assert scored("-len(text)", "--generations", "2") == 2
    assert "holds another run (fairness:score has changed); --override goes on all the same" in capsys.readouterr().err
    monkeypatch.setattr(surroundings, "processor", lambda options: "abacus")
    assert scored("len(text)", "--generations", "2") == 0
    assert ", now abacus: the last bits of its numbers may differ" in capsys.readouterr().out


def test_a_journal_older_than_a_flag_is_gone_on_with(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    old = journals.read(at / "run" / "journal.jsonl")
    header = {name: value for name, value in old.header.items() if name not in ("format", "kind")}
    del header["flags"]["batches"]
    made = journals.begin(old.path, header)
    for entry in old.generations:
        made = journals.append(made, entry)
    assert evolved(at / "run", "--generations", "4", "--batches", "1") == 2
    assert "--batches was None, is 1" in capsys.readouterr().err
    assert evolved(at / "run", "--generations", "4") == 0
    assert "from generation 3" in capsys.readouterr().out


def test_every_flag_is_the_runs_or_the_callers() -> None:
    """What a resumed run may change is listed nowhere else; this makes whoever adds a flag decide."""
    import dataclasses

    free = {
        "action", "journal", "out", "generations", "evaluations", "minutes", "target", "timeout", "chunk_size",
        "device", "rank_timeout", "eval_every", "eval_batches", "save_every", "keep", "resume", "override",
        "overwrite",
    }  # fmt: skip
    assert set(evolve_flags.MEASURING) <= free
    assert free | set(evolve_flags.FIXED) == {field.name for field in dataclasses.fields(evolve_flags.EvolveFlags)}
