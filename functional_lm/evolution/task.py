"""What evolution is measured on: minibatches that all members see, fitness of candidates, and of one model held out.

Two kinds of data: text, whose windows are the batches that training would see, and rows of `prompt` and `response`,
which members answer (or, for loss and accuracy, are read). A generation's batch is a pure function of its number.

Axes: B rows, T tokens of a row, N prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from functional_lm import keys
from functional_lm.errors import DataError, UsageError
from functional_lm.evolution import answers, fitness
from functional_lm.evolution.answers import Row
from functional_lm.folder import Model
from functional_lm.model.transformer import IGNORED
from functional_lm.text import chat, dataset, prepare, readers, rows, supervised
from functional_lm.text.corpus import Corpus
from functional_lm.text.tokenizer import Tokenizer

Tensors = dict[str, Tensor]


class Text(NamedTuple):
    """Batches of windows."""

    batch: Callable[[int], Tensors]
    held_out: Callable[[int], list[Tensors]]  # up to so many batches
    digest: str


class Questions(NamedTuple):
    """Rows to be answered."""

    train: list[Row]
    validation: list[Row]
    length: int  # of the longest prompt, tokens
    encode: Callable[[Row], list[int]]
    stops: tuple[int, ...]
    digest: str


def with_bytes(arrays: dataset.Batch, tokenizer: Tokenizer, device: torch.device) -> Tensors:
    """The batch as tensors, and how many bytes its targets are."""
    targets = arrays["targets"]
    size = int(tokenizer.byte_lengths[targets[targets != IGNORED]].sum())
    tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in ("tokens", "targets")}
    return {**tensors, "bytes": torch.tensor(size, device=device)}


def text(
    found: Corpus, model: Model, out: Path, val_fraction: float, rows: int, block: int, seed: int, device: torch.device
) -> Text:
    """Windows of a text. Raises DataError for one that is too short."""
    data, _ = prepare.dataset_of(found, out / "data" / "text", model.tokenizer)
    train, validation = dataset.split(data, val_fraction, seed)
    dataset.windows_per_epoch(train, block)  # refuses a text shorter than one row

    def tensors(arrays: dataset.Batch) -> Tensors:
        return with_bytes(arrays, model.tokenizer, device)

    def held_out(count: int) -> list[Tensors]:
        if len(validation) < 2:
            return []
        return [tensors(arrays) for arrays in itertools.islice(dataset.windows(validation, block, rows), count)]

    return Text(lambda number: tensors(dataset.batch(train, number, rows, block, seed)), held_out, data.digest)


# Rows of prompt and response ------------------------------------------------------------------------------------------


def is_rows(found: Corpus) -> bool:
    """Whether the first row of the data has a prompt and a response."""
    try:
        row, _ = next(iter(readers.rows(found.files[0])), ({}, ""))
    except DataError:
        return False
    return {"prompt", "response"} <= row.keys()


def questions(found: Corpus, model: Model, val_fraction: float, seed: int, as_chat: bool, answer: int) -> Questions:
    """The rows, split by a key. Raises DataError for a row without prompt or response, or one that is too long."""
    tokenizer, longest = model.tokenizer, model.config.max_len

    def encode(row: Row) -> list[int]:
        if as_chat:
            return chat.prompt(tokenizer, [chat.turn("user", str(row["prompt"]))])
        return [tokenizer.bos_id, *tokenizer.encode(str(row["prompt"]))]

    made: list[Row] = []
    length = 0
    for path in found.files:
        for row, where in readers.rows(path):
            if not {"prompt", "response"} <= row.keys():
                raise DataError(f"{where}: no 'prompt' with 'response' among {sorted(row)}")
            rows.document({name: row[name] for name in ("prompt", "response")}, where)  # refuses what is no text
            size = len(encode(row))
            if size + answer > longest:
                raise DataError(
                    f"{where}: a prompt of {size} tokens and an answer of {answer} exceed the model's max_len {longest}"
                )
            length = max(length, size)
            made.append(row)
    if not made:
        raise DataError(f"no rows in {found.source!r}")
    order = keys.permutation(keys.fold_in_name(keys.key(seed), "questions"), len(made)).tolist()
    cut = max(1, len(made) - round(len(made) * val_fraction))
    stops = chat.stops(tokenizer) if as_chat else (tokenizer.eos_id,)
    digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()
    return Questions([made[i] for i in order[:cut]], [made[i] for i in order[cut:]], length, encode, stops, digest)


def drawn(asked: Questions, number: int, count: int, seed: int) -> list[Row]:
    """The rows of a generation; `count` of them whatever there is (an epoch begins anew)."""
    chosen = supervised.drawn(len(asked.train), number, count, seed)
    return [asked.train[i] for i in chosen.tolist()]


def prompts(asked: Questions, rows: Sequence[Row], device: torch.device) -> answers.Prompts:
    return answers.padded([asked.encode(row) for row in rows], asked.length, device)


def read(asked: Questions, rows: Sequence[Row], tokenizer: Tokenizer, width: int, device: torch.device) -> Tensors:
    """Prompts with their responses as a batch of `width` columns; the responses and the end after them are targets."""
    tokens = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORED, np.int64)
    for number, row in enumerate(rows):
        prompt = asked.encode(row)
        whole = [*prompt, *tokenizer.encode(str(row["response"])), asked.stops[0]][: width + 1]
        tokens[number, : len(whole) - 1] = whole[:-1]
        targets[number, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return with_bytes({"tokens": tokens, "targets": targets}, tokenizer, device)


def longest(asked: Questions, tokenizer: Tokenizer) -> int:
    """Columns that the longest prompt and response need."""
    every = [*asked.train, *asked.validation]
    return max(len(asked.encode(row)) + len(tokenizer.encode(str(row["response"]))) for row in every)


def objective_of(name: str, model: Model) -> fitness.Objective:
    if name not in fitness.OBJECTIVES:
        raise UsageError(f"there is no fitness {name!r}; there are {', '.join(fitness.OBJECTIVES)}")
    return fitness.objective(name, model.config)


def mean(values: Sequence[Any]) -> float:
    """The mean of 0-d tensors or numbers; NaN without any."""
    return float(np.mean([float(value) for value in values])) if values else float("nan")
