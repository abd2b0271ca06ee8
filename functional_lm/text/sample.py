"""The sample that a tokenizer is trained on: passages taken evenly from all documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from functional_lm.text.interface import byte_count

PASSAGE = 4096  # characters: sampling units long enough that no rhythm of the lines (text, blank, text) is met


def sample(documents: Iterable[str], limit: int) -> list[str]:
    """Passages taken evenly from all documents, `limit` bytes at most and (of a larger corpus) at least half of it.

    Every 2^k-th passage is kept, with k growing as the corpus goes on: one reading, no randomness, bounded memory.
    """
    kept: list[str] = []
    held, stride = 0, 1
    for index, passage in enumerate(chain.from_iterable(map(_passages, documents))):
        if index % stride:
            continue
        kept.append(passage)
        held += byte_count(passage)
        while held > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            held = sum(map(byte_count, kept))
    return kept


def _passages(document: str) -> Iterator[str]:
    """Whole lines of some PASSAGE characters; a line that is far longer is cut."""
    start = 0
    while start < len(document):
        line_end = document.find("\n", start + PASSAGE - 1, start + 4 * PASSAGE)
        end = line_end + 1 if line_end >= 0 else start + 4 * PASSAGE
        yield document[start:end]
        start = end
