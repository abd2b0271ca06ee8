"""The command: a run, its journal, what it goes on from, and every way to call it wrong."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_board import shown, told

from functional_lm import (
    console,
    disk,
    evolve,
    evolve_flags,
    evolve_result,
    evolve_surroundings,
    files,
    folder,
    generate,
    keys,
    run_folder,
    tree,
)
from functional_lm.cli import main_single
from functional_lm.errors import DataError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import loop
from functional_lm.interop import peft
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers

WORDS = "the cat sat on the mat and the dog sat on the log " * 30
EAGER = ["--compile", "false", "--dtype", "float32"]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a text and questions."""
    place = tmp_path_factory.mktemp("evolve")
    (place / "text.txt").write_text(WORDS)
    rows = [{"prompt": f"the {a} ", "response": "sat"} for a in ("cat", "dog") for _ in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers.train([WORDS], "char", 280)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=32)
    folder.save(place / "model", transformer.init(config, keys.key(0)), config, tokenizer)
    (place / "scores.py").write_text(
        "import pathlib, sys, time\n"
        "def sat(texts, rows):\n    return [float('s' in text) + float('a' in text) for text in texts]\n"
        "def letters(texts, rows):\n    return [sum(map(ord, text)) / 1000 for text in texts]\n"
        "def fails(texts, rows):\n    raise ValueError('on purpose')\n"
        "def leaves(texts, rows):\n    sys.exit(0)\n"
        "def nothing(texts, rows):\n    print(end='')\n"
        "def nested(texts, rows):\n    return [[float(len(text))] for text in texts]\n"
        "def sleeps(texts, rows):\n    time.sleep(60)\n"
        "def goes_on(texts, rows):\n"
        "    while True:\n        try:\n            time.sleep(60)\n        except Exception:\n            pass\n"
        "def waits(texts, rows):\n    raise TimeoutError('timed out')\n"
        "def nan(texts, rows):\n    return [float('nan')] * len(texts)\n"
        "def later(texts, rows):\n"
        "    if pathlib.Path('broken').exists():\n        raise ValueError('broken by now')\n"
        "    return [float(len(text)) for text in texts]\n"
    )
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return tmp_path


def call(*arguments: str) -> int:
    return main_single(evolve.COMMAND, [*map(str, arguments)])


def evolved(out: Path, *more: str, data: str = "text.txt") -> int:
    usual = ["--model", "model", "--data", data, "--block_size", "16", "--batch_size", "4"]
    usual += ["--population", "4", "--generations", "3", *EAGER]
    kept = [word for flag, word in zip(usual[::2], usual[1::2]) if flag not in more for word in (flag, word)]
    return call("--out", out, *kept, *more)


def weights_of(run: Path) -> str:
    name = "model.safetensors" if (run / "model.safetensors").exists() else "adapter_model.safetensors"
    return tree.digest(tree.load(run / name))


KINDS = {
    "adapter by eggroll": ["--rank", "2"],
    "model by eggroll": ["--space", "full"],
    "model by es, noise regenerated": ["--space", "full", "--strategy", "openai-es", "--noise", "regenerated"],
    "part by genetics": ["--space", "full", "--leaves", "*mlp*", "--strategy", "genetic"],
    "model by mezo": ["--space", "full", "--strategy", "mezo"],
    "norms by cma-es": ["--space", "full", "--leaves", "*norm*", "--strategy", "cma-es"],
    "numbers of training by pbt": [
        *["--space", "hyper", "--strategy", "pbt", "--steps", "3", "--val_fraction", "0.3", "--fresh"],
        *["--tuned", "learning_rate,beta1", "--learning_rate", "0.003"],
    ],
    "numbers of training by cma-es": [
        *["--space", "hyper", "--strategy", "cma-es", "--sigma", "0.5", "--steps", "2", "--val_fraction", "0.3"],
        *["--tuned", "learning_rate,beta1"],
    ],
    "numbers of training by a swarm, in chunks": [
        *["--space", "hyper", "--strategy", "pso", "--sigma", "0.5", "--steps", "2", "--val_fraction", "0.3"],
        *["--tuned", "learning_rate,final_rate,bend", "--warmup", "0.5", "--fresh", "--chunk_size", "3"],
    ],
    "architectures by cma-es": [
        *["--space", "architecture", "--strategy", "cma-es", "--sigma", "0.8", "--steps", "2", "--val_fraction", "0.3"],
        *["--choices", "n_layers=1:2,d_model=8:12:16,n_heads=2:3:4,norm=rmsnorm:layernorm", "--equal_compute"],
    ],
    "architectures by differential evolution, the same numbers": [
        *["--space", "architecture", "--strategy", "differential-evolution", "--sigma", "0.8", "--steps", "2"],
        *["--val_fraction", "0.3", "--choices", "d_model=8:16,feed_forward=gelu:swiglu", "--tuned", ""],
    ],
    "norms by cma-es, restarts": [
        "--space",
        "full",
        "--leaves",
        "*norm*",
        "--strategy",
        "cma-es",
        "--restarts",
        "ipop",
    ],
    "adapter by differential evolution": ["--strategy", "differential-evolution", "--de_base", "current-to-best"],
    "part by pso": ["--space", "full", "--leaves", "*mlp*", "--strategy", "pso"],
    "adapter by nsga2": ["--strategy", "nsga2", "--fitness", "accuracy,loss", "--strength", "20"],
    "part by map-elites": [
        *("--space", "full", "--leaves", "*mlp*", "--strategy", "map-elites", "--descriptor", "accuracy,bits"),
        *("--bins", "4x3", "--ranges", "0:1,-20:0"),
    ],
    "adapter by genetics, accuracy": ["--strategy", "genetic", "--fitness", "accuracy", "--strength", "20"],
    "drawn answers by eggroll": [
        *("--data", "rows.jsonl", "--fitness", "scores:letters", "--max_tokens", "4", "--temperature", "1"),
        *("--sigma", "0.3", "--chunk_size", "3"),
    ],
}


def test_dropout_is_a_choice_of_architecture(at: Path) -> None:
    """Members with it train otherwise than those without; the winner's configuration has its own."""
    searched = ["--space", "architecture", "--strategy", "cma-es", "--sigma", "0.8", "--steps", "3"]
    given = ["--val_fraction", "0.3", "--choices", "dropout=0:0.1", "--tuned", "", "--learning_rate", "0.01"]
    assert evolved(at / "run", *searched, *given, "--generations", "2") == 0
    summary = json.loads((at / "run" / "summary.json").read_text())
    tried = {one["dropout"]: one["fitness"] for one in summary["architectures"]}
    assert set(tried) == {0.0, 0.1}
    assert tried[0.0] != tried[0.1]
    assert folder.load(at / "run", "cpu").config.dropout == summary["architecture"]["dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_replayed_and_uninterrupted_are_one(kind: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after 2 of 4 generations (with and without a checkpoint of the last one), then on: the same bits."""
    flags, began = KINDS[kind], time.perf_counter()
    assert evolved(at / "whole", *flags, "--generations", "4") == 0
    assert evolved(at / "parts", *flags, "--generations", "2", "--save_every", "1") == 0
    shutil.rmtree(at / "parts" / "checkpoints" / "step-00000002")
    assert evolved(at / "parts", *flags, "--generations", "4") == 0
    assert "going on with" in capsys.readouterr().out
    assert weights_of(at / "whole") == weights_of(at / "parts")
    assert call("replay", at / "parts" / "journal.jsonl", "--out", at / "again") == 0
    again = "4 generations trained again on text.txt" if "pbt" in flags else "4 generations told again"
    if "--steps" in flags and "pbt" not in flags:
        again += ", the one that is kept trained again on text.txt"
    said = capsys.readouterr().out
    assert f"{again}, nothing measured; the weights are those of the run, bit for bit" in said
    assert weights_of(at / "again") == weights_of(at / "whole")
    lines = [json.loads(line) for line in (at / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [1, 2, 3, 4]
    assert [line["evaluations"] for line in lines] == [4, 8, 12, 16]
    assert any(line["fitness_std"] > 0 for line in lines)
    assert 0 < sum(4 / line["evaluations_per_second"] for line in lines) < time.perf_counter() - began
    for name in ("fitness_best", "fitness_mean", "fitness_std", "evaluations_per_second"):
        assert [step for step, _ in shown(at / "parts", name)] == [1, 2, 3, 4]
        assert shown(at / "parts", name) == [(step, pytest.approx(value)) for step, value in told(at / "parts", name)]
    assert (at / "parts" / "fitness.png").stat().st_size > 1000


def test_the_winner_is_an_ordinary_folder(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(And on a terminal one sees where the run is.)"""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert evolved(at / "adapter", "--rank", "2") == 0
    *_, last = (json.loads(line) for line in (at / "adapter" / "metrics.jsonl").read_text().splitlines())
    bar = capsys.readouterr().err.split("\r")[-1]
    assert "| 3/3 [" in bar
    figures = [f"{last[f'fitness_{name}']:.4f}" for name in ("best", "mean", "std")]
    rate = console.count(last["evaluations_per_second"])
    assert "best {}, mean {} ± {}, {} evaluations/s]".format(*figures, rate) in bar
    assert evolved(at / "model", "--space", "full") == 0
    base = folder.load("model")
    peft.load_adapter(at / "adapter", base.params)  # refuses one of another base
    assert folder.load(at / "model").config == base.config
    assert weights_of(at / "model") != weights_of(Path("model"))
    assert evolved(at / "further", "--adapter", at / "adapter", "--rank", "2") == 0


def test_the_best_architecture_is_an_ordinary_folder(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is what the summary says, trained; `generate` takes it. Everything that was tried is written."""
    more = ["--space", "architecture", "--strategy", "cma-es", "--sigma", "1", "--steps", "2", "--val_fraction", "0.3"]
    more += ["--choices", "n_layers=2:3,d_model=8:12,n_heads=2:3:5,norm=layernorm", "--max_parameters", "8000"]
    assert evolved(at / "run", *more) == 0
    said = capsys.readouterr().out
    assert "architectures are possible of at most 8,000 parameters" in said
    assert "one that is not becomes the nearest that is; in none of them: n_heads 5" in said
    found, summary = folder.load(at / "run"), files.read_json(at / "run" / "summary.json")
    assert {name: getattr(found.config, name) for name in summary["architecture"]} == summary["architecture"]
    assert summary["architecture"]["norm"] == "layernorm"
    assert tree.size(found.params) == summary["parameters"] <= 8000
    told = [value for one in journals.read(at / "run" / "journal.jsonl").generations for value in one["fitness"]]
    tried = summary["architectures"]
    assert sum(one["times"] for one in tried) == len(told) == summary["evaluations"]
    assert summary["tried"] == len(tried)
    assert tried[0]["fitness"] == pytest.approx(max(told))
    assert (at / "run" / "architectures.png").stat().st_size > 1000
    assert (
        main_single(generate.COMMAND, ["--model", str(at / "run"), "--prompt", "the", "--max_tokens", "2", *EAGER]) == 0
    )


def test_answers_are_evolved_by_any_function(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--fitness", "scores:sat", "--max_tokens", "4", "--sigma", "0.2", "--population", "8"]
    assert evolved(at / "run", *more, "--space", "full", "--generations", "6", data="rows.jsonl") == 0
    rows = [json.loads(line) for line in (at / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["fitness_best"] for row in rows) > 0
    assert evolved(at / "exact", "--fitness", "exact", "--max_tokens", "4", data="rows.jsonl") == 0
    assert evolved(at / "read", "--fitness", "loss", data="rows.jsonl") == 0
    assert "the adapter is in" in capsys.readouterr().out


def test_the_front_of_several_objectives(at: Path) -> None:
    """Read and answered figures in the order that was asked for; the compromise is kept, the front written down."""
    more = ["--strategy", "nsga2", "--fitness", "scores:sat,loss,exact", "--max_tokens", "4", "--population", "6"]
    assert evolved(at / "run", *more, data="rows.jsonl") == 0
    summary = files.read_json(at / "run" / "summary.json")
    front = summary["front"]
    assert [set(row) for row in front] == [{"scores:sat", "loss", "exact"}] * len(front)
    assert summary["kept_figures"] in front
    assert summary["kept"] == "centre"
    told = [row for one in journals.read(at / "run" / "journal.jsonl").generations for row in journals.fitness_of(one)]
    assert all(0 <= row[0] <= 2 and row[1] < 0 <= row[2] <= 1 for row in told)
    best = torch.tensor(told)
    for row in front:
        mine = torch.tensor([row[name] for name in ("scores:sat", "loss", "exact")])
        assert (best == mine).all(1).any()
        assert not ((best >= mine).all(1) & (best > mine).any(1)).any()
    assert (at / "run" / "front.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (at / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["front"] >= len(front)


def test_the_archive_of_kinds(at: Path) -> None:
    more = ["--strategy", "map-elites", "--fitness", "loss", "--descriptor", "scores:later", "--max_tokens", "4"]
    assert evolved(at / "run", *more, "--bins", "3", "--ranges", "-1:5", data="rows.jsonl") == 0
    summary = files.read_json(at / "run" / "summary.json")
    assert summary["cells"] == 3
    told = [row for one in journals.read(at / "run" / "journal.jsonl").generations for row in journals.fitness_of(one)]
    for elite in summary["archive"]:
        low = 2 * elite["cell"][0] - 1
        inside = [row for row in told if low <= row[1] < low + 2]
        assert elite["loss"] == max(inside)[0]
        assert [elite["loss"], elite["scores:later"]] in inside
    assert summary["best_fitness"] == pytest.approx(max(row[0] for row in told))
    assert (at / "run" / "archive.png").stat().st_size > 1000


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_minibatches_come_in_turns(batches: int, at: Path) -> None:
    """An elite's fitness is what it was where the minibatch is."""
    more = ["--strategy", "genetic", "--elites", "1", "--mutation_rate", "0", "--batches", str(batches)]
    assert evolved(at / "run", *more, "--crossover_rate", "0", "--population", "2") == 0
    told = [journals.fitness_of(one) for one in journals.read(at / "run" / "journal.jsonl").generations]
    best = [max(one) for one in told]
    assert (best[1] == best[0]) == (batches == 1)
    assert (told[1][0] == told[2][0]) == (batches == 1)
    assert evolve_flags.batches(evolve_flags.EvolveFlags(strategy="pso")) == 1


def test_it_ends_by_its_budget(at: Path) -> None:
    assert evolved(at / "evaluations", "--evaluations", "9") == 0
    assert files.read_json(at / "evaluations" / "summary.json")["generations"] == 2
    assert evolved(at / "target", "--target", "-100") == 0
    assert files.read_json(at / "target" / "summary.json")["ended"] == "target"
    assert evolved(at / "minutes", "--minutes", "0.00001") == 0
    assert files.read_json(at / "minutes" / "summary.json")["ended"] == "minutes"


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
    "alone": (["--population", "1"], "--population 1 is too small"),
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
        "the range 1:0 is empty",
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
    monkeypatch.setattr(evolve_surroundings, "processor", lambda options: "abacus")
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


# The folder -----------------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_folder_has_one_run_at_a_time(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evolved(at / "run") == 0
    with run_folder.held(at / "run"):
        before = contents(at / "run")
        assert evolved(at / "run", "--generations", "4") == 1
        assert f"another process is at work in {at / 'run'}; wait for it" in capsys.readouterr().err
        assert contents(at / "run") == before
    assert not (at / "run" / run_folder.LOCK).exists()


@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_a_run_to_replace_is_there_until_the_new_one_has_measured(
    ends: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(What is killed tidies nothing up: the next command does.)"""
    assert evolved(at / "run", data="rows.jsonl") == 0
    before = contents(at / "run")
    if ends == "refused":
        assert (
            evolved(at / "run", "--overwrite", "--fitness", "scores:fails", "--max_tokens", "4", data="rows.jsonl") == 1
        )
        assert capsys.readouterr().err == "error: the fitness scores:fails raised ValueError: on purpose\n"
    else:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "told", lambda *_: sys.exit(137))
            with pytest.raises(SystemExit):
                evolved(at / "run", "--overwrite", "--sigma", "0.5", data="rows.jsonl")
        assert evolved(at / "run", "--resume", "never", data="rows.jsonl") == 2
    assert contents(at / "run") == before
    for generations, more in ((1, []), (0, ["--evaluations", "1"])):
        assert evolved(at / "run", "--overwrite", "--generations", "1", *more, data="rows.jsonl") == 0
        assert not (at / "run" / run_folder.REPLACED).exists()
        assert len(journals.read(at / "run" / "journal.jsonl").generations) == generations


def test_a_folder_of_something_else_is_left_as_it_is(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "letters").mkdir()
    (at / "letters" / "to_mother.txt").write_text("dear")
    (at / "texts" / "data").mkdir(parents=True)
    (at / "texts" / "data" / "mine.txt").write_text("words")
    (at / "training").mkdir()
    files.write_json(at / "training" / "run.json", {"options": {}})
    before = contents(at)
    for name, message in {
        "letters": "letters holds to_mother.txt and no run; choose another --out",
        "texts": "texts holds data and no run; choose another --out",
        "training": "training already holds a training; choose another --out, or --overwrite it",
    }.items():
        assert evolved(at / name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for name in ("letters", "texts"):
        assert evolved(at / name, "--overwrite") == 2
        assert f"--overwrite replaces a run and {at / name} holds something else" in capsys.readouterr().err
    assert contents(at) == before
    (at / "prepared" / "data").mkdir(parents=True)
    (at / "prepared" / "data" / "text.json").write_text("{}")
    assert evolved(at / "prepared") == 0


def test_a_damaged_checkpoint_is_named_passed_over_and_kept(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal has all that it knew, even if no checkpoint is whole."""
    assert evolved(at / "whole", "--generations", "4") == 0
    assert evolved(at / "run", "--save_every", "1") == 0
    for path in sorted((at / "run" / "checkpoints").iterdir()):
        data = bytearray((path / "state.safetensors").read_bytes())
        data[-9] ^= 1
        (path / "state.safetensors").write_bytes(data)
    damaged = contents(at / "run" / "checkpoints" / "step-00000003")
    capsys.readouterr()
    assert evolved(at / "run", "--save_every", "1", "--generations", "4") == 0
    said = capsys.readouterr().out
    for step in (2, 3):
        assert f"step-0000000{step}: state.safetensors is damaged (its sha256 is another)" in said
    assert weights_of(at / "run") == weights_of(at / "whole")
    assert contents(at / "run" / "checkpoints" / "step-00000003") == damaged


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_compiled_runs_of_several_processes_are_one(at: Path) -> None:
    """The law of resuming and replaying with the flags' defaults: compiled, and as exact as the processor likes."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}

    def said(*words: str | Path) -> str:
        command = [sys.executable, "-m", "functional_lm.evolve", *map(str, words)]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(out: Path, *more: str) -> str:
        short = ["--rank", "2", "--population", "4", "--block_size", "16", "--batch_size", "4"]
        return said("--model", "model", "--data", "text.txt", "--out", out, *short, *more)

    run(at / "whole", "--generations", "4")
    run(at / "parts", "--generations", "2", "--save_every", "1")
    shutil.rmtree(at / "parts" / "checkpoints" / "step-00000002")
    assert "from generation 2" in run(at / "parts", "--generations", "4")
    assert journals.read(at / "parts" / "journal.jsonl").header["flags"]["compile"]
    assert weights_of(at / "whole") == weights_of(at / "parts")
    assert "bit for bit" in said("replay", at / "parts" / "journal.jsonl", "--out", at / "again")
    assert weights_of(at / "again") == weights_of(at / "whole")


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("g++ was killed"), 130), (DataError("no number"), 1)])
def test_a_signal_that_ends_the_compiler_too_is_an_interruption_and_no_error(
    error: Exception, code: int, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the package has to say is said all the same. The next call goes on."""

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.population.chunks", signalled)
        assert evolved(at / "run") == code
    assert capsys.readouterr().err == ("interrupted\n" if code == 130 else "error: no number\n")
    assert evolved(at / "run") == 0


def test_where_memory_is_short_it_is_said_what_needs_less(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written where it is known, and else when it happens."""
    full, genetic = at / "full", ["--strategy", "genetic", "--space", "full"]
    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.memory.free_memory", lambda device: 1 << 20)
        assert evolved(full, *genetic, "--population", "1000000") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --population 1000000: genetic holds ")
        assert "and 1 MiB are free; --population " in said
        fits = said.split("; --population ")[1].split(" ")[0]
        assert not full.exists()
        assert evolved(full, *genetic, "--population", fits, "--generations", "1") == 0

    def short(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("functional_lm.evolution.population.chunks", short)
        assert evolved(at / "run") == 1
    assert capsys.readouterr().err == (
        "error: out of memory with 4 members, 4 at once; --chunk_size 2 goes on with fewer of them; a new run needs "
        "less with a smaller --batch_size or --population, or --noise regenerated\n"
    )
    assert evolved(at / "run", "--chunk_size", "2") == 0


# The journal ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["journal.jsonl", "state.json"])
def test_a_folder_that_goes_is_not_made_again(name: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, seen = at / "run", [0]

    def vanishing(operation: disk.Operation) -> Any:
        seen[0] += operation.path.name.endswith(name)
        if seen[0] == 5 and out.exists():
            shutil.rmtree(out)
        return operation.act(1.0)

    with disk.watched_by(vanishing):
        assert evolved(out, "--save_every", "1") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the generation was not written (")
    assert "the same command goes on from there" in said
    assert not out.exists()


@pytest.mark.parametrize("how", ["full", "gone"])
def test_what_is_evolved_and_cannot_be_written_is_not_lost(
    how: str, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = at / "run"

    def full(operation: disk.Operation) -> Any:
        if operation.path.name.endswith("summary.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))
        return operation.act(1.0)

    def gone(*arguments: Any) -> None:
        shutil.rmtree(out)
        evolve_result.finish(*arguments)

    with monkeypatch.context() as patch, disk.watched_by(full if how == "full" else lambda one: one.act(1.0)):
        if how == "gone":
            patch.setattr(evolve, "finish", gone)
        assert evolved(out) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the model was not written (")
    assert "; the same command goes on from the last checkpoint when the disk is well again" in said
    assert out.exists() == (how == "full")
    assert evolved(out) == 0
