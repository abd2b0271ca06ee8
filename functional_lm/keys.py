"""Random keys: every random number is a pure function of a key, and the streams are those of `jax.random`.

A key is an int32 tensor [2], the bits of JAX's uint32[2]. Threefry-2x32 with 20 rounds (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) encrypts a counter with it, and element i of a draw reads counter i alone
(JAX's "partitionable" layout). Nothing here has state, so eager, compiled and vmapped calls see the same bits.

- `key`, `split`, `fold_in`, `bits`, `uniform`, `bernoulli`, `randint` and `permutation` are equal bit for bit to
  jax.random (jitted, on a CPU) and to themselves in every mode. float64 and int64 are what JAX draws with x64 enabled.
- `normal`, `truncated_normal`, `gumbel` and `categorical` start from the same bits and pass through log and erf, whose
  last bits differ between libraries, processors and modes: they agree within a few ulp (of 1, where they are small).

A key is used once: draw from it, or derive from it, never both. Batches of keys go through `torch.vmap`. Arguments
named low, high, p and data are Python numbers or 0-d tensors; a tensor never causes a recompilation.

Axes: draws have the shape that was asked for; `split` returns [num, 2].
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int32, Integer, Shaped
from torch import Tensor

from functional_lm.errors import UsageError

Key: TypeAlias = Int32[Tensor, "2"]
Scalar: TypeAlias = float | int | Float[Tensor, ""]
Words: TypeAlias = tuple[Tensor, Tensor, Tensor]  # Threefry's two words of each counter, and their exclusive or

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # keeps the third word of an all-zero key from being zero
_WORD = 0xFFFFFFFF
_SIGN = -0x80000000  # as an xor mask: turns unsigned order into signed order

# Eager mode walks through large draws in blocks: some 130 passes over a block that stays in the processor's cache cost
# half of what they cost in memory, and the temporaries stay small. A GPU only needs the latter.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 25

# Where a random word keeps the fraction of a float: dtype -> (bits dropped on the right, bits kept).
_FRACTION = {torch.float32: (9, 23), torch.float16: (6, 10), torch.bfloat16: (1, 7), torch.float64: (12, 52)}


# ---------------------------------------------------------------------------------------------------------------- keys


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key of a seed: its 64 bits in two's complement, high word first (`jax.random.key` with x64 enabled).

    Without x64 JAX sees only the low 32 bits, so the two agree for seeds from 0 to 2**32 - 1.
    Raises UsageError when `seed` does not fit int64.
    """
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed {seed} does not fit 64 bits: choose one from {-(2**63)} to {2**63 - 1}")
    return torch.tensor([_signed(seed >> 32), _signed(seed)], dtype=torch.int32, device=device)


def split(key: Key, num: int = 2) -> Int32[Tensor, "num 2"]:
    """`num` new keys. Row i is `fold_in(key, i)`, whatever `num` is: so split a key or fold into it, never both."""
    return torch.stack(threefry(key, *_counters(0, num, key.device)), dim=-1)


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
    return torch.stack(threefry(key, 0, _signed(data)))


def fold_in_name(key: Key, name: str) -> Key:
    """A new key for a name such as "model.layers.0.mlp.up_proj.weight": folds in its 32-bit FNV-1a hash.

    Every leaf of a tree draws from the key of its own path, so neither order nor subset changes a draw.
    """
    return fold_in(key, name_hash(name))


def name_hash(name: str) -> int:
    """The 32-bit FNV-1a hash of a name: what `fold_in_name` folds in, for tables of names."""
    digest = 0x811C9DC5
    for byte in name.encode():  # plain arithmetic, because Dynamo traces it
        digest = ((digest ^ byte) * 0x01000193) & _WORD
    return digest


def threefry(key: Key, x0: Int32[Tensor, "*n"] | int, x1: Int32[Tensor, "*n"] | int) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of counter words (x0, x1), in wrapping int32 arithmetic; two int32 tensors of their shape."""
    return _words(key, x0, x1)[:2]


# --------------------------------------------------------------------------------------------------- bits and uniforms


def bits(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.int32) -> Int[Tensor, "*shape"]:
    """Random words: int32 or int64 tensors that hold the bits of `jax.random.bits` for uint32 or uint64."""
    if dtype == torch.int32:
        return _draw(key, shape, lambda words: words[2])
    if dtype == torch.int64:
        return _draw(key, shape, lambda words: (words[0].long() << 32) | (words[1].long() & _WORD))
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
    _, kept = _fraction(dtype)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) == (0, 1):
        return _draw(key, shape, lambda words: _mantissa(words, dtype).to(dtype) * 2.0**-kept)
    work = _work(dtype)
    low, high = _scalar(low, work, key.device), _scalar(high, work, key.device)
    return _draw(key, shape, lambda words: _scale(_mantissa(words, dtype), low, high, dtype))


def bernoulli(
    key: Key, p: float | int | Float[Tensor, "*#shape"] = 0.5, shape: Sequence[int] | None = None
) -> Bool[Tensor, "*shape"]:
    """True with probability p, at the resolution of a uniform of p's dtype (float32 when p is a number).

    `shape` defaults to that of p, which must broadcast to it.
    """
    p = _scalar(p, torch.float32, key.device) if not isinstance(p, Tensor) else p
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
    start, span = _span(low, high, dtype, key.device)
    first, second = split(key).unbind()
    if dtype == torch.int64:
        upper, lower = bits(first, shape, dtype), bits(second, shape, dtype)
        factor = _unsigned_remainder(torch.full_like(span, 2**32), span)
        factor = _unsigned_remainder(factor * factor, span)
        offset = _unsigned_remainder(upper, span) * factor + _unsigned_remainder(lower, span)
        return start + _unsigned_remainder(offset, span)
    upper, lower = bits(first, shape).long() & _WORD, bits(second, shape).long() & _WORD
    factor = 2**16 % span
    factor = ((factor * factor) & _WORD) % span
    offset = ((upper % span) * factor + lower % span) & _WORD
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
    for _ in range(math.ceil(3 * math.log(max(1, size)) / math.log(_WORD))):
        key, word_key = split(key).unbind()
        order = order.gather(0, torch.sort(bits(word_key, (size,)) ^ _SIGN, stable=True).indices)
    return x.index_select(0, order.to(x.device)) if isinstance(x, Tensor) else order


# ------------------------------------------------------------------------------------------------- through log and erf


def normal(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard normal draws: sqrt(2) * erfinv(u), u uniform on the open interval (-1, 1).

    float16 and bfloat16 have the resolution of their uniforms, as in JAX: a bfloat16 draw is one of 128 values within
    +-2.7. Draw float32 and cast where that is too coarse.
    """
    _, kept = _fraction(dtype)
    work = _work(dtype)
    low = 2.0 ** -(kept + 1) - 1  # the number after -1; the sum below is exact

    def finish(words: Words) -> Tensor:
        u = _mantissa(words, dtype).to(work) * 2.0 ** (1 - kept) + low
        return (math.sqrt(2) * _erfinv(u)).to(dtype)

    return _draw(key, shape, finish)


def truncated_normal(
    key: Key,
    low: Scalar,
    high: Scalar,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """Standard normal draws conditioned on the open interval (low, high). float16 and bfloat16 round float32 draws."""
    work = _work(dtype)
    low, high = _scalar(low, work, key.device), _scalar(high, work, key.device)
    edge_low, edge_high = torch.erf(low / math.sqrt(2)), torch.erf(high / math.sqrt(2))
    inside = (
        torch.nextafter(low, torch.full_like(low, math.inf)),
        torch.nextafter(high, -torch.full_like(high, math.inf)),
    )

    def finish(words: Words) -> Tensor:
        u = _scale(_mantissa(words, work), edge_low, edge_high, work)
        return (math.sqrt(2) * _erfinv(u)).clamp(*inside).to(dtype)

    return _draw(key, shape, finish)


def gumbel(key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Standard Gumbel draws, -log(-log(u)). float16 and bfloat16 round float32 draws."""
    work = _work(dtype)
    _, kept = _fraction(work)

    def finish(words: Words) -> Tensor:
        u = (_mantissa(words, work).to(work) * 2.0**-kept).clamp(min=torch.finfo(work).tiny)
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


# ------------------------------------------------------------------------------------------------------------ threefry


def _signed(value: int) -> int:
    """The low 32 bits of `value` as an int32."""
    return ((value + 2**31) & _WORD) - 2**31


def _counters(start: int, stop: int, device: torch.device) -> tuple[Tensor | int, Tensor]:
    """The counters start..stop-1 as (high, low) int32 words."""
    if stop <= 2**31:
        return 0, torch.arange(start, stop, dtype=torch.int32, device=device)
    index = torch.arange(start, stop, device=device)
    return (index >> 32).to(torch.int32), index.to(torch.int32)


def _draw(key: Key, shape: Sequence[int], finish: Callable[[Words], Tensor]) -> Tensor:
    """`finish`, an elementwise function, of the words of every element of `shape`."""
    size = math.prod(shape)
    block = _CPU_BLOCK if key.device.type == "cpu" else _DEVICE_BLOCK
    if torch.compiler.is_compiling() or size <= block:
        return finish(_words(key, *_counters(0, size, key.device))).reshape(shape)
    draw = finish(_words(key, 0, 0)).new_empty(size)  # made from a draw, so that under vmap it is mapped as well
    for start in range(0, size, block):
        stop = min(start + block, size)
        draw[start:stop] = finish(_words(key, *_counters(start, stop, key.device)))
    return draw.reshape(shape)


def _words(key: Key, x0: Tensor | int, x1: Tensor | int) -> Words:
    """The words of the counters (x0, x1)."""
    if not torch.compiler.is_compiling():
        return _encrypt(key[0], key[1], x0, x1)
    counters = (torch.full_like(key[0], x) if isinstance(x, int) else x for x in (x0, x1))
    return _encrypt_compiled(key[0], key[1], *counters)


def _rotate(x: Any, turn: int, left: Any = operator.lshift, right: Any = operator.rshift, constant: Any = int) -> Any:
    """x rotated left. A right shift of int32 repeats the sign bit, so the bits that come round are masked."""
    return left(x, constant(turn)) | (right(x, constant(32 - turn)) & constant((1 << turn) - 1))


def _encrypt(k0: Any, k1: Any, x0: Any, x1: Any, rotate: Any = _rotate, constant: Any = int) -> tuple[Any, Any, Any]:
    """Threefry's rounds on anything that has int32 operators: tensors, or the values of an Inductor kernel."""
    schedule = (k0, k1, k0 ^ k1 ^ constant(_PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = rotate(x1, turn) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + constant(group + 1))
    return x0, x1, x0 ^ x1


# Each round reads each word twice, and Inductor expands such a chain afresh for every reader: some twenty seconds of
# compiling a draw. As one operator with a kernel body of its own it takes a quarter of one, and still fuses.
_encrypt_compiled = torch.library.custom_op(
    "functional_lm::threefry",
    _encrypt,
    mutates_args=(),
    schema="(Tensor k0, Tensor k1, Tensor x0, Tensor x1) -> (Tensor, Tensor, Tensor)",
)


@_encrypt_compiled.register_fake
def _(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> Words:
    _teach_inductor()  # here, because tracing always passes here and importing Inductor is slow
    like = k0.new_empty(torch.broadcast_shapes(k0.shape, k1.shape, x0.shape, x1.shape))
    return like, torch.empty_like(like), torch.empty_like(like)


def _vmap_elementwise(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
    """vmap's rule of an elementwise operator: mapped axes to the front, and ranks made equal behind them."""
    rank = max(x.dim() - (dim is not None) for x, dim in zip(args, in_dims))
    aligned = list(args)
    for i, dim in enumerate(in_dims):
        if dim is not None:
            x = args[i].movedim(dim, 0)
            aligned[i] = x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])
    result = op(*aligned)
    return result, 0 if isinstance(result, Tensor) else (0,) * len(result)


_encrypt_compiled.register_vmap(functools.partial(_vmap_elementwise, _encrypt_compiled))


@functools.cache
def _teach_inductor() -> None:
    """Gives the operator its kernel body. Without it (Inductor's interior is not a promise) it runs unfused."""
    try:
        from torch._inductor.lowering import make_pointwise, register_lowering
        from torch._inductor.virtualized import ops

        def body(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any, Any]:
            constant = functools.cache(functools.partial(ops.constant, dtype=torch.int32))
            shifts: dict[str, Any] = {"left": ops.bitwise_left_shift, "right": ops.bitwise_right_shift}
            return _encrypt(k0, k1, x0, x1, functools.partial(_rotate, **shifts, constant=constant), constant)

        outputs = [make_pointwise(lambda *words, i=i: body(*words)[i]) for i in range(3)]
        lower = register_lowering(torch.ops.functional_lm.threefry, broadcast=True, type_promotion_kind=None)
        lower(lambda *words: tuple(output(*words) for output in outputs))
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(f"random draws will not fuse into compiled kernels: {error}", stacklevel=2)


# --------------------------------------------------------------------------------------------- rounding and remainders


def _fraction(dtype: torch.dtype) -> tuple[int, int]:
    if dtype not in _FRACTION:
        raise TypeError(f"dtype is {dtype}, not float32, float64, float16 or bfloat16")
    return _FRACTION[dtype]


def _mantissa(words: Words, dtype: torch.dtype) -> Tensor:
    """The random fraction of a float of `dtype`, as an integer."""
    dropped, kept = _fraction(dtype)
    if dtype == torch.float64:
        return ((words[0].long() & _WORD) << 20) | ((words[1].long() & _WORD) >> dropped)
    return (words[2] >> dropped) & (2**kept - 1)


def _work(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalar(value: float | int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor of `dtype`."""
    if isinstance(value, Tensor):
        if value.dim():
            raise TypeError(f"a bound is a tensor of shape {tuple(value.shape)}: pass a number or a 0-d tensor")
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _scale(mantissa: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """low + (high - low) * mantissa / 2**b in one rounding, the value of a fused multiply-add.

    torch has no such function, compilers fuse where they like, and JAX's compiled uniform is fused. Here every product
    is exact, so that fusing it changes nothing and the value is the same everywhere.
    """
    _, kept = _fraction(dtype)
    if dtype != torch.float64 and low.device.type != "mps":  # which has no float64
        product = (mantissa.double() * 2.0**-kept) * (high - low).double()
        return _round_to_odd(product, low.double()).maximum(low.double()).to(dtype)
    aligned = mantissa << (_fraction(low.dtype)[1] - kept)
    return (_scale_compiled if torch.compiler.is_compiling() else _scale_in_halves)(aligned, low, high).to(dtype)


def _scale_in_halves(mantissa: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`_scale` within one dtype, by Boldo and Melquiond's emulation (IEEE Transactions on Computers 57, 2008)."""
    _, kept = _fraction(low.dtype)
    half = kept // 2
    part_high = (mantissa >> half).to(low.dtype) * 2.0 ** (half - kept)
    part_low = (mantissa & (2**half - 1)).to(low.dtype) * 2.0**-kept
    span = high - low
    word = span.view(_integer(span.dtype))
    span_high = (word & -(1 << (kept + 1) // 2)).view(span.dtype)
    span_low = span - span_high
    cross, cross_rest = _two_sum(part_high * span_low, part_low * span_high)
    product, rest = _two_sum(part_high * span_high, cross)
    product, rest = _two_sum(product, rest + (part_low * span_low + cross_rest))
    tail, tail_rest = _two_sum(low, rest)
    total, total_rest = _two_sum(product, tail)
    return torch.maximum(total + _round_to_odd(tail_rest, total_rest), low)


# Expanded by Inductor it would take ten seconds to compile.
_scale_compiled = torch.library.custom_op(
    "functional_lm::scale",
    _scale_in_halves,
    mutates_args=(),
    schema="(Tensor mantissa, Tensor low, Tensor high) -> Tensor",
)
_scale_compiled.register_vmap(functools.partial(_vmap_elementwise, _scale_compiled))


@_scale_compiled.register_fake
def _(mantissa: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return low.new_empty(torch.broadcast_shapes(mantissa.shape, low.shape, high.shape))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded a + b and its error, which together are exactly a + b (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _round_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where an inexact sum takes the neighbour with an odd mantissa: a later rounding then errs no more."""
    total, error = _two_sum(a, b)
    word = total.view(_integer(a.dtype))
    step = torch.where((error > 0) == (total > 0), 1, -1).to(word.dtype)
    return torch.where((error != 0) & (word & 1 == 0), word + step, word).view(a.dtype)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _span(low: int | Tensor, high: int | Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """randint's clipped low and max(1, high - low) as 0-d int64 tensors; for int64 the span wraps at 2**64."""
    info = torch.iinfo(dtype)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        low = min(max(low, info.min), info.max)
        span = max(1, min(max(high, info.min), info.max + 1) - low)
        span = ((span + 2**63) % 2**64) - 2**63
        return torch.full((), low, device=device), torch.full((), span, device=device)
    limit = min(info.max + 1, 2**63 - 1)
    start, stop = (
        bound.long().clamp(info.min, top)
        if isinstance(bound, Tensor)
        else torch.full((), min(max(bound, info.min), top), device=device)
        for bound, top in ((low, info.max), (high, limit))
    )
    return start, torch.where(stop > start, stop - start, 1)


def _unsigned_remainder(x: Tensor, n: Tensor) -> Tensor:
    """x mod n for uint64 values held in int64, where n = 0 stands for 2**64 (Warren, "Hacker's Delight", 9-3)."""
    small = n.clamp(min=1)
    rest = x - ((((x >> 1) & (2**63 - 1)) // small) << 1) * small
    rest = torch.where(_unsigned_less(rest, small), rest, rest - small)
    return torch.where(n > 0, rest, torch.where(_unsigned_less(x, n), x, x - n))


def _unsigned_less(a: Tensor, b: Tensor) -> Tensor:
    return (a ^ -(2**63)) < (b ^ -(2**63))


# -------------------------------------------------------------------------------------------------------------- erfinv


def _erfinv(x: Tensor) -> Tensor:
    """erfinv for |x| <= 1 by Giles' polynomials ("Approximating the erfinv function", GPU Computing Gems 2, 2011).

    torch.erfinv is closer to the truth, but this is what JAX evaluates: rounding x * x before the logarithm moves
    float32 values beyond 3.5 sigma by up to 64 ulp, and ours move with JAX's.
    """
    # The clamp does nothing to the value; without it a compiler could fuse the square into log1p's sum, unrounded.
    w = -torch.log1p(-(x * x).clamp(max=1.0))
    if x.dtype == torch.float64:
        root = w.sqrt()
        tail = torch.where(w < 16, _polynomial(_ERFINV64_MIDDLE, root - 3.25), _polynomial(_ERFINV64_TAIL, root - 5))
        factor = torch.where(w < 6.25, _polynomial(_ERFINV64_CENTRE, w - 3.125), tail)
    else:
        tail = _polynomial(_ERFINV32_TAIL, w.sqrt() - 3)
        factor = torch.where(w < 5, _polynomial(_ERFINV32_CENTRE, w - 2.5), tail)
    return x * torch.where(x.abs() == 1, math.inf, factor)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, highest power first."""
    total = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


# fmt: off
_ERFINV32_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)
_ERFINV32_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)
_ERFINV64_CENTRE = (
    -3.6444120640178197e-21, -1.6850591381820166e-19, 1.28584807152564e-18, 1.1157877678025181e-17,
    -1.3331716628546209e-16, 2.0972767875968562e-17, 6.6376381343583238e-15, -4.0545662729752069e-14,
    -8.1519341976054722e-14, 2.6335093153082323e-12, -1.2975133253453532e-11, -5.4154120542946279e-11,
    1.0512122733215323e-09, -4.1126339803469837e-09, -2.9070369957882005e-08, 4.2347877827932404e-07,
    -1.3654692000834679e-06, -1.3882523362786469e-05, 0.00018673420803405714, -0.00074070253416626698,
    -0.0060336708714301491, 0.24015818242558962, 1.6536545626831027,
)
_ERFINV64_MIDDLE = (
    2.2137376921775787e-09, 9.0756561938885391e-08, -2.7517406297064545e-07, 1.8239629214389228e-08,
    1.5027403968909828e-06, -4.013867526981546e-06, 2.9234449089955446e-06, 1.2475304481671779e-05,
    -4.7318229009055734e-05, 6.8284851459573175e-05, 2.4031110387097894e-05, -0.00035503752036284748,
    0.0009532893797373805, -0.0016882755560235047, 0.0024914420961078508, -0.0037512085075692412,
    0.0053709145535900636, 1.0052589676941592, 3.0838856104922208,
)
_ERFINV64_TAIL = (
    -2.7109920616438573e-11, -2.5556418169965252e-10, 1.5076572693500548e-09, -3.789465440126737e-09,
    7.61570120807834e-09, -1.496002662714924e-08, 2.9147953450901081e-08, -6.7711997758452339e-08,
    2.2900482228026655e-07, -9.9298272942317003e-07, 4.5260625972231537e-06, -1.9681778105531671e-05,
    7.5995277030017761e-05, -0.00021503011930044477, -0.00013871931833623122, 1.0103004648645344, 4.8499064014085844,
)
# fmt: on
