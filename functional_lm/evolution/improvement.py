"""A model that learns from the best of its own answers: what a round is made of. Best-of-K sampling and fine-tuning,
as in expert iteration and rejection sampling (arXiv 2308.01825, section 3.3).

Axes: N answers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import keys
from functional_lm.evolution import answers, decoding, task
from functional_lm.evolution.answers import Answering, Row
from functional_lm.evolution.task import Questions
from functional_lm.model import transformer
from functional_lm.model.compute import decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree


class Answer(NamedTuple):
    """One of several answers to a prompt."""

    row: Row
    text: str
    score: float


Write = Callable[[Tree, Sequence[Row], Tensor], list[str]]


def writing(
    asked: Questions, config: ModelConfig, tokenizer: Tokenizer, how: Answering, dtype: torch.dtype, device: Any,
    settings: Mapping[str, float], at_once: int, stop_texts: Sequence[str] = (),
) -> Write:  # fmt: skip
    """`(params, rows, key) -> texts`, one for each row, `at_once` of them in one call: one graph whatever the rows are.

    Chunk c's draws come from the key folded with c.
    """
    write = decoding.writer(config, how, dtype, settings)

    def texts(params: Tree, rows: Sequence[Row], key: Tensor) -> list[str]:
        frozen, none = decoding_copy(params, dtype), {"settings": torch.zeros(1, 0, device=device)}
        found: list[str] = []
        for number, start in enumerate(range(0, len(rows), at_once)):
            part = list(rows[start : start + at_once])
            filled = part + [part[-1]] * (at_once - len(part))
            with torch.no_grad():
                tokens = write(frozen, none, task.prompts(asked, filled, device), keys.fold_in(key, number))
            found += answers.texts(tokens, tokenizer, asked.stops, stop_texts)[0][: len(part)]
        return found

    return texts


def likelihoods(params: Tree, batch: Mapping[str, Tensor], config: ModelConfig) -> Float[Tensor, "N"]:
    """The mean log-likelihood of each row's targets, nats: the sum divided by how many they are."""
    logits = transformer.forward(params, batch["tokens"], config)
    targets = batch["targets"]
    there = targets != transformer.IGNORED
    likely = torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(there, likely, 0.0).sum(-1) / there.sum(-1).clamp(min=1)


def best(given: Sequence[Answer], each: int, least: float | None) -> list[Answer]:
    """Of every `each` answers to one prompt the first of the best, where it has at least the score `least`.

    What is not finite is never the best, and of nothing written there is nothing to learn.
    """
    chosen = []
    for start in range(0, len(given), each):
        finite = [one for one in given[start : start + each] if math.isfinite(one.score) and one.text.strip()]
        if finite:
            first = max(finite, key=lambda answer: answer.score)
            chosen += [first] if least is None or first.score >= least else []
    return chosen
