"""What `evolve` evolves: spaces by the names that the flags give them, each with its strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import evolve_flags
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_strategies import strategy_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from functional_lm.evolution.journal import Journal
    from functional_lm.evolution.spaces import Space
    from functional_lm.evolution.strategy import Strategy
    from functional_lm.folder import Model
    from functional_lm.tree import Tree


GENERATE = "python -m functional_lm.generate --model"


def no_facts(journal: Journal, kept: str, leaves: Tree) -> Mapping[str, Any]:
    return {}


class Evolution(NamedTuple):
    """What follows from the flags and the model, whatever fitness is."""

    model: Model
    space: Space
    strategy: Strategy
    digest: str  # of the model's parameters, and of what is evolved where that does not follow from the flags
    write: Callable[[Path, Any], None]  # a folder with what was evolved
    use: str  # the command that goes on with such a folder, without its prompt
    what: str  # "model" or "adapter"
    facts: Callable[[Journal, str, Tree], Mapping[str, Any]] = no_facts  # more for summary.json, of what is kept


def key_of(options: EvolveFlags) -> Tensor:
    """The key of every draw."""
    from functional_lm import keys

    return keys.key(options.seed, options.device)


def evolution_of(options: EvolveFlags) -> Evolution:
    from functional_lm import evolve_spaces, folder, tree

    if options.space in evolve_spaces.SPACES:
        return evolve_spaces.SPACES[options.space](options)
    assert options.model is not None
    model = folder.load(options.model, options.device, quantized=options.space == "lora")
    digest = tree.digest(model.params)
    if options.space == "lora":
        space, write = _adapter(options, model, digest)
        began = digest if options.adapter is None else tree.digest({"model": model.params, "start": space.start})
        return Evolution(
            model,
            space,
            strategy_of(options, space.start),
            began,
            write,
            f"{GENERATE} {options.model} --adapter",
            "adapter",
        )
    if options.space in evolve_flags.TRAINING:
        from functional_lm import evolve_hyper, evolve_trained

        found = evolve_hyper if options.strategy == "pbt" else evolve_trained
        return found.evolution_of(options, model, digest)
    from functional_lm.evolution import spaces

    space = spaces.full(model.params, options.leaves)

    def write_model(path: Path, leaves: Tree) -> None:
        folder.save(path, space.whole(space.base, leaves), model.config, model.tokenizer)

    return Evolution(model, space, strategy_of(options, space.start), digest, write_model, GENERATE, "model")


def _adapter(options: EvolveFlags, model: Model, digest: str) -> tuple[Space, Callable[[Path, Tree], None]]:
    from functional_lm import keys, tree
    from functional_lm.evolution import spaces
    from functional_lm.interop import peft
    from functional_lm.model import lora

    if options.adapter is not None:
        start, how = peft.load(options.adapter, model.params, digest, options.device)
        how = dataclasses.replace(how, base=str(options.model), digest=digest)
    else:
        alpha = float(options.rank) if options.alpha is None else options.alpha
        key = keys.fold_in_name(key_of(options), "adapter")
        start = lora.init(model.params, options.targets, options.rank, key, alpha)
        how = peft.Settings(options.rank, alpha, options.targets, base=str(options.model), digest=digest)
    scales, shapes = tree.select(start, "*.lora_scale"), tree.to(model.params, "meta")

    def write(path: Path, leaves: Tree) -> None:
        peft.save(path, tree.overlay(leaves, scales), how, shapes)

    return spaces.adapter(model.params, tree.cast(start, _float32())), write


def _float32() -> torch.dtype:
    import torch

    return torch.float32
