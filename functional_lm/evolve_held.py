"""How members that train are measured: on the first half of what is held out, and in the end on the other half.

Each half is batches that are read, or rows that are answered.

Axes: P members, N rows, M tokens of an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolve_asked import Asked
    from functional_lm.evolve_task import Source
    from functional_lm.folder import Model
    from functional_lm.tree import Tree


def halves(held: list[Any]) -> tuple[list[Any], list[Any]]:
    """Of one batch the first half is all."""
    middle = max(1, len(held) // 2)
    return held[:middle], held[middle:]


def deciding(options: EvolveFlags, model: Model, source: Source, size: int) -> Callable[[Tree], Tensor]:
    """`params [P, ...] -> fitness [P]`: `size` models of this architecture at once, on the first half."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import population, spaces, task
    from functional_lm.evolution.strategy import Candidates, unmoved
    from functional_lm.model.transformer import abstract

    first, _ = halves(source.held)
    if source.asked is not None:
        return _answering(options, model, source.asked, size, first, options.compile)
    evaluate = population.evaluator(
        unmoved(size),
        spaces.full(abstract(model.config)),
        task.objective_of(options.fitness, model),
        getattr(torch, options.dtype),
        wrap=lambda function: compiled(function, enabled=options.compile),
    )
    return lambda params: torch.stack([evaluate(Candidates({}, {}, params), batch) for batch in first]).mean(0)


def judging(options: EvolveFlags, model: Model, source: Source) -> Callable[[Tree], float]:
    """`params -> fitness` of one model, on the other half; NaN where there is none."""
    from functional_lm import tree
    from functional_lm.evolve_task import alone_on

    _, other = halves(source.held)
    if source.asked is None:
        return alone_on(options, model, other)
    if not other:
        return lambda params: float("nan")
    measure = _answering(options, model, source.asked, 1, other, False)
    return lambda params: float(measure(tree.map(lambda leaf: leaf[None], params)))


def _answering(
    options: EvolveFlags, model: Model, asked: Asked, size: int, held: list[list[Any]], compile: bool
) -> Callable[[Tree], Tensor]:
    """The score of the answers of `size` models to all of these rows, written batch by batch."""
    import torch

    from functional_lm import keys
    from functional_lm.evolution import answers, spaces, task
    from functional_lm.evolution.strategy import Candidates, unmoved
    from functional_lm.model.transformer import abstract

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    how, longest = dataclasses.replace(asked.how, compile=compile), max(map(len, held))
    answer = answers.answerer(unmoved(size), spaces.full(abstract(model.config)), model.config, how, dtype)

    def written(params: Tree, rows: list[Any], number: int) -> Tensor:
        filled = [*rows, *rows[-1:] * (longest - len(rows))]  # one shape, one graph
        prompts = task.prompts(asked.rows, filled, device)
        return answer(Candidates({}, {}, params), prompts, keys.fold_in(asked.draws, number))[:, : len(rows)]

    def measure(params: Tree) -> Tensor:
        tokens = torch.cat([written(params, rows, number) for number, rows in enumerate(held)], 1)
        return asked.score(tokens, [row for rows in held for row in rows]).to(device)

    return measure
