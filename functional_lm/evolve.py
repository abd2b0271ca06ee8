"""`python -m functional_lm evolve`: a population of models or adapters, any fitness, and the winner as a folder.

Parse, wire, print; the mathematics is in `evolution/`. torch is imported when the work begins.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console, evolve_flags, files, run_folder
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.loop import Outcome, Plan
    from functional_lm.evolution.spaces import Space
    from functional_lm.evolution.strategy import Candidates, Strategy
    from functional_lm.folder import Model
    from functional_lm.text.corpus import Corpus
    from functional_lm.tree import Tree


class Evolution(NamedTuple):
    """What follows from the flags and the model, whatever fitness is."""

    model: Model
    space: Space
    strategy: Strategy
    digest: str  # of the model's parameters
    write: Callable[[Path, Tree], None]  # a folder with what was evolved
    use: str  # the command that goes on with such a folder, without its prompt
    what: str  # "model" or "adapter"


class Task(NamedTuple):
    """How candidates are measured, and one tree alone on what was held out (NaN where nothing was)."""

    measure: Callable[[Candidates, int], Tensor]
    held_out: Callable[[Tree], float]
    tokens: int  # that a member reads and writes in a generation


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
        run_folder.check_overwrite(out, read)
    options = _on_this_machine(options)
    journal = _opened(options, out)
    evolution = _evolution(options)
    task = _task(options, evolution, found, out)
    state = evolution.strategy.init(keys.fold_in_name(_key(options), "evolution"), evolution.space.start)
    if journal is None:
        journal = _begin(options, evolution, out)
    else:
        _check_base(journal, evolution, str(options.model))
        state = loop.resumed(evolution.strategy, state, journal, out)
        console.say(f"going on with {out} from generation {int(state.generation)}")
    console.say(_intention(options, evolution, task))
    outcome = _run(options, evolution, task, state, journal, out)
    if outcome.ended == "interrupted":
        console.say(f"stopped after generation {int(outcome.state.generation)}; the same command goes on from there")
        raise KeyboardInterrupt
    _finish(options, evolution, task, outcome, out, started)
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


def _key(options: EvolveFlags) -> Tensor:
    from functional_lm import keys

    return keys.key(options.seed, options.device)


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


# What is evolved, and how ---------------------------------------------------------------------------------------------


def _evolution(options: EvolveFlags) -> Evolution:
    from functional_lm import folder, tree

    assert options.model is not None
    model = folder.load(options.model, options.device, quantized=options.space == "lora")
    digest = tree.digest(model.params)
    generate = "python -m functional_lm.generate --model"
    if options.space == "lora":
        space, write = _adapter(options, model, digest)
        return Evolution(
            model,
            space,
            _strategy(options, space.start),
            digest,
            write,
            f"{generate} {options.model} --adapter",
            "adapter",
        )
    from functional_lm.evolution import spaces

    space = spaces.full(model.params, options.leaves)

    def write_model(path: Path, leaves: Tree) -> None:
        folder.save(path, space.whole(space.base, leaves), model.config, model.tokenizer)

    return Evolution(model, space, _strategy(options, space.start), digest, write_model, generate, "model")


def _adapter(options: EvolveFlags, model: Model, digest: str) -> tuple[Space, Callable[[Path, Tree], None]]:
    from functional_lm import keys, tree
    from functional_lm.evolution import spaces
    from functional_lm.interop import peft
    from functional_lm.model import lora

    if options.adapter is not None:
        start, how = peft.load(options.adapter, model.params, digest, options.device)
        how = dataclasses.replace(how, base=str(options.model), digest=digest)
    else:
        alpha = float(options.rank) if options.alpha is None else options.alpha
        key = keys.fold_in_name(_key(options), "adapter")
        start = lora.init(model.params, options.targets, options.rank, key, alpha)
        how = peft.Settings(options.rank, alpha, options.targets, base=str(options.model), digest=digest)
    peft.check_tied(model.params, start)
    scales, shapes = tree.select(start, "*.lora_scale"), tree.to(model.params, "meta")

    def write(path: Path, leaves: Tree) -> None:
        peft.save(path, tree.overlay(leaves, scales), how, shapes)

    return spaces.adapter(model.params, tree.cast(start, _float32())), write


def _float32() -> torch.dtype:
    import torch

    return torch.float32


COMPILED = 1 << 24  # numbers drawn in a generation, above which a compiled draw is worth its compiling


def _own_numbers(options: EvolveFlags, start: Tree) -> int:
    """How many numbers a member has of its own."""
    from functional_lm import tree
    from functional_lm.evolution.eggroll import low_rank
    from functional_lm.evolution.strategy import shapes_of

    return low_rank(options.rank).numbers(shapes_of(start)) if options.strategy == "eggroll" else tree.size(start)


def _strategy(options: EvolveFlags, start: Tree) -> Strategy:
    """What the flags name, for a tree. Whether its parts are compiled depends on these two alone, as replay asks."""
    from functional_lm.compile import compiled
    from functional_lm.evolution import cma, eggroll, genetic, gradient, mezo, natural, openai
    from functional_lm.training import optimizer

    drawn = _own_numbers(options, start) * options.population

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, enabled=options.compile and drawn > COMPILED)

    values = dataclasses.asdict(options)
    vectors = {
        "snes": natural.snes,
        "xnes": natural.xnes,
        "cma-es": cma.cma_es,
        "sep-cma-es": cma.sep_cma_es,
    }
    if options.strategy == "genetic":
        names = {field.name for field in dataclasses.fields(genetic.Settings)}
        settings = genetic.Settings(**{name: value for name, value in values.items() if name in names})
        return genetic.genetic(settings, wrap)
    if options.strategy in vectors:
        return vectors[options.strategy](options.population, options.sigma)
    if options.strategy == "mezo":
        return mezo.mezo(options.population, {name: values[name] for name in gradient.NUMBERS}, wrap)
    how = gradient.Settings(options.population, options.antithetic, options.shaping, options.noise)
    numbers = {name: values[name] for name in gradient.NUMBERS}
    chosen = optimizer.optimizer(options.optimizer)
    if options.strategy == "openai-es":
        return openai.openai_es(how, chosen, numbers, wrap)
    return eggroll.eggroll(how, options.rank, chosen, numbers, wrap)


# What it is measured on -----------------------------------------------------------------------------------------------


def _task(options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path) -> Task:
    from functional_lm.evolution import task

    rows = task.is_rows(found)
    if evolve_flags.answers(options):
        if not rows:
            raise DataError(f"--fitness {options.fitness} scores answers; --data {options.data} has no rows of prompt "
                            "and response")  # fmt: skip
        return _answered(options, evolution, found)
    return _read(options, evolution, found, out, rows)


def _read(options: EvolveFlags, evolution: Evolution, found: Corpus, out: Path, rows: bool) -> Task:
    """Loss, bits or accuracy of text, or of the responses in rows."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evolution import population, task
    from functional_lm.model.compute import compute_copy

    model, device, size = evolution.model, torch.device(options.device), options.batch_size
    dtype = getattr(torch, options.dtype)
    if rows:
        asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, 1)
        width = task.longest(asked, model.tokenizer)
        batch: Callable[[int], Any] = lambda number: task.read(  # noqa: E731
            asked, task.drawn(asked, number, size, options.seed), model.tokenizer, width, device
        )
        held = [
            task.read(asked, asked.validation[at : at + size], model.tokenizer, width, device)
            for at in range(0, len(asked.validation), size)
        ][: options.eval_batches]
    else:
        width = options.block_size or model.config.max_len
        if width > model.config.max_len:
            raise UsageError(f"--block_size {width} is longer than the model's max_len {model.config.max_len}")
        text = task.text(found, model, out, options.val_fraction, size, width, options.seed, device)
        batch, held = text.batch, text.held_out(options.eval_batches)
    tokens = size * width
    objective = task.objective_of(options.fitness, model)
    evaluate = population.evaluator(
        evolution.strategy, evolution.space, objective, dtype, _chunk(options, evolution, tokens), _wrap(options)
    )
    alone = compiled(
        lambda params, batch: objective(compute_copy(params, dtype), batch),
        enabled=options.compile and options.eval_every > 0,
    )

    def held_out(leaves: Tree) -> float:
        whole = evolution.space.whole(evolution.space.base, leaves)
        with torch.no_grad():
            return task.mean([alone(whole, one) for one in held])

    return Task(lambda candidates, number: evaluate(candidates, batch(number)), held_out, tokens)


def _answered(options: EvolveFlags, evolution: Evolution, found: Corpus) -> Task:
    """The scores of generated answers."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evolution import answers, task
    from functional_lm.evolution.strategy import Candidates, unmoved

    model, device = evolution.model, torch.device(options.device)
    score, dtype = answers.named(options.fitness), getattr(torch, options.dtype)
    asked = task.questions(found, model, options.val_fraction, options.seed, options.chat, options.max_tokens)
    tokens = options.batch_size * (asked.length + options.max_tokens)
    how = answers.Answering(
        options.max_tokens, asked.stops, options.temperature, _chunk(options, evolution, tokens), options.compile
    )
    answer = answers.answerer(evolution.strategy, evolution.space, model.config, how, dtype)
    draws = keys.fold_in_name(_key(options), "answers")

    def scored(found: Tensor, rows: list[Any]) -> Tensor:
        members = answers.texts(found, model.tokenizer, asked.stops, options.stop)
        with answers.limited(options.timeout, f"the fitness {options.fitness} of a generation"):
            return answers.scored(members, rows, score, options.fitness)

    def measure(candidates: Candidates, number: int) -> Tensor:
        rows = task.drawn(asked, number, options.batch_size, options.seed)
        return scored(answer(candidates, task.prompts(asked, rows, device), keys.fold_in(draws, number)), rows)

    single = unmoved()
    eager = dataclasses.replace(how, compile=False, chunk=None)
    alone = answers.answerer(single, evolution.space, model.config, eager, dtype)

    def held_out(leaves: Tree) -> float:
        rows = asked.validation[: options.eval_batches * options.batch_size]
        if not rows:
            return float("nan")
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], leaves))
        return float(scored(alone(one, task.prompts(asked, rows, device), draws), rows)[0])

    return Task(measure, held_out, tokens)


def _wrap(options: EvolveFlags) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    from functional_lm.compile import compiled

    return lambda function: compiled(function, enabled=options.compile)


def _chunk(options: EvolveFlags, evolution: Evolution, tokens: int) -> int:
    """Members at once, from the flag or from memory."""
    import torch

    from functional_lm.evolution import population

    if options.chunk_size != "auto":
        return int(options.chunk_size)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    own = 4 * _own_numbers(options, evolution.space.start)
    each = population.member_bytes(evolution.model.config, tokens, own, dtype)
    return population.automatic_chunk(options.population, each, tokens, population.free_memory(device))


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
    chunk = min(_chunk(options, evolution, task.tokens), options.population)
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


def _finish(
    options: EvolveFlags, evolution: Evolution, task: Task, outcome: Outcome, out: Path, started: float
) -> None:
    """Measure start, centre and best on what was held out; keep the better of the last two; write the folder."""
    from functional_lm import tree
    from functional_lm.evolution import journal as journals
    from functional_lm.evolution import record

    state = outcome.state
    trees = {"start": evolution.space.start, "centre": state.centre, "best": state.best}
    held = {name: task.held_out(leaves) for name, leaves in trees.items()}
    usual = _usual(options)
    other = "centre" if usual == "best" else "best"
    kept = other if held[other] > held[usual] else usual
    evolution.model.tokenizer.save(out)
    evolution.write(out, trees[kept])
    generations, digest = int(state.generation), tree.digest(trees[kept])
    entry = {"ended": outcome.ended, "generation": generations, "kept": kept, "digest": digest}
    if outcome.journal.end != entry:
        journals.append(outcome.journal, entry)
    summary = {
        "fitness": options.fitness,
        "held_out": {name: None if value != value else value for name, value in held.items()},
        "kept": kept,
        "best_fitness": float(state.best_fitness) if generations else None,
        "generations": generations,
        "evaluations": generations * options.population,
        "tokens": generations * options.population * task.tokens,
        "seconds": outcome.seconds,
        "wall_seconds": time.perf_counter() - started,
        "ended": outcome.ended,
    }
    files.write_json(out / "summary.json", summary)
    if generations:
        record.plot(out, f"fitness ({options.fitness})")
    use = f"{evolution.use} {out} --prompt TEXT"
    files.write_text(out / "README.md", _card(options, summary, out, use))
    if held["start"] == held["start"]:
        console.say(
            f"{options.fitness} of what was held out: {held['start']:.4f} at the start, {held['centre']:.4f} at the "
            f"centre, {held['best']:.4f} of the best member; the {kept} is kept"
        )
        if held[kept] <= held["start"]:
            console.say("that is no better than the start")
    console.say(
        f"{generations} generations, {generations * options.population} evaluations, "
        f"{console.duration(time.perf_counter() - started)} in all"
    )
    console.say(f"the {evolution.what} is in {out}; go on with: {use}")


def _usual(options: EvolveFlags) -> str:
    """What is kept where nothing tells which is better: a distribution's mean, but of single members the best."""
    return "best" if options.strategy == "genetic" else "centre"


def _card(options: EvolveFlags, summary: Mapping[str, Any], out: Path, use: str) -> str:
    shown = {**summary, **{f"held out, {name}": value for name, value in summary["held_out"].items()}}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items() if not isinstance(value, dict))
    return (
        f"# {out.name}\n\nEvolved with functional_lm from `{options.model}` by {options.strategy} on "
        f"`{options.data}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n![fitness](fitness.png)\n\n    {use}\n\n"
        "All flags of the run are in `run.json`, every generation in `journal.jsonl`, which rebuilds the weights:\n"
        f"`python -m functional_lm evolve replay {out}/journal.jsonl --out DIR`.\n"
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
    evolution = _evolution(began)
    _check_base(journal, evolution, str(began.model))
    if journal.cut:
        console.say(f"the last line of {journal.path} was cut off and is left out")
    state = evolution.strategy.init(keys.fold_in_name(_key(began), "evolution"), evolution.space.start)
    for entry in journal.generations:
        state = loop.told(evolution.strategy, state, entry)
    end = journal.end if journal.end and journal.end["generation"] == len(journal.generations) else None
    kept = end["kept"] if end else _usual(began)
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
        "  evolve replay runs/evolve/journal.jsonl --out rebuilt"
    ),
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.evolve"))
