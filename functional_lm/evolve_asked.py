"""Answers as what `evolve` measures: the rows that are answered, and what answers to them are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from functional_lm.evolution.answers import Answering
    from functional_lm.evolution.task import Questions
    from functional_lm.folder import Model
    from functional_lm.text.corpus import Corpus


class Asked(NamedTuple):
    """Questions, how they are answered (eagerly, by all members at once), and what answers are worth."""

    rows: Questions
    how: Answering
    draws: Tensor  # the key of what answers draw
    score: Callable[[Tensor, list[Any]], Tensor]  # tokens [P, N, M] and their N rows -> fitness [P], or [P, figures]


def questions_of(options: EvolveFlags, model: Model, found: Corpus, answer: int) -> Questions:
    """Rows of which each leaves room for so long an answer. Raises DataError."""
    from functional_lm.evolution import task

    return task.questions(found, model, options.val_fraction, options.seed, options.chat, answer)


def asked_of(options: EvolveFlags, model: Model, found: Corpus, names: tuple[str, ...]) -> Asked:
    """Raises UsageError for a function that is not there, DataError for rows that cannot be answered."""
    import torch

    from functional_lm import keys
    from functional_lm.evolution import answers

    scores = {name: answers.named(name) for name in names}
    rows = questions_of(options, model, found, options.max_tokens)

    def score(written: Tensor, asked: list[Any]) -> Tensor:
        members = answers.texts(written, model.tokenizer, rows.stops, options.stop)

        def columns() -> list[Tensor]:
            return [answers.scored(members, asked, function, name) for name, function in scores.items()]

        made = answers.limited(options.timeout, f"the fitness {','.join(names)} of a generation", columns)
        return torch.stack(made, 1) if len(made) > 1 else made[0]

    how = answers.Answering(options.max_tokens, rows.stops, options.temperature)
    return Asked(rows, how, keys.fold_in_name(key_of(options), "answers"), score)
