"""Small training states whose numbers say of which step they are, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from functional_lm import disk, tree
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import checkpoint
from functional_lm.training.step import TrainState


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards know what was synced; the real thing would only take long here."""
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: None)


TOKENIZER = tokenizers.train((), "bytes")
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=8, n_layers=1, n_heads=1, max_len=8)


def state(step: int, rows: int = 3) -> TrainState:
    """Its numbers say of which step they are, and where they stand."""
    leaf = step + torch.arange(2 * rows).view(rows, 2) / 2**19  # exact: rows < 2**18, step < 32
    now = torch.tensor(step)
    return TrainState(now, now * 0, {"w": leaf}, {"m": leaf + 0.5}, {}, {}, torch.tensor([1, step]), {"lr": leaf[0, 0]})


def save(
    folder: Path, now: TrainState, memory: Mapping[str, Any] | None = None, config: ModelConfig | None = None
) -> Path:
    """With a `config` it is a model folder too, as those of one model are."""
    return checkpoint.save(folder, now, config, TOKENIZER, memory or {"of": int(now.step)})


def loaded(path: Path, rows: int = 3) -> int:
    """The step of a checkpoint that is whole and of one piece."""
    found, memory = checkpoint.load(path, state(0, rows))
    step = int(found.step)
    expected = state(step, rows)
    assert found.params["w"].equal(expected.params["w"])
    assert tree.digest(found) == tree.digest(expected)
    assert memory["of"] == step
    return step
