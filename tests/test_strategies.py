"""Strategies as laws: pure, by key and path, never led by NaN; and the statistics that their papers state.

Axes: P members.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, numbers
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import (
    cma,
    differential,
    eggroll,
    genetic,
    gradient,
    mezo,
    natural,
    openai,
    restarts,
    shaping,
    swarm,
)
from functional_lm.evolution import strategy as common
from functional_lm.evolution.strategy import Strategy
from functional_lm.training import transformation
from functional_lm.training.optimizer import OPTIMIZERS, optimizer
from functional_lm.tree import Tree

START: Tree = {
    "model": {"a": {"weight": torch.zeros(5, 4), "bias": torch.zeros(5)}, "norm": {"weight": torch.ones(4)}},
    "lm_head": {"weight": torch.zeros(7, 4)},
}
START = tree.unflatten(tree.flatten(START))  # in canonical order
AT = {"sigma": 0.1, "learning_rate": 0.05}
SOME = gradient.Settings(16)
ONE = torch.tensor(1.0)


def made(name: str, population: int = 16, noise: str = "stored") -> Strategy:
    how = gradient.Settings(population, noise=noise)
    if name == "genetic":
        return genetic.genetic(genetic.Settings(population, strength=0.5))
    if name == "mezo":
        return mezo.mezo(population, AT)
    if name in OTHERS:
        return OTHERS[name](population)
    return openai.openai_es(how, numbers=AT) if name == "openai-es" else eggroll.eggroll(how, 1, numbers=AT)


OTHERS: dict[str, Callable[[int], Strategy]] = {
    "cma-es, ipop": lambda population: restarts.restarting("ipop", population, 0.2),
    "sep-cma-es, bipop": lambda population: restarts.restarting("bipop", population, 0.2, separable=True),
    "differential-evolution": lambda population: differential.differential(
        differential.Settings(population, 0.5, "best", 0.6)
    ),
    "snes": lambda population: natural.snes(population, 0.2),
    "xnes": lambda population: natural.xnes(population, 0.2),
    "pso": lambda population: swarm.particle_swarm(swarm.Settings(population, 0.3)),
}
NAMES = ("genetic", "openai-es", "eggroll", *OTHERS)
EVERY = pytest.mark.parametrize("name", NAMES)


def goal(node: Tree) -> float:
    """Minus the squared distance from a place that lies in no special direction."""
    flat = tree.flatten(node)
    return -sum(
        float((leaf - 0.3 * torch.arange(leaf.numel()).view(leaf.shape).cos()).square().sum()) for leaf in flat.values()
    )


def evolved(strategy: Strategy, generations: int, function: Callable[[Tree], float] = goal, seed: int = 0) -> object:
    state = strategy.init(keys.key(seed), START)
    for _ in range(generations):
        state = strategy.tell(state, common.evaluate(strategy, strategy.ask(state), function))
    return state


# What holds for all ---------------------------------------------------------------------------------------------------


@EVERY
def test_fitness_rises(name: str) -> None:
    state = evolved(made(name, 32), 40)
    assert goal(state.best) == pytest.approx(float(state.best_fitness), rel=1e-4)  # type: ignore[attr-defined]
    assert goal(state.best) > goal(START) / 3  # type: ignore[attr-defined]
    assert goal(state.centre) > goal(START) / 3  # type: ignore[attr-defined]


@EVERY
def test_a_generation_is_a_function_of_state_and_fitness(name: str) -> None:
    strategy = made(name)
    one, other = evolved(strategy, 3), evolved(strategy, 3)
    assert tree.digest(one) == tree.digest(other)
    assert tree.digest(evolved(strategy, 3, seed=1)) != tree.digest(one)


@EVERY
def test_a_state_survives_the_disk(name: str, tmp_path: object) -> None:
    strategy = made(name)
    state = tree.copy(evolved(strategy, 2))  # as the loop has it: products round by how their operands lie
    tree.save(state, f"{tmp_path}/state.safetensors")
    back = tree.copy(tree.restore(state, tree.flatten(tree.load(f"{tmp_path}/state.safetensors"))))
    fitness = torch.arange(16.0)
    assert tree.digest(strategy.tell(back, fitness)) == tree.digest(strategy.tell(state, fitness))


@EVERY
@given(bad=st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=16), seed=SEEDS)
@settings(max_examples=15)
def test_what_is_not_finite_never_wins_and_never_poisons(name: str, bad: list[float], seed: int) -> None:
    strategy = made(name)
    state = strategy.init(keys.key(seed), START)
    candidates = strategy.ask(state)
    fitness = numbers((16,), seed)
    fitness[: len(bad)] = torch.tensor(bad)
    told = strategy.tell(state, fitness)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves((told.centre, told.best)))
    if len(bad) < 16:
        winner = len(bad) + int(fitness[len(bad) :].argmax())
        assert float(told.best_fitness) == float(fitness[winner])
        best = strategy.dense(candidates, winner)
        for found, wanted in zip(tree.leaves(told.best), tree.leaves(best)):
            torch.testing.assert_close(found, wanted)
    else:
        assert float(told.best_fitness) == -math.inf
        assert tree.digest(told.best) == tree.digest(START)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(strategy.ask(told)))


@EVERY
def test_the_best_stays_when_generations_get_worse(name: str) -> None:
    strategy = made(name)
    state = strategy.tell(strategy.init(keys.key(0), START), torch.arange(16.0))
    later = strategy.tell(state, torch.arange(16.0) - 100)
    assert tree.digest(later.best) == tree.digest(state.best)
    assert float(later.best_fitness) == 15.0


BY_PATH = ("openai-es", "eggroll", "mezo", "genetic", "pso")
PART = "model.a.*"


def assert_same_part(strategy: Strategy, state: object, other: Strategy, of_part: object) -> None:
    """Members of `other`, whose tree is a part, have the leaves that those of `strategy` have there."""
    whole, some = strategy.ask(state), other.ask(of_part)
    for i in range(other.population):
        found = tree.select(strategy.dense(whole, i), PART)
        for mine, theirs in zip(tree.leaves(found), tree.leaves(other.dense(some, i)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [*BY_PATH, *(name for name in OTHERS if name != "pso")])
def test_noise_depends_on_key_and_path_alone(name: str) -> None:
    """Neither on the other leaves, nor on how many members there are."""
    strategy, other = made(name, 16), made(name, 8)
    of_part = other.init(keys.key(3), tree.select(START, PART))
    assert_same_part(strategy, strategy.init(keys.key(3), START), other, of_part)


@pytest.mark.parametrize("name", [*BY_PATH, "snes", "xnes", "sep-cma-es, bipop"])
def test_the_order_of_leaves_changes_nothing(name: str) -> None:
    """Nor do strategies over one vector know it, but for the eigenvectors of a full CMA-ES."""
    flat = tree.flatten(START)
    other: Tree = {name.replace(".", "/"): flat[name] for name in reversed(flat)}
    one: Tree = {name: other[name] for name in reversed(other)}
    strategy = made(name)
    states = [strategy.init(keys.key(4), start) for start in (one, other)]
    for generation in range(3):
        states = [strategy.tell(state, numbers((16,), generation)) for state in states]
    for index in (0, 15):
        found, wanted = (strategy.dense(strategy.ask(state), index) for state in states)
        assert found.keys() == wanted.keys() == one.keys()
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BY_PATH)
@given(seed=SEEDS)
@settings(max_examples=3)
def test_later_draws_too_depend_on_key_and_path_alone(name: str, seed: int) -> None:
    """Steps, tournaments, crossover, mutation and velocities: at equal fitness a part goes its way as in the whole."""
    strategy = made(name)
    whole, part = (strategy.init(keys.key(seed), start) for start in (START, tree.select(START, PART)))
    for generation in range(2):
        fitness = numbers((16,), seed + generation)
        whole, part = strategy.tell(whole, fitness), strategy.tell(part, fitness)
    assert_same_part(strategy, whole, strategy, part)


@pytest.mark.parametrize("name", ["openai-es", "eggroll"])
def test_regenerated_noise_is_stored_noise(name: str) -> None:
    stored, regenerated = made(name), made(name, noise="regenerated")
    first, second = (s.ask(s.init(keys.key(5), START)) for s in (stored, regenerated))
    assert {leaf.shape[0] for leaf in tree.leaves(second.own)} == {16}
    assert sum(leaf[0].numel() for leaf in tree.leaves(second.own)) == 3  # a key and a sign
    for i in range(16):
        for mine, theirs in zip(tree.leaves(stored.dense(first, i)), tree.leaves(regenerated.dense(second, i))):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["openai-es", "eggroll"])
def test_pairs_are_opposite(name: str) -> None:
    strategy = made(name)
    candidates = strategy.ask(strategy.init(keys.key(0), START))
    for i in range(0, 16, 2):
        mean = tree.lerp(strategy.dense(candidates, i), strategy.dense(candidates, i + 1), 0.5)
        for found, wanted in zip(tree.leaves(mean), tree.leaves(START)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_any_optimizer_takes_the_estimate(name: str) -> None:
    strategy = openai.openai_es(gradient.Settings(32), optimizer(name), AT)
    assert goal(evolved(strategy, 15).centre) > goal(START)  # type: ignore[attr-defined]


# The estimate ---------------------------------------------------------------------------------------------------------


def estimate(strategy: Strategy, seed: int, slope: Tensor) -> Tensor:
    """The centre's step on a linear fitness, z-scores and plain gradient ascent of rate 1 in its place."""
    state = strategy.init(keys.key(seed), {"a": {"weight": torch.zeros(slope.shape)}})
    members = strategy.ask(state)
    dense = torch.stack([strategy.dense(members, i)["a"]["weight"] for i in range(strategy.population)])
    fitness = (dense * slope).sum((1, 2))
    return strategy.tell(state, fitness).centre["a"]["weight"]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_for_a_linear_fitness_the_estimate_is_unbiased_at_every_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ĝ = mean of f(σE) E / σ is the slope on average, whatever the rank (rank 0: OpenAI-ES).

    Averaged over 50 keys with 128 members each: the standard error of a number is about |slope| / √6400.
    """
    from functional_lm.training.transformation import scale_by_learning_rate

    monkeypatch.setitem(shaping.SHAPINGS, "plain", lambda fitness: fitness)
    slope = numbers((5, 4), 0)
    how = gradient.Settings(128, shaping="plain")
    plain, at = scale_by_learning_rate(), {"sigma": 0.3, "learning_rate": 1.0}
    strategy = eggroll.eggroll(how, rank, plain, at) if rank else openai.openai_es(how, plain, at)
    mean = torch.stack([estimate(strategy, seed, slope) for seed in range(50)]).mean(0)
    error = (mean - slope).abs().max()
    assert error < 5 * slope.norm() * math.sqrt(1 + 2 / max(1, rank)) / math.sqrt(50 * 128)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_noise_has_variance_one_and_fourth_moment_3_plus_6_over_r(rank: int) -> None:
    """arXiv 2511.16652: the entries of A Bᵀ / √r are uncorrelated, of kurtosis 3 + 6/r."""
    perturbation, centre = eggroll.low_rank(rank), {"a": {"weight": torch.zeros(40, 30)}}

    def member(key: Tensor) -> Tensor:
        noise = perturbation.draw(key, common.shapes_of(centre))
        return gradient.formed(perturbation.fixed(centre), perturbation.put(centre, noise, ONE))["a"]["weight"]

    noise = torch.vmap(member)(keys.split(keys.key(0), 400))
    assert noise.mean().abs() < 0.02
    assert noise.square().mean() == pytest.approx(1, abs=0.03)
    assert noise.pow(4).mean() == pytest.approx(3 + 6 / rank, rel=0.12)


def test_the_update_is_the_sum_of_the_formed_noise() -> None:
    """`sum` never forms an E; here each is formed, for a matrix, an embedding and vectors."""
    shapes = {"x.weight": (5, 4), "model.embed_tokens.weight": (6, 3), "n.weight": (4,), "y.lora_A": (3, 4)}
    perturbation = eggroll.low_rank(2)
    centre = tree.unflatten({name: torch.zeros(shape) for name, shape in shapes.items()})
    own, weights = keys.split(keys.key(0), 7), numbers((7,), 1)
    noises = torch.vmap(lambda key: perturbation.draw(key, shapes))(own)
    found = perturbation.sum(weights, noises, shapes)
    members = [
        gradient.formed(perturbation.fixed(centre), perturbation.put(centre, tree.index(noises, i), torch.tensor(1.0)))
        for i in range(7)
    ]
    for name, leaf in tree.flatten(tree.unflatten(tree.flatten(found))).items():
        wanted = sum(weights[i] * tree.flatten(members[i])[name] for i in range(7))
        torch.testing.assert_close(leaf, wanted)


def test_mezo_steps_along_the_draw_by_the_difference() -> None:
    """(f₊ - f₋) / 2σ ε, averaged over the pairs; a pair of which one is not finite adds nothing."""
    strategy = mezo.mezo(4, {"sigma": 0.1, "learning_rate": 0.5})
    state = strategy.init(keys.key(0), START)
    candidates = strategy.ask(state)
    told = strategy.tell(state, torch.tensor([3.0, 1.0, math.nan, 7.0]))
    up, down = strategy.dense(candidates, 0), strategy.dense(candidates, 1)
    for centre, plus, minus, start in zip(*map(tree.leaves, (told.centre, up, down, START)), strict=True):
        noise = (plus - minus) / 0.2
        torch.testing.assert_close(centre, start + 0.5 * (3 - 1) / 0.2 * noise / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "mezo"])
def test_where_float64_is_asked_the_whole_state_is(name: str) -> None:
    """Of a float32 tree and float32 fitness too: centre, best, numbers, moments, members."""
    double = {"numbers": AT, "dtype": torch.float64}
    strategy = mezo.mezo(16, **double) if name == "mezo" else openai.openai_es(SOME, optimizer(name), **double)
    state = strategy.init(keys.key(0), START)
    for fitness in (numbers((16,), 0), numbers((16,), 1)):
        state = strategy.tell(state, fitness)
    asked = strategy.ask(state)
    kept = (state, strategy.renewed(state), strategy.members(asked.shared, asked.own), strategy.dense(asked, 3))
    assert {leaf.dtype for leaf in tree.leaves(kept) if leaf.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("noise", gradient.NOISES)
def test_in_float64_the_step_is_the_formula(noise: str) -> None:
    """rate / (P σ) Σ wᵢ sᵢ εᵢ: one number, weight or sum in float32 would be seen in the ninth place."""
    plain, how = transformation.scale_by_learning_rate(), gradient.Settings(12, noise=noise)
    strategy = openai.openai_es(how, plain, AT, dtype=torch.float64)
    state = strategy.init(keys.key(0), START)
    candidates, start = strategy.ask(state), tree.cast(START, torch.float64)
    fitness = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 3.5, 8.0, 7.0, 0.0])
    weights = fitness.double().argsort().argsort().double() / 11 - 0.5
    steps = [tree.subtract(strategy.dense(candidates, i), start) for i in range(12)]  # ± σ ε
    wanted = tree.leaves(start)
    for step, weight in zip(steps, weights):
        wanted = [at + 0.05 * weight / (12 * 0.1**2) * leaf for at, leaf in zip(wanted, tree.leaves(step))]
    for found, leaf in zip(tree.leaves(strategy.tell(state, fitness).centre), wanted, strict=True):
        torch.testing.assert_close(found, leaf, rtol=1e-13, atol=1e-13)


def test_a_blockwise_sum_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evolved(made("openai-es"), 2)
    monkeypatch.setattr(gradient, "BLOCK", 100)
    parts = evolved(made("openai-es"), 2)
    for one, other in zip(tree.leaves(whole), tree.leaves(parts)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# What cannot work, and what is compiled -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: openai.openai_es(gradient.Settings(7)), "a population of 7 is odd; antithetic pairs need an even one"),
        (lambda: openai.openai_es(gradient.Settings(0)), "a population of 0 is too small"),
        (lambda: eggroll.eggroll(gradient.Settings(8), 0), "the rank of the noise is 0"),
        (lambda: openai.openai_es(gradient.Settings(8, shaping="no")), "there is no shaping 'no'; there are"),
        (lambda: openai.openai_es(gradient.Settings(8, noise="no")), "noise is 'no'; it can be stored, regenerated"),
        (lambda: genetic.genetic(genetic.Settings(4, elites=4)), "4 elites leave no room in a population of 4"),
        (lambda: genetic.genetic(genetic.Settings(4, tournament=0)), "a tournament of 0 has no winner"),
        (lambda: genetic.genetic(genetic.Settings(4, pressure=1.5)), "pressure is 1.5; a probability"),
        (lambda: genetic.genetic(genetic.Settings(4, crossover="x")), "crossover is 'x'; it can be uniform"),
        (lambda: made("eggroll").init(keys.key(0), {}), "there is nothing to evolve"),
        (lambda: made("genetic").init(keys.key(0), {"x": torch.zeros(2, dtype=torch.int64)}), "x holds torch.int64"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def of_pairs(make: Any, population: int, sigma: float, **how: Any) -> Strategy:
    return make(gradient.Settings(population), numbers={"sigma": sigma}, **how)


PAIRED = [partial(of_pairs, openai.openai_es), partial(of_pairs, eggroll.eggroll)]


@pytest.mark.parametrize("make", [natural.snes, natural.xnes, cma.sep_cma_es, cma.cma_es, *PAIRED])
def test_compiled_generations_are_the_eager_ones_and_one_graph_each(make: Any) -> None:
    """Asking and telling are a graph each, of the first generation as of the others."""
    eager, fast = make(6, 0.1), make(6, 0.1, wrap=partial(compiling.compiled, backend="aot_eager"))
    start, graphs = {"x": torch.ones(5)}, [compiling.graphs()]
    states = [strategy.init(keys.key(0), start) for strategy in (eager, fast)]
    for _ in range(3):
        asked = [strategy.ask(state).own["x"] for strategy, state in zip((eager, fast), states)]
        torch.testing.assert_close(asked[1], asked[0], rtol=1e-5, atol=1e-6)
        fitness = -asked[0].square().sum(-1)
        states = [strategy.tell(state, fitness) for strategy, state in zip((eager, fast), states)]
        graphs.append(compiling.graphs())
    for one, other in zip(tree.leaves(states[0]._asdict()), tree.leaves(states[1]._asdict()), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert [after - graphs[0] for after in graphs[1:]] == [2, 2, 2]
