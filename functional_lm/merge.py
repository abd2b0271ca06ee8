"""`python -m functional_lm merge`: several models of one architecture into one."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console, files
from functional_lm.cli import Command, main_single
from functional_lm.errors import DataError, UsageError
from functional_lm.options import REQUIRED, option

if TYPE_CHECKING:
    from functional_lm.folder import Model
    from functional_lm.model.merge import Weights
    from functional_lm.tree import Tree

# Names of what `model/merge.py` has; a test holds them equal.
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare")
FROM_BASE = ("task_arithmetic", "ties", "dare")
THINNED = {"ties": 0.2, "dare": 0.5}  # density where none is given: the first is the paper's
# What models may differ in and still be merged: fields that no weight depends on.
FREE = ("attention", "checkpoint_activations", "dropout", "initializer_range")


@dataclass(frozen=True)
class MergeFlags:
    """Flags of `merge`."""

    models: tuple[str, ...] = option(REQUIRED, "model folders, or adapter folders of --base", metavar="DIR,DIR,...")
    out: str = option(REQUIRED, "model folder to write", aliases=("output_dir",))
    method: str = option("linear", "linear: weighted mean; slerp: on the arc; others: differences", choices=METHODS)
    weights: tuple[float, ...] | None = option(
        None, "a number for each model; equal shares if not given, 1 each of differences"
    )
    layer_weights: str | None = option(
        None, "other weights for leaves whose names match", metavar="'PATTERN=W,W;PATTERN=W,W'"
    )
    base: str | None = option(None, "model folder that the models came from, for differences and adapters")
    density: float | None = option(
        None, "share of each difference that is kept; 0.2 of ties, 0.5 of dare", above=0, high=1
    )
    seed: int = option(0, "seed of dare's draws", low=0)


def run(options: MergeFlags) -> int:
    given = _weights(options)
    if not any(given):
        raise UsageError("--weights are all 0, which is no model; give one that is not")
    patterns = _patterns(options)
    check(options)
    files.refuse_existing(options.out)

    from functional_lm import folder, tree

    found = opened(options)
    names = list(tree.flatten(found[0].params))
    for pattern in patterns:
        if not any(map(tree.matcher(pattern), names)):
            raise UsageError(f"--layer_weights: {pattern!r} matches no leaf, such as {names[0]!r}")
    merged = merge(options, [model.params for model in found], {"*": given, **patterns})
    for name, leaf in tree.flatten(merged).items():
        if not leaf.isfinite().all():
            raise DataError(f"the merged {name!r} holds NaN or infinite numbers; check the models and the weights")
    with files.writing_folder(options.out) as temporary:
        folder.save(temporary, merged, found[0].config, found[0].tokenizer)
        files.write_json(temporary / "merge.json", dataclasses.asdict(options))
    if options.method == "linear" and abs(sum(given) - 1) > 1e-6:
        console.note(f"the weights sum to {sum(given):g}: the model is that many times as large as a mean")
    many = f"{len(options.models)} models" if len(options.models) > 1 else "one model"
    console.say(f"the model is in {options.out}: {many} by {options.method}")
    return 0


def opened(options: MergeFlags, device: str = "cpu") -> list[Model]:
    """The models that the flags name; last the base, of methods that take differences. Raises DataError unless all are
    of one architecture and one tokenizer."""
    from functional_lm import folder

    base = None if options.base is None else folder.load(options.base, device)
    paths, found = [*options.models], [_load(path, base, device) for path in options.models]
    if base is not None and options.method in FROM_BASE:
        paths, found = [*paths, str(options.base)], [*found, base]
    for path, model in zip(paths[1:], found[1:]):
        _check_alike(paths[0], found[0], path, model)
    return found


def _load(path: str, base: Model | None, device: str) -> Model:
    """The model in a folder; of an adapter's folder, the base with it merged in."""
    from functional_lm import folder
    from functional_lm.interop.peft import load_adapter
    from functional_lm.model import lora

    if not _is_adapter(path):
        return folder.load(path, device)
    assert base is not None
    return base._replace(params=lora.merge(base.params, load_adapter(path, base.params, device=device)))


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def merge(options: MergeFlags, params: list[Tree], weights: dict[str, tuple[float, ...]]) -> Tree:
    """The trees by the method of the flags; the last one is the base where there is one."""
    import torch

    from functional_lm import keys
    from functional_lm.model import merge as arithmetic

    w: Weights = {pattern: torch.tensor(values) for pattern, values in weights.items()}
    if options.method == "linear":
        return arithmetic.linear(params, w)
    if options.method == "slerp":
        return arithmetic.slerp(params[0], params[1], w)
    *models, base = params
    if options.method == "task_arithmetic":
        return arithmetic.task_arithmetic(base, models, w)
    density = THINNED[options.method] if options.density is None else options.density
    if options.method == "ties":
        return arithmetic.ties(base, models, w, density)
    return arithmetic.dare(base, models, w, keys.key(options.seed), density)


# What is asked for, held against itself and the models ------------------------------------------------------------


def _weights(options: MergeFlags) -> tuple[float, ...]:
    count = len(options.models)
    if not count:
        raise UsageError("--models is empty; name the folders to merge, commas between")
    if options.weights is None:
        return (1.0,) * count if options.method in FROM_BASE else (1 / count,) * count
    return _right(options, options.weights, "--weights")


def _patterns(options: MergeFlags) -> dict[str, tuple[float, ...]]:
    """`a=1,0;b=0,1` as numbers by pattern. Raises UsageError."""
    found: dict[str, tuple[float, ...]] = {}
    for part in (options.layer_weights or "").split(";"):
        pattern, equals, text = part.strip().partition("=")
        if not pattern and not equals:
            continue
        try:
            values = tuple(float(word) for word in text.split(","))
        except ValueError:
            raise UsageError(f"--layer_weights: {part!r} is not PATTERN=NUMBER,NUMBER,...") from None
        found[pattern.strip()] = _right(options, values, f"--layer_weights {pattern}")
    return found


def _right(options: MergeFlags, values: tuple[float, ...], where: str) -> tuple[float, ...]:
    if len(values) != len(options.models):
        raise UsageError(f"{where} has {len(values)} numbers for {len(options.models)} models; give one for each")
    if not all(abs(value) < float("inf") for value in values):
        raise UsageError(f"{where} is {','.join(map(str, values))}; weights are finite numbers")
    if options.method == "slerp" and (min(values) < 0 or sum(values) <= 0):
        raise UsageError(f"{where} is {','.join(map(str, values))}; places on an arc are at least 0, and not all 0")
    return values


def check(options: MergeFlags) -> None:
    """What the flags say against each other, and folders that are not there. Raises UsageError, DataError."""
    adapters = [path for path in options.models if _is_adapter(path)]
    if adapters and options.base is None:
        raise UsageError(f"{adapters[0]} is an adapter; give the model it was trained on as --base")
    if options.method in FROM_BASE and options.base is None:
        raise UsageError(f"--method {options.method} needs --base, the model that the others came from")
    if options.method not in FROM_BASE and options.base is not None and not adapters:
        raise UsageError(f"--method {options.method} has no --base; {', '.join(FROM_BASE)} have one, and adapters")
    if options.density is not None and options.method not in THINNED:
        raise UsageError(f"--method {options.method} has no --density; {' and '.join(THINNED)} have one")
    least = 1 if options.method in FROM_BASE or adapters else 2
    if len(options.models) < least or (options.method == "slerp" and len(options.models) != 2):
        word = "two" if options.method == "slerp" else f"at least {least}"
        raise UsageError(f"--models names {len(options.models)}; {options.method} merges {word}")
    for path in [*options.models, *([options.base] if options.base else [])]:
        if not Path(path).is_dir():
            raise DataError(f"no model folder at {path}")


def _check_alike(first: str, one: Model, second: str, other: Model) -> None:
    """Raise DataError unless two models have one architecture and one tokenizer."""
    mine, theirs = one.config.to_json(), other.config.to_json()
    for field in mine:
        if field not in FREE and mine[field] != theirs[field]:
            raise DataError(
                f"{field} is {_shown(mine[field])} in {first} and {_shown(theirs[field])} in {second}; "
                "merge models of one shape"
            )
    if one.tokenizer.digest != other.tokenizer.digest:
        raise DataError(f"{first} and {second} have different tokenizers; merge models of one vocabulary")


def _shown(value: Any) -> str:
    return repr(value)


COMMAND = Command("merge", "make one model of several of the same architecture", MergeFlags, run)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.merge"))
