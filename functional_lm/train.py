"""`python -m functional_lm.train`: from raw text to a trained model that writes.

Parse, wire, print; the mathematics is in `model/` and `training/`. torch is imported when the work begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

import functional_lm
from functional_lm import console, files
from functional_lm.cli import Command, OptionGroup, main_single
from functional_lm.errors import UsageError
from functional_lm.model import account
from functional_lm.model import config as model_config
from functional_lm.model.config import ModelConfig
from functional_lm.options import option
from functional_lm.prepare import KINDS, SOURCES, describe, download_folder, downloads, max_download

if TYPE_CHECKING:
    from torch import Tensor

    from functional_lm.evaluation.likelihood import Likelihood
    from functional_lm.text.corpus import Corpus
    from functional_lm.text.dataset import View
    from functional_lm.text.tokenizer import Tokenizer
    from functional_lm.training.loop import Outcome
    from functional_lm.training.record import Recorder
    from functional_lm.training.step import Training, TrainState
    from functional_lm.tree import Tree

DEFAULT_OUT = "runs/train"
PROMPT = 16  # tokens of the validation text that the sample goes on from
# The rest may change when a run is resumed; these would make it another run.
FIXED = (
    "data", "model", "preset", "config", "tokenizer", "tokenizer_type", "vocab_size", "val_fraction", "batch_size",
    "block_size", "gradient_accumulation_steps", "optimizer", "dtype", "seed", "document_masking", "deduplicate",
    "packing",
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Flags of `pretrain`; any field of the model configuration is a flag too."""

    data: str = option("stdlib", f"text to learn: {SOURCES}; or tokens: NAME.bin", aliases=("data_path",))
    use_lmsys_dataset: str | None = option(
        None, "LMSYS-Chat-1M, a file or folder: learned beside --data, alone if that is not given"
    )
    out: str = option(DEFAULT_OUT, "run folder to write", aliases=("output_dir",))
    model: str | None = option(None, "model folder to go on from", aliases=("model_path",), group="Model")
    preset: str | None = option(None, "named architecture", choices=tuple(model_config.PRESETS), group="Model")
    config: str | None = option(None, "architecture from a JSON file", group="Model")
    tokenizer: str | None = option(None, "tokenizer file or folder to use", aliases=("tokenizer_path",), group="Text")
    tokenizer_type: str = option("bpe", "kind of tokenizer to train", choices=KINDS, group="Text")
    vocab_size: int | None = option(
        None, "vocabulary of a tokenizer trained here; the preset's if not given", low=8, high=1_000_000, group="Text"
    )
    val_fraction: float = option(0.05, "share of the tokens kept for validation", low=0, below=1, group="Text")
    deduplicate: bool = option(True, "drop documents that equal an earlier one", group="Text")
    packing: bool = option(True, "rows side by side over all text; false: (a part of) one document a row", group="Text")
    document_masking: bool = option(False, "packed documents do not attend to each other", group="Text")
    steps: int = option(900, "optimizer steps", low=1)
    batch_size: int = option(8, "rows in a microbatch", low=1)
    block_size: int | None = option(None, "tokens in a row; the model's max_len if not given", low=1)
    learning_rate: float = option(3e-3, "peak learning rate", above=0)
    min_learning_rate: float | None = option(None, "last learning rate; a tenth of the peak if not given", low=0)
    optimizer: str = option("adamw", "optimizer", choices=("adamw",))
    schedule: str = option("cosine", "learning rate over time", choices=("cosine", "constant"))
    warmup_steps: int = option(50, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.1, "decoupled decay of matrices", low=0)
    beta1: float = option(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = option(0.95, "decay of the second moment", low=0, below=1)
    grad_clip: float = option(1.0, "largest global gradient norm; 0: off", low=0)
    gradient_accumulation_steps: int = option(1, "microbatches in a step", low=1)
    dtype: str = option("auto", "precision of the products", choices=("auto", "float32", "bfloat16"), group="Machine")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), group="Machine")
    compile: bool = option(True, "compile the step (eager where no C++ compiler is found)", group="Machine")
    seed: int = option(1337, "seed of every random draw", low=0)
    eval_every: int = option(250, "steps between validations; 0: at the end only", low=0, group="Records")
    eval_batches: int = option(
        20, "batches of such a validation; the last one reads the whole split", low=1, group="Records"
    )
    save_every: int = option(250, "steps between checkpoints; 0: at the end only", low=0, group="Records")
    keep: int = option(2, "checkpoints to keep; 0: all", low=0, group="Records")
    log_every: int = option(1, "steps between lines of metrics.jsonl", low=1, group="Records")
    resume: str = option(
        "auto", "auto: go on from the newest checkpoint in --out; never; or a checkpoint", group="Records"
    )
    max_download: int = max_download()
    download_folder: str | None = download_folder()
    overwrite: bool = option(False, "replace a run that --out already holds", group="Records")
    sample_tokens: int = option(120, "tokens of the sample at the end; 0: none", low=0, group="Records")


class Text(NamedTuple):
    """What there is to learn and to be measured on."""

    train: View
    validation: View
    validation_bytes: int


def run(options: TrainOptions, overrides: dict[str, Any]) -> int:
    """The whole job; returns the exit code. Wrong flags are refused before anything is written."""
    started = time.perf_counter()
    out = Path(options.out)
    options = dataclasses.replace(options, data=_source(options))
    found = _check(options, overrides)
    options = _resolve_machine(_resolve_vocabulary(options, overrides))
    checkpoint = _checkpoint_to_resume(options, overrides, out)
    if checkpoint is not None and _is_complete(options, checkpoint, out):
        return 0
    tokenizer, config, params = _tokenizer_and_model(options, overrides, found, out, checkpoint)
    options = dataclasses.replace(options, block_size=options.block_size or config.max_len)
    text = _text(options, tokenizer, found, out)
    return _train(options, tokenizer, config, params, text, out, checkpoint, started)


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
    if options.min_learning_rate is not None and options.min_learning_rate > options.learning_rate:
        raise UsageError(
            f"--min_learning_rate {options.min_learning_rate} is above --learning_rate {options.learning_rate}"
        )
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
        _check_overwrite(options, found)
    return found


def _is_dataset(source: str) -> bool:
    """Whether `--data` names what `prepare` wrote rather than text."""
    return Path(source).suffix == ".bin"


def _check_overwrite(options: TrainOptions, found: Corpus) -> None:
    """What `--overwrite` removes is a run, and nothing that the new one reads."""
    out = Path(options.out)
    if options.resume not in ("auto", "never"):
        raise UsageError("--overwrite starts again and --resume goes on; give one of them")
    if out.exists() and any(out.iterdir()) and not _holds_model(out) and not (out / "run.json").exists():
        raise UsageError(f"--overwrite replaces a run and {out} holds something else; choose another --out")
    read = [(name, getattr(options, name)) for name in ("model", "config", "tokenizer")]
    for name, value in [*read, *(("data", path) for path in found.files)]:
        if value is not None and Path(value).resolve().is_relative_to(out.resolve()):
            raise UsageError(f"--overwrite would remove --{name} {value}; choose another --out")


def _holds_model(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def _architecture(options: TrainOptions, overrides: dict[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The architecture of `--model`, or that of `--config` or `--preset` with the flags' changes."""
    if options.model is not None:
        return model_config.read(Path(options.model) / "config.json")
    if options.config is not None:
        values = model_config.read_values(options.config)
    else:
        values = model_config.preset_values(options.preset or "nano")
    vocabulary = {} if vocab_size is None else {"vocab_size": vocab_size}
    return model_config.from_json({**values, **overrides, **vocabulary}, options.config or "the model")


def _resolve_vocabulary(options: TrainOptions, overrides: dict[str, Any]) -> TrainOptions:
    """`--vocab_size`, or that of the architecture: how many tokens a tokenizer trained here has."""
    return dataclasses.replace(options, vocab_size=options.vocab_size or _architecture(options, overrides).vocab_size)


def _resolve_machine(options: TrainOptions) -> TrainOptions:
    """`auto` replaced by what this machine has, and a word where it lacks a compiler."""
    from functional_lm import compile as compiling

    device = compiling.resolve_device(options.device)
    dtype = str(compiling.resolve_dtype(options.dtype, device)).removeprefix("torch.")
    obstacle = compiling.obstacle(device) if options.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    return dataclasses.replace(options, device=str(device), dtype=dtype, compile=options.compile and obstacle is None)


def _checkpoint_to_resume(options: TrainOptions, overrides: dict[str, Any], out: Path) -> Path | None:
    """Where to go on from, None to start; refuses to write over another run."""
    from functional_lm.training import checkpoint

    if options.overwrite:
        return None
    found = checkpoint.listing(out / "checkpoints")
    if options.resume not in ("auto", "never"):
        path = Path(options.resume)
        if not (path / "training.json").is_file():
            raise UsageError(f"--resume {path} is no checkpoint; give a folder such as RUN/checkpoints/step-00001000")
        if found and path.resolve() != found[-1].resolve():
            raise UsageError(f"{out} holds a run up to {found[-1].name}; choose another --out to go on from {path}")
        return path
    if not found and not _holds_model(out):
        return None
    if not found or options.resume == "never":
        what = "run" if found else "model"
        raise UsageError(f"{out} already holds a {what}; choose another --out, or --overwrite it")
    earlier = files.read_json(out / "run.json")
    if changes := _differences(options, overrides, earlier):
        raise UsageError(f"{out} holds another run ({'; '.join(changes)}); choose another --out, or --overwrite it")
    if earlier["options"]["compile"] != options.compile:
        console.say("compiled and eager steps differ in the last bits: this run is going to have both")
    return found[-1]


def _differences(options: TrainOptions, overrides: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Flags that would make the resumed run another one."""
    before = {name: earlier["options"].get(name) for name in FIXED} | earlier["overrides"]
    now = {name: getattr(options, name) for name in FIXED} | overrides
    if options.block_size is None:
        before.pop("block_size")
        now.pop("block_size")
    names = sorted(before.keys() | now.keys())
    return [
        f"--{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _is_complete(options: TrainOptions, checkpoint: Path, out: Path) -> bool:
    """Whether there is nothing left to do; says so."""
    done = files.read_json(checkpoint / "training.json")["step"]
    if done < options.steps or not (out / "summary.json").exists():
        return False
    loss = files.read_json(out / "summary.json")["val_loss"]
    measured = "" if loss is None else f", validation loss {loss:.4f}"
    console.say(f"{out} is trained already: {done} steps{measured}")
    console.say("more --steps go on from there, --overwrite starts again, another --out starts beside it")
    return True


# Tokenizer, model, text -----------------------------------------------------------------------------------------------


def _tokenizer_and_model(
    options: TrainOptions, overrides: dict[str, Any], found: Corpus, out: Path, checkpoint: Path | None
) -> tuple[Tokenizer, ModelConfig, Tree]:
    """What is trained: the parts of `--model`, or a tokenizer from the text and a fresh tree from the seed."""
    import torch

    from functional_lm import folder, keys
    from functional_lm.model import transformer
    from functional_lm.text import prepare
    from functional_lm.text import tokenizer as tokenizers

    if options.model is not None:
        params, config, tokenizer = folder.load(options.model, options.device, torch.float32)  # masters
    else:
        if checkpoint is not None:
            tokenizer = tokenizers.load(checkpoint)
        elif options.tokenizer is not None:
            tokenizer = tokenizers.load(options.tokenizer)
        else:
            assert options.vocab_size is not None
            with console.announced(f"training a {options.tokenizer_type} tokenizer of {options.vocab_size}"):
                tokenizer = prepare.train_tokenizer(found, options.tokenizer_type, options.vocab_size)
        config = _architecture(options, overrides, tokenizer.vocab_size)
        params = transformer.init(config, keys.fold_in_name(keys.key(options.seed, options.device), "init"))
    if options.overwrite:
        files.remove(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    record = {"options": dataclasses.asdict(options), "overrides": overrides, "model": config.to_json()}
    record["options"]["block_size"] = options.block_size or config.max_len
    files.write_json(out / "run.json", {**record, "versions": _versions()})
    return tokenizer, config, params


def _versions() -> dict[str, Any]:
    import torch

    return {
        "functional_lm": functional_lm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _text(options: TrainOptions, tokenizer: Tokenizer, found: Corpus, out: Path) -> Text:
    from functional_lm.text import dataset, prepare

    assert options.block_size is not None
    data, made = prepare.dataset_of(found, out / "data" / "text", tokenizer, options.deduplicate)
    console.say(describe(made))
    train, validation = dataset.split(data, options.val_fraction, options.seed)
    dataset.windows_per_epoch(train, options.block_size, options.packing)  # refuses a text shorter than one block
    return Text(train, validation, dataset.predicted_bytes(validation, tokenizer.byte_lengths))


# Training -------------------------------------------------------------------------------------------------------------


def _train(
    options: TrainOptions,
    tokenizer: Tokenizer,
    config: ModelConfig,
    params: Tree,
    text: Text,
    out: Path,
    checkpoint: Path | None,
    started: float,
) -> int:
    """The loop with its hooks, then the report."""
    import torch

    from functional_lm import keys, tree
    from functional_lm.training import checkpoint as checkpoints
    from functional_lm.training import loop
    from functional_lm.training.record import Recorder

    assert options.block_size is not None
    functions = _functions(options, config)
    state = functions.init(params, keys.fold_in_name(keys.key(options.seed, options.device), "training"))
    if checkpoint is not None:
        saved, _ = checkpoints.load(checkpoint, state)
        state = saved._replace(numbers=state.numbers)  # the flags of this call
        console.say(f"going on from {checkpoint}")
    microbatches = options.gradient_accumulation_steps
    plan = loop.Plan(
        options.steps,
        options.batch_size * options.block_size * microbatches,
        microbatches,
        options.eval_every if len(text.validation) > 1 else 0,
        options.save_every,
        options.log_every,
        options.compile,
    )
    console.say(
        f"{console.count(tree.size(params))} parameters, {plan.tokens_per_step} tokens a step, {options.steps} steps, "
        f"{options.dtype} on {options.device} with {torch.get_num_threads()} threads"
    )
    shape = (options.batch_size, options.block_size, microbatches)
    console.say(account.estimate_line(config, *shape, options.dtype, device=options.device, compiled=options.compile))
    measure = _measurement(options, config, text)
    with Recorder(out, int(state.step)) as recorder:

        def record(step: int, values: Mapping[str, float]) -> None:
            recorder.metrics(step, values)
            if "val_loss" in values:
                console.say(f"step {step}: validation loss {values['val_loss']:.4f}")

        hooks = loop.Hooks(
            batch=lambda number: _batch(options, text.train, number),
            record=record,
            validate=lambda state: {"val_loss": measure(state.params, options.eval_batches).loss},
            save=lambda state: _save(options, state, config, tokenizer, out),
        )
        outcome = loop.run(state, functions, plan, hooks)
        if outcome.interrupted:
            console.say(f"stopped; the same command goes on from {checkpoints.listing(out / 'checkpoints')[-1]}")
            raise KeyboardInterrupt  # the exit code of a stopped run, 130
        return _finish(options, config, tokenizer, text, out, outcome, measure, recorder, started)


def _functions(options: TrainOptions, config: ModelConfig) -> Training:
    import torch

    from functional_lm.training import optimizer, schedule, step

    last = options.learning_rate / 10 if options.min_learning_rate is None else options.min_learning_rate
    return step.training(
        config,
        optimizer.optimizer(options.optimizer),
        schedule.schedule(options.schedule, options.steps, options.warmup_steps, last / options.learning_rate),
        getattr(torch, options.dtype),
        {name: getattr(options, name) for name in step.DEFAULTS},
    )


def _batch(options: TrainOptions, view: View, number: int) -> dict[str, Tensor]:
    """Microbatch `number` on the device: a pure function of the text, the seed and its number."""
    from functional_lm.text import dataset

    assert options.block_size is not None
    arrays = dataset.batch(view, number, options.batch_size, options.block_size, options.seed, options.packing)
    return _tensors(options, arrays)


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


def _save(options: TrainOptions, state: TrainState, config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    from functional_lm.training import checkpoint

    checkpoint.save(out / "checkpoints", state, config, tokenizer, {})
    checkpoint.prune(out / "checkpoints", options.keep)


# The report -----------------------------------------------------------------------------------------------------------


def _finish(
    options: TrainOptions,
    config: ModelConfig,
    tokenizer: Tokenizer,
    text: Text,
    out: Path,
    outcome: Outcome,
    measure: Callable[[Tree, int | None], Likelihood],
    recorder: Recorder,
    started: float,
) -> int:
    """Validate on the whole split, write the model folder and its records, print a sample."""
    from functional_lm import folder, tree
    from functional_lm.training import record

    params = outcome.state.params
    likelihood = measure(params, None)
    if likelihood.tokens:
        recorder.metrics(options.steps, {"val_loss": likelihood.loss})
    summary: dict[str, Any] = {
        "val_loss": likelihood.loss,
        "val_bits_per_byte": likelihood.bits_per_byte(text.validation_bytes),
        "val_tokens": likelihood.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "wall_seconds": time.perf_counter() - started,
        "compile_seconds": outcome.compile_seconds,
        "peak_memory_bytes": _peak_memory(options.device),
        "parameters": tree.size(params),
        "steps": options.steps,
        "tokens": options.steps * options.batch_size * (options.block_size or 0) * options.gradient_accumulation_steps,
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
    }
    folder.save(out, params, config, tokenizer)
    files.write_json(out / "summary.json", {k: None if v != v else v for k, v in summary.items()})
    files.write_text(out / "README.md", _card(options, summary, out))
    record.plot(out)
    if options.sample_tokens:
        recorder.text(options.steps, "sample", _sample(options, params, config, tokenizer, text))
    console.say()
    if likelihood.tokens:
        console.say(
            f"validation loss {summary['val_loss']:.4f} nats per token, {summary['val_bits_per_byte']:.4f} bits per "
            f"byte, over all {console.count(likelihood.tokens)} tokens of the split"
        )
    console.say(
        f"{console.count(outcome.tokens_per_second)} tokens/s, {console.duration(summary['wall_seconds'])} in all"
    )
    console.say(f"the model is in {out}; go on with: python -m functional_lm.generate --model {out} --prompt TEXT")
    return 0


def _sample(options: TrainOptions, params: Tree, config: ModelConfig, tokenizer: Tokenizer, text: Text) -> str:
    """Print how the model continues the first tokens of the validation text, as it writes."""
    from functional_lm.inference import generate
    from functional_lm.inference import text as writing
    from functional_lm.text import dataset

    source = text.validation if len(text.validation) > PROMPT else text.train
    prompt = dataset.read(source, 0, PROMPT).tolist()
    how = generate.GenerateOptions(options.sample_tokens, temperature=0.8, top_p=0.95, seed=options.seed)
    console.say(f"\na sample: the model goes on from {PROMPT} tokens of the validation text\n")
    pieces = [tokenizer.decode(prompt)]
    print(pieces[0], end="", flush=True)
    for piece in writing.stream(params, generate.decoder(config, compile=False), tokenizer, prompt, how):
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


def _card(options: TrainOptions, summary: Mapping[str, Any], out: Path) -> str:
    """The model card: what it was trained on and what came of it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    return (
        f"# {out.name}\n\nA language model trained with functional_lm on `{options.data}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n![loss](loss.png)\n\n"
        f"    python -m functional_lm.generate --model {out} --prompt TEXT\n\n"
        "All flags of the run are in `run.json`, every step in `metrics.jsonl`.\n"
    )


COMMAND = Command(
    "pretrain",
    "train a model from raw text",
    TrainOptions,
    run,
    extra=(OptionGroup("Architecture", ModelConfig),),
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.train"))
