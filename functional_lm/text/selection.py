"""Which documents are taken and how often: no document twice, and each as often as its source weighs."""

from __future__ import annotations

DIGEST_BYTES = 16
FEWEST_SLOTS = 1 << 10


class DigestSet:
    """A set of 16-byte digests in one block of memory: 24 to 48 bytes for each (48 to 72 while it grows).

    Open addressing with linear probing, at most two thirds full; a Python set would take some 110 bytes for each.
    """

    def __init__(self) -> None:
        self._slots, self._table, self._count = FEWEST_SLOTS, bytearray(FEWEST_SLOTS * DIGEST_BYTES), 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new."""
        if 3 * self._count >= 2 * self._slots:
            self._grow()
        place = self._place(digest)
        if self._table[place : place + DIGEST_BYTES] == digest:
            return False
        self._table[place : place + DIGEST_BYTES] = digest
        self._count += 1
        return True

    def _place(self, digest: bytes) -> int:
        """Where the digest is, or the free slot (zeros) that it would take."""
        slot = int.from_bytes(digest[:8], "little") % self._slots
        while True:
            place = slot * DIGEST_BYTES
            held = self._table[place : place + DIGEST_BYTES]
            if held == digest or not any(held):
                return place
            slot = (slot + 1) % self._slots

    def _grow(self) -> None:
        before, self._slots = self._table, 2 * self._slots
        self._table = bytearray(self._slots * DIGEST_BYTES)
        for start in range(0, len(before), DIGEST_BYTES):
            digest = bytes(before[start : start + DIGEST_BYTES])
            if any(digest):
                place = self._place(digest)
                self._table[place : place + DIGEST_BYTES] = digest


def copies(digest: bytes, weight: float) -> int:
    """How often a document of this digest is seen: the whole part of the weight, and once more for a share of the
    documents that is its fraction. The same documents are chosen each time, and a larger fraction keeps them."""
    whole = int(weight)
    return whole + (int.from_bytes(digest[8:16], "little") < (weight - whole) * 2**64)
