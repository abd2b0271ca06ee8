"""The strategies of `evolve`, by their names and with its flags. (`pbt`, which trains, is in `evolve_hyper.py`.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from functional_lm import evolve_flags
from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    from functional_lm.evolution import genetic as genetics
    from functional_lm.evolution.gradient import Settings, Wrap
    from functional_lm.evolution.strategy import Strategy
    from functional_lm.tree import Tree

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

    drawn = own_numbers(options, start) * options.population

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, enabled=options.compile and drawn > COMPILED)

    return STRATEGIES[options.strategy](options, wrap)


# With an estimated gradient -------------------------------------------------------------------------------------------


def openai_es(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import openai
    from functional_lm.training import optimizer

    return openai.openai_es(_estimate(options), optimizer.optimizer(options.optimizer), _numbers(options), wrap)


def eggroll(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import eggroll
    from functional_lm.training import optimizer

    chosen = optimizer.optimizer(options.optimizer)
    return eggroll.eggroll(_estimate(options), options.rank, chosen, _numbers(options), wrap)


def mezo(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import mezo

    return mezo.mezo(options.population, _numbers(options), wrap)


def _estimate(options: EvolveFlags) -> Settings:
    from functional_lm.evolution.gradient import Settings

    return Settings(options.population, options.antithetic, options.shaping, options.noise)


def _numbers(options: EvolveFlags) -> dict[str, float]:
    from functional_lm.evolution import gradient

    return {name: getattr(options, name) for name in gradient.NUMBERS}


# With a distribution --------------------------------------------------------------------------------------------------


def snes(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import natural

    return natural.snes(options.population, options.sigma, wrap=wrap)


def xnes(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import natural

    return natural.xnes(options.population, options.sigma, wrap=wrap)


def cma_es(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import cma, restarts

    if options.restarts != "none":
        return restarts.restarting(options.restarts, options.population, options.sigma, separable=False)
    return cma.cma_es(options.population, options.sigma, wrap=wrap)


def sep_cma_es(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import cma, restarts

    if options.restarts != "none":
        return restarts.restarting(options.restarts, options.population, options.sigma, separable=True)
    return cma.sep_cma_es(options.population, options.sigma, wrap=wrap)


# With members ---------------------------------------------------------------------------------------------------------


def genetic(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import genetic

    return genetic.genetic(_operators(options), wrap)


def nsga2(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import pareto

    return pareto.nsga2(_operators(options), len(evolve_flags.figures(options)), wrap)


def _operators(options: EvolveFlags) -> genetics.Settings:
    from functional_lm.evolution import genetic

    names = {field.name for field in dataclasses.fields(genetic.Settings)}
    return genetic.Settings(**{name: value for name, value in vars(options).items() if name in names})


def differential_evolution(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import differential

    how = (options.sigma, options.de_base, options.de_weight, options.de_crossover)
    return differential.differential(differential.Settings(options.population, *how), wrap)


def pso(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import swarm

    how = (options.sigma, options.inertia, options.cognitive, options.social)
    return swarm.particle_swarm(swarm.Settings(options.population, *how), wrap)


def map_elites(options: EvolveFlags, wrap: Wrap) -> Strategy:
    from functional_lm.evolution import elites

    grid = elites.Grid(*evolve_flags.grid(options))
    return elites.map_elites(elites.Settings(grid, options.population, options.sigma, options.line), wrap)


STRATEGIES: dict[str, Callable[[EvolveFlags, Wrap], Strategy]] = {
    "genetic": genetic,
    "openai-es": openai_es,
    "eggroll": eggroll,
    "mezo": mezo,
    "snes": snes,
    "xnes": xnes,
    "cma-es": cma_es,
    "sep-cma-es": sep_cma_es,
    "differential-evolution": differential_evolution,
    "pso": pso,
    "nsga2": nsga2,
    "map-elites": map_elites,
}
