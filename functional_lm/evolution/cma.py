"""CMA-ES (Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772) and its separable form (Ros and Hansen,
"A simple modification in CMA-ES achieving linear time and space complexity", PPSN 2008).

Axes: P members, D numbers of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm.evolution import vector
from functional_lm.evolution.gradient import Wrap, unwrapped
from functional_lm.evolution.strategy import Strategy
from functional_lm.evolution.vector import Search


class Distribution(NamedTuple):
    """N(mean, sigma² C). `covariance` is C, [D, D] or its diagonal [D]; `roots` and `basis` are its square roots and
    eigenvectors (of a diagonal one the basis is empty)."""

    mean: Float[Tensor, "D"]
    sigma: Float[Tensor, ""]
    covariance: Tensor
    roots: Float[Tensor, "D"]
    basis: Tensor
    path: Float[Tensor, "D"]  # of the covariance, p_c
    step_path: Float[Tensor, "D"]  # of the step size, p_σ
    updates: Float[Tensor, ""]  # so far


class Constants(NamedTuple):
    """The tutorial's table 1."""

    weights: Float[Tensor, "P"]  # from the best to the worst, negative ones too
    mass: float  # μ_eff
    c_sigma: float
    damping: float
    c_c: float
    c_1: float
    c_mu: float
    expected: float  # E |N(0, I)|


def constants(size: int, population: int, dtype: torch.dtype, separable: bool = False) -> Constants:
    """Equations 49-58. The separable form learns (D + 2) / 3 times as fast, and has no negative weights."""
    raw = [math.log((population + 1) / 2) - math.log(i) for i in range(1, population + 1)]
    parents = population // 2
    positive, negative = [w for w in raw if w > 0][:parents], [w for w in raw if w < 0]
    mass = sum(positive) ** 2 / sum(w * w for w in positive)
    mass_negative = sum(negative) ** 2 / sum(w * w for w in negative)
    c_c = (4 + mass / size) / (size + 4 + 2 * mass / size)
    c_sigma = (mass + 2) / (size + mass + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + c_sigma
    c_1 = 2 / ((size + 1.3) ** 2 + mass)
    c_mu = min(1 - c_1, 2 * (1 / 4 + mass + 1 / mass - 2) / ((size + 2) ** 2 + mass))
    if separable:
        faster = (size + 2) / 3
        c_1, c_mu = min(1.0, c_1 * faster), min(1 - min(1.0, c_1 * faster), c_mu * faster)
    least = min(1 + c_1 / c_mu, 1 + 2 * mass_negative / (mass + 2), (1 - c_1 - c_mu) / (size * c_mu))
    weights = [w / sum(positive) if w > 0 else (0.0 if separable else least * w / -sum(negative)) for w in raw]
    expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
    return Constants(torch.tensor(weights, dtype=dtype), mass, c_sigma, damping, c_c, c_1, c_mu, expected)


def cma_es(population: int, sigma: float, dtype: torch.dtype = torch.float64, wrap: Wrap = unwrapped) -> Strategy:
    """The full form, with negative weights: D² numbers and D³ work, D at most `vector.FULL_LIMIT`."""
    return _strategy("cma-es", population, sigma, dtype, separable=False, wrap=wrap)


def sep_cma_es(population: int, sigma: float, dtype: torch.dtype = torch.float32, wrap: Wrap = unwrapped) -> Strategy:
    """The separable form: a diagonal covariance, D work."""
    return _strategy("sep-cma-es", population, sigma, dtype, separable=True, wrap=wrap)


def _strategy(name: str, population: int, sigma: float, dtype: torch.dtype, separable: bool, wrap: Wrap) -> Strategy:
    def search(size: int, dtype: torch.dtype) -> Search:
        return search_of(size, population, sigma, dtype, separable)

    return vector.over_vectors(name, population, search, dtype, None if separable else vector.FULL_LIMIT, wrap)


def search_of(size: int, population: int, sigma: float, dtype: torch.dtype, separable: bool) -> Search:
    """The functions of either form for vectors of `size` numbers."""
    known = constants(size, population, dtype, separable)

    def init(mean: Tensor) -> Distribution:
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
        square = torch.eye(size, dtype=dtype, device=mean.device) if not separable else ones
        number = torch.zeros((), dtype=dtype, device=mean.device)
        basis = ones.new_zeros(0) if separable else square
        return Distribution(mean, number + sigma, square, ones, basis, zeros, zeros, number)

    def turned(at: Distribution, y: Tensor) -> Tensor:
        """C^½ times standard normal rows."""
        return y * at.roots if separable else (y * at.roots) @ at.basis.mT

    def points(at: Distribution, z: Tensor) -> Tensor:
        return at.mean + at.sigma * turned(at, z)

    def update(at: Distribution, z: Tensor, places: Int[Tensor, "P"]) -> Distribution:
        return _updated(at, z, known.weights.to(z.device)[places], turned, known, separable)

    return Search(init, points, update, lambda at: at.mean)


def _updated(
    at: Distribution, z: Tensor, w: Tensor, turned: Callable[..., Tensor], known: Constants, separable: bool
) -> Distribution:
    """Equations 39-47, of members with weights `w`: `z` standard normal, `turned(at, z)` = C^½ z."""
    size, positive = z.shape[1], w.clamp(min=0)
    white = vector.weighed(positive, z)
    step = turned(at, white)
    whitened = white if separable else at.basis @ white  # C^-½ step
    mean = at.mean + at.sigma * step
    count = at.updates + 1
    step_path = (1 - known.c_sigma) * at.step_path + math.sqrt(
        known.c_sigma * (2 - known.c_sigma) * known.mass
    ) * whitened
    length = step_path.norm()
    sigma = at.sigma * torch.exp(known.c_sigma / known.damping * (length / known.expected - 1))
    stalled = length / torch.sqrt(1 - (1 - known.c_sigma) ** (2 * count)) >= (1.4 + 2 / (size + 1)) * known.expected
    on = (~stalled).to(z.dtype)
    path = (1 - known.c_c) * at.path + on * math.sqrt(known.c_c * (2 - known.c_c) * known.mass) * step
    missing = known.c_1 * (1 - on) * known.c_c * (2 - known.c_c)
    kept = 1 + missing - known.c_1 - known.c_mu * w.sum()
    if separable:
        spread = at.covariance * vector.weighed(w, z.square())
        covariance = kept * at.covariance + known.c_1 * path.square() + known.c_mu * spread
        return Distribution(mean, sigma, covariance, covariance.sqrt(), at.basis, path, step_path, count)
    # A negative weight is scaled by the length of its z, so that C stays positive definite (equation 46).
    scaled = torch.where(w >= 0, w, w * size / z.square().sum(1).clamp(min=1e-30))
    y = turned(at, z)
    covariance = kept * at.covariance + known.c_1 * path.outer(path) + known.c_mu * ((y.mT * scaled) @ y)
    covariance = (covariance + covariance.mT) / 2
    values, basis = torch.linalg.eigh(covariance)
    roots = values.clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    return Distribution(mean, sigma, covariance, roots, basis.contiguous(), path, step_path, count)
