"""What `evolve` evolves, and how: spaces and strategies by the names that the flags give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functional_lm import evolve_flags
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_strategies import of_members

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


COMPILED = 1 << 22  # numbers drawn in a generation, above which a compiled draw is worth its compiling


def own_numbers(options: EvolveFlags, start: Tree) -> int:
    """How many numbers a member has of its own."""
    from functional_lm import tree
    from functional_lm.evolution.eggroll import low_rank
    from functional_lm.evolution.strategy import shapes_of

    return low_rank(options.rank).numbers(shapes_of(start)) if options.strategy == "eggroll" else tree.size(start)


def strategy_of(options: EvolveFlags, start: Tree) -> Strategy:
    """What the flags name, for a tree. Whether its parts are compiled depends on these two alone, as replay asks."""
    from functional_lm.compile import compiled
    from functional_lm.evolution import cma, eggroll, genetic, gradient, mezo, natural, openai, restarts
    from functional_lm.training import optimizer

    drawn = own_numbers(options, start) * options.population

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, enabled=options.compile and drawn > COMPILED)

    values = dataclasses.asdict(options)
    vectors = {
        "snes": natural.snes,
        "xnes": natural.xnes,
        "cma-es": cma.cma_es,
        "sep-cma-es": cma.sep_cma_es,
    }
    if options.strategy == "genetic":
        names = {field.name for field in dataclasses.fields(genetic.Settings)}
        settings = genetic.Settings(**{name: value for name, value in values.items() if name in names})
        return genetic.genetic(settings, wrap)
    if (found := of_members(options, wrap)) is not None:
        return found
    if options.restarts != "none":
        separable = options.strategy == "sep-cma-es"
        return restarts.restarting(options.restarts, options.population, options.sigma, separable)
    if options.strategy in vectors:
        return vectors[options.strategy](options.population, options.sigma, wrap=wrap)
    if options.strategy == "mezo":
        return mezo.mezo(options.population, {name: values[name] for name in gradient.NUMBERS}, wrap)
    how = gradient.Settings(options.population, options.antithetic, options.shaping, options.noise)
    numbers = {name: values[name] for name in gradient.NUMBERS}
    chosen = optimizer.optimizer(options.optimizer)
    if options.strategy == "openai-es":
        return openai.openai_es(how, chosen, numbers, wrap)
    return eggroll.eggroll(how, options.rank, chosen, numbers, wrap)
