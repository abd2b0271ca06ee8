"""`python -m functional_lm finetune`, `lora-finetune` and `dpo`: go on from a model, with conversations.

Parse, wire, print. A method is what is trained (the whole tree, or an adapter beside it), by which objective, and how
it is written; the rest is that of any training.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import console, run_end, run_folder, trainer, training_flags, training_report, training_room
from functional_lm.adaptation_flags import (
    EPOCHS,
    AdaptationFlags,
    DpoOptions,
    FinetuneOptions,
    LoraFlags,
    LoraOptions,
)
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.model import config as model_config

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evaluation.likelihood import Likelihood, Score
    from functional_lm.folder import Model
    from functional_lm.text.conversations import Conversation
    from functional_lm.text.corpus import Corpus
    from functional_lm.text.dataset import Batch
    from functional_lm.text.supervised import Rows, Samples
    from functional_lm.training.step import Training
    from functional_lm.tree import Tree

Options = Any  # FinetuneOptions, LoraOptions or DpoOptions, which share AdaptationFlags and ConversationFlags


class Data(NamedTuple):
    """Rows to learn and to be measured on, and how to make batches of them."""

    train: Rows
    validation: Rows | None
    batch: Callable[[int], Batch]
    windows: Callable[[], Iterator[Batch]]
    per_epoch: float  # microbatches
    shown: Conversation  # what a sample answers
    sampled: str


class Method(NamedTuple):
    """What is trained, and what becomes of it."""

    functions: Training
    trained: Tree
    whole: Callable[[Tree], Tree]  # of trained leaves: the model to measure and to sample, a compute copy
    score: Score
    base: str  # digest of what the trained leaves stand in front of, or come from
    written: trainer.Written | None = None


def run(options: Options) -> int:
    """The whole job; returns the exit code. Wrong flags and bad data are refused before anything is written."""
    from functional_lm import folder
    from functional_lm.text import conversations

    started, out = time.perf_counter(), Path(options.out)
    if options.steps is None and options.epochs is None and options.minutes is None:
        options = dataclasses.replace(options, epochs=EPOCHS)
    found, config = _check(options)
    options = training_flags.resolve_machine(options)
    with run_folder.held(out):
        checkpoint = run_folder.checkpoint_to_resume(options, {}, out, lambda vocab_size: config)
        if checkpoint is not None and run_end.is_complete(options, checkpoint, out):
            return 0
        model = folder.load(options.model, options.device, quantized=isinstance(options, LoraFlags))
        conversations.require_markers(model.tokenizer, options.model)
        options = dataclasses.replace(options, block_size=options.block_size or model.config.max_len)
        data = _pairs(options, model, found) if isinstance(options, DpoOptions) else _chats(options, model, found)
        method = _adapter(options, model) if isinstance(options, LoraFlags) else _everything(options, model)
        model = model._replace(params={})  # what is needed of them the method has, in the form that it needs
        record = run_folder.begin(options, {}, model.config, model.tokenizer, out)
        record["inputs"] |= {"text": data.train.digest, "base": method.base}
        report = training_report.Report(
            out, options.data, _validation_bytes(options, data, model), training_flags.budget(options), started
        )
        options = training_flags.resolve_length(options, data.per_epoch / options.gradient_accumulation_steps)
        return _train(options, model, data, method, checkpoint, record, report)


def _check(options: Options) -> tuple[Corpus, model_config.ModelConfig]:
    """What flags say against each other and against the files that they name; returns the data, which is there, and
    the architecture."""
    from functional_lm.text import corpus

    training_flags.check(options)
    config = model_config.read(Path(options.model) / "config.json")
    if options.block_size is not None and options.block_size > config.max_len:
        raise UsageError(f"--block_size {options.block_size} is longer than the model's max_len {config.max_len}")
    found = corpus.find(options.data)
    if options.overwrite:
        read = [("model", options.model), *(("data", path) for path in found.files)]
        run_folder.check_overwrite(Path(options.out), read)
    return found, config


# Data -----------------------------------------------------------------------------------------------------------------


def _chats(options: Options, model: Model, found: Corpus) -> Data:
    """Conversations: rows of whole exchanges."""
    from functional_lm.text import conversations, supervised

    parts = supervised.split(conversations.read(found), options.val_fraction, options.seed)
    size = options.batch_size
    made: list[Samples | None] = []
    for number, part in enumerate(parts):
        with _about(number):
            made.append(supervised.samples(model.tokenizer, part, options.block_size) if part else None)
    train, validation = (
        None if one is None else supervised.pack(one, options.block_size, options.packing) for one in made
    )
    assert train is not None
    _say_chats(parts, made, len(train), options)
    return Data(
        train,
        validation,
        lambda number: supervised.batch(train, number, size, options.seed),
        lambda: supervised.windows(validation, size) if validation else iter(()),
        len(train) / size,
        (parts[1] or parts[0])[0],
        f"the first turns of a {'validation' if parts[1] else 'training'} conversation",
    )


@contextmanager
def _about(part: int) -> Iterator[None]:
    """What is wrong with the part that is kept for validation is said to be so."""
    try:
        yield
    except DataError as error:
        if part == 0:
            raise
        raise DataError(f"of what is kept for validation, {error}, or another --val_fraction") from None


def _say_chats(
    parts: tuple[list[Conversation], list[Conversation]], made: list[Samples | None], rows: int, options: Options
) -> None:
    there = [one for one in made if one is not None]
    targets, whole = sum(one.targets for one in there), sum(len(one.tokens) for one in there)
    console.say(
        f"{sum(map(len, parts))} conversations ({len(parts[1])} of them for validation) are {console.count(whole)} "
        f"tokens, {console.count(targets)} of them the assistant's; {rows} rows of {options.block_size} an epoch"
    )
    if cut := sum(one.split for one in there):
        left_out = sum(one.left_out for one in there)
        console.say(
            f"{cut} conversations are longer than a row and were split between turns"
            + (f"; {left_out} exchanges are too long by themselves and were left out" if left_out else "")
        )


def _pairs(options: Options, model: Model, found: Corpus) -> Data:
    """Preferences: batches of chosen answers and the rejected ones."""
    from functional_lm.text import conversations, supervised

    preferences = conversations.read_preferences(found)
    by_first = {id(one.chosen): one for one in preferences}
    parts = supervised.split([one.chosen for one in preferences], options.val_fraction, options.seed)
    size, rows = options.batch_size, []
    for number, part in enumerate(parts):
        rejected = [by_first[id(one)].rejected for one in part]
        with _about(number):
            made = supervised.pairs(model.tokenizer, part, rejected, options.block_size) if part else None
        rows.append(None if made is None else supervised.pack(made, options.block_size, packing=False))
    train, validation = rows
    assert train is not None
    left_out = sum(one.samples.left_out for one in rows if one is not None)
    console.say(
        f"{len(preferences)} pairs, {len(parts[1])} of them for validation"
        + (f"; {left_out} are longer than a row of {options.block_size} tokens and were left out" if left_out else "")
    )
    count = len(train) // 2

    def windows() -> Iterator[Batch]:
        total = 0 if validation is None else len(validation) // 2
        for first in range(0, total, size):
            assert validation is not None
            numbers = [n if n < total else -1 for n in range(first, first + size)]
            yield supervised.pair_batch(validation, numbers)

    return Data(
        train,
        validation,
        lambda number: supervised.pair_batch(train, supervised.drawn(count, number, size, options.seed).tolist()),
        windows,
        count / size,
        (parts[1] or parts[0])[0],
        "the prompt of a pair",
    )


def _validation_bytes(options: Options, data: Data, model: Model) -> int:
    """Of the assistant's tokens: what bits per byte are divided by. Preferences have none."""
    if data.validation is None or isinstance(options, DpoOptions):
        return 0
    found = data.validation.samples
    return int(model.tokenizer.byte_lengths[found.tokens[found.learned]].sum())


# Methods --------------------------------------------------------------------------------------------------------------


def _everything(options: Options, model: Model) -> Method:
    """All parameters."""
    import torch

    from functional_lm import tree
    from functional_lm.evaluation import likelihood
    from functional_lm.model.compute import compute_copy

    dtype = getattr(torch, options.dtype)
    config = dataclasses.replace(model.config, checkpoint_activations=options.checkpoint_activations)
    training_room.check(options, config, there=tree.nbytes(model.params), less="lora-finetune needs less")
    return Method(
        trainer.functions(options, config),
        tree.cast(model.params, torch.float32),  # masters
        lambda params: compute_copy(params, dtype),
        likelihood.score(config, dtype),
        tree.digest(model.params),
    )


def _adapter(options: Options, model: Model) -> Method:
    """An adapter beside a frozen base, with the conversations' loss or that of preferences."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.evaluation import likelihood
    from functional_lm.interop import peft
    from functional_lm.model import lora, transformer
    from functional_lm.model.compute import freeze
    from functional_lm.training import preference, step

    dtype = getattr(torch, options.dtype)
    config = dataclasses.replace(model.config, checkpoint_activations=options.checkpoint_activations)
    training_room.check_adapter(options, config)
    adapter = lora.init(
        model.params,
        options.lora_targets,
        options.lora_rank,
        keys.fold_in_name(keys.key(options.seed, options.device), "adapter"),
        options.lora_alpha,
        options.rslora,
        options.dora,
    )
    digest = tree.digest(model.params)
    trained, constant = lora.split(adapter)
    if options.lora_dropout:
        constant = lora.with_dropout(constant, options.lora_dropout)
    frozen = freeze(lora.attach(model.params, constant), trained, dtype)
    objective: step.Objective = transformer.loss
    score = likelihood.score(config, dtype)
    if isinstance(options, DpoOptions):
        objective = preference.objective(frozen, options.beta)  # without A and B nothing is added
        silent = dataclasses.replace(config, dropout=0.0)
        score = lambda params, batch: objective(params, batch, silent, None, 0.0)[1]  # noqa: E731
    how = peft.Settings(
        options.lora_rank, options.lora_alpha, options.lora_targets, options.lora_dropout, options.rslora, options.dora,
        str(options.model), digest,
    )  # fmt: skip
    scales, shapes = tree.select(constant, "*.lora_scale"), tree.to(model.params, "meta")

    def save(path: Path, params: Tree) -> None:
        peft.save(path, tree.overlay(params, scales), how, shapes)

    def load(path: Path) -> Tree:
        return lora.split(peft.load(path, shapes, digest, options.device)[0])[0]

    use = f"python -m functional_lm.generate --model {options.model} --adapter {options.out}"
    console.say(
        f"an adapter of rank {options.lora_rank}: {console.count(tree.size(trained))} numbers beside the model's "
        f"{console.count(tree.size(model.params))}, which stay as they are"
    )
    return Method(
        trainer.functions(options, config, frozen=frozen, objective=objective),
        trained,
        lambda params: step.whole(params, frozen, dtype),
        score,
        digest,
        trainer.Written(save, load, use),
    )


# Training -------------------------------------------------------------------------------------------------------------


def _train(
    options: Options,
    model: Model,
    data: Data,
    method: Method,
    checkpoint: Path | None,
    record: Mapping[str, Any],
    report: training_report.Report,
) -> int:
    """State, job and loop, then the report."""
    from functional_lm import keys, tree
    from functional_lm.training import loop

    state = method.functions.init(method.trained, keys.fold_in_name(keys.key(options.seed, options.device), "training"))
    state, memory = trainer.resumed(state, checkpoint, record, options.override)
    job = trainer.Job(
        model.config,
        model.tokenizer,
        method.functions,
        batch=lambda number: _tensors(options, data.batch(number)),
        measure=_measurement(options, data, method),
        validates=data.validation is not None,
        sample=lambda params: _answer(options, model, method, data.shown, params),
        steps_per_epoch=data.per_epoch / options.gradient_accumulation_steps,
        written=method.written,
        record=record,
        unit="pairs" if isinstance(options, DpoOptions) else "tokens",
        sampled=data.sampled,
    )
    console.say(training_report.intention(options, tree.size(method.trained), job))
    if method.written is None:
        console.say(training_report.needs(options, job))
    with trainer.recording(options, report.out, loop.steps_taken(state)) as recorder:
        outcome, best = trainer.train(options, job, state, memory, report.out, recorder)
        training_report.finish(options, report, job, outcome, best, recorder)
    return 0


def _tensors(options: AdaptationFlags, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(array).to(options.device) for name, array in arrays.items()}


def _measurement(options: Options, data: Data, method: Method) -> Callable[[Tree, int | None], Likelihood]:
    """`(params, batches)`: the loss over that many batches of the validation conversations, None for all."""
    from functional_lm.compile import compiled
    from functional_lm.evaluation import likelihood

    scorer = compiled(method.score, enabled=options.compile)

    def measure(params: Tree, batches: int | None) -> Likelihood:
        if data.validation is None:
            return likelihood.Likelihood(float("nan"), 0)
        chosen = itertools.islice(data.windows(), batches)
        return likelihood.measure(method.whole(params), (_tensors(options, batch) for batch in chosen), scorer)

    return measure


def _answer(options: Options, model: Model, method: Method, shown: Conversation, params: Tree) -> Iterator[str]:
    """A conversation up to its first answer, and the model's own."""
    from functional_lm.inference import generate
    from functional_lm.inference import text as writing
    from functional_lm.text import chat

    first = next(i for i, turn in enumerate(shown.turns) if turn.role == "assistant")
    for turn in shown.turns[:first]:
        yield f"{turn.role}: {turn.content}\n"
    yield "assistant: "
    prompt, stops = chat.prompt(model.tokenizer, shown.turns[:first]), chat.stops(model.tokenizer)
    how = generate.GenerateOptions(options.sample_tokens, 0.8, top_p=0.95, seed=options.seed, stop_ids=stops)
    run = generate.decoder(model.config, compile=False)
    yield from writing.stream(method.whole(params), run, model.tokenizer, prompt, how)


FINETUNE = Command("finetune", "go on from a model with conversations, all of it", FinetuneOptions, run)
LORA = Command("lora-finetune", "train a low-rank adapter of a model with conversations", LoraOptions, run)
DPO = Command("dpo", "train an adapter with pairs of preferred and rejected answers", DpoOptions, run)

if __name__ == "__main__":
    sys.exit(main_single(FINETUNE, prog="python -m functional_lm.finetune"))
