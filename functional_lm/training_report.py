"""What is said before and after a training, and what it leaves in the run folder: model, summary, card, curves."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console, files, trainer, training_room
from functional_lm.run_saving import finishing
from functional_lm.training_flags import TrainingFlags

if TYPE_CHECKING:
    from functional_lm.evaluation.likelihood import Likelihood
    from functional_lm.model.config import ModelConfig
    from functional_lm.text.dataset import View
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.training.loop import Outcome
    from functional_lm.training.record import Recorder
    from functional_lm.tree import Tree

PROMPT = 16  # tokens of the validation text that a sample goes on from


class Report(NamedTuple):
    """What every report says of a run."""

    out: Path
    data: str
    validation_bytes: int
    budget: dict[str, float | None]
    started: float  # time.perf_counter()


def intention(flags: TrainingFlags, parameters: int, job: trainer.Job) -> str:
    """One line: how large, how long, where."""
    import torch

    size = flags.batch_size * (flags.block_size or 0) * flags.gradient_accumulation_steps
    models, each = f"{job.members} models, " if job.members else "", " each" if job.members else ""
    length = f"{flags.steps} steps" if flags.steps else f"{flags.minutes:g} minutes"
    threads = f" with {torch.get_num_threads()} threads" if flags.device == "cpu" else ""
    return (
        f"{models}{console.count(parameters / max(1, job.members))} parameters{each}, {size} tokens a step{each}, "
        f"{length}, {flags.dtype} on {flags.device}{threads}"
    )


EFFICIENCY = 0.6  # of a compiled step beside its products alone; measured at widths 128 to 384


def needs(flags: TrainingFlags, job: trainer.Job) -> str:
    """One line: what the steps are going to need in memory and, where it can be told beforehand, in time."""
    from functional_lm.model import account

    assert flags.block_size is not None
    models, microbatches = max(1, job.members), flags.gradient_accumulation_steps
    memory = training_room.memory_of(flags, job.config)
    tokens = flags.batch_size * flags.block_size
    operations = models * microbatches * tokens * account.training_flops(job.config, flags.block_size)
    said = (
        f"a step needs about {console.size(models * memory.total)} of memory beside torch itself and "
        f"{console.count(operations)} operations"
    )
    if not flags.compile:
        return said
    seconds = operations / (EFFICIENCY * _operations_per_second(flags, job.config, tokens))
    whole = f", some {console.duration(seconds * flags.steps)} in all" if flags.steps else ""
    return f"{said}, about {console.moment(seconds)}{whole} after compiling"


def _operations_per_second(flags: TrainingFlags, config: ModelConfig, tokens: int) -> float:
    """Of one of the step's products, [B T, D] by [D, F], timed here for a tenth of a second."""
    import torch

    from functional_lm import compile as compiling

    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    x = torch.ones(tokens, config.d_model, dtype=dtype, device=device)
    weight = torch.ones(config.d_ff, config.d_model, dtype=dtype, device=device)
    times: list[float] = []
    until = time.perf_counter() + 0.1
    while len(times) < 4 or time.perf_counter() < until:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        compiling.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * tokens * config.d_model * config.d_ff / statistics.median(times)


def finish(
    flags: TrainingFlags, report: Report, job: trainer.Job, outcome: Outcome, best: trainer.Best, recorder: Recorder
) -> None:
    """Measure on the whole split, write the model folder and its records, print a sample."""
    from functional_lm import run_best, tree

    out, params, steps = report.out, outcome.state.best_params, int(outcome.state.step)
    if outcome.ended == "patience":
        console.say(f"ended after {best.waited} validations without a better one; step {best.step} was the best")
    if flags.patience and best.step:
        kept = run_best.kept(out, best.step)
        params = job.written.load(kept) if job.written else tree.load(kept / "model.safetensors", flags.device)
    likelihood = job.measure(params, None)
    if likelihood.tokens:
        recorder.metrics(steps, {"val_loss": likelihood.loss})
    summary = summarize(flags, report, outcome, likelihood, params)
    if flags.patience:
        summary["best_step"] = best.step
    write(report, params, job, summary)
    if flags.sample_tokens:
        recorder.text(steps, "sample", _print_sample(job, params))
    console.say()
    _say_end(report, job, likelihood, outcome)


def finish_population(
    flags: TrainingFlags,
    report: Report,
    job: trainer.Job,
    outcome: Outcome,
    models: Sequence[tuple[int, Mapping[str, float]]],
    recorder: Recorder,
) -> None:
    """Measure every member, print them side by side, write each; the best is the run's model."""
    members = trainer.members(outcome.state, job)
    likelihoods = [job.measure(params, None) for params in members]
    losses = [likelihood.loss for likelihood in likelihoods]
    if job.validates:
        recorder.metrics(int(outcome.state.step.max()), {"val_loss": losses})
    summaries = []
    for i, (params, likelihood, (seed, numbers)) in enumerate(zip(members, likelihoods, models)):
        own = {"member": i, **numbers}
        summary = {**summarize(flags, report, outcome, likelihood, params), **own, "seed": seed}
        write(report._replace(out=report.out / "members" / str(i)), params, job, summary)
        summaries.append(summary)
    order = sorted(range(len(members)), key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))
    first = order[0]
    write(report, members[first], job, {**summaries[first], "members": summaries})
    _say_members(summaries, order)
    if flags.sample_tokens:
        recorder.text(int(outcome.state.step.max()), "sample", _print_sample(job, members[first]))
    console.say(f"\nmember {first} is the model of the run, the others are in {report.out / 'members'}")
    _say_end(report, job, likelihoods[first], outcome)


def _say_members(summaries: Sequence[Mapping[str, Any]], order: Sequence[int]) -> None:
    """The members of a population side by side, the best first."""
    columns = {"member": "d", "seed": "d", "learning_rate": ".2e", "weight_decay": "g"}
    columns |= {"val_loss": ".4f", "val_bits_per_byte": ".4f", "skipped": "d"}
    shown = {name: form for name, form in columns.items() if name in summaries[0]}
    console.say("\n" + "  ".join(f"{name:>{max(8, len(name))}}" for name in shown))
    for i in order:
        cells = (f"{summaries[i][name]:{form}}".rjust(max(8, len(name))) for name, form in shown.items())
        console.say("  ".join(cells))


def summarize(
    flags: TrainingFlags, report: Report, outcome: Outcome, likelihood: Likelihood, params: Tree
) -> dict[str, Any]:
    from functional_lm import tree

    steps = int(outcome.state.step.max())
    per_step = flags.batch_size * (flags.block_size or 0) * flags.gradient_accumulation_steps
    return {
        "val_loss": likelihood.loss,
        "val_bits_per_byte": likelihood.bits_per_byte(report.validation_bytes) if report.validation_bytes else math.nan,
        "val_tokens": likelihood.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "wall_seconds": time.perf_counter() - report.started,
        "training_seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "peak_memory_bytes": _peak_memory(flags.device),
        "parameters": tree.size(params),
        "steps": steps,
        "skipped": int(outcome.state.skipped.max()),
        "tokens": steps * per_step,
        "ended": outcome.ended,
        "budget": report.budget,
        "device": flags.device,
        "dtype": flags.dtype,
        "seed": flags.seed,
    }


def write(report: Report, params: Tree, job: trainer.Job, summary: Mapping[str, Any]) -> None:
    """The model folder with its summary, card and (of the run itself) curves."""
    from functional_lm import folder
    from functional_lm.training import record

    out = report.out
    with finishing():
        if job.written is not None:
            job.tokenizer.save(out)
            job.written.save(out, params)
        else:
            folder.save(out, params, job.config, job.tokenizer)
        files.write_json(out / "summary.json", _plain(summary))
        curves = (out / "metrics.jsonl").exists()
        files.write_text(out / "README.md", _card(report.data, summary, out, curves, _use(job, out)))
        if curves:
            record.plot(out)


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is not finite is null in JSON, of members too."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in summary.items()}


def _say_end(report: Report, job: trainer.Job, likelihood: Likelihood, outcome: Outcome) -> None:
    if likelihood.tokens:
        bits = likelihood.bits_per_byte(report.validation_bytes)
        console.say(
            f"validation loss {likelihood.loss:.4f} nats per {job.unit[:-1]}, "
            f"{f'{bits:.4f} bits per byte, ' if report.validation_bytes else ''}"
            f"over all {console.count(likelihood.tokens)} {job.unit} of the split"
        )
    if skipped := int(outcome.state.skipped.max()):
        console.say(f"{skipped} steps changed nothing: their loss or gradient was not finite")
    wall = console.duration(time.perf_counter() - report.started)
    console.say(f"{console.count(outcome.tokens_per_second)} tokens/s, {wall} in all")
    what = "adapter" if job.written else "model"
    console.say(f"the {what} is in {report.out}; go on with: {_use(job, report.out)} --prompt TEXT")


def _use(job: trainer.Job, out: Path) -> str:
    """The command that writes with what was trained."""
    return job.written.use if job.written else f"python -m functional_lm.generate --model {out}"


# Samples --------------------------------------------------------------------------------------------------------------


def sample(
    flags: TrainingFlags, params: Tree, config: ModelConfig, tokenizer: Tokenizer, validation: View, train: View
) -> Iterator[str]:
    """How the model goes on from the first tokens of the validation text, those first, as it writes."""
    from functional_lm.inference import generate
    from functional_lm.inference import text as writing
    from functional_lm.text import dataset

    source = validation if len(validation) > PROMPT else train
    prompt = dataset.read(source, 0, PROMPT).tolist()
    how = generate.GenerateOptions(flags.sample_tokens, temperature=0.8, top_p=0.95, seed=flags.seed)
    yield tokenizer.decode(prompt)
    yield from writing.stream(params, generate.decoder(config, compile=False), tokenizer, prompt, how)


def _print_sample(job: trainer.Job, params: Tree) -> str:
    console.say(f"\na sample: the model goes on from {job.sampled}\n")
    pieces = []
    for piece in job.sample(params):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)


def _peak_memory(device: str) -> int:
    """Bytes: of the process on the CPU, of torch's allocator on an accelerator."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _card(data: str, summary: Mapping[str, Any], out: Path, curves: bool, use: str) -> str:
    """The model card: what it was trained on and what came of it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items() if not isinstance(value, (dict, list)))
    picture = "![loss](loss.png)\n\n" if curves else ""
    return (
        f"# {out.name}\n\nA language model trained with functional_lm on `{data}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n{picture}"
        f"    {use} --prompt TEXT\n\n"
        "All flags of the run are in `run.json`, every step in `metrics.jsonl`.\n"
    )
