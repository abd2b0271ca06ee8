"""`python -m functional_lm.train`: from raw text to a trained model that writes.

Parse, wire, print; the mathematics is in `model/` and `training/`. torch is imported when the work begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from functional_lm import console, run_end, run_folder, trainer, training_flags, training_report, training_room
from functional_lm.cli import Command, OptionGroup, main_single
from functional_lm.errors import UsageError
from functional_lm.model import config as model_config
from functional_lm.model.config import ModelConfig
from functional_lm.prepare import describe, downloads
from functional_lm.pretraining_flags import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evaluation.likelihood import Likelihood
    from functional_lm.text.corpus import Corpus
    from functional_lm.text.dataset import View
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.training.step import Training, TrainState
    from functional_lm.tree import Tree


LEAST = 8  # tokens of a vocabulary


class Text(NamedTuple):
    """What there is to learn and to be measured on."""

    train: View
    validation: View
    validation_bytes: int


class Start(NamedTuple):
    """What is trained, and from where on."""

    tokenizer: Tokenizer
    config: ModelConfig
    params: Tree
    checkpoint: Path | None
    record: dict[str, Any]  # which run this is


class Member(NamedTuple):
    """One of the models that are trained."""

    seed: int
    numbers: dict[str, float]  # its own learning rate, ...


def run(options: TrainOptions, overrides: dict[str, Any]) -> int:
    """The whole job; returns the exit code. Wrong flags are refused before anything is written."""
    started = time.perf_counter()
    out = Path(options.out)
    options = dataclasses.replace(options, data=_source(options))
    found = _check(options, overrides)
    exactly = options.vocab_size is not None
    options = training_flags.resolve_machine(_resolve_vocabulary(options, overrides))
    training_room.check(options, _architecture(options, overrides, LEAST), len(_members(options)))
    with run_folder.held(out):
        architecture = partial(_architecture, options, overrides)
        checkpoint = run_folder.checkpoint_to_resume(options, overrides, out, architecture)
        if checkpoint is not None and run_end.is_complete(options, checkpoint, out):
            return 0
        tokenizer, config, params = _tokenizer_and_model(options, found, overrides, checkpoint, exactly)
        options = dataclasses.replace(options, block_size=options.block_size or config.max_len)
        record = run_folder.begin(options, overrides, config, tokenizer, out)
        text = _text(options, tokenizer, found, out)
        budget = training_flags.budget(options)
        report = training_report.Report(out, options.data, text.validation_bytes, budget, started)
        options = training_flags.resolve_length(options, _steps_per_epoch(options, text))
        record["inputs"]["text"] = text.train.dataset.digest
        return _train(options, Start(tokenizer, config, params, checkpoint, record), text, report)


# Before any work ------------------------------------------------------------------------------------------------------


def _source(options: TrainOptions) -> str:
    """`--data`, and what the flag of the first original adds to it."""
    if options.use_lmsys_dataset is None:
        return options.data
    given = options.data != TrainOptions.data
    return f"{options.data},{options.use_lmsys_dataset}" if given else options.use_lmsys_dataset


def _check(options: TrainOptions, overrides: dict[str, Any]) -> Corpus:
    """Contradictions between flags (each by itself has been checked already); returns the text, which is there."""
    from functional_lm.text import corpus

    given = [name for name in ("model", "preset", "config") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} both name an architecture; give one of them")
    training_flags.check(options)
    if len(_members(options)) > 1 and (options.patience or options.spike):
        what = "--patience ends" if options.patience else "--spike turns back"
        raise UsageError(f"{what} one training; a --population ends with --steps, --epochs or --minutes")
    if options.model is not None and (overrides or options.tokenizer):
        changed = next(iter(overrides), "tokenizer")
        raise UsageError(f"--model brings its own architecture and tokenizer; --{changed} cannot change them")
    longest = _architecture(options, overrides).max_len
    if options.block_size is not None and options.block_size > longest:
        raise UsageError(f"--block_size {options.block_size} is longer than the model's --max_len {longest}")
    if _is_dataset(options.data) and options.model is None and options.tokenizer is None:
        raise UsageError(f"--data {options.data} is tokens already; give the --tokenizer that made them, or a --model")
    found = corpus.find(options.data, downloads(options))
    if options.overwrite:
        read = [(name, getattr(options, name)) for name in ("model", "config", "tokenizer")]
        run_folder.check_overwrite(Path(options.out), [*read, *(("data", path) for path in found.files)])
    return found


def _is_dataset(source: str) -> bool:
    """Whether `--data` names what `prepare` wrote rather than text."""
    return Path(source).suffix == ".bin"


def _architecture(options: TrainOptions, overrides: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The architecture of `--model`, or that of `--config` or `--preset` with the flags' changes."""
    if options.model is not None:
        return model_config.read(Path(options.model) / "config.json")
    changes = {**overrides, **({} if vocab_size is None else {"vocab_size": vocab_size})}
    if options.config is not None:
        return model_config.changed(model_config.read_values(options.config), changes, options.config)
    return model_config.from_json({**model_config.preset_values(options.preset or "nano"), **changes}, "the model")


def _resolve_vocabulary(options: TrainOptions, overrides: dict[str, Any]) -> TrainOptions:
    """`--vocab_size`, or that of the architecture: how many tokens a tokenizer trained here has."""
    return dataclasses.replace(options, vocab_size=options.vocab_size or _architecture(options, overrides).vocab_size)


def _members(options: TrainOptions) -> list[Member]:
    """The models to train: one, or those of the population. Raises UsageError where the lists do not fit together."""
    lists = {name: getattr(options, name) for name in ("seeds", "learning_rates", "weight_decays")}
    given = {name: values for name, values in lists.items() if values is not None}
    counts = {f"--{name}": len(values) for name, values in given.items()}
    if options.population is not None:
        counts = {"--population": options.population, **counts}
    if not counts:
        return [Member(options.seed, {})]
    (first, count), *rest = counts.items()
    for name, other in rest:
        if other != count:
            raise UsageError(f"{first} is for {count} models and {name} for {other}; each list has a value for each")
    if count < 2:
        raise UsageError(f"{first} is for one model; a population has two or more")
    seeds = options.seeds or tuple(options.seed + (0 if given else i) for i in range(count))
    names = {"learning_rates": "learning_rate", "weight_decays": "weight_decay"}
    numbers = [{names[name]: given[name][i] for name in names if name in given} for i in range(count)]
    return [Member(seed, own) for seed, own in zip(seeds, numbers)]


# Tokenizer, model, text -----------------------------------------------------------------------------------------------


def _tokenizer_and_model(
    options: TrainOptions, found: Corpus, overrides: dict[str, Any], checkpoint: Path | None, exactly: bool
) -> tuple[Tokenizer, ModelConfig, Tree]:
    """What is trained: the parts of `--model`, or a tokenizer from the text and a fresh tree from the seed."""
    import torch

    from functional_lm import folder, keys, tree
    from functional_lm.model import transformer
    from functional_lm.text import tokenizer as tokenizers

    if options.model is not None:
        params, config, tokenizer = folder.load(options.model, options.device, torch.float32)  # masters
        training_room.check(options, config, len(_members(options)), tree.nbytes(params))
        if len(_members(options)) > 1:
            params = tree.stack([params] * len(_members(options)))
    else:
        if checkpoint is not None:
            tokenizer = tokenizers.load(checkpoint)
        elif options.tokenizer is not None:
            tokenizer = tokenizers.load(options.tokenizer)
            if exactly and options.vocab_size != tokenizer.vocab_size:
                raise UsageError(
                    f"--vocab_size is {options.vocab_size}, and the tokenizer in {options.tokenizer} has "
                    f"{tokenizer.vocab_size} ids; leave one of them out"
                )
        else:
            tokenizer = _new_tokenizer(options, found, exactly)
        config = _architecture(options, overrides, tokenizer.vocab_size)
        training_room.check(options, config, len(_members(options)))
        seeds = [member.seed for member in _members(options)]
        fresh = [transformer.init(config, keys.fold_in_name(keys.key(s, options.device), "init")) for s in seeds]
        params = tree.stack(fresh) if len(seeds) > 1 else fresh[0]
    return tokenizer, config, params


def _new_tokenizer(options: TrainOptions, found: Corpus, exactly: bool) -> Tokenizer:
    """A tokenizer of the text; smaller than the architecture's where the text has no more, unless `exactly` so many."""
    from functional_lm.text import prepare
    from functional_lm.text.subword import VocabularyTooLarge

    def trained(size: int) -> Tokenizer:
        with console.announced(f"training a {options.tokenizer_type} tokenizer of {size}"):
            return prepare.train_tokenizer(found, options.tokenizer_type, size)

    assert options.vocab_size is not None
    try:
        return trained(options.vocab_size)
    except VocabularyTooLarge as error:
        if exactly:
            raise
        console.say(f"the text has no more than {error.most} pieces, so that many")
        return trained(error.most)


def _text(options: TrainOptions, tokenizer: Tokenizer, found: Corpus, out: Path) -> Text:
    from functional_lm.text import dataset, prepare

    assert options.block_size is not None
    data, made = prepare.dataset_of(found, out / "data" / "text", tokenizer, options.deduplicate)
    console.say(describe(made))
    train, validation = dataset.split(data, options.val_fraction, options.seed)
    dataset.windows_per_epoch(train, options.block_size, options.packing)  # refuses a text shorter than one block
    return Text(train, validation, dataset.predicted_bytes(validation, tokenizer.byte_lengths))


# Training -------------------------------------------------------------------------------------------------------------


def _steps_per_epoch(options: TrainOptions, text: Text) -> float:
    from functional_lm.text import dataset

    assert options.block_size is not None
    rows = options.batch_size * options.gradient_accumulation_steps
    return dataset.windows_per_epoch(text.train, options.block_size, options.packing) / rows


def _train(options: TrainOptions, start: Start, text: Text, report: training_report.Report) -> int:
    """State, job and loop, then the report."""
    from functional_lm import tree
    from functional_lm.training import loop

    models, (tokenizer, config, params, checkpoint, record) = _members(options), start
    functions = _functions(options, config, len(models) > 1)
    state, memory = trainer.resumed(_state(options, functions, params), checkpoint, record, options.override)
    job = trainer.Job(
        config,
        tokenizer,
        functions,
        batch=lambda number: _batch(options, text.train, models, number),
        measure=_measurement(options, config, text),
        validates=len(text.validation) > 1,
        sample=lambda params: training_report.sample(options, params, config, tokenizer, text.validation, text.train),
        steps_per_epoch=_steps_per_epoch(options, text),
        members=len(models) if len(models) > 1 else 0,
        record=record,
    )
    console.say(training_report.intention(options, tree.size(params), job))
    console.say(training_report.needs(options, job))
    with trainer.recording(options, report.out, loop.steps_taken(state)) as recorder:
        outcome, best = trainer.train(options, job, state, memory, report.out, recorder)
        if job.members:
            training_report.finish_population(
                options, report, job, outcome, [(m.seed, m.numbers) for m in models], recorder
            )
        else:
            training_report.finish(options, report, job, outcome, best, recorder)
    return 0


def _functions(options: TrainOptions, config: ModelConfig, population: bool) -> Training:
    from functional_lm.training.population import vmapped

    config = dataclasses.replace(config, attention="standard") if population else config
    functions = trainer.functions(options, config)
    return vmapped(functions) if population else functions


def _state(options: TrainOptions, functions: Training, params: Tree) -> TrainState:
    """The state before the first step: of one model, or of a population with each member's own numbers."""
    import torch

    from functional_lm import keys
    from functional_lm.training.population import with_numbers

    models = _members(options)
    own = [keys.fold_in_name(keys.key(member.seed, options.device), "training") for member in models]
    if len(models) == 1:
        return functions.init(params, own[0])
    state = functions.init(params, torch.stack(own))
    return with_numbers(state, {name: [member.numbers[name] for member in models] for name in models[0].numbers})


def _batch(options: TrainOptions, view: View, models: list[Member], number: int) -> dict[str, Tensor]:
    """Microbatch `number` on the device, [B, T] or [P, B, T]: a pure function of the text, the seeds and its number."""
    import numpy as np

    from functional_lm.text import dataset

    assert options.block_size is not None
    size, block = options.batch_size, options.block_size
    seeds = [member.seed for member in models]
    drawn = {seed: dataset.batch(view, number, size, block, seed, options.packing) for seed in dict.fromkeys(seeds)}
    if len(models) == 1:
        return _tensors(options, drawn[seeds[0]])
    return _tensors(options, {name: np.stack([drawn[seed][name] for seed in seeds]) for name in drawn[seeds[0]]})


def _tensors(options: TrainOptions, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    names = ("tokens", "targets", "documents") if options.document_masking else ("tokens", "targets")
    return {name: torch.from_numpy(arrays[name]).to(options.device) for name in names}


def _measurement(options: TrainOptions, config: ModelConfig, text: Text) -> Callable[[Tree, int | None], Likelihood]:
    """`(params, batches)`: the validation likelihood over that many batches, None for the whole split."""
    import torch

    from functional_lm.compile import compiled
    from functional_lm.evaluation import likelihood
    from functional_lm.text import dataset

    scorer = compiled(likelihood.score(config, getattr(torch, options.dtype)), enabled=options.compile)
    assert options.block_size is not None
    size, block = options.batch_size, options.block_size

    def measure(params: Tree, batches: int | None) -> Likelihood:
        if len(text.validation) < 2:
            return likelihood.Likelihood(float("nan"), 0)
        arrays = itertools.islice(dataset.windows(text.validation, block, size), batches)
        total = -(-(len(text.validation) - 1) // (block * size))
        bar = tqdm(arrays, "validating", min(total, batches or total), leave=False, disable=None)
        return likelihood.measure(params, (_tensors(options, batch) for batch in bar), scorer)

    return measure


COMMAND = Command(
    "pretrain",
    "train a model from raw text",
    TrainOptions,
    run,
    extra=(OptionGroup("Architecture", ModelConfig),),
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.train"))
