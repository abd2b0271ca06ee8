"""Random keys: every random number is a pure function of a key, and the streams are those of `jax.random`.

A key is an int32 tensor [2], the bits of JAX's uint32[2]. Threefry-2x32 (`threefry.py`) encrypts a counter with it, and
element i of a draw reads counter i alone (JAX's "partitionable" layout); `arithmetic.py` makes numbers of the words.
Nothing here has state, so eager, compiled and vmapped calls see the same bits.

- `key`, `split`, `fold_in`, `bits`, `uniform`, `bernoulli`, `randint` and `permutation` are equal bit for bit to
  jax.random (jitted, on a CPU) and to themselves in every mode. float64 and int64 are what JAX draws with x64 enabled.
- `normal`, `truncated_normal`, `gumbel` and `categorical` start from the same bits and pass through log and erf, whose
  last bits differ between libraries, processors and modes: they agree within a few ulp (of 1, where they are small).

A key is used once: draw from it, or derive from it, never both. Batches of keys go through `torch.vmap`. Arguments
named low, high, p and data are Python numbers or 0-d tensors; a tensor never causes a recompilation.

Axes: draws have the shape that was asked for; `split` returns [num, 2].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int32, Integer, Shaped
from torch import Tensor

from functional_lm.arithmetic import (
    clipped_span,
    erfinv,
    fraction,
    mantissa,
    scalar,
    scale,
    unsigned_remainder,
    work_dtype,
)
from functional_lm.errors import UsageError
from functional_lm.threefry import WORD, Key, Words, counters, encrypted, signed, threefry

Scalar: TypeAlias = float | int | Float[Tensor, ""]
_SIGN = -0x80000000  # as an xor mask: turns unsigned order into signed order

# Eager mode walks through large draws in blocks: some 130 passes over a block that stays in the processor's cache cost
# half of what they cost in memory, and the temporaries stay small. A GPU only needs the latter.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 25


# ---------------------------------------------------------------------------------------------------------------- keys


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key of a seed: its 64 bits in two's complement, high word first (`jax.random.key` with x64 enabled).

    Without x64 JAX sees only the low 32 bits, so the two agree for seeds from 0 to 2**32 - 1.
    Raises UsageError when `seed` does not fit int64.
    """
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed {seed} does not fit 64 bits: choose one from {-(2**63)} to {2**63 - 1}")
    return torch.tensor([signed(seed >> 32), signed(seed)], dtype=torch.int32, device=device)


def split(key: Key, num: int = 2) -> Int32[Tensor, "num 2"]:
    """`num` new keys. Row i is `fold_in(key, i)`, whatever `num` is: so split a key or fold into it, never both."""
    return torch.stack(threefry(key, *counters(0, num, key.device)), dim=-1)


def fold_in(key: Key, data: int | Integer[Tensor, ""]) -> Key:
    """A new key for one datum: a Python int from -2**31 to 2**32 - 1 or a 0-d integer tensor, taken modulo 2**32.

    A tensor may be traced (a step counter). For a whole table of keys: `torch.vmap(fold_in, (None, 0))(key, data)`.
    """
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.dim():
            raise TypeError(f"fold_in: data is {data.dtype} of shape {tuple(data.shape)}, not a 0-d integer tensor")
        return torch.stack(threefry(key, 0, data.to(torch.int32)))
    if not -(2**31) <= data < 2**32:
        raise UsageError(f"fold_in: {data} does not fit 32 bits: fold its high and low words in one after the other")
    return torch.stack(threefry(key, 0, signed(data)))


def fold_in_name(key: Key, name: str) -> Key:
    """A new key for a name such as "model.layers.0.mlp.up_proj.weight": folds in its 32-bit FNV-1a hash.

    Every leaf of a tree draws from the key of its own path, so neither order nor subset changes a draw.
    """
    return fold_in(key, name_hash(name))


def name_hash(name: str) -> int:
    """The 32-bit FNV-1a hash of a name: what `fold_in_name` folds in, for tables of names."""
    digest = 0x811C9DC5
    for byte in name.encode():  # plain arithmetic, because Dynamo traces it
        digest = ((digest ^ byte) * 0x01000193) & WORD
    return digest


# --------------------------------------------------------------------------------------------------- bits and uniforms


def bits(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.int32) -> Int[Tensor, "*shape"]:
    """Random words: int32 or int64 tensors that hold the bits of `jax.random.bits` for uint32 or uint64."""
    if dtype == torch.int32:
        return _draw(key, shape, lambda words: words[2])
    if dtype == torch.int64:
        return _draw(key, shape, lambda words: (words[0].long() << 32) | (words[1].long() & WORD))
    raise TypeError(f"bits: dtype is {dtype}, not torch.int32 or torch.int64")


def uniform(
    key: Key,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    low: Scalar = 0.0,
    high: Scalar = 1.0,
) -> Float[Tensor, "*shape"]:
    """Uniform draws from [low, high): low + (high - low) * k / 2**b, rounded once, for a random b-bit integer k.

    b is 23, 52, 10 and 7 for float32, float64, float16 and bfloat16 (which so has 128 values). Where the range is
    narrow against |low|, rounding can return `high` itself, as in JAX. float16 and bfloat16 equal JAX on [0, 1) only:
    elsewhere JAX rounds twice. No gradient passes through low and high: scale a draw from [0, 1) where one must.
    """
    _, kept = fraction(dtype)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) == (0, 1):
        return _draw(key, shape, lambda words: mantissa(words, dtype).to(dtype) * 2.0**-kept)
    work = work_dtype(dtype)
    low, high = scalar(low, work, key.device), scalar(high, work, key.device)
    return _draw(key, shape, lambda words: scale(mantissa(words, dtype), low, high, dtype))


def bernoulli(
    key: Key, p: float | int | Float[Tensor, "*#shape"] = 0.5, shape: Sequence[int] | None = None
) -> Bool[Tensor, "*shape"]:
    """True with probability p, at the resolution of a uniform of p's dtype (float32 when p is a number).

    `shape` defaults to that of p, which must broadcast to it.
    """
    p = scalar(p, torch.float32, key.device) if not isinstance(p, Tensor) else p
    return uniform(key, p.shape if shape is None else shape, p.dtype) < p


def randint(
    key: Key,
    shape: Sequence[int],
    low: int | Integer[Tensor, ""],
    high: int | Integer[Tensor, ""],
    dtype: torch.dtype = torch.int32,
) -> Integer[Tensor, "*shape"]:
    """Integers from [low, high), bounds clipped to the dtype (high to its maximum + 1); `low` when the range is empty.

    int8, int16, uint8 and int32 read two 32-bit words an element, int64 two 64-bit words (so int32 and int64 draw
    different numbers). Some values are likelier than others by a factor of up to 1 + span / 2**64 (int64: 2**128), and,
    as JAX's multiplier wraps to 0 there, of up to 1 + span / 2**32 (2**64) where the span exceeds 2**16 (2**32).
    """
    if dtype not in (torch.int8, torch.int16, torch.uint8, torch.int32, torch.int64):
        raise TypeError(f"randint: dtype is {dtype}, not int8, int16, uint8, int32 or int64")
    start, span = clipped_span(low, high, dtype, key.device)
    first, second = split(key).unbind()
    if dtype == torch.int64:
        upper, lower = bits(first, shape, dtype), bits(second, shape, dtype)
        factor = unsigned_remainder(torch.full_like(span, 2**32), span)
        factor = unsigned_remainder(factor * factor, span)
        offset = unsigned_remainder(upper, span) * factor + unsigned_remainder(lower, span)
        return start + unsigned_remainder(offset, span)
    upper, lower = bits(first, shape).long() & WORD, bits(second, shape).long() & WORD
    factor = 2**16 % span
    factor = ((factor * factor) & WORD) % span
    offset = ((upper % span) * factor + lower % span) & WORD
    return (start + offset % span).to(dtype)


def permutation(key: Key, x: int | Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "n *rest"]:
    """A random order of 0..x-1 (int64), or of the rows of the tensor x.

    Sorts by random 32-bit words, as often as it takes for ties to leave no trace (JAX's rule: one round up to some
    1600 elements, two up to 2.6 million, then three). Needs some 40 bytes of memory an element.
    """
    if isinstance(x, Tensor) and not x.dim():
        raise TypeError("permutation: x is a 0-d tensor: pass a Python int or a tensor with rows")
    size = x.shape[0] if isinstance(x, Tensor) else x
    order = torch.arange(size, device=key.device)
    for _ in range(math.ceil(3 * math.log(max(1, size)) / math.log(WORD))):
        key, word_key = split(key).unbind()
        order = order.gather(0, torch.sort(bits(word_key, (size,)) ^ _SIGN, stable=True).indices)
    return x.index_select(0, order.to(x.device)) if isinstance(x, Tensor) else order


# ------------------------------------------------------------------------------------------------- through log and erf


def normal(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard normal draws: sqrt(2) * erfinv(u), u uniform on the open interval (-1, 1).

    float16 and bfloat16 have the resolution of their uniforms, as in JAX: a bfloat16 draw is one of 128 values within
    +-2.7. Draw float32 and cast where that is too coarse.
    """
    _, kept = fraction(dtype)
    work = work_dtype(dtype)
    low = 2.0 ** -(kept + 1) - 1  # the number after -1; the sum below is exact

    def finish(words: Words) -> Tensor:
        u = mantissa(words, dtype).to(work) * 2.0 ** (1 - kept) + low
        return (math.sqrt(2) * erfinv(u)).to(dtype)

    return _draw(key, shape, finish)


def truncated_normal(
    key: Key,
    low: Scalar,
    high: Scalar,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """Standard normal draws conditioned on the open interval (low, high). float16 and bfloat16 round float32 draws."""
    work = work_dtype(dtype)
    low, high = scalar(low, work, key.device), scalar(high, work, key.device)
    edge_low, edge_high = torch.erf(low / math.sqrt(2)), torch.erf(high / math.sqrt(2))
    inside = (
        torch.nextafter(low, torch.full_like(low, math.inf)),
        torch.nextafter(high, -torch.full_like(high, math.inf)),
    )

    def finish(words: Words) -> Tensor:
        u = scale(mantissa(words, work), edge_low, edge_high, work)
        return (math.sqrt(2) * erfinv(u)).clamp(*inside).to(dtype)

    return _draw(key, shape, finish)


def gumbel(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard Gumbel draws, -log(-log(u)). float16 and bfloat16 round float32 draws."""
    work = work_dtype(dtype)
    _, kept = fraction(work)

    def finish(words: Words) -> Tensor:
        u = (mantissa(words, work).to(work) * 2.0**-kept).clamp(min=torch.finfo(work).tiny)
        return -torch.log(-torch.log(u)).to(dtype)

    return _draw(key, shape, finish)


def categorical(
    key: Key, logits: Float[Tensor, "*batch"], dim: int = -1, shape: Sequence[int] | None = None
) -> Int[Tensor, "*shape"]:
    """Indices (int64) drawn with probabilities softmax(logits, dim), by the Gumbel-max trick.

    `shape` defaults to that of logits without `dim`, and may put further axes of independent draws before it.
    Logits of -inf are never drawn (unless all are: index 0). float16 and bfloat16 logits get float32 noise; JAX's
    would be as coarse as they are.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    dim = dim % logits.dim()
    batch = logits.shape[:dim] + logits.shape[dim + 1 :]
    noise = list(batch if shape is None else shape)
    noise.insert(len(noise) - len(batch) + dim, logits.shape[dim])
    return (gumbel(key, noise, logits.dtype) + logits).argmax(dim - logits.dim())


def _draw(key: Key, shape: Sequence[int], finish: Callable[[Words], Tensor]) -> Tensor:
    """`finish`, an elementwise function, of the words of every element of `shape`."""
    size = math.prod(shape)
    block = _CPU_BLOCK if key.device.type == "cpu" else _DEVICE_BLOCK
    if torch.compiler.is_compiling() or size <= block:
        return finish(encrypted(key, *counters(0, size, key.device))).reshape(shape)
    draw = finish(encrypted(key, 0, 0)).new_empty(size)  # made from a draw, so that under vmap it is mapped as well
    for start in range(0, size, block):
        stop = min(start + block, size)
        draw[start:stop] = finish(encrypted(key, *counters(start, stop, key.device)))
    return draw.reshape(shape)
