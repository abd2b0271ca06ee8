"""A small run of training, and how tests read and call it.

Its text is short enough to be learnt by heart.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.training import checkpoint

FLAGS = {
    "compile": "false", "dtype": "float32", "device": "cpu", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64,
    "max_len": 32, "vocab_size": 320, "batch_size": 4, "steps": 12, "warmup_steps": 3, "learning_rate": 0.01,
    "dropout": 0.1, "gradient_accumulation_steps": 2, "eval_every": 5, "save_every": 4, "keep": 0, "sample_tokens": 8,
    "val_fraction": 0.2, "eval_batches": 2,
}  # fmt: skip
ARCHITECTURE = ("d_model", "n_layers", "n_heads", "d_ff", "max_len", "dropout")
Files = dict[str, bytes]


def command(verb: str, **flags: Any) -> int:
    """A command as a person types it, in this process."""
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return main(COMMANDS, [verb, *words])


def pretrain(**flags: Any) -> int:
    return command("pretrain", **{**FLAGS, **flags})


def contents(path: Path) -> Files:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines(run) if "loss" in row]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command said."""
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} lazy dogs.\n" for i in range(100)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """An uninterrupted run with dropout, accumulation and validation in between; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(data=text, out=out) == 0
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


# Resuming -------------------------------------------------------------------------------------------------------------


def cut_back(folder: Path, step: int) -> None:
    """As if the process had died behind this step's checkpoint, at the moment when more lines had been written."""
    for path in checkpoint.listing(folder / "checkpoints"):
        if path.name > checkpoint.name(step):
            shutil.rmtree(path)
    for name in ("model.safetensors", "summary.json", "loss.png"):
        (folder / name).unlink()


def equal_runs(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    same = ("model.safetensors", "config.json", "tokenizer.model")
    last = tuple(f"checkpoints/step-00000012/{name}" for name in (*same, "training.safetensors", "training.json"))
    assert all(ours[name] == theirs[name] for name in same + last)
    assert losses(one) == losses(other)
    for name in ("val_loss", "val_bits_per_byte", "val_tokens", "tokens", "steps"):
        assert read(one / "summary.json")[name] == read(other / "summary.json")[name]


# Generating -----------------------------------------------------------------------------------------------------------


WRITING = {"compile": "false", "dtype": "float32", "device": "cpu", "max_tokens": 12}


def written(capsys: pytest.CaptureFixture[str], model: Path, **flags: Any) -> str:
    capsys.readouterr()
    assert command("generate", **{**WRITING, "model": model, **flags}) == 0
    return capsys.readouterr().out
