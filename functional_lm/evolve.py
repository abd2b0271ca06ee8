"""`python -m functional_lm evolve`: a population of models or adapters, any fitness, and the winner as a folder.

Parse, wire, print; the mathematics is in `evolution/`. torch is imported when the work begins.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import (
    console,
    disk,
    evolve_checks,
    evolve_flags,
    evolve_memory,
    evolve_override,
    evolve_replay,
    run_folder,
    training_flags,
)
from functional_lm import evolve_start as start
from functional_lm.cli import Command, main_single
from functional_lm.errors import UsageError
from functional_lm.evolution import ranks
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_result import finish
from functional_lm.evolve_search import Evolution, evolution_of
from functional_lm.evolve_task import Task, task_of
from functional_lm.run_saving import finishing, unwritten

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.loop import Outcome, Plan
    from functional_lm.evolution.population import Share
    from functional_lm.evolution.ranks import Group
    from functional_lm.evolution.strategy import Candidates
    from functional_lm.text.corpus import Corpus
    from functional_lm.training.record import Values


def run(options: EvolveFlags) -> int:
    """The whole job; returns the exit code. Wrong flags and bad data are refused before anything is written."""
    with ranks.joined(options.device, options.rank_timeout) as group:
        evolve_checks.check(options)
        if options.action == "replay":
            return evolve_replay.replay(options) if group.first else 0
        from functional_lm.text import corpus

        out = Path(options.out)
        found = group.in_turn("find", lambda: corpus.find(str(options.data)))
        if group.count > 1 and options.strategy == "pbt":
            raise UsageError(
                "--strategy pbt goes on with the weights of its members, which ranks do not exchange; start it without "
                "torchrun, or choose another strategy"
            )
        if not group.first:
            return _evolve(training_flags.on_this_machine(options), found, out, group)
        if options.overwrite:
            read = [("model", options.model), ("adapter", options.adapter), *(("data", path) for path in found.files)]
            read += [("base", options.base), *(("models", path) for path in options.models)]
            run_folder.check_overwrite(out, read)
        with run_folder.held(out):
            return _evolve(training_flags.on_this_machine(options), found, out, group)


def _evolve(options: EvolveFlags, found: Corpus, out: Path, group: Group) -> int:
    """The run, in a folder that is its own. What is on the disk rank 0 reads and writes first."""
    from functional_lm.evolution import loop

    started = time.perf_counter()
    journal, changes = group.in_turn("open", lambda: start.opened(options, out, group.first))
    evolution = evolution_of(options)
    group.in_turn("kernels", lambda: start.open_kernels(options))

    def divide(tokens: int) -> Share:
        return start.share(options, evolution, None if changes else journal, tokens, group)

    task = group.in_turn("data", lambda: task_of(options, evolution, found, out, divide))
    with evolve_memory.room(options, task.share.size):
        if journal is None:
            state = start.first_state(options, evolution, evolution.strategy)
        else:
            start.check_base(journal, evolution, evolve_flags.origin(options))
            changes += start.check_data(options, journal, task)
            start.say_changes(options, journal, task)
            strategies = evolve_override.strategies(options, evolution, journal)
            state = loop.resumed(
                strategies, start.first_state(options, evolution, strategies(0)), journal, out, task.advance
            )
            state = evolution.strategy.renewed(state)
            console.say(f"going on with {out} from generation {int(state.generation)}")
        group.check_same(start.facts(options, evolution, task, state))
        if journal is None or changes:
            journal = start.noted(options, evolution, task, journal, out, group)
        console.say(_intention(options, evolution, task, group))
        outcome = _run(options, evolution, task, state, journal, out, group)
    if outcome.ended == "interrupted":
        console.say(f"stopped after generation {int(outcome.state.generation)}; the same command goes on from there")
        raise KeyboardInterrupt
    if group.first:
        run_folder.settle(out)  # where there was nothing to measure
        with disk.never_made(out), finishing():
            finish(options, evolution, task, outcome, out, started)
    return 0


# The run and its end --------------------------------------------------------------------------------------------------


def _plan(options: EvolveFlags) -> Plan:
    from functional_lm.evolution.loop import Plan

    seconds = None if options.minutes is None else 60 * options.minutes
    return Plan(
        options.generations, options.evaluations, seconds, options.target, options.save_every, options.eval_every,
        options.keep,
    )  # fmt: skip


def _intention(options: EvolveFlags, evolution: Evolution, task: Task, group: Group) -> str:
    import torch

    from functional_lm import tree

    threads = f" with {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    each = f" on each of {group.count} ranks" if group.count > 1 else ""
    return (
        f"{options.strategy} over {console.count(tree.size(evolution.space.start))} numbers of "
        f"{console.count(tree.size(evolution.model.params))} ({options.space}), {options.population} members, "
        f"{task.share.size} at once{each}, {task.tokens} tokens each, {options.dtype} on {options.device}{threads}"
    )


def _run(
    options: EvolveFlags, evolution: Evolution, task: Task, state: Any, journal: Journal, out: Path, group: Group
) -> Outcome:
    from functional_lm.evolution import loop
    from functional_lm.training.record import Recorder

    first, compiles = int(state.generation), options.compile

    def advance(state: Any, number: int) -> Any:
        if number != first or not options.compile or options.strategy != "pbt":
            return task.advance(state, number)
        with console.announced("compiling the population's training"):
            return task.advance(state, number)

    def measure(candidates: Candidates, number: int) -> Tensor:
        nonlocal compiles
        if not compiles:
            return task.placed(group.together(task.measure(candidates, number)), candidates)
        compiles, alone = False, options.space not in evolve_flags.TRAINING or options.strategy == "pbt"
        with console.announced(f"compiling the population's {'' if alone else 'training and '}evaluation"):
            return task.placed(group.together(task.measure(candidates, number)), candidates)

    def agree(ended: str | None) -> str | None:
        """Rank 0 decides; a signal that came to any of them ends all."""
        codes = [code for (code,) in group.exchanged([1 + loop.ENDINGS.index(ended) if ended else 0])]
        interrupted = 1 + loop.ENDINGS.index("interrupted")
        code = codes[0] or (interrupted if interrupted in codes else 0)
        return loop.ENDINGS[code - 1] if code else None

    def validate(state: Any) -> Mapping[str, float]:
        return {"val_fitness": task.held_out(state.centre)}

    strategy, plan = evolution.strategy, _plan(options)
    if not group.first:
        hooks = loop.Hooks(measure, lambda *values: None, agree=agree, hurry=group.hurry)
        return loop.run(strategy, state, journal, plan, hooks, None)
    with disk.never_made(out), unwritten("the generation was not written"), Recorder(out, first) as recorder:

        def record(number: int, values: Values) -> None:
            recorder.metrics(number, values)
            recorder.sync()
            run_folder.settle(out)  # a fitness may fail until it has measured a generation

        hooks = loop.Hooks(measure, record, validate, advance, task.describe, agree, group.hurry)
        return loop.run(strategy, state, journal, plan, hooks, out)


COMMAND = Command(
    "evolve",
    "evolve a model or an adapter by any fitness",
    EvolveFlags,
    run,
    positional=("action", "journal"),
    details=(
        "examples:\n"
        "  evolve --model runs/train --data text.txt --strategy eggroll --population 64\n"
        "  evolve --model runs/train --data questions.jsonl --fitness exact --max_tokens 8\n"
        "  evolve --space merge --models runs/a,runs/b --data text.txt --strategy cma-es --sigma 0.2\n"
        "  evolve replay runs/evolve/journal.jsonl --out rebuilt"
    ),
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.evolve"))
