"""How a run of `evolve` begins or goes on: the journal that is there, what has to be the same, what is noted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, evolve_flags, evolve_override, files, run_folder, surroundings
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_memory import chunk_of, trainings_at_once
from functional_lm.evolve_search import Evolution, key_of
from functional_lm.evolve_task import Task

if TYPE_CHECKING:
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.population import Share
    from functional_lm.evolution.ranks import Group
    from functional_lm.evolution.strategy import Strategy


def open_kernels(options: EvolveFlags) -> None:
    """Compile those that members are computed with, or say why they cannot be."""
    from functional_lm import kernels

    if surroundings.asks_for_kernels(options):
        with console.announced("compiling the kernels", quiet=kernels.are_made()):
            obstacle = kernels.obstacle()
        if obstacle:
            console.say(f"adding low-rank noise without a kernel of its own, somewhat slower: {obstacle}")


def opened(options: EvolveFlags, out: Path, writes: bool) -> tuple[Journal | None, list[str]]:
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
    journal = evolve_override.journal_of(path)
    if not (journal.generations or journal.end):
        return None  # nothing was measured: it may begin as another one
    if journal.cut:
        console.say(f"the last line of {path} was cut off; its generation is measured again")
    return journal


def check_base(journal: Journal, evolution: Evolution, path: str) -> None:
    if journal.header["digest"] != evolution.digest:
        raise DataError(
            f"{journal.path} began with another model ({journal.header['digest'][:12]}) than the one in {path} "
            f"({evolution.digest[:12]})"
        )


def share(options: EvolveFlags, evolution: Evolution, journal: Journal | None, tokens: int, group: Group) -> Share:
    """What this rank measures. Chunks are as large as the flag says, or as they were, or as memory and ranks allow."""
    from functional_lm.evolution import population

    if options.space in evolve_flags.TRAINING:
        size = trainings_at_once(options, evolution.model, group.count)
    else:
        size = chunk_of(options, evolution, tokens)
    if options.chunk_size == "auto":
        size = journal.header["chunk"] if journal else min(size, max(1, options.population // group.count))
    return population.share(options.population, size, group.rank, group.count)


def facts(options: EvolveFlags, evolution: Evolution, task: Task, state: Any) -> dict[str, str]:
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


def check_data(options: EvolveFlags, journal: Journal, task: Task) -> list[str]:
    """Raise DataError for another text, which `--override` takes where nothing is trained on it."""
    if journal.header.get("data", task.digest) == task.digest:
        return []
    if evolve_override.obstacle("data", options):
        raise DataError(f"{journal.path} began with another text: the one in --data has changed; --overwrite the run")
    changes = ["the text has changed"]
    run_folder.agree(f"{journal.path} began with another text", changes, options.override, kind=DataError)
    return changes


def say_changes(options: EvolveFlags, journal: Journal, task: Task) -> None:
    """What may change the last bits of a run that goes on."""
    now = {**surroundings.machine(options), "chunk": task.share.size}
    if changes := surroundings.differences(now, journal.header):
        console.say(f"the run began with {'; '.join(changes)}: the last bits of its numbers may differ")


def noted(
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
        "kernels": surroundings.kernels_of(options),
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


def first_state(options: EvolveFlags, evolution: Evolution, strategy: Strategy) -> Any:
    """The state before the first generation."""
    from functional_lm import keys

    return strategy.init(keys.fold_in_name(key_of(options), "evolution"), evolution.space.start)
