"""`generate --prompts FILE`: many prompts through the engine at once, a line of JSON for each."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, sampling_settings
from functional_lm import options as checking
from functional_lm.errors import DataError, UsageError

if TYPE_CHECKING:
    from functional_lm.generate import GenerateFlags
    from functional_lm.inference.requests import Request
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.writer import Opened

OWN = ("max_tokens", *sampling_settings.USUAL, "seed", "stop")  # of a row


def read(path: str, options: GenerateFlags) -> list[tuple[dict[str, Any], GenerateFlags]]:
    """The rows of a file, each with its settings: those of the command and, over them, its own.

    A line of a `.jsonl` file is a text or an object with `prompt` and any of `OWN`; another `id` is handed on. Of any
    other file each line is a prompt. Raises DataError for a file that is missing or no text, UsageError naming the line
    for what cannot be meant.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(f"cannot read {path}: {why}; check the path, or convert it") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _object(line, f"{path} line {number}") if path.endswith(".jsonl") else {"prompt": line}
            rows.append((row, _settings(row, options, f"{path} line {number}")))
    if not rows:
        raise UsageError(f"{path} holds no prompt")
    return rows


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {str(error)[:100]}") from None
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UsageError(f"{place} is no text and no object with a prompt")
    if extra := row.keys() - {"prompt", "id", *OWN}:
        raise UsageError(f"{place}: {min(extra)!r} is not known; there are prompt, id, {', '.join(OWN)}")
    return row


def _settings(row: dict[str, Any], options: GenerateFlags, place: str) -> GenerateFlags:
    own = {name: row[name] for name in OWN if name in row}
    if "stop" in own:
        stops = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"{place}: stop is {own['stop']!r}; it has to be a text or a list of them")
        own["stop"] = tuple(stops)
    made = dataclasses.replace(options, **own)
    try:
        checking.check(made)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    return made


def asked(row: dict[str, Any], how: GenerateFlags, tokenizer: Tokenizer) -> Request:
    """What a row asks of the engine."""
    from functional_lm.inference.requests import Request

    return Request(
        tuple(tokenizer.encode(row["prompt"])) or (tokenizer.bos_id,),
        how.max_tokens,
        **{name: getattr(how, name) for name in sampling_settings.USUAL},
        seed=how.seed,
        stop_ids=(tokenizer.eos_id,),
        rolls=True,
    )


def run(options: GenerateFlags, path: str, opened: Opened) -> None:
    """Print a line of JSON for each row, in the order of the file; what it took goes to stderr."""
    rows = read(path, options)
    started, said = time.perf_counter(), 0
    for row in answers(rows, options.slots, opened, options.guesses):
        print(json.dumps(row, ensure_ascii=False), flush=True)
        said += row["tokens"]
    seconds = time.perf_counter() - started
    console.note(f"{len(rows)} prompts, {said} tokens, {console.count(said / seconds)} tokens/s, compiling included")


def answers(
    rows: list[tuple[dict[str, Any], GenerateFlags]], slots: int, opened: Opened, guesses: int = 0
) -> Iterator[dict[str, Any]]:
    """Each row with its `text`, `tokens` and `finish_reason`."""
    from functional_lm import writer
    from functional_lm.serving.answer import Answer

    requests = [asked(row, how, opened.tokenizer) for row, how in rows]
    with writer.engine(opened, requests, min(slots, len(rows)), guesses) as engine:
        handles = [engine.submit(request) for request in requests]
        for (row, how), handle in zip(rows, handles):
            answer = Answer(handle, opened.tokenizer, how.stop)
            text = "".join(answer)
            yield {**row, "text": text, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
