"""Where a token stands: rotary angles, sinusoids.

Axes: B batch, T time, E head width, C longest position. Positions are integers that may differ from row to row (slots
of a cache, packed documents).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm.model.config import ModelConfig
from functional_lm.model.norm import wide


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, float32, `[*T, E_rotary / 2]`."""

    cos: Float[Tensor, "*T half"]
    sin: Float[Tensor, "*T half"]


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Float[Tensor, "half"]:
    """Radians per token of each rotated pair (RoFormer, arXiv 2104.09864), with Llama-3's scaling where asked.

    Llama-3 leaves wavelengths shorter than `original / high` alone, divides the frequency of those longer than
    `original / low` by `factor`, and goes smoothly from one to the other in between.
    """
    width = config.rotary_width
    # θ^-e written with exp: Inductor keeps tables that cost an exponential, and computes cheaper ones again in every
    # layer and head that reads them.
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequency = torch.exp(-math.log(config.rope_theta) * exponent)
    if config.rope_scaling is None:
        return frequency
    factor, low, high, original = config.rope_scaling
    wavelength = 2 * math.pi / frequency
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency * (smooth + (1 - smooth) / factor)


def rotary_table(config: ModelConfig, longest: int, device: torch.device | None = None) -> Rotation:
    """The angles at 0 .. longest - 1, in order: what a forward without a cache reads, and vectorises, directly."""
    angle = torch.arange(longest, dtype=torch.float32, device=device)[:, None] * rotary_frequencies(config, device)
    return Rotation(angle.cos(), angle.sin())


def rotation(config: ModelConfig, positions: Int[Tensor, "*T"], longest: int) -> Rotation:
    """The angles at any `positions`, each below `longest`."""
    cos, sin = rotary_table(config, longest, positions.device)
    return Rotation(cos[positions], sin[positions])


def rotate(x: Float[Tensor, "*B heads T E"], by: Rotation) -> Float[Tensor, "*B heads T E"]:
    """Rotate the first 2*half dimensions of each head in the half-split pairing (i, i + half), in float32 at least."""
    half = by.cos.shape[-1]
    turned, rest = (x, None) if x.shape[-1] == 2 * half else x.tensor_split([2 * half], dim=-1)
    # Halves as an axis rather than as slices: the gradient of unbind is one stack, that of slices pads with zeros.
    first, second = (wide(part) for part in turned.unflatten(-1, (2, half)).unbind(-2))
    cos, sin = (angle if angle.dim() == 2 else angle.unsqueeze(-3) for angle in by)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-2).to(x.dtype)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def sinusoids(width: int, longest: int, device: torch.device | None = None) -> Float[Tensor, "C D"]:
    """Vaswani et al. (arXiv 1706.03762), section 3.5: sines in the even dimensions, cosines in the odd ones."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width))
    angle = torch.arange(longest, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def restart(documents: Int[Tensor, "*B T"]) -> Int[Tensor, "*B T"]:
    """Positions that count from 0 at the first token of each document of a packed row."""
    index = torch.arange(documents.shape[-1], device=documents.device).expand(documents.shape)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[..., 1:] = documents[..., 1:] != documents[..., :-1]
    return index - torch.where(new, index, 0).cummax(-1).values
