"""From logits to tokens: pure functions of (logits, key, settings), row by row.

All settings are tensors [S], so that slots with different ones share a compiled graph.

Axes: S slots, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from functional_lm import keys


class Sampling(NamedTuple):
    """How each slot chooses: all [S]. A pytree."""

    temperature: Float[Tensor, "S"]
    top_k: Int[Tensor, "S"]
    top_p: Float[Tensor, "S"]

    @classmethod
    def uniform(
        cls,
        slots: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> Sampling:
        """The same settings in every slot; temperature 0 is greedy, top_k 0 and top_p 1 are off."""
        return cls(
            torch.full((slots,), float(temperature), device=device),
            torch.full((slots,), int(top_k), dtype=torch.int64, device=device),
            torch.full((slots,), float(top_p), device=device),
        )


def truncate(logits: Float[Tensor, "S V"], top_k: Int[Tensor, "S"], top_p: Float[Tensor, "S"]) -> Float[Tensor, "S V"]:
    """-inf for all but the `top_k` largest (0: all) and, of those, the smallest set of mass at least `top_p`.

    Nucleus sampling: arXiv 1904.09751, section 3.1. The largest always stays; ties with the last one kept stay too.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    probabilities = torch.softmax(ordered.masked_fill(rank >= limit, -math.inf), dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    # 1 is compared by itself: a sum that float32 rounds up to 1 would cut the tail off.
    kept = (rank < limit) & ((before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0))
    # What is kept is a prefix of the order, so the last kept value is the threshold.
    threshold = ordered.gather(-1, kept.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < threshold, -math.inf)


def sample(
    logits: Float[Tensor, "S V"], row_keys: Int[Tensor, "S 2"], how: Sampling, truncating: bool = True
) -> Int[Tensor, "S"]:
    """One token a row: the largest where the temperature is 0, else drawn with the Gumbel-max trick from the row's key.

    `truncating` (static) says whether any row uses top_k or top_p; sorting V numbers is most of the cost.
    """
    logits = logits.float()
    greedy = logits.argmax(-1)
    heat = torch.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat  # the largest at 0, so that no temperature overflows it
    if truncating:
        scaled = truncate(scaled, how.top_k, how.top_p)
    drawn = torch.vmap(keys.categorical)(row_keys, scaled)
    return torch.where(how.temperature > 0, drawn, greedy)
