"""What `evolve` measures candidates on: text that is read, or questions that are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import evolve_flags, surroundings
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution, key_of

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.population import Share
    from functional_lm.evolution.strategy import Candidates
    from functional_lm.folder import Model
    from functional_lm.text.corpus import Corpus
    from functional_lm.tree import Tree


def unchanged(state: Any, number: int) -> Any:
    return state


def nothing(state: Any) -> Mapping[str, list[float]]:
    return {}


def as_they_are(leaves: Tree) -> Any:
    return leaves


def in_place(values: Tensor, candidates: Candidates) -> Tensor:
    return values


class Task(NamedTuple):
    """How candidates are measured, and one tree alone on what was held out (NaN where nothing was)."""

    measure: Callable[[Candidates, int], Tensor]
    held_out: Callable[[Tree], float]
    tokens: int  # that a member reads and writes in a generation
    share: Share  # of the population that `measure` measures
    digest: str  # of the data
    advance: Callable[[Any, int], Any] = unchanged  # what a generation does to the state before it is measured
    describe: Callable[[Any], Mapping[str, list[float]]] = nothing  # more of it for the records
    whole: Callable[[Tree], Any] = as_they_are  # of evolved leaves: what is written
    placed: Callable[[Tensor, Candidates], Tensor] = in_place  # what all ranks measured, end to end, by member


class Source(NamedTuple):
    """Text, or the responses in rows, as batches."""

    batch: Callable[[int], Any]
    held: list[Any]
    tokens: int  # of a batch
    digest: str


Divide = Callable[[int], "Share"]  # given the tokens of a member


def task_of(options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path, divide: Divide) -> Task:
    """Of several figures, those of text that is read and those of answers are each measured together."""
    from functional_lm.evolution import task

    rows, names = task.is_rows(found), evolve_flags.figures(options)
    answered = tuple(filter(evolve_flags.answers, names))
    read = tuple(name for name in names if name not in answered)
    if answered and not rows:
        raise DataError(f"--fitness {answered[0]} scores answers; --data {options.data} has no rows of prompt "
                        "and response")  # fmt: skip
    first = [_answered(options, evolution, found, answered, divide)] if answered else []
    if not read:
        return _in_turns(options, first[0])
    source = _source(options, evolution.model, found, out, rows)
    if options.space in evolve_flags.TRAINING:
        return _trained(options, evolution, source, divide)
    alike = (lambda tokens: first[0].share) if first else divide
    tasks = [*first, _read(options, evolution, source, read, alike)]
    return _in_turns(options, tasks[0] if len(tasks) == 1 else _together(tasks, [answered, read], names))


def _trained(options: EvolveFlags, evolution: Evolution, source: Source, divide: Divide) -> Task:
    """Raises UsageError where nothing is held out."""
    from functional_lm import evolve_hyper, evolve_trained

    if not source.held:
        raise UsageError(
            f"--space {options.space} measures on what is held out, which is less than a row; give more text, or a "
            f"larger --val_fraction than {options.val_fraction:g}"
        )
    if options.strategy == "pbt":
        return evolve_hyper.task_of(options, evolution, source, divide)
    return evolve_trained.task_of(options, evolution, source, source.tokens // options.batch_size, divide)


def _in_turns(options: EvolveFlags, made: Task) -> Task:
    """On minibatches that come again, if they are not without end."""
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
    return first._replace(measure=measure, tokens=sum(one.tokens for one in tasks))


def _source(options: EvolveFlags, model: Model, found: Corpus, out: Path, rows: bool) -> Source:
    import torch

    from functional_lm.evolution import task

    device, size = torch.device(options.device), options.batch_size
    count = options.eval_batches * (2 if options.space in evolve_flags.TRAINING else 1)  # half of them are its fitness
    if not rows:
        width = options.block_size or model.config.max_len
        if width > model.config.max_len:
            raise UsageError(f"--block_size {width} is longer than the model's max_len {model.config.max_len}")
        text = task.text(found, model, out, options.val_fraction, size, width, options.seed, device)
        return Source(text.batch, text.held_out(count), size * width, text.digest)
    asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, 1)
    width = task.longest(asked, model.tokenizer)

    def batch(number: int) -> Any:
        return task.read(asked, task.drawn(asked, number, size, options.seed), model.tokenizer, width, device)

    held = [
        task.read(asked, asked.validation[at : at + size], model.tokenizer, width, device)
        for at in range(0, len(asked.validation), size)
    ][:count]
    return Source(batch, held, size * width, asked.digest)


def _read(options: EvolveFlags, evolution: Evolution, source: Source, names: tuple[str, ...], divide: Divide) -> Task:
    """Loss, bits or accuracy of text, or of the responses in rows."""
    import torch

    from functional_lm.evolution import fitness, population, task

    objective, *others = (task.objective_of(name, evolution.model) for name in names)
    measured = fitness.several([objective, *others]) if others else objective
    part, dtype = divide(source.tokens), getattr(torch, options.dtype)
    evaluate = population.evaluator(
        evolution.strategy,
        evolution.space,
        measured,
        dtype,
        part.size,
        _wrap(options),
        part,
        surroundings.with_kernels(options),
    )
    return Task(
        lambda candidates, number: evaluate(candidates, source.batch(number)),
        alone_on(options, evolution, source.held),
        source.tokens,
        part,
        source.digest,
    )


def alone_on(options: EvolveFlags, evolution: Evolution, held: Sequence[Any]) -> Callable[[Tree], float]:
    """The mean fitness of one tree over these batches; NaN without any."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import task
    from functional_lm.model.compute import compute_copy

    objective = task.objective_of(next(filter(_is_read, evolve_flags.figures(options))), evolution.model)
    dtype = getattr(torch, options.dtype)
    alone = compiled(
        lambda params, batch: objective(compute_copy(params, dtype), batch),
        enabled=options.compile and options.eval_every > 0,
    )

    def held_out(leaves: Tree) -> float:
        whole = evolution.space.whole(evolution.space.base, leaves)
        with torch.no_grad():
            return task.mean([alone(whole, one) for one in held])

    return held_out


def _answered(
    options: EvolveFlags, evolution: Evolution, found: Corpus, names: tuple[str, ...], divide: Divide
) -> Task:
    """The scores of generated answers."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evolution import answers, task
    from functional_lm.evolution.strategy import Candidates, unmoved

    model, device = evolution.model, torch.device(options.device)
    scores, dtype = {name: answers.named(name) for name in names}, getattr(torch, options.dtype)
    asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, options.max_tokens)
    tokens = options.batch_size * (asked.length + options.max_tokens)
    part = divide(tokens)
    with_kernels = surroundings.with_kernels(options)
    how = answers.Answering(
        options.max_tokens, asked.stops, options.temperature, part.size, options.compile, part, with_kernels
    )
    answerer = _answerer(options)
    answer = answerer(evolution.strategy, evolution.space, model.config, how, dtype)
    draws = keys.fold_in_name(key_of(options), "answers")

    def scored(found: Tensor, rows: list[Any]) -> Tensor:
        members = answers.texts(found, model.tokenizer, asked.stops, options.stop)

        def columns() -> list[Tensor]:
            return [answers.scored(members, rows, score, name) for name, score in scores.items()]

        made = answers.limited(options.timeout, f"the fitness {','.join(names)} of a generation", columns)
        return torch.stack(made, 1) if len(made) > 1 else made[0]

    def measure(candidates: Candidates, number: int) -> Tensor:
        rows = task.drawn(asked, number, options.batch_size, options.seed)
        return scored(answer(candidates, task.prompts(asked, rows, device), keys.fold_in(draws, number)), rows)

    single = unmoved()
    eager = dataclasses.replace(how, compile=False, chunk=None, part=None, with_kernels=False)
    alone = answerer(single, evolution.space, model.config, eager, dtype)

    def held_out(leaves: Tree) -> float:
        rows = asked.validation[: options.eval_batches * options.batch_size]
        if not rows:
            return float("nan")
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], leaves))
        return float(scored(alone(one, task.prompts(asked, rows, device), draws), rows).view(-1)[0])

    return Task(measure, held_out, tokens, part, asked.digest)


def _is_read(name: str) -> bool:
    return not evolve_flags.answers(name)


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
