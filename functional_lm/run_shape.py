"""What no `--override` changes in a training that goes on: flags that the tensors of its checkpoint are made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functional_lm.model import config as model_config
from functional_lm.model.config import ModelConfig

Architecture = Callable[[int], ModelConfig]  # that the flags describe, with so many tokens in its vocabulary
WHY = {
    "its tensors have other shapes": ("population", "lora_rank", "lora_targets", "dora"),
    "its state is made for it": ("optimizer",),
    "the run has its tokenizer": ("tokenizer", "tokenizer_type", "vocab_size"),
}
SHAPING = (
    "model", "preset", "config", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_len",
    "positions", "feed_forward", "bias", "norm", "norm_placement", "qk_norm", "tie_embeddings",
)  # fmt: skip
LISTS = ("seeds", "learning_rates", "weight_decays")  # a value for each model of a population


def obstacles(changed: Mapping[str, tuple[Any, Any]], run: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Those among the flags that changed, `name: (before, now)`, that nothing overrides, each with its reason.

    `run` is what the checkpoint says of its run.
    """
    reasons = {name: why for why, names in WHY.items() for name in names if name in changed}
    if all(changed.get("tokenizer", (None,))):  # the same one in another place, perhaps
        reasons.pop("tokenizer", None)
    shapes = "its tensors have other shapes"
    reasons |= dict.fromkeys((name for name in LISTS if name in changed and _lengths_differ(*changed[name])), shapes)
    if "ema_decay" in changed and 0 in changed["ema_decay"]:
        reasons["ema_decay"] = "its state has a mean of the weights, or none"
    if "float16" in changed.get("dtype", ()):
        reasons["dtype"] = "its state has a loss scale, or none"
    had = model_config.from_json(run["model"])
    now = architecture(had.vocab_size)
    if _shapes(had) != _shapes(now):
        reasons |= dict.fromkeys((name for name in SHAPING if name in changed), shapes)
    return [f"--{name} ({why})" for name, why in reasons.items()]


def _lengths_differ(before: Any, now: Any) -> bool:
    return isinstance(before, list) != isinstance(now, list) or len(before or ()) != len(now or ())


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from functional_lm import tree
    from functional_lm.model import transformer

    return {name: tuple(leaf.shape) for name, leaf in tree.flatten(transformer.abstract(config)).items()}
