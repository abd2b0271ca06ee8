"""Natural evolution strategies (Wierstra et al., JMLR 15, 2014): SNES and xNES.

Axes: P members, D numbers of the tree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm.evolution import vector
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.shaping import utilities
from functional_lm.evolution.strategy import Strategy
from functional_lm.evolution.vector import Search


class Separable(NamedTuple):
    mean: Float[Tensor, "D"]
    sigma: Float[Tensor, "D"]


class Full(NamedTuple):
    """Points are mean + A z."""

    mean: Float[Tensor, "D"]
    transform: Float[Tensor, "D D"]


def snes(population: int, sigma: float, dtype: torch.dtype = torch.float32, wrap: Wrap = unwrapped) -> Strategy:
    """Separable NES (section 3.4, algorithm 6): a standard deviation for each number, D work."""

    def search(size: int, dtype: torch.dtype) -> Search:
        rate = (3 + math.log(size)) / (5 * math.sqrt(size))

        def update(at: Separable, z: Tensor, places: Int[Tensor, "P"]) -> Separable:
            u = utilities(len(places), dtype, z.device).flip(0)[places]
            mean = at.mean + at.sigma * vector.weighed(u, z)
            return Separable(mean, at.sigma * torch.exp(rate / 2 * vector.weighed(u, z.square() - 1)))

        return Search(
            lambda mean: Separable(mean, torch.full_like(mean, sigma)),
            lambda at, z: at.mean + at.sigma * z,
            update,
            lambda at: at.mean,
        )

    return vector.over_vectors("snes", population, search, dtype, None, wrap)


def xnes(population: int, sigma: float, dtype: torch.dtype = torch.float64, wrap: Wrap = unwrapped) -> Strategy:
    """Exponential NES (section 3.3, algorithm 5), with the matrix exponential itself.

    Its steps are those of the rotated problem rotated. D² numbers and D³ work: D is at most `vector.FULL_LIMIT`.
    """

    return vector.over_vectors(
        "xnes", population, lambda size, dtype: exponential(size, sigma, dtype), dtype, vector.FULL_LIMIT, wrap
    )


def exponential(size: int, sigma: float, dtype: torch.dtype) -> Search:
    """The functions of xNES for vectors of `size` numbers."""
    rate = (9 + 3 * math.log(size)) / (5 * size * math.sqrt(size))

    def update(at: Full, z: Tensor, places: Int[Tensor, "P"]) -> Full:
        u = utilities(len(places), dtype, z.device).flip(0)[places]
        identity = torch.eye(size, dtype=dtype, device=z.device)
        shape = (z.mT * u) @ z - u.sum() * identity
        mean = at.mean + at.transform @ (u @ z)
        return Full(mean, at.transform @ torch.linalg.matrix_exp(rate / 2 * shape))

    return Search(
        lambda mean: Full(mean, sigma * torch.eye(size, dtype=dtype, device=mean.device)),
        lambda at, z: at.mean + z @ at.transform.mT,
        update,
        lambda at: at.mean,
    )
