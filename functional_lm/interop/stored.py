"""Safetensors files one tensor at a time, in one file or in shards.

Headers are read first, so that a folder is judged before any weight moves; a file is opened afresh for each tensor, so
that no more of it than that tensor is mapped into memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import byte_order, pickles
from functional_lm.errors import DataError
from functional_lm.files import not_safetensors, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 20  # numbers looked at together


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor. Raises DataError where a number is not finite."""
        tensor = self.as_it_lies()
        if not all(part.isfinite().all() for part in tensor.flatten().split(CHUNK)):
            if byte_order.turned(tensor):
                raise DataError(f"{self.path}: {self.name!r} {byte_order.SAID}")
            raise DataError(f"{self.path}: {self.name!r} holds NaN or infinite numbers; this model is damaged")
        return tensor

    def as_it_lies(self) -> Tensor:
        """The tensor, whatever its numbers are."""
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def catalogue(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name; only headers are read.

    Raises DataError where there are no safetensors, where an index names files elsewhere or disagrees with them, or
    for numbers that are no floats.
    """
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            raise DataError(f"{folder} has {SINGLE} and {INDEX}; remove the one that does not belong to the model")
        return _shards(folder)
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    pickles.refuse(folder)
    raise DataError(f"no {SINGLE} and no {INDEX} in {folder}")


def _shards(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    try:
        places = read_json(index)["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards: it has to map names to files under 'weight_map'") from error
    for name in files:
        if not re.fullmatch(r"[\w .+=@-]{1,60}\.safetensors", str(name)):
            raise DataError(f"{index} names the shard {name!r}; a shard is a .safetensors file of the same folder")
        _check_there(folder / name)
    found: dict[str, Stored] = {}
    for name in files:
        here = _header(folder / name)
        for tensor in here:
            if places.get(tensor) != name:
                raise DataError(f"{folder / name} holds {tensor!r}, and {INDEX} does not say so")
        found |= here
    if missing := places.keys() - found.keys():
        raise DataError(f"{index} promises the tensor {min(missing)!r}, and {places[min(missing)]} lacks it")
    return found


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no file {path}; copy the whole folder again")


def _header(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise not_safetensors(path, error) from error
    for name, (_, dtype) in kinds.items():
        if dtype not in DTYPES:
            raise DataError(f"{path}: {name!r} is stored as {dtype}; only {', '.join(DTYPES)} are read")
    return {name: Stored(path, name, shape, DTYPES[dtype]) for name, (shape, dtype) in kinds.items()}
