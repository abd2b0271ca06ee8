"""The names in the flags of `evolve`, which import no torch, and in the README are those of what there is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from functional_lm import (
    evolve_checks,
    evolve_flags,
    evolve_spaces,
    evolve_strategies,
    keys,
    merge,
    sampling_settings,
    tree,
)
from functional_lm.evolution import decoding, differential, fitness, genetic, gradient, hyper, restarts, shaping
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.flags import describe
from functional_lm.model import merge as merging
from functional_lm.training import optimizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NEEDED: Mapping[str, Mapping[str, Any]] = {  # by strategies that a flag of their own has to be given to
    "nsga2": {"fitness": "loss,bits"},
    "map-elites": {"descriptor": ("bits",), "bins": "3", "ranges": ("0:1",)},
}


def choices(name: str) -> tuple[str, ...]:
    """What a flag may be."""
    (flag,) = (flag for flag in describe(EvolveFlags) if flag.name == name)
    return tuple(flag.about["choices"])


@pytest.mark.parametrize(
    ("flag", "there"),
    [
        ("strategy", {*evolve_strategies.STRATEGIES, "pbt"}),
        ("space", {"full", "lora", *evolve_spaces.SPACES, *evolve_flags.TRAINING}),
        ("method", set(merging.METHODS)),
        ("settings", set(decoding.INTO)),
        ("optimizer", set(optimizer.OPTIMIZERS)),
        ("shaping", set(shaping.SHAPINGS)),
        ("noise", set(gradient.NOISES)),
        ("restarts", {"none", *restarts.KINDS}),
        ("crossover", set(genetic.CROSSOVERS)),
        ("mutation", set(genetic.MUTATIONS)),
        ("de_base", set(differential.BASES)),
        ("tuned", (set(gradient.NUMBERS) - {"sigma"}) | set(hyper.SCHEDULE)),
    ],
)
def test_a_flag_can_be_what_there_is(flag: str, there: set[str]) -> None:
    """No name more, none less, none twice."""
    assert set(choices(flag)) == there
    assert len(choices(flag)) == len(there)


def test_fitness_can_be_what_there_is() -> None:
    assert set(evolve_flags.MEASURED) == set(fitness.OBJECTIVES)
    assert tuple(sampling_settings.USUAL) == choices("settings")
    assert merge.METHODS == merging.METHODS


def states() -> dict[str, tuple[Any, Any]]:
    """Each strategy of the flags, and a state of it."""
    start: dict[str, Any] = {"w": torch.ones(3, 2)}
    found = {}
    for name in evolve_strategies.STRATEGIES:
        options = dataclasses.replace(EvolveFlags(), strategy=name, population=4, **NEEDED.get(name, {}))
        strategy = evolve_strategies.strategy_of(options, start)
        found[name] = strategy, strategy.init(keys.key(0), start)
    return found


def test_kinds_of_strategies_are_those_of_their_states() -> None:
    """Estimating ones have an optimizer's numbers, remembering ones their members' figures, searching ones a tree each.

    Those that restart are those that `--restarts` changes.
    """
    made = states()
    assert [strategy.name for strategy, _ in made.values()] == [*made]
    fields = {name: set(state._fields) for name, (_, state) in made.items()}
    gradients = {name for name, (_, state) in made.items() if isinstance(state, gradient.Search)}
    assert gradients == {*evolve_flags.ESTIMATING, "mezo"}
    remembered = {name for name, its in fields.items() if its & {"fitness", "figures"}}
    assert remembered == set(evolve_flags.REMEMBERING)
    distributions = {name for name, its in fields.items() if "distribution" in its}
    assert distributions | {"differential-evolution", "pso"} == set(evolve_flags.SEARCHING)
    kept = {name for name, its in fields.items() if its & {"members", "elites", "places"}} - {"nsga2"}
    assert kept | {"pbt"} == set(evolve_flags.KEEPING)
    again = {name: fields_of(EvolveFlags(strategy=name, population=4, restarts="ipop")) for name in distributions}
    assert {name for name, its in again.items() if "run" in its} == set(evolve_flags.RESTARTING)


OTHERWISE: Mapping[str, Any] = {
    "elites": 1, "tournament": 1, "pressure": 0.1, "crossover": "arithmetic", "crossover_rate": 0.1,
    "mutation": "tensor", "mutation_rate": 0.9, "strength": 5.0, "de_base": "best", "de_weight": 1.5,
    "de_crossover": 0.1, "inertia": 0.1, "cognitive": 0.1, "social": 0.1, "bins": "2", "ranges": ("0:3",), "line": 0.5,
    "spread": 2.0, "exploit": 0.5, "perturb": 2.0, "resample": 1.0,
}  # fmt: skip


def told(strategy: str, **changes: Any) -> str:
    """What some generations come to."""
    given = {"strategy": strategy, "population": 8, "sigma": 0.3, **NEEDED.get(strategy, {}), **changes}
    start = {"w": keys.normal(keys.key(1), (3, 2), torch.float32)}
    made = evolve_strategies.strategy_of(EvolveFlags(**given), start)
    state = made.init(keys.key(0), start)
    for generation in range(2):
        figures = keys.uniform(keys.key(generation), (8, made.figures), torch.float32)
        state = made.tell(state, figures if made.figures > 1 else figures[:, 0])
    return tree.digest(made.ask(state))


@pytest.mark.parametrize("strategy", sorted(evolve_strategies.STRATEGIES))
def test_a_flag_of_some_strategies_changes_those_alone(strategy: str) -> None:
    """(pbt is made of a model and a step; another test has what it reads.)"""
    assert OTHERWISE.keys() == evolve_checks.OWN.keys()
    usual, own = told(strategy), {name for name, its in evolve_checks.OWN.items() if strategy in its}
    needed = NEEDED.get(strategy, {})
    changed = {
        name
        for name, value in OTHERWISE.items()
        if (name in own or name not in needed) and told(strategy, **{name: value}) != usual
    }
    assert changed == own


@pytest.mark.parametrize("name", sorted(optimizer.OPTIMIZERS))
def test_a_number_of_some_optimizers_changes_those_alone(name: str) -> None:
    """Some steps, of a matrix inside a layer and a vector."""
    chosen = optimizer.optimizer(name)

    def stepped(**changes: float) -> str:
        params: Any = {
            "model": {"layers": {"0": {"up_proj": {"weight": torch.eye(4)}}}, "norm": {"weight": torch.ones(4)}}
        }
        numbers = {
            "beta1": 0.9,
            "beta2": 0.99,
            "momentum": 0.9,
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "grad_clip": 0.0,
        }
        state = chosen.init(params)
        for step in range(8):
            gradients = tree.map(lambda leaf, step=step: keys.normal(keys.key(step), leaf.shape, torch.float32), params)
            now = {key: torch.tensor(value) for key, value in {**numbers, **changes, "step": step}.items()}
            updates, state = chosen.update(gradients, state, params, now)
            params = tree.map(torch.add, params, updates)
        return tree.digest((params, state))

    for number, its in evolve_checks.OPTIMIZING.items():
        assert (stepped(**{number: 0.5}) != stepped()) == (name in its), number


def fields_of(options: EvolveFlags) -> set[str]:
    start = {"w": torch.ones(3, 2)}
    return set(evolve_strategies.strategy_of(options, start).init(keys.key(0), start)._fields)


@pytest.mark.parametrize(("flag", "head"), [("space", "what is evolved"), ("strategy", "how")])
def test_the_readme_has_a_row_for_each(flag: str, head: str) -> None:
    """(Population-based training has a section of its own.)"""
    table = re.search(rf"\| {head} \| `--{flag}` \|\n\|---\|---\|\n((?:\|.*\n)+)", README)
    assert table is not None
    rows = [row.rsplit(" | ", 1)[1] for row in table[1].splitlines()]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(set(choices(flag)) - {"pbt"})
    assert "--strategy pbt" in README
