"""How `improve` asks a model, and how it scores what is said. torch is imported when the work begins."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm.errors import DataError
from functional_lm.improve_flags import ImproveFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from functional_lm.evolution.answers import Row
    from functional_lm.evolution.improvement import Write
    from functional_lm.evolution.task import Questions
    from functional_lm.folder import Model
    from functional_lm.tree import Tree

LIKELIHOOD = "likelihood"


class Asker(NamedTuple):
    """What measures and asks a model, whichever one it is."""

    asked: Questions
    sample: Write  # as the flags say
    greedy: Write
    rate: Callable[[Tree, Sequence[Row], Sequence[str]], list[float]]  # (params, rows, answers) -> scores
    held_out: Callable[[Tree], float]


def asker_of(options: ImproveFlags, model: Model, found: Any) -> Asker:
    """Raises DataError for rows that cannot be used, UsageError for a score that cannot be meant."""
    import torch

    from functional_lm import keys, sampling_settings
    from functional_lm.compile import compiled
    from functional_lm.evolution import answers, fitness, improvement, task
    from functional_lm.model.compute import compute_copy

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    asked = task.questions(found, model, options.val_fraction, options.seed, True, options.max_tokens)
    if not asked.validation:
        raise DataError(f"--val_fraction {options.val_fraction} of {len(asked.train)} rows is none: nothing decides")
    own = options.score == LIKELIHOOD
    score = None if own else answers.named(options.score)
    how = answers.Answering(options.max_tokens, asked.stops, compile=options.compile)

    def writing(temperature: float, top_p: float) -> Write:
        settings = {**sampling_settings.USUAL, "temperature": temperature, "top_p": top_p}
        return improvement.writing(
            asked, model.config, model.tokenizer, how, dtype, device, settings, options.at_once, options.stop
        )

    config = fitness.vmappable(model.config)
    likely = compiled(
        lambda params, batch: improvement.likelihoods(compute_copy(params, dtype), batch, config),
        enabled=options.compile,
    )
    width = asked.length + options.max_tokens
    width = min(max(width, task.longest(asked, model.tokenizer)), model.config.max_len)

    def own_likelihood(params: Tree, rows: Sequence[Row]) -> Tensor:
        made = []
        for start in range(0, len(rows), options.at_once):
            part = list(rows[start : start + options.at_once])
            filled = part + [part[-1]] * (options.at_once - len(part))
            batch = task.read(asked, filled, model.tokenizer, width, device)
            with torch.no_grad():
                made.append(likely(params, {name: batch[name] for name in ("tokens", "targets")})[: len(part)].cpu())
        return torch.cat(made)

    def rate(params: Tree, rows: Sequence[Row], texts: Sequence[str]) -> list[float]:
        if score is None:
            said = [{**row, "response": text} for row, text in zip(rows, texts)]
            values: list[float] = own_likelihood(params, said).tolist()
            return values
        work = partial(answers.values_of, texts, rows, score, options.score)
        return answers.limited(options.timeout, f"the score {options.score} of a round", work)

    greedy = writing(0.0, 1.0)

    def held_out(params: Tree) -> float:
        rows = asked.validation
        if own:  # of the rows' responses: confidence in its own words would rise by itself
            return float(own_likelihood(params, rows).double().mean())
        return float(task.mean(rate(params, rows, greedy(params, rows, keys.key(0, options.device)))))

    return Asker(asked, writing(options.temperature, options.top_p), greedy, rate, held_out)
