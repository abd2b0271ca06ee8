"""How many members of an evolution memory holds at once, and what is said where it does not hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from functional_lm import console, evolve_flags
from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_search import Evolution
from functional_lm.evolve_strategies import own_numbers


def chunk_of(options: EvolveFlags, evolution: Evolution, tokens: int) -> int:
    """Members at once, from the flag or from memory. Raises UsageError for more members than memory holds."""
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

    def held(population: int) -> int:
        cells = math.prod(evolve_flags.grid(options)[0]) if options.descriptor else 0
        return memory.held(options.strategy, population, numbers, options.noise == "regenerated", cells)

    left = free - held(options.population)
    if left < each and free != memory.UNKNOWN:
        fits = int((free - each - held(0)) // max(1, held(1) - held(0)))
        least = f"--population {fits - fits % 2} fits" if fits > 3 else "evolve fewer numbers"
        raise UsageError(
            f"--population {options.population}: {options.strategy} holds {console.size(held(options.population))} of "
            f"them at once, and {console.size(free)} are free; {least}, --chunk_size 1 tries it all the same"
        )
    return memory.automatic_chunk(options.population, each, tokens, left, device.type)


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
