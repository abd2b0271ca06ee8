"""From logits to tokens: pure functions of (logits, key, settings), row by row.

All settings are tensors [S], so that slots with different ones share a compiled graph.

Axes: S slots, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


class Penalties(NamedTuple):
    """What each slot holds against tokens, and what it has seen of them. A pytree.

    1 (repetition) and 0 (the others) are off. `prompted` and `counts` say which tokens stand in the prompt and how
    often each has been generated.
    """

    min_p: Float[Tensor, "S"]
    repetition: Float[Tensor, "S"]
    presence: Float[Tensor, "S"]
    frequency: Float[Tensor, "S"]
    bias: Float[Tensor, "S V"]
    prompted: Bool[Tensor, "S V"]
    counts: Int[Tensor, "S V"]

    @classmethod
    def none(cls, slots: int, vocab_size: int, device: str | torch.device = "cpu") -> Penalties:
        """All off, nothing seen."""
        zeros = torch.zeros(slots, device=device)
        table = torch.zeros(slots, vocab_size, device=device)
        return cls(zeros, zeros + 1, zeros.clone(), zeros.clone(), table, table.bool(), table.to(torch.int64))

    def counted(self, tokens: Int[Tensor, "S"], times: Int[Tensor, "S"] | None = None) -> Penalties:
        """With one more generated token in each slot, or so many of it."""
        slot = torch.arange(tokens.shape[0], device=tokens.device)
        times = torch.ones_like(tokens) if times is None else times
        return self._replace(counts=self.counts.index_put((slot, tokens), times, accumulate=True))


def penalize(logits: Float[Tensor, "S V"], by: Penalties) -> Float[Tensor, "S V"]:
    """Logits of seen tokens made smaller.

    Repetition (arXiv 1909.05858, section 4.1, prompt included): positive logits are divided by it, others multiplied.
    Then, as OpenAI's interface defines them over generated tokens, minus presence where there is one, minus frequency
    times their number, plus the bias.
    """
    weaker = torch.where(logits > 0, logits / by.repetition[:, None], logits * by.repetition[:, None])
    logits = torch.where(by.prompted | (by.counts > 0), weaker, logits)
    return logits - by.frequency[:, None] * by.counts - by.presence[:, None] * (by.counts > 0) + by.bias


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
    logits: Float[Tensor, "S V"],
    row_keys: Int[Tensor, "S 2"],
    how: Sampling,
    truncating: bool = True,
    penalties: Penalties | None = None,
) -> Int[Tensor, "S"]:
    """One token a row: the largest where the temperature is 0, else drawn with the Gumbel-max trick from the row's key.

    `truncating` (static) says whether any row uses top_k or top_p; sorting V numbers is most of the cost. min_p (arXiv
    2407.01082) keeps tokens at least so likely, as a share of the likeliest, after the temperature.
    """
    logits = logits.float()
    if penalties is not None:
        logits = penalize(logits, penalties)
    greedy = logits.argmax(-1)
    heat = torch.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat  # the largest at 0, so that no temperature overflows it
    if truncating:
        scaled = truncate(scaled, how.top_k, how.top_p)
    if penalties is not None:
        scaled = scaled.masked_fill(scaled < penalties.min_p.log()[:, None], -math.inf)
    drawn = torch.vmap(keys.categorical)(row_keys, scaled)
    return torch.where(how.temperature > 0, drawn, greedy)
