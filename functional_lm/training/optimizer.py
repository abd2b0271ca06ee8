"""The named optimizers: clipping, a direction, decoupled decay, learning rate, as one chain.

    state            = optimizer.init(params)
    updates, state   = optimizer.update(gradients, state, params, numbers)      params + updates are the next ones

`transformation.py` has what composes, `direction.py` the directions; a new optimizer is a new chain of them.
"""

from __future__ import annotations

from collections.abc import Callable

from functional_lm.errors import UsageError
from functional_lm.training.direction import (
    scale_by_adafactor,
    scale_by_adam,
    scale_by_lion,
    scale_by_momentum,
    scale_by_muon,
)
from functional_lm.training.transformation import (
    Optimizer,
    add_decayed_weights,
    chain,
    clip_by_global_norm,
    partition,
    scale_by_learning_rate,
)


def is_matrix(name: str) -> bool:
    """Decay by path: projections and embeddings decay; norms, biases and scales do not."""
    return name.endswith(("weight", "lora_A", "lora_B")) and "norm" not in name


def is_hidden_matrix(name: str) -> bool:
    """The matrices inside the layers, which Muon is for: no embedding, no output, no vector."""
    return name.endswith("weight") and "norm" not in name and ".layers." in f".{name}"


def _chained(**direction: Optimizer) -> Optimizer:
    return chain(
        clip=clip_by_global_norm(), **direction, decay=add_decayed_weights(is_matrix), rate=scale_by_learning_rate()
    )


def adamw() -> Optimizer:
    """AdamW (arXiv 1711.05101)."""
    return _chained(adam=scale_by_adam())


def muon() -> Optimizer:
    """Muon for the matrices inside the layers, Adam for embeddings, output, norms and biases; one learning rate."""
    return _chained(parts=partition(muon=(is_hidden_matrix, scale_by_muon()), adam=("*", scale_by_adam())))


def lion() -> Optimizer:
    """Lion (arXiv 2302.06675); its learning rate is some three to ten times lower than AdamW's."""
    return _chained(lion=scale_by_lion())


def sgd() -> Optimizer:
    """SGD with momentum `beta1`."""
    return _chained(momentum=scale_by_momentum())


def adafactor() -> Optimizer:
    """Adafactor (arXiv 1804.04235) with a learning rate and no momentum: the least memory."""
    return _chained(adafactor=scale_by_adafactor())


OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "sgd": sgd,
    "adafactor": adafactor,
}


def optimizer(name: str) -> Optimizer:
    """The optimizer of that name. Raises UsageError with the names there are."""
    if name not in OPTIMIZERS:
        raise UsageError(f"there is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]()
