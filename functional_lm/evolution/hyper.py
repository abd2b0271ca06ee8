"""Numbers of training as what is evolved: scales on which they are searched, and population-based training.

    strategy = pbt(settings, functions, numbers)        functions: of `training.step`, for one model
    state    = strategy.init(key, params)               P models, P training states, numbers drawn around `numbers`
    state    = trained(state)                           some steps of all members at once: `steps_of(functions)`
    state    = strategy.tell(state, fitness)            exploit and explore

Any strategy over trees searches the same numbers as `offsets`: each candidate is a training from one start.

Jaderberg et al., "Population based training of neural networks", arXiv 1711.09846: members that are among the worst go
on with the weights, the optimizer's state and the numbers of one of the best ("exploit", truncation selection), and
their numbers are then perturbed or drawn anew ("explore"). Which member goes on as which, and with what numbers,
follows from key and fitness alone: `history` needs no training.

A number is searched on the scale of its logarithm; a decay (`beta1`, ...) on that of its distance from 1. A schedule is
numbers too (`schedule.bent`): the share of the training in which the rate rises, the last rate over the peak, the bend.

Axes: P members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import strategy as common
from functional_lm.evolution.shaping import usable
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.training.schedule import bent
from functional_lm.training.step import Batch, Training, TrainState
from functional_lm.training.transformation import Optimizer
from functional_lm.tree import Tree

BELOW_ONE = ("beta1", "beta2", "momentum")
SHARES = ("warmup", "final_rate")  # at most 1
SCHEDULE = (*SHARES, "bend")
Numbers = dict[str, Float[Tensor, "P"]]


@dataclass(frozen=True)
class Settings:
    """The share that is replaced, and how what replaces it differs."""

    population: int = 8
    spread: float = 10.0  # members begin, and are drawn anew, within this factor of each number
    exploit: float = 0.2  # of the population, at least one member
    perturb: float = 1.2  # times or divided by
    resample: float = 0.25  # probability that a number is drawn anew instead


class Population(NamedTuple):
    """The state. `states` [P, ...] are the trainings; `centre` are the weights of the last generation's best."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    states: TrainState


# Scales ---------------------------------------------------------------------------------------------------------------


def inner(name: str, value: Tensor) -> Tensor:
    """A number on the scale on which it is searched."""
    return torch.log(1 - value) if name in BELOW_ONE else torch.log(value)


def outer(name: str, scaled: Tensor) -> Tensor:
    """Back from there; a decay is at least 0, a share at most 1."""
    if name in BELOW_ONE:
        return 1 - scaled.clamp(max=0.0).exp()
    return (scaled.clamp(max=0.0) if name in SHARES else scaled).exp()


def check_numbers(numbers: Mapping[str, float]) -> None:
    """Raise UsageError for a number that has no place on its scale."""
    for name, value in numbers.items():
        if not (value < 1 if name in BELOW_ONE else value > 0):
            raise UsageError(f"--tuned {name} is searched by factors, and begins at {value:g}; give --{name} another")


def drawn(key: Tensor, numbers: Mapping[str, float], settings: Settings) -> dict[str, Float[Tensor, ""]]:
    """One member's numbers, uniform on their scales within the spread."""
    width = math.log(settings.spread)
    made = {}
    for name, value in numbers.items():
        at = keys.uniform(keys.fold_in_name(key, name))
        middle = inner(name, torch.tensor(value, device=key.device))
        made[name] = outer(name, middle + (2 * at - 1) * width)
    return made


# Who goes on as whom --------------------------------------------------------------------------------------------------


def beginning(key: Tensor, numbers: Mapping[str, float], settings: Settings) -> Numbers:
    """The numbers of the first generation."""
    own = common.member_keys(keys.fold_in_name(key, "numbers"), settings.population)
    return torch.vmap(lambda k: drawn(k, numbers, settings))(own)


def selected(
    key: Tensor, fitness: Float[Tensor, "P"], settings: Settings
) -> tuple[Int[Tensor, "P"], Bool[Tensor, "P"]]:
    """Whom each member goes on from, and whether that is another one: those among the worst, and those whose fitness
    is not finite, from one of the best, each as likely."""
    count = settings.population
    share = min(max(1, int(count * settings.exploit)), count // 2)
    ranked, finite = usable(fitness)
    order = ranked.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(count, device=order.device))
    best = finite.sum().clamp(max=share)
    replaced = ((place >= count - share) | ~finite) & (best > 0)
    luck = torch.vmap(keys.uniform)(common.member_keys(keys.fold_in_name(key, "exploit"), count))
    chosen = order[(luck * best).long().clamp(max=count - 1)]
    return torch.where(replaced, chosen, torch.arange(count, device=order.device)), replaced


def explored(
    key: Tensor, now: Numbers, replaced: Bool[Tensor, "P"], numbers: Mapping[str, float], settings: Settings
) -> Numbers:
    """The numbers of those who were replaced, each times or divided by `perturb`, or drawn anew."""

    def one(key: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
        anew, made = drawn(keys.fold_in_name(key, "anew"), numbers, settings), {}
        for name, value in own.items():
            up, whether = keys.split(keys.fold_in_name(key, name)).unbind()
            step = math.log(settings.perturb) * torch.where(keys.bernoulli(up, 0.5), 1.0, -1.0)
            perturbed = outer(name, inner(name, value) + step)
            made[name] = torch.where(keys.bernoulli(whether, settings.resample), anew[name], perturbed)
        return made

    changed = torch.vmap(one)(common.member_keys(keys.fold_in_name(key, "explore"), settings.population), now)
    return {name: torch.where(replaced, changed[name], now[name]) for name in now}


def following(
    key: Tensor, fitness: Float[Tensor, "P"], now: Numbers, numbers: Mapping[str, float], settings: Settings
) -> tuple[Numbers, Int[Tensor, "P"]]:
    """The numbers of the next generation, and whom each of its members goes on from."""
    parents, replaced = selected(key, fitness, settings)
    copied = {name: value[parents] for name, value in now.items()}
    return explored(key, copied, replaced, numbers, settings), parents


def history(
    key: Tensor,
    fitness: Sequence[Float[Tensor, "P"]],
    numbers: Mapping[str, float],
    settings: Settings | Callable[[int], Settings],
) -> tuple[list[Numbers], list[Int[Tensor, "P"]]]:
    """The numbers with which each generation was trained, and from which member of the one before its members come.

    The settings may be those of each generation.
    """
    settings_of = settings if callable(settings) else lambda generation: settings
    now = beginning(key, numbers, settings_of(0))
    parents = torch.arange(settings_of(0).population, device=key.device)
    numbers_of, parents_of = [], []
    for generation, measured in enumerate(fitness):
        numbers_of.append(now)
        parents_of.append(parents)
        now, parents = following(keys.fold_in(key, generation), measured, now, numbers, settings_of(generation))
    return numbers_of, parents_of


def lineage(
    numbers_of: Sequence[Numbers], parents_of: Sequence[Int[Tensor, "P"]], generation: int, member: int
) -> dict[str, list[float]]:
    """The schedule that led to a member of a generation: each number, generation by generation up to it."""
    found: dict[str, list[float]] = {name: [] for name in numbers_of[0]}
    for at in range(generation, -1, -1):
        for name, values in numbers_of[at].items():
            found[name].insert(0, float(values[member]))
        member = int(parents_of[at][member])
    return found


# The strategy ---------------------------------------------------------------------------------------------------------


def pbt(
    settings: Settings,
    functions: Training,
    numbers: Mapping[str, float],
    fresh: Callable[[Tensor], Tree] | None = None,
) -> Strategy:
    """Population-based training over `numbers`. Members begin at the parameters that `init` is given, or `fresh(key)`.

    Between `ask` of a generation and its fitness the states are trained (`steps_of`); `tell` needs the trained ones.
    """
    common.check_population(settings.population)
    check_numbers(numbers)

    def init(key: Tensor, start: Tree) -> Population:
        count = settings.population
        first = newborn(key, fresh, count) if fresh else [start] * count
        begun = [functions.init(params, own) for params, own in zip(first, _members(key, count).unbind())]
        states = _with(tree.stack(begun), beginning(key, numbers, settings))
        zero = torch.zeros((), dtype=torch.int64, device=key.device)
        centre = tree.copy(first[0]) if fresh else start
        return Population(key, zero, centre, centre, common.worst(key), states)

    def ask(state: Population) -> Candidates:
        return Candidates({}, {}, state.states.params)

    def tell(state: Population, fitness: Float[Tensor, "P"]) -> Population:
        params = state.states.params
        best, best_fitness = common.improved(state, fitness, lambda i: tree.map(lambda leaf: leaf[i], params))
        centre = tree.map(lambda leaf: leaf[usable(fitness)[0].argmax()], params)
        now = {name: state.states.numbers[name] for name in numbers}
        after, parents = following(common.generation_key(state), fitness, now, numbers, settings)
        states = tree.map(lambda leaf: leaf[parents], state.states)._replace(key=state.states.key)
        return Population(state.key, state.generation + 1, centre, best, best_fitness, _with(states, after))

    return Strategy("pbt", settings.population, init, ask, tell)


def newborn(key: Tensor, fresh: Callable[[Tensor], Tree], count: int) -> list[Tree]:
    """New weights of the first `count` members of a strategy that begins with this key."""
    return [fresh(keys.fold_in_name(own, "init")) for own in _members(key, count).unbind()]


def _members(key: Tensor, count: int) -> Int[Tensor, "P 2"]:
    return common.member_keys(keys.fold_in_name(key, "members"), count)


def _with(states: TrainState, numbers: Numbers) -> TrainState:
    return states._replace(numbers={**states.numbers, **numbers})


def scheduled(optimizer: Optimizer) -> Optimizer:
    """The optimizer at a rate that follows `schedule.bent`, whose numbers are the training's own."""

    def update(updates: Tree, state: Any, params: Tree, numbers: Mapping[str, Tensor]) -> tuple[Tree, Any]:
        factor = bent(numbers["step"], numbers["total_steps"], *(numbers[name] for name in SCHEDULE))
        now = {**numbers, "learning_rate": numbers["learning_rate"] * factor}
        return optimizer.update(updates, state, params, now)

    return Optimizer(optimizer.init, update)


def steps_of(
    functions: Training, wrap: Callable[..., Any]
) -> Callable[[TrainState, Callable[[int], Batch], int, int], TrainState]:
    """`(states, batch, first, count) -> states`: all members through the same `count` batches from number `first` on.

    `wrap(step)` compiles, and may write into the states that it is handed: they are a copy.
    """
    step = wrap(torch.vmap(functions.train_step, in_dims=(0, None)))

    def train(states: TrainState, batch: Callable[[int], Batch], first: int, count: int) -> TrainState:
        states = tree.copy(states)
        for number in range(first, first + count):
            states, _ = step(states, batch(number))
        return states

    return train


# Other strategies over the same numbers -------------------------------------------------------------------------------


def offsets(numbers: Mapping[str, float], device: torch.device | str) -> Tree:
    """What other strategies evolve: how far each number is from where it began, on its scale; [1], all 0."""
    return {name: torch.zeros(1, device=device) for name in numbers}


def moved(numbers: Mapping[str, float], offset: Tree) -> Numbers:
    """The numbers [...] that are so far [..., 1] from where they began."""
    return {
        name: outer(name, inner(name, torch.tensor(value, device=offset[name].device)) + offset[name][..., 0].float())
        for name, value in numbers.items()
    }


def begun(functions: Training, params: Tree, key: Tensor, numbers: Numbers, count: int) -> TrainState:
    """`count` trainings of one start, with numbers of their own."""
    one = functions.init(params, key)
    return _with(tree.map(lambda leaf: leaf.expand(count, *leaf.shape).contiguous(), one), numbers)
