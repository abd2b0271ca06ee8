"""What `evolve` measures candidates on: text that is read, or questions that are answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import evolve_flags, surroundings
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_asked import Asked, asked_of, questions_of
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution

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
    held: list[Any]  # batches of what is not trained on
    tokens: int  # of a batch
    digest: str
    asked: Asked | None = None  # what is held out is answered: then it is lists of rows


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
    if options.space in evolve_flags.TRAINING:
        return _trained(options, evolution, _source(options, evolution.model, found, out, rows, answered), divide)
    first = [_answered(options, evolution, found, answered, divide)] if answered else []
    if not read:
        return _in_turns(options, first[0])
    source = _source(options, evolution.model, found, out, rows)
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


def _source(
    options: EvolveFlags, model: Model, found: Corpus, out: Path, rows: bool, answered: tuple[str, ...] = ()
) -> Source:
    """Batches of a text or of rows; those held out are to be answered where figures of answers are named."""
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
    scored = asked_of(options, model, found, answered) if answered else None
    asked = scored.rows if scored else questions_of(options, model, found, 1)
    width = task.longest(asked, model.tokenizer)

    def read(chosen: Sequence[Any]) -> Any:
        return task.read(asked, chosen, model.tokenizer, width, device)

    held = [asked.validation[at : at + size] for at in range(0, len(asked.validation), size)][:count]
    return Source(
        lambda number: read(task.drawn(asked, number, size, options.seed)),
        held if scored else [read(part) for part in held],
        size * width,
        asked.digest,
        scored,
    )


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
        _alone(options, evolution, source.held),
        source.tokens,
        part,
        source.digest,
    )


def alone_on(options: EvolveFlags, model: Model, held: Sequence[Any]) -> Callable[[Tree], float]:
    """The mean fitness of one model's parameters over these batches; NaN without any."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import task
    from functional_lm.model.compute import compute_copy

    objective = task.objective_of(next(filter(_is_read, evolve_flags.figures(options))), model)
    dtype = getattr(torch, options.dtype)
    alone = compiled(
        lambda params, batch: objective(compute_copy(params, dtype), batch),
        enabled=options.compile and options.eval_every > 0,
    )

    def mean(params: Tree) -> float:
        with torch.no_grad():
            return task.mean([alone(params, one) for one in held])

    return mean


def _alone(options: EvolveFlags, evolution: Evolution, held: Sequence[Any]) -> Callable[[Tree], float]:
    """The same of evolved leaves."""
    mean = alone_on(options, evolution.model, held)
    return lambda leaves: mean(evolution.space.whole(evolution.space.base, leaves))


def _answered(
    options: EvolveFlags, evolution: Evolution, found: Corpus, names: tuple[str, ...], divide: Divide
) -> Task:
    """The scores of generated answers."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evolution import task
    from functional_lm.evolution.strategy import Candidates, unmoved

    model, device, dtype = evolution.model, torch.device(options.device), getattr(torch, options.dtype)
    questions, how, draws, score = asked_of(options, model, found, names)
    tokens = options.batch_size * (questions.length + options.max_tokens)
    part, answerer = divide(tokens), _answerer(options)
    together = dataclasses.replace(
        how, chunk=part.size, compile=options.compile, part=part, with_kernels=surroundings.with_kernels(options)
    )
    answer = answerer(evolution.strategy, evolution.space, model.config, together, dtype)

    def measure(candidates: Candidates, number: int) -> Tensor:
        rows = task.drawn(questions, number, options.batch_size, options.seed)
        return score(answer(candidates, task.prompts(questions, rows, device), keys.fold_in(draws, number)), rows)

    alone = answerer(unmoved(), evolution.space, model.config, how, dtype)

    def held_out(leaves: Tree) -> float:
        rows = questions.validation[: options.eval_batches * options.batch_size]
        if not rows:
            return float("nan")
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], leaves))
        return float(score(alone(one, task.prompts(questions, rows, device), draws), rows).view(-1)[0])

    return Task(measure, held_out, tokens, part, questions.digest)


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
