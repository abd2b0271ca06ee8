"""Learning-rate schedules: pure functions from the step to a factor of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm.errors import UsageError

Schedule = Callable[[Tensor], Float[Tensor, ""]]


def cosine(steps: int, warmup: int, floor: float) -> Schedule:
    """Linear warm-up over `warmup` steps to 1, then half a cosine (SGDR, arXiv 1608.03983) to `floor` at `steps`."""

    def factor(step: Tensor) -> Float[Tensor, ""]:
        done = ((step - warmup) / max(1, steps - warmup)).clamp(0, 1)
        return warm(step, warmup) * (floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * done)))

    return factor


def constant(steps: int, warmup: int, floor: float) -> Schedule:
    """Linear warm-up, then 1."""
    return lambda step: warm(step, warmup)


def warm(step: Tensor, warmup: int) -> Float[Tensor, ""]:
    """(step + 1) / warmup up to 1: the first step already moves."""
    return ((step + 1) / max(1, warmup)).clamp(max=1.0)


SCHEDULES: dict[str, Callable[[int, int, float], Schedule]] = {"cosine": cosine, "constant": constant}


def schedule(name: str, steps: int, warmup: int, floor: float) -> Schedule:
    """The schedule of that name over `steps` steps; `floor` is the last rate over the peak rate."""
    if name not in SCHEDULES:
        raise UsageError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name](steps, warmup, floor)
