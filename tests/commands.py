"""A command that records how it is called, for the tests of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from functional_lm.cli import Command, OptionGroup, main_single
from functional_lm.model.config import ModelConfig
from functional_lm.options import REQUIRED, option

CALLS: list[tuple[Any, ...]] = []


@dataclass(frozen=True, kw_only=True)
class Options:
    """One option of every kind."""

    data: str = option("stdlib", "documents", aliases=("data_path", "data-file"), metavar="SRC", group="Data")
    steps: int = option(100, "optimizer steps", low=1)
    learning_rate: float = option(1e-3, "peak", above=0, below=1)
    dropout: float = option(0.0, "share dropped", low=0, high=0.5)
    schedule: str = option("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    compile: bool = option(True, "use torch.compile")
    fused: bool | None = option(None, "by device when none")
    seed: int | None = option(None, "a fresh one when none")
    note: str | None = option(None, "free text")
    prompt: str = option("", "text to continue")
    stop: tuple[str, ...] = option((), "texts that end the output")
    sizes: tuple[int, ...] = option((1, 2), "widths", low=0)
    betas: tuple[float, float] | None = option((0.9, 0.95), "momentum")
    norm: bool = field(default=False)


@dataclass(frozen=True, kw_only=True)
class Needy:
    model: str = option(REQUIRED, "the model folder", metavar="DIR", aliases=("model_path",))
    prompt: str = option(REQUIRED, "text to continue")
    tokens: int = option(8, "how many tokens")


def record(*arguments: Any) -> list[int]:
    CALLS.append(arguments)
    return [1, 2, 3]  # that Fire would print


COMMAND = Command("train", "Train a model.", Options, record)
LAYERED = Command("pretrain", "Pretrain.", Options, record, extra=(OptionGroup("Model", ModelConfig),))
NEEDY = Command("generate", "Continue a text.", Needy, record, positional=("prompt",))


def run(argv: list[str], command: Command = COMMAND) -> Any:
    """The options that the function got."""
    CALLS.clear()
    assert main_single(command, argv) == 0
    assert len(CALLS) == 1
    return CALLS[0][0]
