"""Direct preference optimization: learn which of two answers is preferred, without a reward model.

Axes: B pairs, T time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from functional_lm.model.config import ModelConfig
from functional_lm.model.norm import wide
from functional_lm.model.transformer import IGNORED, forward
from functional_lm.training.step import Batch, Objective
from functional_lm.tree import Tree


def answer_log_probabilities(
    params: Tree, batch: Batch, config: ModelConfig, key: Tensor | None = None
) -> Float[Tensor, "B"]:
    """log p(answer | prompt) of each row: the sum over its targets that are not IGNORED, float32."""
    logits = wide(forward(params, batch["tokens"], config, key, batch.get("documents")))
    targets = batch["targets"].long()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -nll.view(targets.shape).sum(-1)


def loss(policy: Float[Tensor, "2*B"], reference: Float[Tensor, "2*B"], beta: float) -> Float[Tensor, "B"]:
    """-log σ(β [log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)]) of each pair (arXiv 2305.18290, eq. 7).

    The first half are the chosen answers, the second half the rejected ones, in the same order.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))


def objective(reference: Tree, beta: float) -> Objective:
    """The objective of `step.training` for batches of pairs, [2 B, T]; `reference` is a compute copy, held constant.

    Summed over the pairs, and counted: a pair without targets is padding.
    """

    def value(
        params: Tree, batch: Batch, config: ModelConfig, key: Tensor | None = None, z_loss: float = 0.0
    ) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            before = answer_log_probabilities(reference, batch, config)
        losses = loss(answer_log_probabilities(params, batch, config, key), before, beta)
        there = (batch["targets"] != IGNORED).any(-1).chunk(2)[0]
        total = torch.where(there, losses, 0.0).sum()
        return total, {"nll": total.detach(), "tokens": there.sum()}

    return value
