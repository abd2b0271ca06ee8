"""Whether memory holds a training: what a step takes beside what there is, before anything is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING

from functional_lm import console
from functional_lm.errors import UsageError
from functional_lm.training_flags import TrainingFlags

if TYPE_CHECKING:
    from functional_lm.evolve_flags import EvolveFlags
    from functional_lm.model.account import TrainingMemory
    from functional_lm.model.config import ModelConfig

# Parameter-sized tensors that an optimizer keeps (Muon has one for the matrices of the layers and two for the rest).
MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1, "adafactor": 0}
SURE = 0.8  # of the estimate: no step was measured to take less
FROZEN = 0.5  # of the activations beside an adapter, which keeps fewer of them; not measured


def step_memory(
    flags: TrainingFlags | EvolveFlags, config: ModelConfig, averages: int = 0, microbatches: int = 1
) -> TrainingMemory:
    """What a step of one model takes, by an estimate; `averages` are copies of the parameters beside the moments."""
    from functional_lm.model import account

    return account.training_memory(
        config,
        flags.batch_size,
        flags.block_size or config.max_len,
        account.WIDTHS[flags.dtype],
        MOMENTS[flags.optimizer] + averages,
        microbatches=microbatches,
        device=flags.device,
        compiled=flags.compile,
    )


def memory_of(flags: TrainingFlags, config: ModelConfig) -> TrainingMemory:
    """That of a training by its flags."""
    return step_memory(flags, config, int(flags.ema_decay > 0), flags.gradient_accumulation_steps)


def check(
    flags: TrainingFlags, config: ModelConfig, models: int = 1, there: int = 0, less: str = "a smaller model needs less"
) -> None:
    """Raise UsageError where memory cannot hold a step of so many models, `there` bytes of which it holds already.

    `less` is what to do where it cannot hold what does not come from the batch.
    """
    memory = memory_of(flags, config)
    held = memory.parameters + memory.optimizer + memory.accumulated + memory.gradients
    _refuse(flags, config, models, int(max(held, SURE * memory.total) * models) - there, held * models - there, less)


def check_adapter(flags: TrainingFlags, config: ModelConfig) -> None:
    """The same of an adapter, beside a model that is in memory."""
    memory = memory_of(flags, config)
    _refuse(flags, config, 1, int(FROZEN * (memory.activations + memory.logits)), 0, "")


def _refuse(flags: TrainingFlags, config: ModelConfig, models: int, needed: int, held: int, less: str) -> None:
    """`held` of what is needed does not come from the batch."""
    import torch

    from functional_lm.evolution.memory import UNKNOWN, free_memory
    from functional_lm.model import account

    free = free_memory(torch.device(flags.device))
    if needed <= free or free == UNKNOWN:
        return
    length = flags.block_size or config.max_len
    if held > free:
        what = f"{console.count(account.parameters(config))} parameters{f' of {models} models' if models > 1 else ''}"
        remedy = less if models < 2 else f"{less}, and so do fewer models"
    else:
        fits = int(flags.batch_size * (free - held) / max(1, needed - held))
        what = f"{flags.batch_size} rows of {length} tokens"
        more = f"--batch_size {fits} fits" if 0 < fits < flags.batch_size else "a smaller --block_size needs less"
        remedy = f"{more}, --checkpoint_activations true trades time for memory"
    raise UsageError(
        f"a step over {what} takes at least {console.size(needed)} of memory, and {console.size(free)} are free; "
        f"{remedy}"
    )
