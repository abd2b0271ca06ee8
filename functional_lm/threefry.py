"""The block cipher under every draw: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), on int32 tensors that hold the bits of unsigned words.

Eager calls run its rounds as they are written; compiled ones see one operator, `functional_lm::threefry`, with a kernel
body of its own. The bits are the same.

Axes: a key is [2]; the words of counters [*n] are [*n].
"""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any, TypeAlias

import torch
from jaxtyping import Int32
from torch import Tensor

Key: TypeAlias = Int32[Tensor, "2"]
Words: TypeAlias = tuple[Tensor, Tensor, Tensor]  # the two words of each counter, and their exclusive or

WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # keeps the third word of an all-zero key from being zero


def threefry(key: Key, x0: Int32[Tensor, "*n"] | int, x1: Int32[Tensor, "*n"] | int) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of counter words (x0, x1), in wrapping int32 arithmetic; two int32 tensors of their shape."""
    return encrypted(key, x0, x1)[:2]


def encrypted(key: Key, x0: Tensor | int, x1: Tensor | int) -> Words:
    """What the cipher makes of the counters (x0, x1); ints stand for counter words that all elements share."""
    if not torch.compiler.is_compiling():
        return _encrypt(key[0], key[1], x0, x1)
    counters = (torch.full_like(key[0], x) if isinstance(x, int) else x for x in (x0, x1))
    return _encrypt_compiled(key[0], key[1], *counters)


def signed(value: int) -> int:
    """The low 32 bits of `value` as an int32."""
    return ((value + 2**31) & WORD) - 2**31


def counters(start: int, stop: int, device: torch.device) -> tuple[Tensor | int, Tensor]:
    """The counters start..stop-1 as (high, low) int32 words."""
    if stop <= 2**31:
        return 0, torch.arange(start, stop, dtype=torch.int32, device=device)
    index = torch.arange(start, stop, device=device)
    return (index >> 32).to(torch.int32), index.to(torch.int32)


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


def vmap_elementwise(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
    """vmap's rule of an elementwise operator: mapped axes to the front, and ranks made equal behind them."""
    rank = max(x.dim() - (dim is not None) for x, dim in zip(args, in_dims))
    aligned = list(args)
    for i, dim in enumerate(in_dims):
        if dim is not None:
            x = args[i].movedim(dim, 0)
            aligned[i] = x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.dim()) + x.shape[1:])
    result = op(*aligned)
    return result, 0 if isinstance(result, Tensor) else (0,) * len(result)


_encrypt_compiled.register_vmap(functools.partial(vmap_elementwise, _encrypt_compiled))


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
