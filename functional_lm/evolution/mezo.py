"""MeZO (arXiv 2305.17333, algorithm 1), which is SPSA: a step along each draw by the difference of its two ends.

    g = (f(θ + σ ε) - f(θ - σ ε)) / (2 σ) ε,   θ <- θ + rate g,   averaged over the pairs of a population

Noise is drawn inside the forward and again in the step, so that nothing is kept but keys; with the fitness in a journal
the weights follow from the base alone.

Axes: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from functional_lm.evolution import gradient, openai
from functional_lm.evolution.gradient import Settings, Wrap, unwrapped
from functional_lm.evolution.strategy import Strategy
from functional_lm.training.optimizer import is_matrix
from functional_lm.training.transformation import add_decayed_weights, chain, scale_by_learning_rate


def mezo(
    population: int = 2,
    numbers: Mapping[str, float] | None = None,
    wrap: Wrap = unwrapped,
    dtype: torch.dtype = torch.float32,
) -> Strategy:
    """The strategy of `population` / 2 pairs; `numbers` are σ, learning_rate and weight_decay.

    With `dtype` float64 the whole state is float64, whatever the tree that it begins with is.
    """
    plain = chain(decay=add_decayed_weights(is_matrix), rate=scale_by_learning_rate())
    settings = Settings(population, antithetic=True, shaping=gradient.DIFFERENCE, noise="regenerated")
    return gradient.estimating("mezo", settings, openai.dense(dtype), plain, numbers, wrap, dtype)
