"""The arithmetic of the draws in `keys.py`, from random words to numbers.

What is rounded is rounded once, in operations that a compiler may fuse or not without changing a bit; unsigned words
are reckoned with in signed tensors. `erfinv` goes through log and agrees within a few ulp.

Functions are elementwise and broadcast; shapes are those of their arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functional_lm.threefry import WORD, Words, vmap_elementwise

# Where a random word keeps the fraction of a float: dtype -> (bits dropped on the right, bits kept).
_FRACTION = {torch.float32: (9, 23), torch.float16: (6, 10), torch.bfloat16: (1, 7), torch.float64: (12, 52)}


def fraction(dtype: torch.dtype) -> tuple[int, int]:
    """Of the bits of a random word: how many are dropped on the right, how many are kept. Raises TypeError."""
    if dtype not in _FRACTION:
        raise TypeError(f"dtype is {dtype}, not float32, float64, float16 or bfloat16")
    return _FRACTION[dtype]


def mantissa(words: Words, dtype: torch.dtype) -> Tensor:
    """The random fraction of a float of `dtype`, as an integer."""
    dropped, kept = fraction(dtype)
    if dtype == torch.float64:
        return ((words[0].long() & WORD) << 20) | ((words[1].long() & WORD) >> dropped)
    return (words[2] >> dropped) & (2**kept - 1)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to calculate in: float64, or float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar(value: float | int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor of `dtype`. Raises TypeError for a tensor with axes."""
    if isinstance(value, Tensor):
        if value.dim():
            raise TypeError(f"a bound is a tensor of shape {tuple(value.shape)}: pass a number or a 0-d tensor")
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


def scale(mantissa: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """low + (high - low) * mantissa / 2**b in one rounding, the value of a fused multiply-add.

    torch has no such function, compilers fuse where they like, and JAX's compiled uniform is fused. Here every product
    is exact, so that fusing it changes nothing and the value is the same everywhere.
    """
    _, kept = fraction(dtype)
    if dtype != torch.float64 and low.device.type != "mps":  # which has no float64
        product = (mantissa.double() * 2.0**-kept) * (high - low).double()
        return _round_to_odd(product, low.double()).maximum(low.double()).to(dtype)
    aligned = mantissa << (fraction(low.dtype)[1] - kept)
    return (_scale_compiled if torch.compiler.is_compiling() else scale_in_halves)(aligned, low, high).to(dtype)


def scale_in_halves(mantissa: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`scale` within one dtype, by Boldo and Melquiond's emulation (IEEE Transactions on Computers 57, 2008)."""
    _, kept = fraction(low.dtype)
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
    scale_in_halves,
    mutates_args=(),
    schema="(Tensor mantissa, Tensor low, Tensor high) -> Tensor",
)
_scale_compiled.register_vmap(functools.partial(vmap_elementwise, _scale_compiled))


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


def clipped_span(
    low: int | Tensor, high: int | Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
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


def unsigned_remainder(x: Tensor, n: Tensor) -> Tensor:
    """x mod n for uint64 values held in int64, where n = 0 stands for 2**64 (Warren, "Hacker's Delight", 9-3)."""
    small = n.clamp(min=1)
    rest = x - ((((x >> 1) & (2**63 - 1)) // small) << 1) * small
    rest = torch.where(_unsigned_less(rest, small), rest, rest - small)
    return torch.where(n > 0, rest, torch.where(_unsigned_less(x, n), x, x - n))


def _unsigned_less(a: Tensor, b: Tensor) -> Tensor:
    return (a ^ -(2**63)) < (b ^ -(2**63))


def erfinv(x: Tensor) -> Tensor:
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
