"""Which entry of a bank each adapter has, while adapters come and go.

Requests name an adapter by a number that is given once, so that a late request never meets another adapter in the
entry that its own has left.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from functional_lm.errors import UsageError


class Entries:
    """Numbers and entries; number 0 is entry 0, the model itself. The engine's lock guards it."""

    def __init__(self, capacity: int, held: int) -> None:
        """Entries from 1 to `capacity`, of which the first `held` hold the adapters with these numbers."""
        self.capacity = capacity
        self._rows = {number: number for number in range(held + 1)}
        self._leaving: dict[int, int] = {}
        self._numbers = itertools.count(held + 1)

    def check(self, number: int) -> None:
        """Raise UsageError for a number that requests may not name (any more)."""
        if number not in self._rows:
            raise UsageError(f"adapter {number} is none of the {len(self._rows) - 1} that are here")

    def row(self, number: int) -> int:
        """The entry of an adapter, also of one that leaves while requests still go through it."""
        return self._rows[number] if number in self._rows else self._leaving[number]

    def take(self, in_use: Collection[int]) -> tuple[int, int]:
        """A new number and a free entry; `in_use` are the numbers that requests go through now.

        Raises UsageError where no entry is free.
        """
        self._leaving = {number: row for number, row in self._leaving.items() if number in in_use}
        free = set(range(1, self.capacity + 1)) - {*self._rows.values(), *self._leaving.values()}
        if not free:
            raise UsageError(f"all {self.capacity} entries for adapters are in use; unload one, or serve with more")
        number = next(self._numbers)
        self._rows[number] = min(free)
        return number, min(free)

    def leave(self, number: int) -> None:
        """No more requests for an adapter; its entry is free when none goes through it. Raises UsageError."""
        self.check(number)
        if number:
            self._leaving[number] = self._rows.pop(number)
