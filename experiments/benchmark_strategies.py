"""What a generation costs besides the fitness: ask, a sum of squares, tell, beside EvoTorch and evosax.

    python experiments/benchmark_strategies.py [--evotorch PYTHON] [--evosax PYTHON] [--sizes 1000,100000]

Each side is a process of its own, by the interpreter that has the library (EvoTorch's and evosax's are left out if none
is given), on as many threads. The sides take turns, one round of generations each; the table shows medians. Ours is
compiled as `evolve` compiles it, evosax by jax.jit; EvoTorch runs as its README runs it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import turns

STRATEGIES = ("snes", "sep-cma-es", "openai-es", "cma-es", "xnes")
MATRICES = ("cma-es", "xnes")  # D² numbers
LARGEST = 1000  # D of those
GENERATIONS = 10
SIGMA = 0.1


def ours(name: str, size: int, population: int) -> Callable[[], Any]:
    import torch

    from functional_lm import keys
    from functional_lm.compile import compiled
    from functional_lm.evolution import cma, gradient, natural, openai
    from functional_lm.training import optimizer

    made: dict[str, Callable[[], Any]] = {
        "snes": lambda: natural.snes(population, SIGMA, torch.float32, compiled),
        "xnes": lambda: natural.xnes(population, SIGMA, torch.float32, compiled),
        "cma-es": lambda: cma.cma_es(population, SIGMA, torch.float32, compiled),
        "sep-cma-es": lambda: cma.sep_cma_es(population, SIGMA, torch.float32, compiled),
        "openai-es": lambda: openai.openai_es(
            gradient.Settings(population),
            optimizer.optimizer("adamw"),
            {"sigma": SIGMA, "learning_rate": 0.01},
            compiled,
        ),
    }
    strategy = made[name]()
    state = strategy.init(keys.key(0), {"x": torch.ones(size)})

    def members(candidates: Any) -> torch.Tensor:
        leaves = strategy.members(candidates.shared, candidates.own)
        return leaves["x"]

    def generation() -> None:
        nonlocal state
        state = strategy.tell(state, -members(strategy.ask(state)).square().sum(-1))

    return generation


def evotorch(name: str, size: int, population: int) -> Callable[[], Any]:
    from evotorch import Problem
    from evotorch.algorithms import CMAES, PGPE, SNES, XNES

    problem = Problem(
        "min", lambda x: (x**2).sum(-1), solution_length=size, initial_bounds=(1, 1.001), vectorized=True, seed=0
    )
    made: dict[str, Callable[[], Any]] = {
        "snes": lambda: SNES(problem, popsize=population, stdev_init=SIGMA),
        "xnes": lambda: XNES(problem, popsize=population, stdev_init=SIGMA),
        "cma-es": lambda: CMAES(problem, popsize=population, stdev_init=SIGMA),
        "sep-cma-es": lambda: CMAES(problem, popsize=population, stdev_init=SIGMA, separable=True),
        "openai-es": lambda: PGPE(
            problem, popsize=population, stdev_init=SIGMA, center_learning_rate=0.01, stdev_learning_rate=0.1
        ),
    }
    return made[name]().step


def evosax(name: str, size: int, population: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from evosax import algorithms

    kind = {"snes": "SNES", "xnes": "xNES", "cma-es": "CMA_ES", "sep-cma-es": "Sep_CMA_ES", "openai-es": "Open_ES"}[
        name
    ]
    start = jnp.ones(size)
    strategy = getattr(algorithms, kind)(population_size=population, solution=start)
    params = strategy.default_params
    state = strategy.init(jax.random.key(0), start, params)
    key = jax.random.key(1)

    @jax.jit
    def step(key: Any, state: Any) -> Any:
        one, two, key = jax.random.split(key, 3)
        found, state = strategy.ask(one, state, params)
        state, _ = strategy.tell(two, found, (found**2).sum(-1), state, params)
        return key, state

    def generation() -> None:
        nonlocal key, state
        key, state = jax.block_until_ready(step(key, state))

    return generation


SIDES = {"ours": ours, "evotorch": evotorch, "evosax": evosax}


def worker(side: str, name: str, size: int, population: int) -> None:
    """Answer each line on standard input with the times of a round."""
    generation = SIDES[side](name, size, population)
    for _ in range(3):
        generation()
    turns.serve("ready", lambda: turns.timed(generation, GENERATIONS))


def compare(interpreters: dict[str, str], name: str, size: int, population: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a generation by side."""
    sides = {
        side: turns.started([python, __file__, "--worker", side, name, str(size), str(population)], quiet=True)
        for side, python in interpreters.items()
    }
    return {
        side: 1e3 * statistics.median(chain.from_iterable(found)) for side, found in turns.taken(sides, rounds).items()
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        side, name, size, population = sys.argv[2:]
        return worker(side, name, int(size), int(population))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evotorch", help="a Python that has EvoTorch")
    parser.add_argument("--evosax", help="a Python that has evosax")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--sizes", default="1000,100000")
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    sides = {"ours": sys.executable, "evotorch": given.evotorch, "evosax": given.evosax}
    interpreters = {side: python for side, python in sides.items() if python}
    print(f"{given.population} members, float32, milliseconds a generation")
    print(f"| strategy | D | {' | '.join(interpreters)} |\n|---|---|{'---|' * len(interpreters)}")
    for name in given.strategies.split(","):
        for numbers in map(int, given.sizes.split(",")):
            if name in MATRICES and numbers > LARGEST:
                continue
            found = compare(interpreters, name, numbers, given.population, given.rounds)
            print(f"| {name} | {numbers} | {' | '.join(f'{value:.2f}' for value in found.values())} |", flush=True)
    return None


if __name__ == "__main__":
    main()
