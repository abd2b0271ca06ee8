"""`python -m functional_lm quantize`: a model in 8 or 4 bits a weight, and what that costs in perplexity."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from functional_lm import console, files
from functional_lm.cli import Command, main_single
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option
from functional_lm.prepare import SOURCES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from functional_lm.evaluation.likelihood import Likelihood
    from functional_lm.folder import Model
    from functional_lm.model.quantize import Plan
    from functional_lm.text.dataset import View
    from functional_lm.tree import Tree

ROWS, LONGEST = 8, 1024  # rows in a forward, and most tokens of them


@dataclass(frozen=True)
class QuantizeFlags:
    """Flags of `quantize`."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    out: str = option(REQUIRED, "model folder to write", aliases=("output_dir",))
    bits: int = option(8, "bits a weight of the projections", choices=(8, 4))
    group_size: int = option(64, "weights that share a scale, of 4 bits; even", low=2)
    method: str = option(
        "rtn", "rtn: to the nearest; gptq: by what the layers' inputs are on --data", choices=("rtn", "gptq")
    )
    embeddings: bool = option(True, "embedding and output too, always in 8 bits: much of what a small model reads")
    targets: str | None = option(None, "names of the weights to quantise; all projections if not given", metavar="GLOB")
    data: str | None = option(None, f"text to calibrate with and to measure on: {SOURCES}", aliases=("data_path",))
    val_fraction: float = option(0.05, "share of the text that is measured on", above=0, below=1, group="Text")
    seed: int = option(1337, "seed of that split and of the calibration's rows", low=0, group="Text")
    calibration_rows: int = option(
        64, "rows to calibrate with, of the model's context or 1024 tokens", low=1, group="Text"
    )
    eval_rows: int = option(256, "most rows of that length to measure on", low=1, group="Text")


def run(options: QuantizeFlags) -> int:
    plan = _plan(options)
    if options.method == "gptq" and options.data is None:
        raise UsageError("--method gptq needs --data, text to calibrate with")
    files.refuse_existing(options.out)

    import torch

    from functional_lm import folder, tree
    from functional_lm.model import gptq, quantize

    model = folder.load(options.model)
    names = tree.flatten(model.params).keys()
    if options.targets is not None and not any(map(tree.matcher(options.targets), names)):
        raise UsageError(f"--targets {options.targets} match no weight, such as {next(iter(names))}")
    quantize.quantize(tree.to(model.params, "meta"), plan)  # refuses what cannot be, before any text is read
    train, validation = _text(options, model)
    if validation is not None:
        next(_batches(options, model, validation))  # refuses a text that has nothing to measure on
    if options.method == "gptq":
        assert train is not None
        with console.announced("calibrating"):
            tokens = torch.from_numpy(_calibration(options, model, train))
            params = gptq.gptq(model.params, tokens, model.config, plan)
    else:
        params = quantize.quantize(model.params, plan)
    with files.writing_folder(options.out) as temporary:
        folder.save(temporary, params, model.config, model.tokenizer, plan)
    before, after = tree.nbytes(model.params), tree.nbytes(params)
    numbers = 8 * after / tree.size(model.params)
    console.say(f"{console.size(before)} are {console.size(after)}, {numbers:.2f} bits a parameter")
    if validation is not None:
        _report(options, model, params, validation)
    console.say(f"the model is in {options.out}")
    return 0


def _plan(options: QuantizeFlags) -> Plan:
    from functional_lm.model.quantize import PROJECTIONS, Plan

    return Plan(options.bits, options.group_size, options.method, options.embeddings, options.targets or PROJECTIONS)


# Text -----------------------------------------------------------------------------------------------------------------


def _text(options: QuantizeFlags, model: Model) -> tuple[View | None, View | None]:
    """What is calibrated with and what is measured on: the split that training makes of the same text and seed."""
    if options.data is None:
        return None, None
    from functional_lm.text import dataset, prepare

    with tempfile.TemporaryDirectory() as temporary:  # mapped into memory, it is there as long as it is needed
        data, _ = prepare.dataset_of(options.data, Path(temporary) / "text", model.tokenizer)
    return dataset.split(data, options.val_fraction, options.seed)


def _length(model: Model) -> int:
    return min(model.config.max_len, LONGEST)


def _calibration(options: QuantizeFlags, model: Model, train: View) -> NDArray[np.int64]:
    """[N, T] tokens from all over the text."""
    from functional_lm.text import dataset

    return dataset.batch(train, 0, options.calibration_rows, _length(model), options.seed)["tokens"]


def _batches(options: QuantizeFlags, model: Model, validation: View) -> Iterator[Mapping[str, Tensor]]:
    import torch

    from functional_lm.text import dataset

    arrays = dataset.windows(validation, _length(model), min(ROWS, options.eval_rows))
    for batch in itertools.islice(arrays, -(-options.eval_rows // ROWS)):
        yield {name: torch.from_numpy(batch[name]) for name in ("tokens", "targets")}


def _report(options: QuantizeFlags, model: Model, params: Tree, validation: View) -> None:
    """Perplexity of both, computed in float32."""
    from functional_lm.evaluation import likelihood

    scorer = likelihood.score(model.config)

    def measured(tree: Tree) -> Likelihood:
        return likelihood.measure(tree, _batches(options, model, validation), scorer)

    with console.announced("measuring"):
        old, new = measured(model.params), measured(params)
    change, tokens = new.perplexity / old.perplexity - 1, console.count(new.tokens)
    console.say(
        f"perplexity {old.perplexity:.4f} before, {new.perplexity:.4f} after ({change:+.2%}), "
        f"over {tokens} tokens in windows of {_length(model)}"
    )


COMMAND = Command("quantize", "make a model's weights 8 or 4 bits wide", QuantizeFlags, run)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.quantize"))
