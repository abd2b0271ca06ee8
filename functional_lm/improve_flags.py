"""The flags of `improve`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.options import REQUIRED, option
from functional_lm.training_flags import DEVICES


@dataclass(frozen=True)
class ImproveFlags:
    """Flags of `improve`."""

    model: str = option(REQUIRED, "model folder to begin with; it stays as it is", aliases=("model_path",))
    data: str = option(REQUIRED, "JSON or JSONL rows of prompt and response", aliases=("data_path",))
    out: str = option("runs/improve", "folder to write: the model, and a line for each round", aliases=("output_dir",))
    score: str = option(
        "exact", "exact (match), module:function of answers and rows, or likelihood: the model's own, nats a token"
    )
    rounds: int = option(5, "rounds", low=1)
    prompts: int = option(64, "prompts of a round", low=1, high=10**6, group="Answers")
    samples: int = option(8, "answers to each", low=1, high=10**6, group="Answers")
    temperature: float = option(1.0, "of them", above=0, high=100, group="Answers")
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this mass", above=0, high=1, group="Answers")
    max_tokens: int = option(64, "longest answer", low=1, group="Answers")
    stop: tuple[str, ...] = option((), "texts that end an answer, commas between", group="Answers")
    least: float | None = option(
        None, "score below which the best answer to a prompt is not learned; 1 of exact, none of others",
        group="Answers",
    )  # fmt: skip
    at_once: int = option(64, "answers written at once", low=1, high=10**5, group="Answers")
    timeout: float = option(
        600.0, "seconds that scoring a round may take; 0: no limit; a call into a library that never returns to "
        "Python is not interrupted", low=0, group="Answers",
    )  # fmt: skip
    val_fraction: float = option(0.2, "share of the rows that decide", above=0, below=1, group="Answers")
    epochs: float = option(2.0, "passes over the kept answers", above=0, group="Learning")
    learning_rate: float = option(1e-4, "peak learning rate", above=0, group="Learning")
    batch_size: int = option(8, "rows in a step", low=1, high=10**6, group="Learning")
    lora_rank: int = option(
        0, "learn an adapter of this rank and merge it; 0: all weights", low=0, high=4096, group="Learning"
    )
    seed: int = option(1337, "seed of every random draw", low=0)
    dtype: str = option("auto", "precision of the products", choices=("auto", "float32", "bfloat16"), group="Machine")
    device: str = option("auto", "where to run", choices=DEVICES, group="Machine")
    compile: bool = option(True, "compile (eager where no C++ compiler is found)", group="Machine")
    override: bool = option(False, "go on with other flags or another text than the rounds before")
