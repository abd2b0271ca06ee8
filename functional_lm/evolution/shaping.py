"""From fitness to weights: what of a population's fitness an estimate listens to.

Fitness is maximised. What is not finite counts as worse than everything else: it never wins, and its weight is finite,
so that it never poisons a sum. Equals get equal weights, so that the order of the members changes nothing.

Axes: P members.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm.errors import UsageError

Shaping = Callable[[Float[Tensor, "P"]], Float[Tensor, "P"]]


def usable(fitness: Float[Tensor, "P"]) -> tuple[Float[Tensor, "P"], Bool[Tensor, "P"]]:
    """The fitness with -inf where it is not finite, and where it is."""
    finite = torch.isfinite(fitness)
    return torch.where(finite, fitness, -math.inf), finite


def winner(fitness: Float[Tensor, "P"]) -> Int[Tensor, ""]:
    """The index of the best member."""
    return usable(fitness)[0].argmax()


def spans(fitness: Float[Tensor, "P"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """For each member how many are worse, and how many are worse or equal: the places that its equals share."""
    usable_, _ = usable(fitness)
    order = usable_.sort().values.contiguous()
    return torch.searchsorted(order, usable_), torch.searchsorted(order, usable_, right=True)


def centered_rank(fitness: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Ranks from -1/2 to 1/2 (arXiv 1703.03864, section 2); of equals the mean, so that a sum over all is 0."""
    low, high = spans(fitness)
    rank = (low + high - 1).to(fitness.dtype) / 2
    return rank / max(1, fitness.shape[0] - 1) - 0.5 if fitness.shape[0] > 1 else torch.zeros_like(fitness)


def z_score(fitness: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """(f - mean) / standard deviation over what is finite; what is not gets the score of the worst."""
    _, finite = usable(fitness)
    count = finite.sum().clamp(min=1)
    known = torch.where(finite, fitness, 0.0)
    mean = known.sum() / count
    spread = (torch.where(finite, known - mean, 0.0).square().sum() / count).sqrt()
    score = (known - mean) / torch.where(spread > 0, spread, 1.0)
    worst = torch.where(finite, score, math.inf).amin()
    return torch.where(finite, score, torch.where(torch.isfinite(worst), worst, 0.0))


def utilities(count: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Float[Tensor, "P"]:
    """NES's utilities from the worst to the best: max(0, log(P/2 + 1) - log rank), summing to 0.

    Wierstra et al., "Natural evolution strategies", JMLR 15 (2014), section 3.1.
    """
    rank = torch.arange(count, 0, -1, dtype=dtype, device=device)
    raw = (math.log(count / 2 + 1) - rank.log()).clamp(min=0)
    return raw / raw.sum() - 1 / count


def nes(fitness: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """NES's utility of each member; equals share the mean of theirs."""
    low, high = spans(fitness)
    table = utilities(fitness.shape[0], fitness.dtype, fitness.device)
    total = torch.cat([table.new_zeros(1), table.cumsum(0)])
    return (total[high] - total[low]) / (high - low)


SHAPINGS: dict[str, Shaping] = {"centered_rank": centered_rank, "z_score": z_score, "nes": nes}


def shaping(name: str) -> Shaping:
    """The shaping of that name. Raises UsageError with the names there are."""
    if name not in SHAPINGS:
        raise UsageError(f"there is no shaping {name!r}; there are {', '.join(SHAPINGS)}")
    return SHAPINGS[name]
