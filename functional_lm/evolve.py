"""`python -m functional_lm evolve`: a population of models or adapters, any fitness, and the winner as a folder.

Parse, wire, print; the mathematics is in `evolution/`. torch is imported when the work begins.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, disk, evolve_checks, evolve_flags, evolve_override, files, run_folder
from functional_lm import evolve_surroundings as surroundings
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.evolution import ranks
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_result import finish, usual_choice
from functional_lm.evolve_search import Evolution, evolution_of, key_of
from functional_lm.evolve_task import Task, chunk_of, task_of
from functional_lm.run_saving import finishing, unwritten

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.loop import Outcome, Plan
    from functional_lm.evolution.population import Share
    from functional_lm.evolution.ranks import Group
    from functional_lm.evolution.strategy import Candidates, Strategy
    from functional_lm.text.corpus import Corpus
    from functional_lm.training.record import Values
    from functional_lm.tree import Tree


def run(options: EvolveFlags) -> int:
    """The whole job; returns the exit code. Wrong flags and bad data are refused before anything is written."""
    with ranks.joined(options.device, options.rank_timeout) as group:
        evolve_checks.check(options)
        if options.action == "replay":
            return _replay(options) if group.first else 0
        from functional_lm.text import corpus

        out = Path(options.out)
        found = group.in_turn("find", lambda: corpus.find(str(options.data)))
        if group.count > 1 and options.strategy == "pbt":
            raise UsageError(
                "--strategy pbt goes on with the weights of its members, which ranks do not exchange; start it without "
                "torchrun, or choose another strategy"
            )
        if not group.first:
            return _evolve(_on_this_machine(options), found, out, group)
        if options.overwrite:
            read = [("model", options.model), ("adapter", options.adapter), *(("data", path) for path in found.files)]
            read += [("base", options.base), *(("models", path) for path in options.models)]
            run_folder.check_overwrite(out, read)
        with run_folder.held(out):
            return _evolve(_on_this_machine(options), found, out, group)


def _evolve(options: EvolveFlags, found: Corpus, out: Path, group: Group) -> int:
    """The run, in a folder that is its own. What is on the disk rank 0 reads and writes first."""
    from functional_lm.evolution import loop

    started = time.perf_counter()
    journal, changes = group.in_turn("open", lambda: _opened(options, out, group.first))
    evolution = evolution_of(options)

    def divide(tokens: int) -> Share:
        return _share(options, evolution, None if changes else journal, tokens, group)

    task = group.in_turn("data", lambda: task_of(options, evolution, found, out, divide))
    with surroundings.room(options, task.share.size):
        if journal is None:
            state = _start(options, evolution, evolution.strategy)
        else:
            _check_base(journal, evolution, evolve_flags.origin(options))
            changes += _check_data(options, journal, task)
            _say_changes(options, journal, task)
            strategies = evolve_override.strategies(options, evolution, journal)
            state = loop.resumed(strategies, _start(options, evolution, strategies(0)), journal, out, task.advance)
            state = evolution.strategy.renewed(state)
            console.say(f"going on with {out} from generation {int(state.generation)}")
        group.check_same(_facts(options, evolution, task, state))
        if journal is None or changes:
            journal = _noted(options, evolution, task, journal, out, group)
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


def _start(options: EvolveFlags, evolution: Evolution, strategy: Strategy) -> Any:
    """The state before the first generation."""
    from functional_lm import keys

    return strategy.init(keys.fold_in_name(key_of(options), "evolution"), evolution.space.start)


# Before any work ------------------------------------------------------------------------------------------------------


def _on_this_machine(options: EvolveFlags) -> EvolveFlags:
    from functional_lm import compile as compiling

    device = compiling.resolve_device(options.device)
    dtype = str(compiling.resolve_dtype(options.dtype, device)).removeprefix("torch.")
    obstacle = compiling.obstacle(device) if options.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    return dataclasses.replace(options, device=str(device), dtype=dtype, compile=options.compile and obstacle is None)


def _opened(options: EvolveFlags, out: Path, writes: bool) -> tuple[Journal | None, list[str]]:
    """The journal to go on with, None for a new run, and what makes it another one.

    Raises UsageError where `out` holds something else.
    """
    journal = _journal(options, out)
    changes = evolve_override.changes(options, journal, out) if journal else []
    if writes:
        run_folder.make(out, options.overwrite)
    return journal, changes


def _journal(options: EvolveFlags, out: Path) -> Journal | None:
    from functional_lm.evolution import journal as journals

    path = out / journals.NAME
    if options.overwrite:
        return None
    run_folder.check_free(out, "evolution")
    if not (path.exists() or run_folder.holds_model(out)):
        return None
    if options.resume == "never" or not path.exists():
        raise UsageError(f"{out} already holds a run; choose another --out, or --overwrite it")
    journal = journals.read(path)
    if not (journal.generations or journal.end):
        return None  # nothing was measured: it may begin as another one
    if journal.cut:
        console.say(f"the last line of {path} was cut off; its generation is measured again")
    return journal


def _check_base(journal: Journal, evolution: Evolution, path: str) -> None:
    if journal.header["digest"] != evolution.digest:
        raise DataError(
            f"{journal.path} began with another model ({journal.header['digest'][:12]}) than the one in {path} "
            f"({evolution.digest[:12]})"
        )


def _share(options: EvolveFlags, evolution: Evolution, journal: Journal | None, tokens: int, group: Group) -> Share:
    """What this rank measures. Chunks are as large as the flag says, or as they were, or as memory and ranks allow."""
    from functional_lm.evolution import population

    if options.space in evolve_flags.TRAINING:
        from functional_lm import evolve_trained

        size = evolve_trained.chunk_of(options, evolution.model, group.count)
    else:
        size = chunk_of(options, evolution, tokens)
    if options.chunk_size == "auto":
        size = journal.header["chunk"] if journal else min(size, max(1, options.population // group.count))
    return population.share(options.population, size, group.rank, group.count)


def _facts(options: EvolveFlags, evolution: Evolution, task: Task, state: Any) -> dict[str, str]:
    """What has to be the same for every rank. `state` says that all of them read the journal of one folder."""
    from functional_lm import tree

    machine = surroundings.machine(options)
    return {
        "version of torch": machine.pop("torch"),
        "kind of processor, or number of threads,": f"{options.compile} {machine}",
        "set of flags": f"{dataclasses.astuple(options)}",
        "model": evolution.digest,
        "text": task.digest,
        "function of fitness": f"{surroundings.functions(options)}",
        "chunk size": f"{task.share.size}",
        "state (does it see another --out?)": f"{int(state.generation)} {tree.digest(state.centre)}",
    }


def _check_data(options: EvolveFlags, journal: Journal, task: Task) -> list[str]:
    """Raise DataError for another text, which `--override` takes where nothing is trained on it."""
    if journal.header.get("data", task.digest) == task.digest:
        return []
    if evolve_override.obstacle("data", options):
        raise DataError(f"{journal.path} began with another text: the one in --data has changed; --overwrite the run")
    changes = ["the text has changed"]
    run_folder.agree(f"{journal.path} began with another text", changes, options.override, kind=DataError)
    return changes


def _say_changes(options: EvolveFlags, journal: Journal, task: Task) -> None:
    """What may change the last bits of a run that goes on."""
    now = {**surroundings.machine(options), "chunk": task.share.size}
    if changes := surroundings.differences(now, journal.header):
        console.say(f"the run began with {'; '.join(changes)}: the last bits of its numbers may differ")


def _noted(
    options: EvolveFlags, evolution: Evolution, task: Task, journal: Journal | None, out: Path, group: Group
) -> Journal:
    """What a run is from here on: every flag, the tokenizer, a line of the journal. Rank 0 writes."""
    import torch

    import functional_lm
    from functional_lm.evolution import journal as journals

    versions = {"functional_lm": functional_lm.__version__, "torch": torch.__version__}
    flags = dataclasses.asdict(options)
    settings = {
        "flags": flags,
        "digest": evolution.digest,
        "data": task.digest,
        "functions": surroundings.functions(options),
        "processor": surroundings.processor(options),
        "threads": torch.get_num_threads(),
        "chunk": task.share.size,
        "ranks": group.count,
        "versions": versions,
    }
    line = journals.header_of(settings, len(journal.generations) if journal else 0)
    if not group.first:
        return journals.remembered(journal or journals.Journal(out / journals.NAME, [], [], None, "", 0, False), line)
    files.write_json(out / "run.json", {"kind": "evolution", "options": flags, "versions": versions})
    evolution.model.tokenizer.save(out)
    return journals.append(journal, line) if journal else journals.begin(out / journals.NAME, settings)


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
            run_folder.settle(out)  # a fitness may fail until it has measured a generation

        hooks = loop.Hooks(measure, record, validate, advance, task.describe, agree, group.hurry)
        return loop.run(strategy, state, journal, plan, hooks, out)


# Replay ---------------------------------------------------------------------------------------------------------------


def _replay(options: EvolveFlags) -> int:
    """The weights that a journal describes, from the base alone (and the data, where members train). Nothing is
    measured."""
    from functional_lm import tree
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution import loop

    journal = journals.read(str(options.journal))
    flags = evolve_override.flags_of(journal.header, f"{journal.path}")
    given: dict[str, Any] = {name: getattr(options, name) for name in ("model", "data") if getattr(options, name)}
    began = dataclasses.replace(flags, **given, device=flags.device if options.device == "auto" else options.device)
    out = Path(options.out) if options.out != EvolveFlags.out else Path(f"{began.out}-replayed")
    files.refuse_existing(out)
    began = _on_this_machine(began)
    if began.compile != flags.compile:
        console.say("the journal's run was compiled and this machine cannot: the last bits may differ")
    evolution = evolution_of(began)
    _check_base(journal, evolution, evolve_flags.origin(began))
    if journal.cut:
        console.say(f"the last line of {journal.path} was cut off and is left out")
    strategies = evolve_override.strategies(began, evolution, journal)
    with _trained(began, evolution, journal) as (advance, whole):
        state = loop.retold(strategies, _start(began, evolution, strategies(0)), journal, advance)
        end = journal.end if journal.end and journal.end["generation"] == len(journal.generations) else None
        kept = end["kept"] if end else usual_choice(began)
        leaves = state.centre if kept == "centre" else state.best
        written = whole(leaves)
    same = end is not None and tree.digest(leaves) == end["digest"]
    with files.writing_folder(out) as temporary:
        evolution.model.tokenizer.save(temporary)
        evolution.write(temporary, written)
    console.say(
        f"{_done_again(began, len(journal.generations))}, nothing measured; "
        + ("the weights are those of the run, bit for bit" if same else _unlike(began, journal, end is not None))
    )
    console.say(f"the {evolution.what} is in {out}; go on with: {evolution.use} {out} --prompt TEXT")
    return 0


def _done_again(options: EvolveFlags, count: int) -> str:
    if options.strategy == "pbt":
        return f"{count} generations trained again on {options.data}"
    if options.space in evolve_flags.TRAINING:
        return f"{count} generations told again, the one that is kept trained again on {options.data}"
    return f"{count} generations told again"


@contextmanager
def _trained(
    options: EvolveFlags, evolution: Evolution, journal: Journal
) -> Iterator[tuple[Callable[[Any, int], Any], Callable[[Tree], Any]]]:
    """What brings a state to where it was measured, and leaves to what is written: nothing, but where both train."""
    if options.space not in evolve_flags.TRAINING:
        yield (lambda state, number: state), (lambda leaves: leaves)
        return
    from functional_lm.text import corpus

    with tempfile.TemporaryDirectory() as place:

        def divide(tokens: int) -> Share:
            return _share(options, evolution, journal, tokens, ranks.Group())

        task = task_of(options, evolution, corpus.find(str(options.data)), Path(place), divide)
        _check_data(options, journal, task)
        yield task.advance, task.whole


def _unlike(options: EvolveFlags, journal: Journal, ended: bool) -> str:
    if not ended:
        return "the journal does not say how the run ended, so there is nothing to compare with"
    changes = surroundings.differences(surroundings.machine(options), journal.header)
    why = f" (it had {'; '.join(changes)})" if changes else ""
    return f"the weights differ from the run's in some bits{why}"


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
