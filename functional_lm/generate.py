"""`python -m functional_lm.generate`: continue a text with a trained model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console
from functional_lm.cli import Command, main_single
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option

if TYPE_CHECKING:
    from functional_lm.chat import ChatFlags
    from functional_lm.model.config import ModelConfig
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.tree import Tree

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class GenerateFlags:
    """Flags of `generate`."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    adapter: str | None = option(None, "adapter folder (PEFT's form) to merge into the model")
    any_base: bool = option(False, "use an adapter that was trained on another base all the same")
    prompt: str = option("", "text to go on from; empty: the beginning of a document")
    prompts: str | None = option(
        None, "file of prompts instead (.jsonl: rows with a prompt and settings of their own; else a prompt a line)"
    )
    slots: int = option(8, "with --prompts: texts that are written at once", low=1, high=1024)
    max_tokens: int = option(200, "longest continuation", low=1, aliases=("max_new_tokens",))
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
    min_p: float | None = option(
        None, "draw from tokens at least so likely, as a share of the likeliest; the model's own, or 0", low=0, high=1,
        group="Sampling",
    )  # fmt: skip
    repetition_penalty: float | None = option(
        None, "divides the logits of tokens seen before; the model's own, or 1", above=0, group="Sampling"
    )
    presence_penalty: float | None = option(
        None, "taken from the logits of tokens written before; the model's own, or 0", low=-2, high=2, group="Sampling"
    )
    frequency_penalty: float | None = option(
        None, "the same for every time that it was; the model's own, or 0", low=-2, high=2, group="Sampling"
    )
    seed: int = option(0, "seed of the draws", low=0, group="Sampling")
    stop: tuple[str, ...] = option((), "texts that end it, commas between; none of them is printed", group="Sampling")
    stream: bool = option(True, "print as it is written")
    dtype: str = option("auto", "precision of weights and cache", choices=DTYPES, group="Machine")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), group="Machine")
    compile: bool = option(True, "compile prefill and decoding (eager where no C++ compiler is found)", group="Machine")


class Opened(NamedTuple):
    """What the flags name, ready to write: a compute copy with its adapter merged, and whether to compile."""

    weights: Tree
    config: ModelConfig
    tokenizer: Tokenizer
    compile: bool


def opened(options: GenerateFlags | ChatFlags) -> Opened:
    """The model, its adapter and the machine that the flags name."""
    from functional_lm import compile as compiling
    from functional_lm import folder, kernels
    from functional_lm.interop.peft import load_adapter
    from functional_lm.model import lora, quantize
    from functional_lm.model.compute import decoding_copy

    device = compiling.resolve_device(options.device)
    dtype = compiling.resolve_dtype(options.dtype, device)
    params, config, tokenizer = folder.load(options.model, device, quantized=True)
    if options.adapter is not None:
        add = lora.attach if quantize.is_quantized(params) else lora.merge
        params = add(params, load_adapter(options.adapter, params, options.any_base, device))
    obstacle = compiling.obstacle(device) if options.compile else None
    if obstacle:
        console.note(f"running without compilation: {obstacle}")
    compile = options.compile and obstacle is None
    copy = kernels.prepared(decoding_copy(params, dtype), wanted=compile and device.type == "cpu")
    return Opened(copy, config, tokenizer, compile)


def run(options: GenerateFlags) -> int:
    """Print the prompt and its continuation (a line of JSON for each of many); what it took goes to stderr."""
    from functional_lm import batch, sampling_settings
    from functional_lm.inference import text
    from functional_lm.inference.generate import GenerateOptions, decoder, generate

    settings: dict[str, Any] = sampling_settings.resolved(options, options.model)
    if options.prompts is not None:
        if options.prompt:
            raise UsageError("give either --prompt or --prompts")
        resolved = dataclasses.replace(options, **settings)
        batch.read(options.prompts, resolved)  # what is wrong there is said before a model is loaded
        batch.run(resolved, options.prompts, opened(options))
        return 0
    weights, config, tokenizer, compile = opened(options)
    prompt = tokenizer.encode(options.prompt) or [tokenizer.bos_id]
    how = GenerateOptions(options.max_tokens, seed=options.seed, stop_ids=(tokenizer.eos_id,), **settings)
    run = decoder(config, compile, how.truncates)
    if compile:
        with console.announced("compiling", file=sys.stderr):
            list(generate(weights, prompt, run, dataclasses.replace(how, max_tokens=2)))
    started, count = time.perf_counter(), 0
    pieces = [options.prompt]
    if options.stream:
        print(options.prompt, end="", flush=True)

    def counted() -> Iterator[str]:
        nonlocal count
        for piece in text.stream(weights, run, tokenizer, prompt, how):
            count += 1
            yield piece

    for piece in text.until(counted(), options.stop):
        pieces.append(piece)
        if options.stream:
            print(piece, end="", flush=True)
    print() if options.stream else print("".join(pieces))
    console.note(f"{count} tokens, {console.count(count / (time.perf_counter() - started))} tokens/s")
    return 0


COMMAND = Command("generate", "continue a text with a trained model", GenerateFlags, run)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.generate"))
