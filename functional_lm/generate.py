"""`python -m functional_lm.generate`: continue a text with a trained model."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Any

from functional_lm import console
from functional_lm.cli import Command, main_single
from functional_lm.decoding_flags import DecodingFlags
from functional_lm.errors import UsageError
from functional_lm.options import option


@dataclass(frozen=True)
class GenerateFlags(DecodingFlags):
    """Flags of `generate`."""

    prompt: str = option("", "text to go on from; empty: the beginning of a document")
    prompts: str | None = option(
        None, "file of prompts instead (.jsonl: rows with a prompt and settings of their own; else a prompt a line)"
    )
    slots: int = option(8, "with --prompts: texts that are written at once", low=1, high=1024)
    max_tokens: int = option(200, "longest continuation", low=1, aliases=("max_new_tokens",))
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
    guesses: int = option(
        0, "read so many tokens ahead where a text repeats itself: the same text, in a context shorter by as many",
        low=0, high=64, group="Machine",
    )  # fmt: skip


def run(options: GenerateFlags) -> int:
    """Print the prompt and its continuation (a line of JSON for each of many); what it took goes to stderr."""
    from functional_lm import batch, sampling_settings, writer
    from functional_lm.inference.requests import Request
    from functional_lm.serving.answer import Answer

    settings: dict[str, Any] = sampling_settings.resolved(options, options.model)
    if options.prompts is not None:
        if options.prompt:
            raise UsageError("give either --prompt or --prompts")
        resolved = dataclasses.replace(options, **settings)
        batch.read(options.prompts, resolved)  # what is wrong there is said before a model is loaded
        batch.run(resolved, options.prompts, writer.opened(options))
        return 0
    model = writer.opened(options)
    prompt = tuple(model.tokenizer.encode(options.prompt)) or (model.tokenizer.bos_id,)
    stop_ids = (model.tokenizer.eos_id,)
    request = Request(prompt, options.max_tokens, seed=options.seed, stop_ids=stop_ids, rolls=True, **settings)
    with writer.engine(model, [request], guesses=options.guesses) as engine:
        started, pieces = time.perf_counter(), [options.prompt]
        if options.stream:
            print(options.prompt, end="", flush=True)
        answer = Answer(engine.submit(request), model.tokenizer, options.stop)
        for piece in answer:
            pieces.append(piece)
            if options.stream:
                print(piece, end="", flush=True)
        print() if options.stream else print("".join(pieces))
        speed = console.count(answer.tokens / (time.perf_counter() - started))
        console.note(f"{answer.tokens} tokens, {speed} tokens/s")
    return 0


COMMAND = Command("generate", "continue a text with a trained model", GenerateFlags, run)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.generate"))
