"""Kernels in C++ for decoding on the CPU: compiled on first use, optional, and held by tests to the pure forms here.

    few_rows(x, weight)                    x Wᵀ for some rows of x, at the speed at which W is read
    filled_rows(query, key, value, at)     attention of one query a slot over the cache rows that are filled

`marked` puts a leaf FEW beside each matrix that they can serve; `linear` and `attention` look for it. Nothing else of
the tree changes, and without the leaf nothing here is called.

Axes: S slots, H query heads, K key/value heads, C cache length, E head width.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import compile_store, files
from functional_lm.tree import Tree

FEW = "few_rows"  # an empty leaf
ROWS = 16  # up to so many rows the kernel is faster than the library's product (measured)
WIDE = 32  # inputs come in multiples of it
HEADS = frozenset((*range(16, 144, 16), 256))  # head widths that the kernel knows

NAME = "functional_lm_decoding"
SOURCE = Path(__file__).with_name("decoding.cpp")
FLAGS = ["-O3", "-march=native"]

_library = torch.library.Library("functional_lm", "DEF")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? scales=None) -> Tensor")
_library.define("filled_rows(Tensor query, Tensor key, Tensor value, Tensor positions, int window) -> Tensor")


def few_rows(
    x: Float[Tensor, "... in"], weight: Tensor, scales: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "... out"]:
    """x Wᵀ, or x (scales W)ᵀ of an int8 W, summed in float32; x's dtype. `weight` is [out, in], contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor = torch.ops.functional_lm.few_rows(flat, weight, scales)
    return result.view(*x.shape[:-1], -1)


def filled_rows(
    query: Float[Tensor, "S H E"],
    key: Float[Tensor, "S K C E"],
    value: Float[Tensor, "S K C E"],
    positions: Int[Tensor, "S"],
    window: int = 0,
) -> Float[Tensor, "S H E"]:
    """softmax(q kᵀ / √E) v over rows 0..positions[s] of each slot, of which the last `window` if that is not 0."""
    result: Tensor = torch.ops.functional_lm.filled_rows(query, key, value, positions, window)
    return result


# The pure forms -----------------------------------------------------------------------------------------------------


def pure_few_rows(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    y = F.linear(x.float(), weight.float())
    return (y if scales is None else y * scales.float()).to(x.dtype)


def pure_filled_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int) -> Tensor:
    (slots, heads, width), (shared, length) = query.shape, key.shape[1:3]
    grouped = query.float().reshape(slots, shared, heads // shared, width)
    scores = grouped @ key.float().mT / math.sqrt(width)
    distance = positions[:, None] - torch.arange(length, device=positions.device)
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], -math.inf), -1)
    return (weights @ value.float()).reshape(query.shape).to(query.dtype)


@torch.library.register_fake("functional_lm::few_rows")
def _few_rows_shape(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("functional_lm::filled_rows")
def _filled_rows_shape(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


# Whether and where --------------------------------------------------------------------------------------------------


@functools.cache
def obstacle() -> str | None:
    """Compile and load the kernels (torch keeps them on the disk); None, or why that cannot be and what helps."""
    from torch.utils import cpp_extension

    if sys.platform == "win32":
        return "the decoding kernels are written for GCC and clang"
    machine = compile_store.digest((torch.__version__, compile_store.processor()))
    folder = compile_store.folder() / f"decoding-{machine[:16]}"
    with _ninja_on_the_path():
        try:
            cpp_extension.verify_ninja_availability()
        except RuntimeError:
            return "ninja was not found, which compiles the decoding kernels; pip install ninja"
        try:
            files.make_folder(folder)
            with FileLock(folder / "building"):  # ends with its process; torch's own, a kill would leave behind
                files.remove(folder / "lock")
                cpp_extension.load(NAME, [str(SOURCE)], FLAGS, build_directory=str(folder), is_python_module=False)
        except (RuntimeError, OSError) as error:
            return f"the decoding kernels could not be compiled: {str(error).splitlines()[0]}"
    return None


@contextmanager
def _ninja_on_the_path() -> Iterator[None]:
    """pip puts ninja beside Python, which is not on the path where an environment is used without being activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{before}{os.pathsep}{Path(sys.executable).parent}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def prepared(params: Tree, wanted: bool = True) -> Tree:
    """`marked`, where the kernels are wanted (the model is compiled) and can be had; else the tree as it is."""
    return marked(params) if wanted and obstacle() is None else params


def marked(params: Tree) -> Tree:
    """The tree with a leaf FEW beside each matrix that `few_rows` can multiply with; no copy."""
    made = {name: marked(child) if isinstance(child, dict) else child for name, child in params.items()}
    return {**made, FEW: torch.empty(0)} if _serves(made) else made


def _serves(params: Tree) -> bool:
    whole = matrix(params)
    if not isinstance(whole, Tensor) or whole.dim() != 2 or "grids" in params:
        return False
    kinds = (torch.float32, torch.bfloat16) if "weight" in params else (torch.int8,)
    return whole.device.type == "cpu" and whole.dtype in kinds and whole.is_contiguous() and whole.shape[1] % WIDE == 0


def matrix(params: Tree) -> Tensor | None:
    """The leaf that a product reads: of a quantised matrix its whole numbers."""
    return next((params[name] for name in ("packed", "qweight", "weight") if name in params), None)


def few(params: Tree, x: Float[Tensor, "... in"]) -> bool:
    """Whether this product is the kernel's."""
    return FEW in params and x.numel() <= ROWS * x.shape[-1]


def attends(query: Float[Tensor, "S H T E"]) -> bool:
    """Whether the kernel knows attention of these queries: one a slot, of a head width of its list."""
    return query.shape[-2] == 1 and query.shape[-1] in HEADS and query.dtype in (torch.float32, torch.bfloat16)
