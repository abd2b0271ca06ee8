"""What `evolve` measures candidates on: text that is read, or questions that are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import evolve_flags
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution, key_of, own_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.strategy import Candidates
    from functional_lm.text.corpus import Corpus
    from functional_lm.tree import Tree


class Task(NamedTuple):
    """How candidates are measured, and one tree alone on what was held out (NaN where nothing was)."""

    measure: Callable[[Candidates, int], Tensor]
    held_out: Callable[[Tree], float]
    tokens: int  # that a member reads and writes in a generation


def task_of(options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path) -> Task:
    from functional_lm.evolution import task

    rows = task.is_rows(found)
    if evolve_flags.answers(options):
        if not rows:
            raise DataError(f"--fitness {options.fitness} scores answers; --data {options.data} has no rows of prompt "
                            "and response")  # fmt: skip
        return _answered(options, evolution, found)
    return _read(options, evolution, found, out, rows)


def _read(options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path, rows: bool) -> Task:
    """Loss, bits or accuracy of text, or of the responses in rows."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import population, task
    from functional_lm.model.compute import compute_copy

    model, device, size = evolution.model, torch.device(options.device), options.batch_size
    dtype = getattr(torch, options.dtype)
    if rows:
        asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, 1)
        width = task.longest(asked, model.tokenizer)
        batch: Callable[[int], Any] = lambda number: task.read(  # noqa: E731
            asked, task.drawn(asked, number, size, options.seed), model.tokenizer, width, device
        )
        held = [
            task.read(asked, asked.validation[at : at + size], model.tokenizer, width, device)
            for at in range(0, len(asked.validation), size)
        ][: options.eval_batches]
    else:
        width = options.block_size or model.config.max_len
        if width > model.config.max_len:
            raise UsageError(f"--block_size {width} is longer than the model's max_len {model.config.max_len}")
        text = task.text(found, model, out, options.val_fraction, size, width, options.seed, device)
        batch, held = text.batch, text.held_out(options.eval_batches)
    tokens = size * width
    objective = task.objective_of(options.fitness, model)
    evaluate = population.evaluator(
        evolution.strategy, evolution.space, objective, dtype, chunk_of(options, evolution, tokens), _wrap(options)
    )
    alone = compiled(
        lambda params, batch: objective(compute_copy(params, dtype), batch),
        enabled=options.compile and options.eval_every > 0,
    )

    def held_out(leaves: Tree) -> float:
        whole = evolution.space.whole(evolution.space.base, leaves)
        with torch.no_grad():
            return task.mean([alone(whole, one) for one in held])

    return Task(lambda candidates, number: evaluate(candidates, batch(number)), held_out, tokens)


def _answered(options: EvolveFlags, evolution: Evolution, found: Corpus) -> Task:
    """The scores of generated answers."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evolution import answers, task
    from functional_lm.evolution.strategy import Candidates, unmoved

    model, device = evolution.model, torch.device(options.device)
    score, dtype = answers.named(options.fitness), getattr(torch, options.dtype)
    asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, options.max_tokens)
    tokens = options.batch_size * (asked.length + options.max_tokens)
    how = answers.Answering(
        options.max_tokens, asked.stops, options.temperature, chunk_of(options, evolution, tokens), options.compile
    )
    answerer = _answerer(options)
    answer = answerer(evolution.strategy, evolution.space, model.config, how, dtype)
    draws = keys.fold_in_name(key_of(options), "answers")

    def scored(found: Tensor, rows: list[Any]) -> Tensor:
        members = answers.texts(found, model.tokenizer, asked.stops, options.stop)
        with answers.limited(options.timeout, f"the fitness {options.fitness} of a generation"):
            return answers.scored(members, rows, score, options.fitness)

    def measure(candidates: Candidates, number: int) -> Tensor:
        rows = task.drawn(asked, number, options.batch_size, options.seed)
        return scored(answer(candidates, task.prompts(asked, rows, device), keys.fold_in(draws, number)), rows)

    single = unmoved()
    eager = dataclasses.replace(how, compile=False, chunk=None)
    alone = answerer(single, evolution.space, model.config, eager, dtype)

    def held_out(leaves: Tree) -> float:
        rows = asked.validation[: options.eval_batches * options.batch_size]
        if not rows:
            return float("nan")
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], leaves))
        return float(scored(alone(one, task.prompts(asked, rows, device), draws), rows)[0])

    return Task(measure, held_out, tokens)


def _answerer(options: EvolveFlags) -> Callable[..., Any]:
    """What writes the answers: models that differ, or one model whose settings differ."""
    from functional_lm import sampling_settings
    from functional_lm.evolution import answers, decoding

    if options.space != "decode":
        return answers.answerer
    assert options.model is not None
    began = sampling_settings.resolved(None, options.model)
    return partial(decoding.answerer, settings=began, names=options.settings)


def _wrap(options: EvolveFlags) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    from functional_lm.compile import compiled

    return lambda function: compiled(function, enabled=options.compile)


def chunk_of(options: EvolveFlags, evolution: Evolution, tokens: int) -> int:
    """Members at once, from the flag or from memory."""
    import torch

    from functional_lm.evolution import population

    if options.chunk_size != "auto":
        return int(options.chunk_size)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    own = 4 * (own_numbers(options, evolution.space.start) + evolution.space.makes)
    each = population.member_bytes(evolution.model.config, tokens, own, dtype)
    return population.automatic_chunk(options.population, each, tokens, population.free_memory(device))
