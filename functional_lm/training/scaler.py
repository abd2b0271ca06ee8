"""Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740, section 3.2), as a state and two functions.

Gradients of a loss times `scale` do not vanish in float16's short range. After a step whose gradients overflowed the
scale halves; after INTERVAL good ones in a row it doubles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functional_lm.tree import Tree

START, LARGEST, INTERVAL = 2.0**5, 2.0**24, 1000  # of a loss summed over tokens: a mean would start near 2^16


def init(device: torch.device) -> Tree:
    """`{"good": [] int64, "scale": [] float32}`."""
    return {
        "good": torch.zeros((), dtype=torch.int64, device=device),
        "scale": torch.tensor(START, device=device),
    }


def update(state: Tree, finite: Tensor) -> Tree:
    """The scale after a step whose gradients were `finite` or not; an empty state stays empty."""
    if not state:
        return state
    good = torch.where(finite, state["good"] + 1, 0)
    grow = good >= INTERVAL
    scale = torch.where(finite, torch.where(grow, state["scale"] * 2, state["scale"]), state["scale"] / 2)
    return {"good": torch.where(grow, 0, good), "scale": scale.clamp(1.0, LARGEST)}
