"""The flags that `generate` and `chat` share: which model writes, how it draws, where it runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.options import REQUIRED, option

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class DecodingFlags:
    """A model and the machine that it writes on; a draw's settings are the model's own where nothing is given."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    adapter: str | None = option(None, "adapter folder (PEFT's form) to merge into the model")
    any_base: bool = option(False, "use an adapter that was trained on another base all the same")
    temperature: float | None = option(
        None, "0: always the likeliest token; the model's own (generation_config.json), or 0.8", low=0, group="Sampling"
    )
    top_k: int | None = option(
        None, "draw from the k likeliest tokens; the model's own, or 0, which is off", low=0, group="Sampling"
    )
    top_p: float | None = option(
        None, "draw from the likeliest tokens that hold this mass; the model's own, or 1", above=0, high=1,
        group="Sampling",
    )  # fmt: skip
    dtype: str = option("auto", "precision of weights and cache", choices=DTYPES, group="Machine")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), group="Machine")
    compile: bool = option(True, "compile prefill and decoding (eager where no C++ compiler is found)", group="Machine")
