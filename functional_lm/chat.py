"""`python -m functional_lm chat`: talk to a fine-tuned model in the terminal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from functional_lm import console, sampling_settings
from functional_lm.cli import Command, main_single
from functional_lm.decoding_flags import DecodingFlags
from functional_lm.options import option


@dataclass(frozen=True)
class ChatFlags(DecodingFlags):
    """Flags of `chat`."""

    system: str | None = option(None, "what the model is told before the conversation")
    max_tokens: int = option(200, "longest answer", low=1, aliases=("max_new_tokens",))
    seed: int = option(0, "seed of the draws", low=0, group="Sampling")


def run(options: ChatFlags) -> int:
    """Read turns from standard input, a line each, and stream the answers until its end (Ctrl-D).

    A conversation that outgrows the model's context forgets its oldest exchanges, and says so.
    """
    from functional_lm import writer
    from functional_lm.inference.requests import Request
    from functional_lm.serving.answer import Answer
    from functional_lm.text import chat, conversations

    settings: dict[str, Any] = sampling_settings.resolved(options, options.model)
    model = writer.opened(options)
    tokenizer, config = model.tokenizer, model.config
    conversations.require_markers(tokenizer, options.model)
    how = Request(
        (tokenizer.bos_id,),
        options.max_tokens,
        seed=options.seed,
        stop_ids=chat.stops(tokenizer),
        rolls=True,
        **settings,
    )
    turns = [chat.turn("system", options.system)] if options.system else []
    room = max(config.max_len - options.max_tokens, config.max_len // 2)
    with writer.engine(model, [how], others=True) as engine:
        for said in _lines():
            try:
                kept = chat.latest(tokenizer, [*turns, chat.turn("user", said)], room)
            except ValueError as error:
                console.note(f"{error}, which a context of {config.max_len} leaves beside an answer; say less")
                continue
            if len(kept) < len(turns) + 1:
                console.note("the conversation is longer than the model's context: its beginning is forgotten")
            prompt = tuple(chat.prompt(tokenizer, kept))
            request = dataclasses.replace(how, prompt=prompt, seed=how.seed + len(turns))
            answer = []
            for piece in Answer(engine.submit(request), tokenizer):
                answer.append(piece)
                print(piece, end="", flush=True)
            print(flush=True)
            turns = [*kept, chat.turn("assistant", "".join(answer))]
    return 0


def _lines() -> Iterator[str]:
    """What a person types, line by line, until the end of standard input."""
    asks = "user: " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(asks)
        except EOFError:
            print()
            return
        if said.strip():
            yield said


COMMAND = Command("chat", "talk to a fine-tuned model in the terminal (Ctrl-D ends)", ChatFlags, run)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.chat"))
