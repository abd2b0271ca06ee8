"""Evolution strategies that estimate a gradient: perturb a centre, weigh the perturbations, let an optimizer step.

    ĝ = 1 / (P σ) Σ wᵢ sᵢ εᵢ        wᵢ the shaped fitness, sᵢ = ±1 the sign, εᵢ of unit variance

A *perturbation* says how ε is drawn and put into the tree; this is what strategies differ in (`openai.py`,
`eggroll.py`). Noise is *stored* (`ask` draws it for all members) or *regenerated*: then a member is a key and a sign,
and its noise is drawn when it is computed, so that memory does not grow with P.

Axes: P members, N pairs (or members, where they are not paired).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import strategy as common
from functional_lm.evolution.shaping import shaping
from functional_lm.evolution.strategy import Candidates, Strategy
from functional_lm.training.transformation import Optimizer
from functional_lm.tree import Tree

DIFFERENCE = "difference"  # a shaping of pairs: the fitness itself
NOISES = ("stored", "regenerated")
NUMBERS = {
    "sigma": 0.02,
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "momentum": 0.95,
    "grad_clip": 0.0,
}
BLOCK = 1 << 26  # numbers of noise that `tell` draws at once
FEW = 1 << 20  # numbers of noise of all pairs up to which calls into torch cost more than what they compute

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Partial = Callable[[Tree, Tensor, Tensor], Tree]


@dataclass(frozen=True)
class Settings:
    """How a gradient is estimated."""

    population: int = 32
    antithetic: bool = True
    shaping: str = "centered_rank"
    noise: str = "stored"


class Perturbation(NamedTuple):
    """`draw(key, shapes) -> noise`, of unit variance; `put(centre, noise, amount) -> leaves` of a member;
    `fixed(centre)`, the leaves that all members have as they stand; `sum(weights, noises, shapes) -> gradient`, of
    noises with an axis N in front; `numbers(shapes)`, how many of them a draw has.
    """

    draw: Callable[[Tensor, common.Shapes], Tree]
    put: Callable[[Tree, Tree, Tensor], Tree]
    fixed: Callable[[Tree], Tree]
    sum: Callable[[Tensor, Tree, common.Shapes], Tree]
    numbers: Callable[[common.Shapes], int]


class Search(NamedTuple):
    """The state. `numbers` are the optimizer's and σ, 0-d, which may change during a run."""

    key: Tensor
    generation: Tensor
    centre: Tree
    best: Tree
    best_fitness: Tensor
    optimizer: Tree
    numbers: dict[str, Tensor]


def difference(fitness: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Half the difference of each pair, with either sign; 0 where one of the two is not finite."""
    first, second = fitness.view(-1, 2).unbind(-1)
    half = (first - second) / 2
    half = torch.where(torch.isfinite(half), half, 0.0)
    return torch.stack([half, -half], -1).flatten()


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def estimating(
    name: str,
    settings: Settings,
    perturbation: Perturbation,
    optimizer: Optimizer,
    numbers: Mapping[str, float] | None = None,
    wrap: Wrap = unwrapped,
    dtype: torch.dtype = torch.float32,
) -> Strategy:
    """The strategy around a perturbation. `wrap` (`compiled`, say) goes around asking, and around telling: whole where
    the noise is small, else around its heavy parts, which are compiled sooner.

    `dtype` is that of numbers, weights and moments; of float64 the centre is too, else it is the tree's own.

    Raises UsageError for settings that contradict each other.
    """
    common.check_population(settings.population, antithetic=settings.antithetic)
    weigh = difference if settings.shaping == DIFFERENCE and settings.antithetic else shaping(settings.shaping)
    if settings.noise not in NOISES:
        raise UsageError(f"noise is {settings.noise!r}; it can be {', '.join(NOISES)}")
    count, pairs = settings.population, settings.population // (2 if settings.antithetic else 1)
    signs = (1.0, -1.0) if settings.antithetic else (1.0,)
    constants = {**NUMBERS, **(numbers or {})}

    def known(device: torch.device) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in sorted(constants.items())}

    def init(key: Tensor, start: Tree) -> Search:
        start = tree.cast(start, dtype) if dtype == torch.float64 else start
        # No two leaves are one tensor, so that one graph serves this state and all later ones.
        return tree.copy(Search(*common.begun(key, start, dtype), optimizer.init(start), known(key.device)))

    def renewed(state: Search) -> Search:
        return state._replace(numbers=known(state.key.device))

    def one(centre: Tree, key: Tensor, amount: Tensor) -> Tree:
        return perturbation.put(centre, perturbation.draw(key, common.shapes_of(centre)), amount)

    def both(centre: Tree, key: Tensor, sigma: Tensor) -> Tree:
        """A pair: its noise is drawn once."""
        noise = perturbation.draw(key, common.shapes_of(centre))
        amounts = sigma * torch.tensor(signs, dtype=dtype, device=key.device)
        return torch.vmap(lambda amount: perturbation.put(centre, noise, amount))(amounts)

    def all_of_them(centre: Tree, own: Tensor, sigma: Tensor) -> Tree:
        """Members [P, ...] of pairs [N]."""
        made = torch.vmap(lambda key: both(centre, key, sigma))(own)
        return tree.map(lambda leaf: leaf.flatten(0, 1), made)

    def plain(centre: Tree, key: Tensor, amount: Tensor) -> Tree:
        return formed(centre, one(centre, key, amount))

    partial = _partial(perturbation)

    def pair_keys(state: Search) -> Tensor:
        return common.member_keys(common.generation_key(state), pairs)

    def ask(state: Search) -> Candidates:
        own, sigma = pair_keys(state), state.numbers["sigma"]
        fixed = perturbation.fixed(state.centre)
        if settings.noise == "stored":
            return Candidates(fixed, {}, all_of_them(state.centre, own, sigma))
        sign = torch.tensor(signs, dtype=dtype, device=own.device).repeat(pairs)
        each = {"key": own.repeat_interleave(len(signs), 0), "sign": sign}
        return Candidates(fixed, {"centre": state.centre, "sigma": sigma}, each)

    def members(shared: Tree, own: Tree) -> Tree:
        if settings.noise == "stored":
            return own
        centre, sigma = shared["centre"], shared["sigma"]
        if len(own["sign"]) % len(signs) == 0:  # whole pairs
            return all_of_them(centre, own["key"][:: len(signs)], sigma)
        return torch.vmap(lambda key, sign: one(centre, key, sign * sigma))(own["key"], own["sign"])

    def dense(candidates: Candidates, index: int) -> Tree:
        own = tree.map(lambda leaf: leaf[index : index + 1], candidates.own)
        return formed(candidates.fixed, tree.index(members(candidates.shared, own), 0))

    def told(state: Search, fitness: Float[Tensor, "P"], partial: Partial, winner: Callable[..., Tree]) -> Search:
        own, sigma = pair_keys(state), state.numbers["sigma"]

        def candidate(index: Tensor) -> Tree:
            at = index[None]  # an index without an axis would be read as a Python number
            (sign,) = torch.tensor(signs, device=own.device)[at % len(signs)]
            (key,) = own[at // len(signs)]
            return winner(state.centre, key, sign * sigma)

        best, best_fitness = common.improved(state, fitness, candidate)
        fitness = fitness.to(own.device, torch.promote_types(fitness.dtype, dtype))
        weights = weigh(fitness).to(dtype).view(pairs, len(signs))
        weights = (weights * torch.tensor(signs, device=own.device)).sum(-1) / (count * sigma)
        shapes = common.shapes_of(state.centre)
        at_once = max(1, BLOCK // perturbation.numbers(shapes))
        parts = (partial(state.centre, *some) for some in zip(own.split(at_once), weights.split(at_once)))
        now = {**state.numbers, "step": state.generation}
        downhill = tree.scale(functools.reduce(tree.add, parts), -1.0)
        updates, moments = optimizer.update(downhill, state.optimizer, state.centre, now)
        centre = tree.map(lambda p, u: (p + u).to(p.dtype), state.centre, updates)
        return Search(state.key, state.generation + 1, centre, best, best_fitness, moments, state.numbers)

    in_parts = functools.partial(told, partial=wrap(partial), winner=wrap(plain))
    whole = wrap(functools.partial(told, partial=partial, winner=plain))

    def tell(state: Search, fitness: Float[Tensor, "P"]) -> Search:
        few = pairs * perturbation.numbers(common.shapes_of(state.centre)) <= FEW
        return (whole if few else in_parts)(state, fitness)

    asked = wrap(ask) if settings.noise == "stored" else ask  # without noise there is nothing to compute
    return Strategy(name, count, init, asked, tell, members, dense, renewed=renewed)


def _partial(perturbation: Perturbation) -> Partial:
    def partial(centre: Tree, own: Tensor, weights: Tensor) -> Tree:
        """Σ wᵢ εᵢ over some of the pairs, drawn again from their keys."""
        shapes = common.shapes_of(centre)
        return perturbation.sum(weights, torch.vmap(lambda key: perturbation.draw(key, shapes))(own), shapes)

    return partial


def formed(fixed: Tree, leaves: Tree) -> Tree:
    """A member as plain leaves: low-rank noise beside a fixed weight is added to it."""
    from functional_lm.model.linear import product
    from functional_lm.model.lora import EMBEDDING

    base, flat = tree.flatten(fixed), tree.flatten(leaves)
    made = {**base, **{name: leaf for name, leaf in flat.items() if not _beside(name, base)}}
    for path in {name.rpartition(".")[0]: None for name in flat if _beside(name, base)}:
        change = product({kind: flat[f"{path}.{kind}"] for kind in ("lora_A", "lora_B", "lora_scale")})
        weight = base[f"{path}.weight"]
        made[f"{path}.weight"] = (weight + (change.mT if path.endswith(EMBEDDING) else change)).to(weight.dtype)
    return tree.unflatten(made)


def _beside(name: str, base: Mapping[str, Tensor]) -> bool:
    path, _, kind = name.rpartition(".")
    return kind.startswith("lora_") and f"{path}.weight" in base and name not in base


def sample(key: Tensor, shapes: common.Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Standard normal draws by name."""
    return common.drawn(key, shapes, keys.normal, dtype)
