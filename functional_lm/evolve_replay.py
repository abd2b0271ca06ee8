"""`evolve replay`: the weights that a journal describes, without a fitness."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, evolve_flags, evolve_override, files, surroundings, training_flags
from functional_lm import evolve_start as start
from functional_lm.evolution import ranks
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_result import usual_choice
from functional_lm.evolve_search import Evolution, evolution_of
from functional_lm.evolve_task import task_of

if TYPE_CHECKING:
    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.population import Share
    from functional_lm.tree import Tree


def replay(options: EvolveFlags) -> int:
    """The weights that a journal describes, from the base alone (and the data, where members train). Nothing is
    measured."""
    from functional_lm import tree
    from functional_lm.evolution import loop

    journal = evolve_override.journal_of(str(options.journal))
    flags = evolve_override.flags_of(journal.header, f"{journal.path}")
    given: dict[str, Any] = {name: getattr(options, name) for name in ("model", "data") if getattr(options, name)}
    began = dataclasses.replace(flags, **given, device=flags.device if options.device == "auto" else options.device)
    out = Path(options.out) if options.out != EvolveFlags.out else Path(f"{began.out}-replayed")
    files.refuse_existing(out)
    began = training_flags.on_this_machine(began)
    if began.compile != flags.compile:
        console.say("the journal's run was compiled and this machine cannot: the last bits may differ")
    evolution = evolution_of(began)
    start.check_base(journal, evolution, evolve_flags.origin(began))
    if journal.cut:
        console.say(f"the last line of {journal.path} was cut off and is left out")
    strategies = evolve_override.strategies(began, evolution, journal)
    with _trained(began, evolution, journal) as (advance, whole):
        state = loop.retold(strategies, start.first_state(began, evolution, strategies(0)), journal, advance)
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

    options = dataclasses.replace(options, fitness="loss")  # nothing is scored again, and the function may be gone
    with tempfile.TemporaryDirectory() as place:

        def divide(tokens: int) -> Share:
            return start.share(options, evolution, journal, tokens, ranks.Group())

        task = task_of(options, evolution, corpus.find(str(options.data)), Path(place), divide)
        start.check_data(options, journal, task)
        yield task.advance, task.whole


def _unlike(options: EvolveFlags, journal: Journal, ended: bool) -> str:
    if not ended:
        return "the journal does not say how the run ended, so there is nothing to compare with"
    changes = surroundings.differences(surroundings.machine(options), journal.header)
    why = f" (it had {'; '.join(changes)})" if changes else ""
    return f"the weights differ from the run's in some bits{why}"
