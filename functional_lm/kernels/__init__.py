"""Kernels in C++ for the CPU: compiled on first use, optional, and held by tests to the pure forms here.

    product(x, blocks, outputs)            x Wᵀ for rows of x, at the speed at which W is read
    filled_rows(query, key, value, at)     attention of one query a slot over the cache rows that are filled
    low_rank(x, y, params)                 y + scale (x Aᵀ) Bᵀ, for each member of a population its own

`laid_out` gives a tree whose matrices lie in blocks, `thin` one whose adapters are `low_rank`'s (`layout.py`); `linear`
and `attention` look at what they are handed. None of them has a gradient.

Axes: S slots, H query heads, K key/value heads, C cache length, E head width, N blocks of 32 outputs, P members,
M rows, R rank.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import compile_store, files
from functional_lm.kernels.layout import BLOCKS, OUTPUTS, THIN, laid_out, rows, thin, whole
from functional_lm.tree import Tree

HEADS = frozenset((*range(16, 144, 16), 256))  # head widths that the kernel knows

__all__ = [
    "BLOCKS",
    "OUTPUTS",
    "THIN",
    "filled_rows",
    "laid_out",
    "low_rank",
    "multiplied",
    "prepared",
    "product",
    "rows",
    "thin",
    "whole",
]

NAME = "functional_lm_kernels"
WHOLE = "whole"  # a file beside a library that has been compiled to its end
SOURCES = [Path(__file__).with_name(name) for name in ("decoding.cpp", "low_rank.cpp", "vectors.h")]
# The threads are those of torch's own OpenMP, which is loaded already: no other one is linked beside it.
FLAGS = ["-O3", "-march=native", *(["-fopenmp"] if sys.platform == "linux" else [])]

_library = torch.library.Library("functional_lm", "DEF")
_library.define("product(Tensor x, Tensor blocks, Tensor? scales, SymInt outputs) -> Tensor")
_library.define("filled_rows(Tensor query, Tensor key, Tensor value, Tensor positions, int window) -> Tensor")
_library.define("low_rank(Tensor x, Tensor y, Tensor a, Tensor b, Tensor scale) -> Tensor")
_library.define("low_rank_(Tensor x, Tensor(a!) y, Tensor a, Tensor b, Tensor scale) -> ()")


def product(
    x: Float[Tensor, "... in"],
    blocks: Tensor,
    outputs: int,
    scales: Float[Tensor, "32N"] | None = None,
) -> Float[Tensor, "... out"]:
    """x Wᵀ of a matrix [out, in] in blocks, or x (scales W)ᵀ where they hold whole numbers; x's dtype.

    Sums are in float32. With whole numbers the rows of x become such too, each as fine as exact sums of int32 allow
    (`whole_rows`).
    """
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor = torch.ops.functional_lm.product(flat, blocks, scales, outputs)
    return result.view(*x.shape[:-1], outputs)


def multiplied(params: Tree, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """`product` with the leaves of `laid_out`."""
    return product(x, params[BLOCKS], params[OUTPUTS].shape[0], params.get("scales"))


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


def low_rank(
    x: Float[Tensor, "*B in"], y: Float[Tensor, "*B out"], params: Tree, transposed: bool = False
) -> Float[Tensor, "*B out"]:
    """y + scale (x Aᵀ) Bᵀ of an adapter under the names THIN, y's dtype; sums are in float32.

    Under `vmap` it is one call for all members, which what they share is not copied for; there y is used up. If
    `transposed` it is y + scale (x B) A.
    """
    a, b = (params[name] for name in THIN)
    if transposed:
        a, b = b.mT, a.mT
    rows, products = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
    scale = params["lora_scale"].float().reshape(1)
    result: Tensor = torch.ops.functional_lm.low_rank(rows.to(y.dtype), products, a[None], b[None], scale)
    return result.view(y.shape)


# The pure forms -----------------------------------------------------------------------------------------------------


def pure_product(x: Float[Tensor, "M in"], blocks: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    weight = whole(blocks, outputs)
    if scales is None:
        return F.linear(x.float(), weight.float()).to(x.dtype)
    numbers, own = whole_rows(x)
    sums = F.linear(numbers.double(), weight.double()).float()
    return (sums * (own[:, None] * scales[:outputs])).to(x.dtype)


def whole_rows(x: Float[Tensor, "M in"]) -> tuple[Int[Tensor, "M in"], Float[Tensor, "M"]]:
    """Rows as whole numbers of up to 16 bits and the float32 scale of each: x ≈ numbers scale.

    The largest is what a sum of `in` products with whole numbers up to 127 leaves of an int32.
    """
    most = x.float().abs().amax(-1)
    limit = torch.full_like(most, min(32767, (2**31 - 1) // (127 * x.shape[-1])))  # a number would be a reciprocal
    by = torch.where(most > 0, limit / most, 0.0)
    return (x.float() * by[:, None]).round().to(torch.int16), most / limit


def pure_filled_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int) -> Tensor:
    (slots, heads, width), (shared, length) = query.shape, key.shape[1:3]
    grouped = query.float().reshape(slots, shared, heads // shared, width)
    scores = grouped @ key.float().mT / math.sqrt(width)
    distance = positions[:, None] - torch.arange(length, device=positions.device)
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], -math.inf), -1)
    return (weights @ value.float()).reshape(query.shape).to(query.dtype)


def pure_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Float[Tensor, "P M out"]:
    thin = (x.float() @ a.to(x.dtype).float().mT) * scale[:, None, None]
    return (y.float() + thin @ b.float().mT).to(y.dtype)


@torch.library.register_fake("functional_lm::product")
def _product_shape(x: Tensor, blocks: Tensor, scales: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.register_fake("functional_lm::filled_rows")
def _filled_rows_shape(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, window: int) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.register_fake("functional_lm::low_rank")
def _low_rank_shape(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.register_fake("functional_lm::low_rank_")
def _nothing(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> None:
    return None


@torch.library.register_vmap("functional_lm::low_rank")
def _low_rank_of_each(info: Any, in_dims: Sequence[int | None], *given: Tensor) -> tuple[Tensor, int]:
    """One more axis becomes part of that of the members; what it does not run over is read again, not copied."""

    def together(leaf: Tensor, at: int | None) -> Tensor:
        every = leaf.expand(info.batch_size, *leaf.shape) if at is None else leaf.movedim(at, 0)
        return every.flatten(0, 1)

    x, y, *rest = map(together, given, in_dims)
    if in_dims[1] is None:
        y = y.clone()
    torch.ops.functional_lm.low_rank_(x, y, *rest)
    return y.unflatten(0, (info.batch_size, -1)), 0


# Whether and where --------------------------------------------------------------------------------------------------


@functools.cache
def obstacle() -> str | None:
    """Load the kernels, compiled on first use and kept on the disk; None, or why that cannot be and what helps."""
    if sys.platform == "win32":
        return "the kernels are written for GCC and clang"
    folder = _folder()
    with suppress(OSError):  # damaged: made anew
        if (folder / WHOLE).is_file():
            torch.ops.load_library(folder / f"{NAME}.so")
            return None
    return _compile(folder)


def are_made() -> bool:
    """Whether `obstacle` has something to load, and nothing to compile."""
    return (_folder() / WHOLE).is_file()


def _folder() -> Path:
    source = [file.read_text(encoding="utf-8") for file in SOURCES]
    made = compile_store.digest((torch.__version__, compile_store.processor(), source, FLAGS))
    return compile_store.folder() / f"kernels-{made[:16]}"


def _compile(folder: Path) -> str | None:
    from torch.utils import cpp_extension

    compiled = [str(file) for file in SOURCES if file.suffix == ".cpp"]
    with _ninja_on_the_path():
        try:
            cpp_extension.verify_ninja_availability()
        except RuntimeError:
            return "ninja was not found, which compiles the kernels; pip install ninja"
        try:
            files.make_folder(folder)
            with FileLock(folder / "building"):  # ends with its process; torch's own, a kill would leave behind
                files.remove(folder / "lock")
                cpp_extension.load(NAME, compiled, FLAGS, build_directory=str(folder), is_python_module=False)
                files.write_text(folder / WHOLE, "")
        except (RuntimeError, OSError) as error:
            return f"the kernels could not be compiled: {str(error).splitlines()[0]}"
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
    """`laid_out`, where the kernels are wanted (the model is compiled) and can be had; else the tree as it is."""
    return laid_out(params) if wanted and obstacle() is None else params


def attends(query: Float[Tensor, "S H T E"]) -> bool:
    """Whether the kernel knows attention of these queries: one a slot, of a head width of its list."""
    return query.shape[-2] == 1 and query.shape[-1] in HEADS and query.dtype in (torch.float32, torch.bfloat16)
