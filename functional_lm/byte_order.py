"""Whether the numbers of a file have their bytes in the other order, told from the numbers themselves.

A safetensors file is little-endian and says nothing about it. A float whose bytes were turned round has an exponent
made of what was the end of its mantissa: one in 256 of such is NaN or infinite, and where the ends were zeros, as in
float32 numbers that were bfloat16 before, all of them are smaller than any weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SAID = "has the bytes of its numbers in the other order (big-endian; safetensors is little-endian); write it again"
SMALLEST, LARGEST = 1e-30, 1e6  # what lies outside is no weight
FEWEST = 16  # numbers that are not zero; fewer tell nothing


def turned(leaf: Tensor) -> bool:
    """Whether numbers of which some are not finite would be weights if their bytes were turned round.

    Where a computation ended in infinity or NaN they are those that it makes, with no bits behind them or all; what
    turned bytes make has any bits.
    """
    numbers = leaf.detach().cpu().contiguous().flatten()
    other, made = _other(leaf), torch.isin(_bits(numbers[~numbers.isfinite()]), _made(leaf.dtype))
    return 4 * int(made.sum()) < len(made) and bool(_plausible(other[other != 0]).all())


def absurd(leaves: Iterable[Tensor]) -> bool:
    """Whether most of these numbers are of no weight's size as they lie, and all of them are with their bytes turned.

    Meant for the vectors of a whole model (norms, biases), which are few. A model that has them so, all but zero or
    beyond all bounds, would compute nothing; zeros tell nothing.
    """
    flat = [leaf.detach().cpu().flatten() for leaf in leaves if leaf.is_floating_point()]
    there = [numbers[numbers != 0] for numbers in flat if numbers.any()]
    count = sum(map(len, there))
    strange = sum(int((~_plausible(numbers)).sum()) for numbers in there)
    return count >= FEWEST and 2 * strange > count and all(bool(_plausible(_other(numbers)).all()) for numbers in there)


def _plausible(numbers: Tensor) -> Tensor:
    """NaN is not."""
    size = numbers.double().abs()
    return (size >= SMALLEST) & (size <= LARGEST)


def _made(kind: torch.dtype) -> Tensor:
    """The bits of infinity, of NaN with one bit behind it, and of NaN with all, of either sign."""
    infinity = _bits(torch.full((1,), torch.inf, dtype=kind))
    limits = torch.iinfo(infinity.dtype)
    positive = torch.cat([infinity, infinity + int(0.5 / torch.finfo(kind).eps), torch.full_like(infinity, limits.max)])
    return torch.cat([positive, positive + limits.min])


def _bits(numbers: Tensor) -> Tensor:
    """As integers of their width, whose equality is that of the bits."""
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])


def _other(leaf: Tensor) -> Tensor:
    """Each number with its bytes in the other order."""
    numbers = leaf.detach().cpu().contiguous().flatten()
    return numbers.view(torch.uint8).view(-1, leaf.element_size()).flip(1).contiguous().view(leaf.dtype).flatten()
