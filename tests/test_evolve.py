"""The command: runs of all kinds, resumed and replayed, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from evolutions import EAGER, at, call, evolved, there, weights_of
from test_board import shown, told

from functional_lm import console, evolve_flags, files, folder, generate, tree
from functional_lm.cli import main_single
from functional_lm.evolution import journal as journals
from functional_lm.interop import peft

__all__ = ["at", "there"]  # fixtures


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
    "numbers of training by what they answer": [
        *["--space", "hyper", "--strategy", "snes", "--sigma", "0.5", "--steps", "2", "--val_fraction", "0.5"],
        *["--data", "rows.jsonl", "--fitness", "scores:letters", "--max_tokens", "4", "--temperature", "1"],
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
    data = flags[flags.index("--data") + 1] if "--data" in flags else "text.txt"
    again = f"4 generations trained again on {data}" if "pbt" in flags else "4 generations told again"
    if "--steps" in flags and "pbt" not in flags:
        again += f", the one that is kept trained again on {data}"
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
