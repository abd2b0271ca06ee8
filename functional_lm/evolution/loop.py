"""The loop around a strategy: ask, measure, tell, write down. The clock, the terminal and signals are met here.

A generation is on the disk before the next one begins, so that a stopped run loses nothing but the one it was at. Its
line of metrics comes before that of the journal: one too many is dropped when the run goes on, one too few would be
missing for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from functional_lm import console, files, seal, tree
from functional_lm.errors import DataError
from functional_lm.evolution import journal as journals
from functional_lm.evolution import strategy as common
from functional_lm.evolution.journal import Journal
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.training import checkpoint as checkpoints
from functional_lm.training.loop import compilers_end_with_us, stopping_by_signal
from functional_lm.training.record import Values
from functional_lm.training.saving import Verified

NOTES, FORMAT = "state.json", 1
ENDINGS = ("generations", "evaluations", "minutes", "target", "interrupted")
LOST = 5  # generations in a row without one finite fitness that end the run


@dataclass(frozen=True)
class Plan:
    """How far and how often; counted in generations, 0 for never."""

    generations: int
    evaluations: int | None = None
    seconds: float | None = None
    target: float | None = None
    save_every: int = 10
    eval_every: int = 0
    keep: int = 2


class Hooks(NamedTuple):
    """What the loop asks of the world outside."""

    measure: Callable[[Candidates, int], Tensor]  # the fitness [P] of candidates on a minibatch
    record: Callable[[int, Values], None]
    validate: Callable[[Any], Mapping[str, float]] = lambda state: {}
    advance: Callable[[Any, int], Any] = lambda state, number: state  # what a generation does before it is measured
    describe: Callable[[Any], Mapping[str, list[float]]] = lambda state: {}  # more of a measured state for the records
    agree: Callable[[str | None], str | None] = lambda ended: ended  # why the run ends here, whoever sees it
    hurry: Callable[[], None] = lambda: None  # what else the signal does that ends the run after the generation


@dataclass
class Outcome:
    """What the loop ended with."""

    state: Any
    journal: Journal
    ended: str = "generations"  # one of ENDINGS
    seconds: float = 0.0
    whole: Verified = field(default_factory=lambda: Verified(reason))  # the checkpoints that are


def told(strategy: Strategy, state: Any, entry: Mapping[str, Any]) -> Any:
    """The state after a generation of a journal. Raises DataError for one that this state did not ask."""
    key = common.generation_key(state)
    if key.tolist() != entry["key"] or int(state.generation) != entry["generation"]:
        raise DataError(f"generation {entry['generation']} of the journal was drawn from another key")
    fitness = torch.tensor(journals.fitness_of(entry), device=key.device)
    if fitness.shape != common.shape_of_fitness(strategy):
        raise DataError(f"generation {entry['generation']} of the journal has {len(fitness)} members")
    # A product of transposed tensors rounds otherwise than that of the ones that a checkpoint brings back.
    return tree.map(lambda leaf: leaf.contiguous(), strategy.tell(state, fitness))


def run(strategy: Strategy, state: Any, journal: Journal, plan: Plan, hooks: Hooks, out: Path | None) -> Outcome:
    """Evolve to the end of the plan. Ctrl-C or SIGTERM ends after the generation; the state is on the disk.

    Without an `out` nothing is written: another process does.

    Raises DataError when no member of `LOST` generations in a row had a finite fitness.
    """
    before = journal.generations[-1]["seconds"] if journal.generations else 0.0
    outcome, started, lost = Outcome(state, journal, seconds=before), time.perf_counter(), 0
    total = plan.generations
    with (
        stopping_by_signal(hooks.hurry) as stopping,
        tqdm(total=total, initial=int(state.generation), unit=" generations", dynamic_ncols=True, disable=None) as bar,
    ):
        while True:
            number = int(outcome.state.generation)
            outcome.seconds = before + time.perf_counter() - started
            ending = _ending(plan, strategy, outcome, number) or ("interrupted" if stopping() else None)
            if ended := hooks.agree(ending):
                outcome.ended = ended
                break
            began = time.perf_counter()
            with compilers_end_with_us(stopping):
                measured = hooks.advance(outcome.state, number)
                fitness = hooks.measure(strategy.ask(measured), strategy.batch(measured)).float().cpu()
            if fitness.shape != (shape := common.shape_of_fitness(strategy)):
                raise DataError(f"the fitness has the shape {tuple(fitness.shape)}, not {shape}")
            fitness = torch.where(torch.isfinite(fitness), fitness, math.nan)
            seconds = before + time.perf_counter() - started
            entry = journals.entry(number, common.generation_key(outcome.state).tolist(), fitness.tolist(), seconds)
            outcome.state = told(strategy, measured, entry)
            lost = 0 if torch.isfinite(first_figure(fitness)).any() else lost + 1
            values = _values(strategy, outcome.state, fitness, time.perf_counter() - began)
            if plan.eval_every and (number + 1) % plan.eval_every == 0:
                values |= hooks.validate(outcome.state)
            hooks.record(number + 1, {**values, **hooks.describe(measured)})
            outcome.journal = (journals.append if out else journals.remembered)(outcome.journal, entry)
            bar.set_postfix_str(_shown(values), refresh=False)
            bar.update()
            if lost == LOST:
                raise DataError(
                    f"no member of {LOST} generations in a row had a finite fitness; give a smaller --sigma, "
                    "or look at what the fitness returns"
                )
            if out and plan.save_every and (number + 1) % plan.save_every == 0:
                save(out, outcome, plan.keep)
        if out:
            save(out, outcome, plan.keep)
    return outcome


def _ending(plan: Plan, strategy: Strategy, outcome: Outcome, number: int) -> str | None:
    if number >= plan.generations:
        return "generations"
    if plan.evaluations is not None and (number + 1) * strategy.population > plan.evaluations:
        return "evaluations"
    if plan.seconds is not None and outcome.seconds >= plan.seconds:
        return "minutes"
    if plan.target is not None and float(outcome.state.best_fitness) >= plan.target:
        return "target"
    return None


def _values(strategy: Strategy, state: Any, fitness: Tensor, seconds: float) -> dict[str, float]:
    """A line of metrics; best, mean and spread are this generation's, over its finite members, of the first figure."""
    fitness = first_figure(fitness)
    known = fitness[torch.isfinite(fitness)].double()
    number = int(state.generation)
    return {
        "generation": number,
        "evaluations": number * strategy.population,
        "fitness_best": float(known.max()) if len(known) else math.nan,
        "fitness_mean": float(known.mean()) if len(known) else math.nan,
        "fitness_std": float(known.std(correction=0)) if len(known) else math.nan,
        "fitness_best_so_far": float(state.best_fitness),
        "not_finite": len(fitness) - len(known),
        "evaluations_per_second": strategy.population / seconds,
        **strategy.told(state),
    }


def first_figure(fitness: Tensor) -> Tensor:
    """The fitness [P] of members of several figures: the first one, where all of them are finite."""
    if fitness.dim() == 1:
        return fitness
    return torch.where(torch.isfinite(fitness).all(1), fitness[:, 0], math.nan)


def _shown(values: Mapping[str, float]) -> str:
    return (
        f"best {values['fitness_best']:.4f}, mean {values['fitness_mean']:.4f} ± {values['fitness_std']:.4f}, "
        f"{console.count(values['evaluations_per_second'])} evaluations/s"
    )


# States on the disk ---------------------------------------------------------------------------------------------------


def save(out: Path, outcome: Outcome, keep: int) -> Path:
    """The state as a sealed checkpoint, with the journal's length, so that the two are not mixed up.

    A whole one of the same generation is this one, a damaged one is kept under another name; all but the newest `keep`
    whole ones go.
    """
    number = int(outcome.state.generation)
    path = out / "checkpoints" / checkpoints.name(number)
    if not outcome.whole(path):
        if path.exists():
            files.replace(path, checkpoints.aside(path))
        with files.writing_folder(path) as temporary:
            tree.save(outcome.state, temporary / "state.safetensors")
            notes = {"kind": "evolution", "generation": number, "length": outcome.journal.length}
            seal.seal(temporary, NOTES, FORMAT, notes)
        outcome.whole.add(path)
    checkpoints.prune(out / "checkpoints", keep, outcome.whole)
    return path


def reason(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, None if it can. Raises `seal.LaterFormat` for a later version's."""
    return seal.reason(path, NOTES, FORMAT)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named, and kept."""
    path, damaged = checkpoints.newest_whole(out / "checkpoints", reason)
    for entry in damaged:
        console.say(f"passing over a damaged checkpoint, which is kept: {entry.reason}")
    return path


def resumed(
    strategies: Callable[[int], Strategy],
    state: Any,
    journal: Journal,
    out: Path,
    advance: Callable[[Any, int], Any] = lambda state, number: state,
) -> Any:
    """The state to go on with: that of the newest whole checkpoint, and the journal's generations behind it told again.

    Without a checkpoint all of them are, to `state`. Raises DataError for a journal that ends before its checkpoint.
    """
    path = newest(out)
    if path is not None:
        number = seal.read(path, NOTES, FORMAT)["generation"]
        if number > len(journal.generations):
            raise DataError(
                f"{journal.path} ends with generation {len(journal.generations)} and {path} stands at {number}; "
                f"remove {path} to go on from the journal"
            )
        flat = tree.flatten(tree.load(path / "state.safetensors", state.key.device))
        # Copies, because products round by how their operands are aligned, and a file's tensors lie anywhere.
        state = tree.copy(tree.restore(state, flat, str(path)))
    return retold(strategies, state, journal, advance)


def retold(
    strategies: Callable[[int], Strategy], state: Any, journal: Journal, advance: Callable[[Any, int], Any]
) -> Any:
    """The state after the generations of a journal that it has not been told, each by the strategy of its time."""
    for number, entry in enumerate(journal.generations[int(state.generation) :], int(state.generation)):
        strategy = strategies(number)
        state = told(strategy, advance(strategy.renewed(state), number), entry)
    return state
