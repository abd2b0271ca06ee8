"""What `evolve` measures candidates on: text that is read, or questions that are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    """Of several figures, those of text that is read and those of answers are each measured together."""
    from functional_lm.evolution import task

    rows, names = task.is_rows(found), evolve_flags.figures(options)
    answered = tuple(filter(evolve_flags.answers, names))
    read = tuple(name for name in names if name not in answered)
    if answered and not rows:
        raise DataError(f"--fitness {answered[0]} scores answers; --data {options.data} has no rows of prompt "
                        "and response")  # fmt: skip
    tasks = [_read(options, evolution, found, out, rows, read)] if read else []
    tasks += [_answered(options, evolution, found, answered)] if answered else []
    made = tasks[0] if len(tasks) == 1 else _together(tasks, [read, answered], names)
    turns = evolve_flags.batches(options)
    return made._replace(measure=lambda candidates, number: made.measure(candidates, number % turns)) if turns else made


def _together(tasks: list[Task], groups: list[tuple[str, ...]], names: tuple[str, ...]) -> Task:
    """Tasks that measure groups of figures as one that measures them in the order of `names`."""
    import torch

    places = {name: place for place, name in enumerate(name for group in groups for name in group)}
    order = [places[name] for name in names]

    def measure(candidates: Candidates, number: int) -> Tensor:
        found = [one.measure(candidates, number) for one in tasks]
        columns = torch.cat([one.view(one.shape[0], -1).cpu() for one in found], 1)
        return columns[:, order]

    first = tasks[0] if names[0] in groups[0] else tasks[1]
    return Task(measure, first.held_out, sum(one.tokens for one in tasks))


def _read(
    options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path, rows: bool, names: tuple[str, ...]
) -> Task:
    """Loss, bits or accuracy of text, or of the responses in rows."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import fitness, population, task
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
    objective, *others = (task.objective_of(name, model) for name in names)
    measured = fitness.several([objective, *others]) if others else objective
    evaluate = population.evaluator(
        evolution.strategy, evolution.space, measured, dtype, chunk_of(options, evolution, tokens), _wrap(options)
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


def _answered(options: EvolveFlags, evolution: Evolution, found: Corpus, names: tuple[str, ...]) -> Task:
    """The scores of generated answers."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evolution import answers, task
    from functional_lm.evolution.strategy import Candidates, unmoved

    model, device = evolution.model, torch.device(options.device)
    scores, dtype = {name: answers.named(name) for name in names}, getattr(torch, options.dtype)
    asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, options.max_tokens)
    tokens = options.batch_size * (asked.length + options.max_tokens)
    how = answers.Answering(
        options.max_tokens, asked.stops, options.temperature, chunk_of(options, evolution, tokens), options.compile
    )
    answer = answers.answerer(evolution.strategy, evolution.space, model.config, how, dtype)
    draws = keys.fold_in_name(key_of(options), "answers")

    def scored(found: Tensor, rows: list[Any]) -> Tensor:
        members = answers.texts(found, model.tokenizer, asked.stops, options.stop)
        with answers.limited(options.timeout, f"the fitness {','.join(names)} of a generation"):
            columns = [answers.scored(members, rows, score, name) for name, score in scores.items()]
        return torch.stack(columns, 1) if len(columns) > 1 else columns[0]

    def measure(candidates: Candidates, number: int) -> Tensor:
        rows = task.drawn(asked, number, options.batch_size, options.seed)
        return scored(answer(candidates, task.prompts(asked, rows, device), keys.fold_in(draws, number)), rows)

    single = unmoved()
    eager = dataclasses.replace(how, compile=False, chunk=None)
    alone = answers.answerer(single, evolution.space, model.config, eager, dtype)

    def held_out(leaves: Tree) -> float:
        rows = asked.validation[: options.eval_batches * options.batch_size]
        if not rows:
            return float("nan")
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], leaves))
        return float(scored(alone(one, task.prompts(asked, rows, device), draws), rows).view(-1)[0])

    return Task(measure, held_out, tokens)


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
    own = 4 * own_numbers(options, evolution.space.start)
    each = population.member_bytes(evolution.model.config, tokens, own, dtype)
    return population.automatic_chunk(options.population, each, tokens, population.free_memory(device))
