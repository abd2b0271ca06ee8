"""Which prompts the slots' cache rows still hold, so that a prompt that begins alike need not be read again.

Only whole chunks count: they stand at the same places in every prompt that begins with them and are computed by the
same call, so that what is said behind them is the same to the bit. They are their owner's (an adapter and whoever asks
through it): an adapter's rows are of no use to another, and nobody learns from a count what somebody else has asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """The prompt tokens in a slot's first rows, whose they are, and since when (a count)."""

    tokens: tuple[int, ...] = ()
    owner: Hashable = None
    used: int = 0


class Prefixes:
    """What each slot keeps."""

    def __init__(self, slots: int, chunk: int) -> None:
        self.chunk = chunk
        self._kept = [Kept()] * slots
        self._clock = itertools.count(1)

    def best(self, free: Iterable[int], prompt: Sequence[int], owner: Hashable) -> tuple[int, int]:
        """The free slot that holds most of a prompt, and how many tokens of it.

        At least one token is left to read, because the next one follows from it. Of equals the slot that loses least
        by being overwritten is taken: the one with the fewest rows, then the one not used for longest.
        """
        shared = {slot: self._common(self._kept[slot], prompt, owner) for slot in free}

        def worth(slot: int) -> tuple[int, int, int]:
            return shared[slot], -len(self._kept[slot].tokens), -self._kept[slot].used

        slot = max(shared, key=worth)
        return slot, shared[slot]

    def _common(self, kept: Kept, prompt: Sequence[int], owner: Hashable) -> int:
        if kept.owner != owner:
            return 0
        pairs = enumerate(zip(kept.tokens, prompt[:-1]))
        length = next((i for i, (one, other) in pairs if one != other), min(len(kept.tokens), len(prompt) - 1))
        return length - length % self.chunk

    def note(self, slot: int, read: Sequence[int], owner: Hashable) -> None:
        """The slot's rows hold `read` now, and nothing else."""
        whole = len(read) - len(read) % self.chunk
        self._kept[slot] = Kept(tuple(read[:whole]), owner, next(self._clock))

    def rows(self, slot: int) -> int:
        """How many rows of a slot are worth keeping."""
        return len(self._kept[slot].tokens)

    def forget(self) -> None:
        """No slot holds anything."""
        self._kept = [Kept()] * len(self._kept)
