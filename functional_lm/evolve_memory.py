"""How many members of an evolution memory holds at once, and what is said where it does not hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from functional_lm import console, evolve_flags, training_room
from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution
from functional_lm.evolve_strategies import own_numbers

if TYPE_CHECKING:
    from functional_lm.folder import Model
    from functional_lm.model.account import TrainingMemory


def chunk_of(options: EvolveFlags, evolution: Evolution, tokens: int) -> int:
    """Members at once, from the flag or from memory. Raises UsageError for more members than memory holds.

    Those of `--restarts` are as many as they may have become when the run ends.
    """
    import torch

    from functional_lm.evolution import memory

    if options.chunk_size != "auto":
        return int(options.chunk_size)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    numbers, free = own_numbers(options, evolution.space.start), memory.free_memory(device)
    writes = any(map(evolve_flags.answers, evolve_flags.figures(options)))
    copy = dtype.itemsize if dtype.itemsize < 4 else 0  # what is computed with
    own = (4 + copy) * numbers + 4 * evolution.space.makes
    each = memory.member_bytes(evolution.model.config, tokens, own, dtype, writes)

    times = _doubled(options)

    def held(population: int) -> int:
        cells = math.prod(evolve_flags.grid(options)[0]) if options.descriptor else 0
        return memory.held(options.strategy, times * population, numbers, options.noise == "regenerated", cells)

    if each > free != memory.UNKNOWN:
        raise UsageError(
            f"--batch_size {options.batch_size}: a member takes {console.size(each)} as it reads {tokens} tokens, and "
            f"{console.size(free)} are free; a smaller --batch_size or --block_size needs less, --chunk_size 1 tries "
            "it all the same"
        )
    left = free - held(options.population)
    if left < each and free != memory.UNKNOWN:
        fits = int((free - each - held(0)) // max(1, held(1) - held(0)))
        least = f"--population {fits - fits % 2} fits" if fits > 3 else "evolve fewer numbers"
        after = f" may become {times * options.population} after --restarts {options.restarts}" if times > 1 else ""
        fewer = f", --restarts none takes {console.size(held(options.population) // times)}" if times > 1 else ""
        raise UsageError(
            f"--population {options.population}{after}: {options.strategy} holds "
            f"{console.size(held(options.population))} of them at once, and {console.size(free)} are free; {least}"
            f"{fewer}, --chunk_size 1 tries it all the same"
        )
    return memory.automatic_chunk(options.population, each, tokens, left, device.type, writes)


def _doubled(options: EvolveFlags) -> int:
    """How often the first population the largest one is that a run of so many generations comes to."""
    if options.restarts == "none":
        return 1
    from functional_lm.evolution import restarts

    parts = options.generations
    if options.evaluations is not None:
        parts = min(parts, -(-options.evaluations // options.population))
    return restarts.most_parts(parts)


def trainings_at_once(options: EvolveFlags, model: Model, ranks: int) -> int:
    """Members that are trained at once: those that half of the free memory holds, of the largest architecture.

    All of them by pbt, which goes on with their states. Raises UsageError where memory does not hold them, or not one.
    """
    import torch

    from functional_lm.evolution import memory
    from functional_lm.evolve_trained import grid_of

    if options.chunk_size != "auto":
        return int(options.chunk_size)
    largest = max(
        (training_room.step_memory(options, config) for config in grid_of(options, model.config).able.values()),
        key=lambda one: one.total,
    )
    free = memory.free_memory(torch.device(options.device))
    needed = pbt_bytes(largest) if options.strategy == "pbt" else int(training_room.SURE * largest.total)
    together = options.population if options.strategy == "pbt" else 1
    if together * needed > free and free != memory.UNKNOWN:
        fits = free // needed
        more = "" if options.strategy == "pbt" else ", --chunk_size 1 tries it all the same"
        least = (
            f"--population {fits} fits" if 1 < fits < together else "a smaller --batch_size or --block_size needs less"
        )
        raise UsageError(
            f"--population {options.population}: {options.strategy} trains {together} at once, which takes at least "
            f"{console.size(together * needed)}, and {console.size(free)} are free; {least}{more}"
        )
    if options.strategy == "pbt":
        return options.population
    room = int(memory.SHARE * free) // largest.total
    return max(1, min(room, -(-options.population // ranks)))


def pbt_bytes(one: TrainingMemory) -> int:
    """Of a member at least: its step, and beside its state that of the generation before."""
    return int(training_room.SURE * one.total) + one.parameters + one.optimizer


@contextmanager
def room(options: EvolveFlags, at_once: int) -> Iterator[None]:
    """Where memory does not hold what is computed, what needs less is said. Raises FunctionalLMError."""
    from functional_lm.trainer import out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fewer = at_once > 1 and options.strategy != "pbt"
        now = f"--chunk_size {at_once // 2} goes on with fewer of them; " if fewer else ""
        stored = options.strategy in evolve_flags.ESTIMATING and options.noise == "stored"
        raise FunctionalLMError(
            f"out of memory with {options.population} members, {at_once} at once; {now}a new run needs less "
            f"with a smaller --batch_size or --population{', or --noise regenerated' if stored else ''}"
        ) from error
