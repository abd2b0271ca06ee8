"""Spaces of `evolve` that are not a model's leaves: what their flags name, and the folder that the winner becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from functional_lm import files
from functional_lm import merge as merge_command
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import GENERATE, Evolution, key_of
from functional_lm.evolve_strategies import strategy_of
from functional_lm.merge import MergeFlags

if TYPE_CHECKING:
    from functional_lm.evolution import merging
    from functional_lm.tree import Tree


def merge(options: EvolveFlags) -> Evolution:
    """Coefficients over models. What `merge` refuses is refused here. Raises UsageError, DataError."""
    from functional_lm import folder, tree
    from functional_lm.evolution import merging

    flags = MergeFlags(options.models, options.out, options.method, base=options.base, density=options.density)
    merge_command.check(flags)
    found = merge_command.opened(flags, options.device)
    models = [model.params for model in found]
    base = models.pop() if options.method in merge_command.FROM_BASE else None
    groups = merging.grouped(models[0], options.groups)
    space = merging.merged(models, groups, options.method, base, key_of(options), options.density)

    def write(path: Path, leaves: Tree) -> None:
        folder.save(path, space.whole(space.base, leaves), found[0].config, found[0].tokenizer)
        files.write_json(path / "merge.json", _in_words(flags, merging.recipe(leaves, groups), options.seed))

    return Evolution(
        found[0], space, strategy_of(options, space.start), tree.digest(space.base), write, GENERATE, "model"
    )


def _in_words(flags: MergeFlags, found: merging.Recipe, seed: int) -> dict[str, object]:
    """The flags of `merge` that make the same model."""
    own = dict(found.weights)
    weights = own.pop("*", None)
    layers = ";".join(f"{group}={','.join(map(repr, values))}" for group, values in own.items()) or None
    return dataclasses.asdict(
        dataclasses.replace(flags, weights=weights, layer_weights=layers, density=found.density, seed=seed)
    )


def decode(options: EvolveFlags) -> Evolution:
    """How a model's tokens are chosen, beginning at its own settings."""
    from functional_lm import folder, sampling_settings, tree
    from functional_lm.evolution import decoding

    assert options.model is not None
    model, plan = folder.load(options.model, options.device, quantized=True), folder.read_plan(options.model)
    size = model.config.vocab_size
    began = sampling_settings.resolved(None, options.model)
    space = decoding.decode(model.params, began, options.settings, size)
    space = space._replace(start=tree.to(space.start, options.device))

    def write(path: Path, leaves: Tree) -> None:
        folder.save(path, model.params, model.config, model.tokenizer, plan)
        found = decoding.settings_of(leaves["settings"], options.settings, size)
        evolved = {name: value.item() for name, value in found.items()}
        sampling_settings.write(path, {**began, **evolved})

    digest = tree.digest({"model": model.params, "start": space.start})
    return Evolution(model, space, strategy_of(options, space.start), digest, write, GENERATE, "model")


SPACES: dict[str, Callable[[EvolveFlags], Evolution]] = {"merge": merge, "decode": decode}
