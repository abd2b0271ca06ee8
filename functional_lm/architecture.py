"""`python -m functional_lm create-config` and `inspect`: an architecture as a file, and what it costs, before training.

Nothing here imports torch: a folder's weights are described by the header of their file.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from functional_lm import console, files
from functional_lm.cli import Command, OptionGroup, main
from functional_lm.errors import DataError, UsageError
from functional_lm.model import account
from functional_lm.model import config as model_config
from functional_lm.model.config import PRESETS, ModelConfig
from functional_lm.options import REQUIRED, option

DERIVED = (
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "initializer_range",
)  # numbers that follow from others where they are not given


@dataclass(frozen=True)
class CreateFlags:
    """Flags of `create-config`; any field of the model configuration is a flag too."""

    output: str = option(REQUIRED, "JSON file to write", aliases=("out",))
    type: str = option("nano", "named architecture to start from", choices=tuple(PRESETS), aliases=("preset",))
    overwrite: bool = option(False, "replace a file that is there")


@dataclass(frozen=True)
class InspectFlags:
    """Flags of `inspect`; any field of the model configuration is a flag too."""

    model: str | None = option(None, "model folder to describe", aliases=("model_path",), group="Model")
    preset: str | None = option(
        None, "named architecture; nano if nothing else is given", choices=tuple(PRESETS), group="Model"
    )
    config: str | None = option(None, "architecture from a JSON file", group="Model")
    batch_size: int = option(8, "rows in a microbatch of training", low=1)
    block_size: int | None = option(None, "tokens in a row; the model's max_len if not given", low=1)
    dtype: str = option("bfloat16", "precision of products and cache", choices=tuple(account.WIDTHS))
    optimizer_moments: int = option(2, "numbers that the optimizer keeps for each parameter (AdamW: 2)", low=0)
    device: str = option("cpu", "where to train: the kernel of attention goes by it", choices=("cpu", "cuda"))
    compile: bool = option(True, "a compiled step; eager ones keep several times the activations")


def run_create(options: CreateFlags, overrides: dict[str, Any]) -> int:
    """Write the whole architecture, so that a later change of the presets does not change it."""
    path = Path(options.output)
    values = {**model_config.preset_values(options.type), **overrides}
    config = model_config.from_json(values, "the model")
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; name a file in it")
    if path.exists() and not options.overwrite:
        raise UsageError(f"--output {path} is there already; choose another name, or --overwrite it")
    said = {name: value for name, value in config.to_json().items() if name not in DERIVED or values.get(name)}
    files.write_json(path, said)
    console.say(f"the configuration is in {path}: {console.count(account.parameters(config))} parameters")
    console.say(f"train with it: python -m functional_lm.train --config {shlex.quote(str(path))}")
    return 0


# inspect --------------------------------------------------------------------------------------------------------------


def run_inspect(options: InspectFlags, overrides: dict[str, Any]) -> int:
    """Print what the model is and what it costs."""
    config, title, facts = _chosen(options, overrides)
    length = options.block_size or config.max_len
    if length > config.max_len:
        raise UsageError(f"--block_size {length} is longer than the model's --max_len {config.max_len}")
    blocks = [
        [title, *facts, *_columns(_fields(config))],
        _costs(config, length),
        _training(options, config, length),
        _decoding(config, options.dtype),
    ]
    console.say("\n\n".join("\n".join(block) for block in blocks))
    return 0


def _chosen(options: InspectFlags, overrides: dict[str, Any]) -> tuple[ModelConfig, str, list[str]]:
    """The architecture, a heading, and what a folder's files say of it."""
    given = [name for name in ("model", "preset", "config") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} both name an architecture; give one of them")
    if options.model is not None:
        if overrides:
            raise UsageError(f"--model brings its own architecture; --{next(iter(overrides))} cannot change it")
        folder = Path(options.model)
        config = model_config.read(folder / "config.json")
        return config, f"Architecture of {folder}", [_weights(folder / "model.safetensors", config)]
    changes = " with " + ", ".join(f"{name} {value}" for name, value in overrides.items()) if overrides else ""
    if options.config is not None:
        values = model_config.read_values(options.config)
        config = model_config.changed(values, overrides, options.config)
        return config, f"Architecture of {options.config}{changes}", []
    name = options.preset or "nano"
    config = model_config.from_json({**model_config.preset_values(name), **overrides}, "the model")
    return config, f"Architecture {name}{changes}", []


def _weights(path: Path, config: ModelConfig) -> str:
    """A line on the weights, from the file's header. Raises DataError where they are not those of the config."""
    header = files.safetensors_header(path)
    found, described = sum(_numbers(name, entry) for name, entry in header.items()), account.parameters(config)
    if found != described:
        raise DataError(f"{path} holds {found:,} parameters; its config.json describes {described:,}")
    formats = sorted({str(entry["dtype"]) for entry in header.values()})
    return f"  {path.name}: {len(header)} tensors, {', '.join(formats)}, {console.size(path.stat().st_size)}"


def _numbers(name: str, entry: Mapping[str, Any]) -> int:
    """How many parameters a tensor stands for: of 4 bits two to a byte, of a quantised one's grids none."""
    if name.endswith((".scales", ".zeros")):
        return 0
    return math.prod(entry["shape"]) * (2 if entry["dtype"] == "U8" else 1)


def _fields(config: ModelConfig) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in dataclasses.asdict(config).items()]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _columns(pairs: Sequence[tuple[str, str]], count: int = 3) -> list[str]:
    """Names and values in columns, read downwards."""
    height = -(-len(pairs) // count)
    columns = [pairs[start : start + height] for start in range(0, len(pairs), height)]
    lines = []
    for row in range(height):
        cells = []
        for column in columns:
            if row < len(column):
                left, right = (max(len(pair[side]) for pair in column) for side in (0, 1))
                cells.append(f"{column[row][0]:{left}}  {column[row][1]:{right}}")
        lines.append(("  " + "    ".join(cells)).rstrip())
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


LABELS = {
    "embed_tokens": "embeddings (embed_tokens)",
    "embed_positions": "positions (embed_positions)",
    "self_attn": "attention (self_attn)",
    "mlp": "feed-forward (mlp)",
    "norms": "norms",
    "lm_head": "output (lm_head)",
}


def _costs(config: ModelConfig, length: int) -> list[str]:
    """Parameters and operations by subtree."""
    rows = [("Parameters and FLOPs", "a layer", "in all", "FLOPs a token, forward")]
    for part in account.parts(config):
        if part.parameters or part.multiplied:
            tied = part.name == "lm_head" and config.tie_embeddings
            held = "tied" if tied else f"{part.parameters:,}"
            each = f"{part.per_layer:,}" if part.per_layer else ""
            rows.append((LABELS[part.name], each, held, console.count(2 * part.multiplied) if part.multiplied else ""))
    rows.append((f"attention over {length} tokens", "", "", console.count(account.attention_flops(config, length))))
    total, forward = account.parameters(config), account.flops(config, length)
    rows.append(("in all", "", f"{total:,}", console.count(forward)))
    training = account.training_flops(config, length)
    again = ", checkpointing one of the layers" if config.checkpoint_activations else ""
    return [
        *_table(rows),
        f"  Training: {console.count(training)} FLOPs a token; the backward costs two forwards{again}.",
        "  A multiply-add counts 2; norms, activations and the softmax are left out.",
    ]


def _training(options: InspectFlags, config: ModelConfig, length: int) -> list[str]:
    def memory(config: ModelConfig) -> account.TrainingMemory:
        return account.training_memory(
            config,
            options.batch_size,
            length,
            account.WIDTHS[options.dtype],
            options.optimizer_moments,
            device=options.device,
            compiled=options.compile,
        )

    need, saving = memory(config), not config.checkpoint_activations
    other = memory(dataclasses.replace(config, checkpoint_activations=saving)).activations
    rows = [
        ("Training memory (estimate)", "", ""),
        ("parameters, float32", console.size(need.parameters), "all the time"),
        (f"optimizer state, {options.optimizer_moments} x float32", console.size(need.optimizer), "all the time"),
        (f"compute copy, {options.dtype}", console.size(need.copy), "till the backward"),
        ("activations", console.size(need.activations), "till the backward"),
        ("logits", console.size(need.logits), "till the backward"),
        ("gradients, float32", console.size(need.gradients), "then"),
        *([] if options.compile else [("the eager update", console.size(need.update), "then")]),
        ("at most at once", console.size(need.total), ""),
    ]
    how = "a compiled" if options.compile else "an eager"
    return [
        *_table(rows),
        f"  For {options.batch_size} rows of {length} tokens in {how} step on {options.device}.",
        f"  Activations with --checkpoint_activations {str(saving).lower()}: {console.size(other)}.",
    ]


def _decoding(config: ModelConfig, dtype: str) -> list[str]:
    width = account.WIDTHS[dtype]
    slot, thousand = (account.decoding_memory(config, 1, length, width) for length in (config.max_len, 1000))
    rows = [
        (f"Decoding memory, {dtype}", ""),
        ("weights", console.size(slot.weights)),
        (f"KV cache of a slot of {config.max_len} tokens", console.size(slot.cache)),
        ("KV cache of 1,000 tokens", console.size(thousand.cache)),
    ]
    return _table(rows)


ARCHITECTURE = (OptionGroup("Architecture", ModelConfig),)
CREATE_CONFIG = Command(
    "create-config",
    "write an architecture as a JSON file",
    CreateFlags,
    run_create,
    extra=ARCHITECTURE,
)
INSPECT = Command(
    "inspect",
    "print what a model is, and what it costs in parameters, operations and memory",
    InspectFlags,
    run_inspect,
    extra=ARCHITECTURE,
)

if __name__ == "__main__":
    sys.exit(main((CREATE_CONFIG, INSPECT), prog="python -m functional_lm.architecture"))
