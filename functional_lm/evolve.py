"""`python -m functional_lm evolve`: a population of models or adapters, any fitness, and the winner as a folder.

Parse, wire, print; the mathematics is in `evolution/`. torch is imported when the work begins.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, evolve_flags, files, run_folder
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_result import finish, usual_choice
from functional_lm.evolve_search import Evolution, evolution_of, key_of
from functional_lm.evolve_task import Task, chunk_of, task_of

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.loop import Outcome, Plan
    from functional_lm.evolution.strategy import Candidates


def run(options: EvolveFlags) -> int:
    """The whole job; returns the exit code. Wrong flags and bad data are refused before anything is written."""
    evolve_flags.check(options)
    if options.action == "replay":
        return _replay(options)
    from functional_lm import keys
    from functional_lm.evolution import loop
    from functional_lm.text import corpus

    started, out = time.perf_counter(), Path(options.out)
    found = corpus.find(str(options.data))
    if options.overwrite:
        read = [("model", options.model), ("adapter", options.adapter), *(("data", path) for path in found.files)]
        read += [("base", options.base), *(("models", path) for path in options.models)]
        run_folder.check_overwrite(out, read)
    options = _on_this_machine(options)
    journal = _opened(options, out)
    evolution = evolution_of(options)
    task = task_of(options, evolution, found, out)
    state = evolution.strategy.init(keys.fold_in_name(key_of(options), "evolution"), evolution.space.start)
    if journal is None:
        journal = _begin(options, evolution, out)
    else:
        _check_base(journal, evolution, evolve_flags.origin(options))
        state = loop.resumed(evolution.strategy, state, journal, out)
        console.say(f"going on with {out} from generation {int(state.generation)}")
    console.say(_intention(options, evolution, task))
    outcome = _run(options, evolution, task, state, journal, out)
    if outcome.ended == "interrupted":
        console.say(f"stopped after generation {int(outcome.state.generation)}; the same command goes on from there")
        raise KeyboardInterrupt
    finish(options, evolution, task, outcome, out, started)
    return 0


# Before any work ------------------------------------------------------------------------------------------------------


def _on_this_machine(options: EvolveFlags) -> EvolveFlags:
    from functional_lm import compile as compiling

    device = compiling.resolve_device(options.device)
    dtype = str(compiling.resolve_dtype(options.dtype, device)).removeprefix("torch.")
    obstacle = compiling.obstacle(device) if options.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    return dataclasses.replace(options, device=str(device), dtype=dtype, compile=options.compile and obstacle is None)


def _opened(options: EvolveFlags, out: Path) -> Journal | None:
    """The journal to go on with, None for a new run. Raises UsageError where `out` holds something else."""
    from functional_lm.evolution import journal as journals

    path = out / journals.NAME
    if options.overwrite or not (path.exists() or run_folder.holds_model(out)):
        return None
    if options.resume == "never" or not path.exists():
        raise UsageError(f"{out} already holds a run; choose another --out, or --overwrite it")
    journal = journals.read(path)
    before = journal.header["flags"]
    now = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(options).items()}
    for name in evolve_flags.FIXED:
        if before.get(name) != now[name]:
            raise UsageError(
                f"{out} holds another run (--{name} was {before.get(name)}, is {now[name]}); "
                "choose another --out, or --overwrite it"
            )
    if journal.cut:
        console.say(f"the last line of {path} was cut off; its generation is measured again")
    return journal


def _check_base(journal: Journal, evolution: Evolution, path: str) -> None:
    if journal.header["digest"] != evolution.digest:
        raise DataError(
            f"{journal.path} began with another model ({journal.header['digest'][:12]}) than the one in {path} "
            f"({evolution.digest[:12]})"
        )


def _begin(options: EvolveFlags, evolution: Evolution, out: Path) -> Journal:
    """Make the folder: tokenizer, every flag, the journal's first line."""
    import torch

    import functional_lm
    from functional_lm.evolution import journal as journals

    kept = out / "data"
    if options.overwrite:
        for entry in [] if not out.exists() else [path for path in out.iterdir() if path != kept]:
            files.remove(entry)
    files.make_folder(out)
    evolution.model.tokenizer.save(out)
    versions = {"functional_lm": functional_lm.__version__, "torch": torch.__version__}
    flags = dataclasses.asdict(options)
    files.write_json(out / "run.json", {"options": flags, "versions": versions})
    settings = {"flags": flags, "digest": evolution.digest, "threads": torch.get_num_threads(), "versions": versions}
    return journals.begin(out / journals.NAME, settings)


# The run and its end --------------------------------------------------------------------------------------------------


def _plan(options: EvolveFlags) -> Plan:
    from functional_lm.evolution.loop import Plan

    seconds = None if options.minutes is None else 60 * options.minutes
    return Plan(
        options.generations, options.evaluations, seconds, options.target, options.save_every, options.eval_every,
        options.keep,
    )  # fmt: skip


def _intention(options: EvolveFlags, evolution: Evolution, task: Task) -> str:
    import torch

    from functional_lm import tree

    threads = f" with {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    chunk = min(chunk_of(options, evolution, task.tokens), options.population)
    return (
        f"{options.strategy} over {console.count(tree.size(evolution.space.start))} numbers of "
        f"{console.count(tree.size(evolution.model.params))} ({options.space}), {options.population} members, "
        f"{chunk} at once, {task.tokens} tokens each, {options.dtype} on {options.device}{threads}"
    )


def _run(options: EvolveFlags, evolution: Evolution, task: Task, state: Any, journal: Journal, out: Path) -> Outcome:
    from functional_lm.evolution import loop
    from functional_lm.training.record import Recorder

    first = int(state.generation)

    def measure(candidates: Candidates, number: int) -> Tensor:
        if number != first or not options.compile:
            return task.measure(candidates, number)
        with console.announced("compiling the population's evaluation"):
            return task.measure(candidates, number)

    def validate(state: Any) -> Mapping[str, float]:
        return {"val_fitness": task.held_out(state.centre)}

    with Recorder(out, first) as recorder:
        return loop.run(
            evolution.strategy, state, journal, _plan(options), loop.Hooks(measure, recorder.metrics, validate), out
        )


# Replay ---------------------------------------------------------------------------------------------------------------


def _replay(options: EvolveFlags) -> int:
    """The weights that a journal describes, from the base alone: nothing is measured."""
    from functional_lm import keys, tree
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution import loop

    journal = journals.read(str(options.journal))
    flags: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in journal.header["flags"].items()
    }
    if options.model is not None:
        flags["model"] = options.model
    began = EvolveFlags(**{**flags, "device": options.device if options.device != "auto" else flags["device"]})
    out = Path(options.out) if options.out != EvolveFlags.out else Path(f"{began.out}-replayed")
    files.refuse_existing(out)
    began = _on_this_machine(began)
    if began.compile != flags["compile"]:
        console.say("the journal's run was compiled and this machine cannot: the last bits may differ")
    evolution = evolution_of(began)
    _check_base(journal, evolution, evolve_flags.origin(began))
    if journal.cut:
        console.say(f"the last line of {journal.path} was cut off and is left out")
    state = evolution.strategy.init(keys.fold_in_name(key_of(began), "evolution"), evolution.space.start)
    for entry in journal.generations:
        state = loop.told(evolution.strategy, state, entry)
    end = journal.end if journal.end and journal.end["generation"] == len(journal.generations) else None
    kept = end["kept"] if end else usual_choice(began)
    leaves = state.centre if kept == "centre" else state.best
    same = end is not None and tree.digest(leaves) == end["digest"]
    with files.writing_folder(out) as temporary:
        evolution.model.tokenizer.save(temporary)
        evolution.write(temporary, leaves)
    console.say(
        f"{len(journal.generations)} generations told again, nothing measured; "
        + ("the weights are those of the run, bit for bit" if same else _unlike(journal, end is not None))
    )
    console.say(f"the {evolution.what} is in {out}; go on with: {evolution.use} {out} --prompt TEXT")
    return 0


def _unlike(journal: Journal, ended: bool) -> str:
    import torch

    if not ended:
        return "the journal does not say how the run ended, so there is nothing to compare with"
    threads = journal.header["threads"]
    return (
        f"the weights differ from the run's in some bits (it had {threads} threads and torch "
        f"{journal.header['versions']['torch']}; here {torch.get_num_threads()} and {torch.__version__})"
    )


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
