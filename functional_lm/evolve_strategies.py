"""Strategies whose state is members, by the names and flags of `evolve`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from functional_lm import evolve_flags
from functional_lm.evolve_flags import EvolveFlags

if TYPE_CHECKING:
    from functional_lm.evolution.gradient import Wrap
    from functional_lm.evolution.strategy import Strategy


def of_members(options: EvolveFlags, wrap: Wrap) -> Strategy | None:
    """What the flags name; None where it is a strategy of another kind."""
    from functional_lm.evolution import differential, elites, genetic, pareto, swarm

    count, sigma = options.population, options.sigma
    if options.strategy == "differential-evolution":
        how = differential.Settings(count, sigma, options.de_base, options.de_weight, options.de_crossover)
        return differential.differential(how, wrap)
    if options.strategy == "pso":
        return swarm.particle_swarm(
            swarm.Settings(count, sigma, options.inertia, options.cognitive, options.social), wrap
        )
    if options.strategy == "nsga2":
        names = {field.name for field in dataclasses.fields(genetic.Settings)}
        given = {name: value for name, value in dataclasses.asdict(options).items() if name in names}
        return pareto.nsga2(genetic.Settings(**given), len(evolve_flags.figures(options)), wrap)
    if options.strategy == "map-elites":
        grid = elites.Grid(*evolve_flags.grid(options))
        return elites.map_elites(elites.Settings(grid, count, sigma, options.line), wrap)
    return None
