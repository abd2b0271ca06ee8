"""How a run of `evolve` ends: the better of centre and best, as a folder with its records."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, evolve_figures, evolve_flags, files
from functional_lm.evolve_flags import KEEPING, EvolveFlags
from functional_lm.evolve_search import Evolution
from functional_lm.evolve_task import Task

if TYPE_CHECKING:
    from functional_lm.evolution.loop import Outcome


def finish(options: EvolveFlags, evolution: Evolution, task: Task, outcome: Outcome, out: Path, started: float) -> None:
    """Measure start, centre and best on what was held out; keep the better of the last two; write the folder."""
    from functional_lm import tree
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution import record

    state = outcome.state
    trees = {"start": evolution.space.start, "centre": state.centre, "best": state.best}
    held = {name: task.held_out(leaves) for name, leaves in trees.items()}
    usual = usual_choice(options)
    other = "centre" if usual == "best" else "best"
    kept = other if held[other] > held[usual] and options.strategy != "nsga2" else usual
    evolution.model.tokenizer.save(out)
    evolution.write(out, task.whole(trees[kept]))
    generations, digest = int(state.generation), tree.digest(trees[kept])
    entry = {"ended": outcome.ended, "generation": generations, "kept": kept, "digest": digest}
    if outcome.journal.end != entry:
        journals.append(outcome.journal, entry)
    summary = {
        "fitness": options.fitness,
        "held_out": {name: value if math.isfinite(value) else None for name, value in held.items()},
        "kept": kept,
        "best_fitness": float(state.best_fitness) if state.best_fitness.isfinite() else None,
        "generations": generations,
        "evaluations": generations * options.population,
        "tokens": generations * options.population * task.tokens,
        "seconds": outcome.seconds,
        "wall_seconds": time.perf_counter() - started,
        "ended": outcome.ended,
        **evolution.facts(outcome.journal, kept, trees[kept]),
    }
    if generations:
        summary |= evolve_figures.report(options, state, out)
    files.write_json(out / "summary.json", summary)
    if options.space == "architecture":
        found = [f"{name} {value}" for name, value in summary["architecture"].items()]
        shown = ", ".join(found + [f"{name} {value:.3g}" for name, value in summary["numbers"].items()])
        tried = f"{summary['tried']} architectures tried; " if generations else ""
        console.say(f"{tried}kept: {shown}; {summary['parameters']:,} parameters, {summary['steps']} steps")
    if generations:
        record.plot(out, f"fitness ({evolve_flags.figures(options)[0]})")
    use = f"{evolution.use} {out} --prompt TEXT"
    files.write_text(out / "README.md", _card(options, summary, out, use))
    if held["start"] == held["start"]:
        console.say(
            f"{evolve_flags.figures(options)[0]} of what was held out: {held['start']:.4f} at the start, "
            f"{held['centre']:.4f} at the centre, {held['best']:.4f} of the best member; the {kept} is kept"
        )
        if held[kept] <= held["start"] and options.strategy != "nsga2":
            console.say("that is no better than the start")
    console.say(
        f"{generations} generations, {generations * options.population} evaluations, "
        f"{console.duration(time.perf_counter() - started)} in all"
    )
    console.say(f"the {evolution.what} is in {out}; go on with: {use}")


def usual_choice(options: EvolveFlags) -> str:
    """What is kept where nothing tells which is better: a distribution's mean, but of single members the best.

    So too after restarts, which begin far from where the last run ended. Of a front it is the compromise, the centre,
    whatever one objective says of it.
    """
    return "best" if options.strategy in KEEPING or options.restarts != "none" else "centre"


def _card(options: EvolveFlags, summary: Mapping[str, Any], out: Path, use: str) -> str:
    shown = {**summary, **{f"held out, {name}": value for name, value in summary["held_out"].items()}}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items() if not isinstance(value, dict | list))
    return (
        f"# {out.name}\n\nEvolved with functional_lm from `{evolve_flags.origin(options)}` by {options.strategy} on "
        f"`{options.data}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n![fitness](fitness.png)\n\n    {use}\n\n"
        "All flags of the run are in `run.json`, every generation in `journal.jsonl`, which rebuilds the weights:\n"
        f"`python -m functional_lm evolve replay {out}/journal.jsonl --out DIR`.\n"
    )
