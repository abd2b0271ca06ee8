"""Learning-rate schedules: pure functions from the step to a factor of the peak rate.

    factor(step, total) -> 0-d float32; `step` counts from 0, `total` is the run's length in steps, both 0-d tensors

The length is a number like any other: it may change during a run (a run limited by the clock), and nothing recompiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm.errors import UsageError

Schedule = Callable[[Tensor, Tensor], Float[Tensor, ""]]
Body = Callable[[Tensor, Tensor, int, float], Tensor]  # (step, total, warmup, floor)

WSD_COOLDOWN = 0.2  # a share that arXiv 2405.18392 (section 4) finds enough


def schedule(name: str, warmup: int = 0, floor: float = 0.0, cooldown: float | None = None) -> Schedule:
    """Linear warm-up over `warmup` steps, the body of that name, and a straight line down at the end.

    `floor` is the last rate over the peak rate; `cooldown` the share of the run in which the rate falls to it from
    where the body stood (None: 0.2 for `wsd`, else no such end). Raises UsageError for an unknown name.
    """
    if name not in BODIES:
        raise UsageError(f"there is no schedule {name!r}; there are {', '.join(BODIES)}")
    body, share = BODIES[name], cooldown
    if share is None:
        share = WSD_COOLDOWN if name == "wsd" else 0.0

    def factor(step: Tensor, total: Tensor) -> Float[Tensor, ""]:
        total = total.float()
        begin = total * (1 - share)
        value = warm(step, warmup) * body(torch.minimum(step.float(), begin) if share else step, total, warmup, floor)
        if not share:
            return value
        fallen = ((step - begin) / (total - begin).clamp(min=1)).clamp(0, 1)
        return value + (floor - value).clamp(max=0) * fallen

    return factor


def bent(
    step: Tensor, total: Tensor, warmup: Tensor | float, last: Tensor | float, bend: Tensor | float
) -> Float[Tensor, ""]:
    """A schedule that is three numbers, which may be tensors: members of a population may each have their own.

    The rate rises over the share `warmup` of the run, and comes down to `last` as 1 - (1 - last) t^bend, where t is the
    share of the rest that lies behind: a line for 1, later the larger it is. (0, 1, 1) is constant.
    """
    total = total.float()
    risen = ((step + 1) / (warmup * total).clamp(min=1)).clamp(max=1.0)
    behind = ((step / total - warmup) / torch.as_tensor(1 - warmup).clamp(min=1e-6)).clamp(0, 1)
    return risen * (1 - (1 - last) * behind**bend)


def warm(step: Tensor, warmup: int) -> Float[Tensor, ""]:
    """(step + 1) / warmup up to 1: the first step already moves."""
    return ((step + 1) / max(1, warmup)).clamp(max=1.0)


def _done(step: Tensor, total: Tensor, warmup: int) -> Tensor:
    """The share of the steps after the warm-up that lies behind."""
    return ((step - warmup) / (total - warmup).clamp(min=1)).clamp(0, 1)


def _cosine(step: Tensor, total: Tensor, warmup: int, floor: float) -> Tensor:
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * _done(step, total, warmup)))


def _linear(step: Tensor, total: Tensor, warmup: int, floor: float) -> Tensor:
    return 1 - (1 - floor) * _done(step, total, warmup)


def _constant(step: Tensor, total: Tensor, warmup: int, floor: float) -> Tensor:
    return torch.ones_like(total)


def _inverse_sqrt(step: Tensor, total: Tensor, warmup: int, floor: float) -> Tensor:
    least = max(1, warmup)
    return torch.sqrt(least / (step + 1).clamp(min=least)).clamp(min=floor)


# Half a cosine (SGDR, arXiv 1608.03983); warm-up, stable, decay (MiniCPM, arXiv 2404.06395); 1/√t (arXiv 1706.03762).
BODIES: dict[str, Body] = {
    "cosine": _cosine,
    "wsd": _constant,
    "linear": _linear,
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
}

cosine = partial(schedule, "cosine")
constant = partial(schedule, "constant")
