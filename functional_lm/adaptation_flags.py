"""The flags of the commands that go on from a model: `finetune`, `lora-finetune`, `dpo`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from functional_lm.options import REQUIRED, option
from functional_lm.training_flags import TrainingFlags

EPOCHS = 3.0  # where no length is given


@dataclass(frozen=True)
class ConversationFlags:
    """The model, and the conversations that it learns from."""

    model: str = option(REQUIRED, "model folder to go on from", aliases=("model_path",))
    data: str = option(
        REQUIRED,
        "JSON or JSONL of prompt and response, messages, conversation or conversations; several with commas",
        aliases=("data_path",),
    )
    out: str = option("runs/finetune", "run folder to write", aliases=("output_dir",))
    val_fraction: float = option(
        0.05, "share of the conversations kept for validation", low=0, below=1, group="Conversations"
    )


@dataclass(frozen=True)
class PackingFlags:
    """How conversations become rows."""

    packing: bool = option(
        True, "several conversations side by side in a row; they do not see each other", group="Conversations"
    )


@dataclass(frozen=True)
class AdaptationFlags(TrainingFlags):
    """As for any training, with what suits a model that knows something already."""

    epochs: float | None = option(
        None, f"passes over the conversations; {EPOCHS:g} if no length is given", above=0, group="Length"
    )
    steps: int | None = option(None, "optimizer steps, instead of --epochs", low=1, group="Length")
    learning_rate: float = option(3e-4, "peak learning rate", above=0, group="Optimizer")
    warmup_steps: int = option(10, "steps of linear warm-up", low=0, group="Optimizer")
    weight_decay: float = option(0.01, "decoupled decay of matrices", low=0, group="Optimizer")
    checkpoint_activations: bool = option(
        False, "recompute each layer in the backward pass to save memory", group="Machine"
    )


@dataclass(frozen=True)
class LoraFlags:
    """The adapter."""

    lora_rank: int = option(16, "rank of the adapter", low=1, high=4096, group="Adapter")
    lora_alpha: float = option(16.0, "its scale is alpha / rank", above=0, group="Adapter")
    lora_targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "what it adapts: ends of paths, globs over paths, or all-linear",
        group="Adapter",
    )
    lora_dropout: float = option(0.0, "dropout on its input", low=0, below=1, group="Adapter")
    rslora: bool = option(False, "scale by alpha / sqrt(rank)", group="Adapter")
    dora: bool = option(False, "learn the lengths of the weight's rows too", group="Adapter")


@dataclass(frozen=True)
class FinetuneOptions(AdaptationFlags, PackingFlags, ConversationFlags):
    """Flags of `finetune`."""


@dataclass(frozen=True)
class LoraOptions(LoraFlags, AdaptationFlags, PackingFlags, ConversationFlags):
    """Flags of `lora-finetune`."""

    out: str = option("runs/lora", "run folder to write, an adapter", aliases=("output_dir",))
    learning_rate: float = option(1e-3, "peak learning rate", above=0, group="Optimizer")
    weight_decay: float = option(0.0, "decoupled decay of matrices", low=0, group="Optimizer")


@dataclass(frozen=True)
class DpoOptions(LoraFlags, AdaptationFlags, ConversationFlags):
    """Flags of `dpo`."""

    data: str = option(
        REQUIRED, "JSON or JSONL of prompt, chosen, rejected; several with commas", aliases=("data_path",)
    )
    out: str = option("runs/dpo", "run folder to write, an adapter", aliases=("output_dir",))
    val_fraction: float = option(0.05, "share of the pairs kept for validation", low=0, below=1, group="Preference")
    beta: float = option(0.1, "how dearly it costs to leave the reference", above=0, group="Preference")
    learning_rate: float = option(5e-5, "peak learning rate", above=0, group="Optimizer")
    weight_decay: float = option(0.0, "decoupled decay of matrices", low=0, group="Optimizer")
