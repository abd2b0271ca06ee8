"""Model folders: a parameter tree, its configuration and its tokenizer as Hugging Face lays them out.

config.json  model.safetensors  tokenizer.model  tokenizer_config.json  generation_config.json
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import byte_order, files, pickles, tree
from functional_lm.errors import DataError
from functional_lm.model import config as model_config
from functional_lm.model import quantize
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import OURS, to_hugging_face
from functional_lm.model.quantize import Plan
from functional_lm.model.transformer import abstract
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.byte_pairs import BytePairTokenizer
from functional_lm.text.interface import END
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree

# Keys of config.json: how the weights are quantised, and the digest of the tokenizer that the model learned with.
QUANTIZATION, TOKENIZER = "quantization", "tokenizer_sha256"


class Model(NamedTuple):
    """What a model folder holds; `params` are quantised where the folder says so (`quantize.is_quantized`)."""

    params: Tree
    config: ModelConfig
    tokenizer: Tokenizer


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantized: bool = False,
) -> Model:
    """`params, config, tokenizer` of a model folder; `dtype` casts the weights, None keeps what the file holds.

    `quantized` says that the caller can use quantised weights, which `linear` multiplies with and nothing can train.
    Raises DataError if the folder or a part of it is missing, the file's tensors are not those of the config, or they
    are quantised and the caller has not said so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        pickles.refuse(folder)
        raise DataError(f"no model folder at {folder}; train one with `python -m functional_lm.train --out {folder}`")
    config = model_config.read(folder / "config.json")
    plan = read_plan(folder)
    if plan is not None and not quantized:
        raise DataError(f"the weights in {folder} are quantised; give the model that they were made from")
    params = tree.load(folder / "model.safetensors", device)
    check(params, config, folder / "model.safetensors", plan)
    check_finite(params, folder / "model.safetensors")
    if dtype is not None:
        params = tree.cast(params, dtype)
    tokenizer = tokenizers.load(folder)
    check_tokenizer(tokenizer, config, folder)
    return Model(params, config, tokenizer)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Raise DataError for a tokenizer in a model's folder that is not the model's own.

    Another program that writes the folder again may lay a tokenizer.json out in its own way: such a one is judged by
    its size alone.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}; "
            "they do not belong together"
        )
    recorded = model_config.read_object(folder / "config.json").get(TOKENIZER)
    if recorded not in (None, tokenizer.digest) and not isinstance(tokenizer, BytePairTokenizer):
        raise DataError(
            f"{folder}: its tokenizer is another one ({tokenizer.digest[:12]}) than the model learned with "
            f"({str(recorded)[:12]}); put that one back"
        )


def read_plan(folder: str | Path) -> Plan | None:
    """How a folder's weights are quantised; None if they are not."""
    path = Path(folder) / "config.json"
    values = model_config.read_object(path).get(QUANTIZATION)
    return None if values is None else quantize.from_json(values, str(path))


def check(params: Tree, config: ModelConfig, what: str | Path, plan: Plan | None = None) -> None:
    """Raise DataError unless the tree has exactly the leaves and shapes that the configuration (and plan) describe."""
    shapes = abstract(config)
    expected: dict[str, Tensor] = tree.flatten(shapes if plan is None else quantize.quantize(shapes, plan))
    found = tree.flatten(params)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise DataError(f"{what} lacks the tensor {name!r} that its config.json describes")
        if name not in expected:
            raise DataError(f"{what} holds a tensor {name!r} that its config.json does not describe")
        if found[name].shape != expected[name].shape:
            raise DataError(
                f"{what}: {name!r} is {list(found[name].shape)}; config.json describes {list(expected[name].shape)}"
            )
        kind, wanted = found[name].dtype, expected[name].dtype
        if kind != wanted and not (kind.is_floating_point and wanted.is_floating_point):
            raise DataError(f"{what}: {name!r} is of {kind}; config.json describes {wanted}")


def check_finite(params: Tree, what: str | Path) -> None:
    """Raise DataError for a number that is none, or none that a weight could be: nothing can be computed from there."""
    flat = tree.flatten(params)
    for name, leaf in flat.items():
        if leaf.is_floating_point() and not leaf.isfinite().all():
            bad = int((~leaf.isfinite()).sum())
            if byte_order.turned(leaf):
                raise DataError(f"{what}: {name!r} {byte_order.SAID}")
            raise DataError(
                f"{what}: {name!r} holds NaN or infinite numbers ({bad} of {leaf.numel()}); the model is damaged, or "
                "its training diverged: take an earlier one"
            )
    if byte_order.absurd(leaf for leaf in flat.values() if leaf.ndim == 1):
        raise DataError(f"{what} {byte_order.SAID}")


def save(folder: str | Path, params: Tree, config: ModelConfig, tokenizer: Tokenizer, plan: Plan | None = None) -> None:
    """Write the parts of a model folder, each whole or not at all; other files of the folder stay.

    `plan` is how the parameters are quantised. Raises ValueError for quantised ones without it.
    """
    if quantize.is_quantized(params) != (plan is not None):
        raise ValueError("quantised parameters are saved with the plan of their quantisation, others without")
    folder = Path(folder)
    files.make_folder(folder)
    tree.save(params, folder / "model.safetensors")
    dtype = next(leaf.dtype for leaf in tree.leaves(params) if leaf.is_floating_point())
    save_description(folder, config, tokenizer, dtype, plan=plan)


def save_description(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    family: str | None = None,
    plan: Plan | None = None,
) -> None:
    """Everything of a model folder but its tensors, which have `dtype`.

    `family` is the model_type to write: by default the one that needs no other names for the tensors. Quantised ones
    are nobody else's.
    """
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    tokenizer.save(folder)
    ends = [tokenizer.eos_id, *(tokenizer.special_ids[name] for name in (END,) if name in tokenizer.special_ids)]
    files.write_json(folder / "generation_config.json", {**special, "eos_token_id": ends if ends[1:] else ends[0]})
    written = to_hugging_face(config, special, str(dtype).removeprefix("torch."), OURS if plan else family)
    written[TOKENIZER] = tokenizer.digest
    files.write_json(folder / "config.json", {**written, QUANTIZATION: plan.to_json()} if plan else written)
