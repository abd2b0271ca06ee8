"""Conversations as samples, and samples as batches in which the assistant's tokens alone are targets.

A sample is the delimiter, the system turn if there is one, and whole exchanges (a user's turn and the answer to it).
A conversation that is longer than a row is split between exchanges, each part with the system turn in front: no
answer loses its end. An exchange that is alone longer than a row is left out, and counted.

Samples are laid side by side into rows, which `documents` keeps apart. Rows are made once; their order is drawn anew
in each epoch, so that a batch is a pure function of (rows, step, seed).

Axes: B batch, T time, N samples, R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from functional_lm.errors import DataError, UsageError
from functional_lm.text import chat, document
from functional_lm.text.chat import Turn
from functional_lm.text.conversations import Conversation
from functional_lm.text.dataset import IGNORED, Batch
from functional_lm.text.interface import Tokenizer


@dataclass(frozen=True, eq=False)
class Samples:
    """N token sequences, end to end, and which of their tokens the assistant writes."""

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    offsets: NDArray[np.int64]  # [N + 1]
    delimiter: int
    split: int = 0  # conversations that were longer than a row
    left_out: int = 0  # exchanges that were

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def targets(self) -> int:
        """How many tokens there are to learn."""
        return int(self.learned.sum())


class Laid(NamedTuple):
    """A turn as tokens."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]


def lay(tokenizer: Tokenizer, conversations: Sequence[Conversation], threads: int = 1) -> list[list[Laid]]:
    """Every turn of every conversation as tokens; all texts are encoded in one call."""
    spoken = [[chat.layout([turn]) for turn in conversation.turns] for conversation in conversations]
    flat = [part for turns in spoken for turn in turns for part in turn]
    ids, lengths = document.encode(tokenizer, [[part.segment] for part in flat], threads)
    learned = np.repeat(np.array([part.learned for part in flat], bool), lengths)
    ends = np.cumsum(lengths)
    made: list[list[Laid]] = []
    start = number = 0
    for turns in spoken:
        made.append([])
        for turn in turns:
            number += len(turn)
            end = int(ends[number - 1])
            made[-1].append(Laid(ids[start:end], learned[start:end]))
            start = end
    return made


def samples(tokenizer: Tokenizer, conversations: Sequence[Conversation], block_size: int) -> Samples:
    """The samples of conversations, each at most `block_size` + 1 tokens, so that a row can hold it.

    Raises DataError if no exchange is short enough.
    """
    parts: list[list[Laid]] = []
    split = left_out = 0
    head = Laid(np.array([tokenizer.bos_id], np.int32), np.zeros(1, bool))
    for conversation, turns in zip(conversations, lay(tokenizer, conversations), strict=True):
        systems = [laid for turn, laid in zip(conversation.turns, turns) if turn.role == "system"]
        begin = [head, *systems]
        exchanges = _exchanges(conversation.turns, turns)
        cut, skipped = _fitting(begin, exchanges, block_size + 1)
        parts += [begin + [laid for exchange in group for laid in exchange] for group in cut]
        left_out += skipped
        split += skipped > 0 or len(cut) > 1
    if not parts:
        raise DataError(
            f"none of the {left_out} exchanges fits into a row of {block_size} tokens; give a larger --block_size"
        )
    lengths = [sum(len(laid.ids) for laid in part) for part in parts]
    return Samples(
        np.concatenate([laid.ids for part in parts for laid in part]),
        np.concatenate([laid.learned for part in parts for laid in part]),
        np.cumsum([0, *lengths]),
        tokenizer.bos_id,
        split,
        left_out,
    )


def pairs(
    tokenizer: Tokenizer, chosen: Sequence[Conversation], rejected: Sequence[Conversation], block_size: int
) -> Samples:
    """Samples 2 i and 2 i + 1 are a chosen and a rejected conversation; the last answer alone is learned.

    A pair of which one does not fit into a row is left out, and counted. Raises DataError if none fits.
    """
    head = np.array([tokenizer.bos_id], np.int32)
    rows: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    for both in zip(lay(tokenizer, chosen), lay(tokenizer, rejected), strict=True):
        ids = [np.concatenate([head, *(laid.ids for laid in turns)]) for turns in both]
        if max(map(len, ids)) <= block_size + 1:
            learned = [turns[-1].learned for turns in both]
            rows += [(row, np.append(np.zeros(len(row) - len(own), bool), own)) for row, own in zip(ids, learned)]
    if not rows:
        raise DataError(
            f"none of the {len(chosen)} pairs fits into rows of {block_size} tokens; give a larger --block_size"
        )
    return Samples(
        np.concatenate([ids for ids, _ in rows]),
        np.concatenate([learned for _, learned in rows]),
        np.cumsum([0, *(len(ids) for ids, _ in rows)]),
        tokenizer.bos_id,
        left_out=len(chosen) - len(rows) // 2,
    )


def _exchanges(turns: Sequence[Turn], laid: list[Laid]) -> list[tuple[Laid, Laid]]:
    """(user, assistant); a last word of the user's has no answer, and nothing is learned behind it."""
    users = [own for turn, own in zip(turns, laid) if turn.role == "user"]
    return list(zip(users, [own for turn, own in zip(turns, laid) if turn.role == "assistant"]))


def _fitting(
    begin: list[Laid], exchanges: list[tuple[Laid, Laid]], limit: int
) -> tuple[list[list[tuple[Laid, Laid]]], int]:
    """Exchanges in groups that fit into `limit` tokens together with `begin`, and how many fit into none."""
    room = limit - sum(len(laid.ids) for laid in begin)
    groups: list[list[tuple[Laid, Laid]]] = []
    held = skipped = 0
    for exchange in exchanges:
        size = sum(len(laid.ids) for laid in exchange)
        if size > room:
            skipped += 1
            held = room  # what follows does not go on from what came before
        elif groups and held + size <= room:
            groups[-1].append(exchange)
            held += size
        else:
            groups.append([exchange])
            held = size
    return groups, skipped


def split(
    conversations: Sequence[Conversation], val_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation, disjoint and together complete; at least one trains. Shuffled by a key.

    Raises UsageError unless 0 <= val_fraction < 1.
    """
    from functional_lm import keys

    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}; it must be at least 0 and less than 1")
    count = len(conversations)
    order = keys.permutation(keys.fold_in_name(keys.key(seed), "conversations"), count).tolist()
    cut = max(1, count - round(count * val_fraction))
    return [conversations[i] for i in order[:cut]], [conversations[i] for i in order[cut:]]


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """R rows of samples."""

    samples: Samples
    members: tuple[tuple[int, ...], ...]  # the samples of each row
    block_size: int

    def __len__(self) -> int:
        return len(self.members)

    @property
    def digest(self) -> str:
        """Names the contents: equal digests, equal batches."""
        found = hashlib.sha256(f"{self.block_size} {self.members}".encode())
        for array in (self.samples.tokens, self.samples.learned, self.samples.offsets):
            found.update(array.tobytes())
        return found.hexdigest()


def pack(found: Samples, block_size: int, packing: bool = True) -> Rows:
    """Samples in rows of T tokens: the longest first, each into the fullest row that has room for it.

    Without `packing` each has a row of its own. A sample of n tokens takes n - 1 places: its last token is a target
    alone.
    """
    sizes = np.diff(found.offsets) - 1
    if not packing:
        return Rows(found, tuple((i,) for i in range(len(found))), block_size)
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(block_size + 1)]  # rows by the places that they have left
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        room = next((room for room in range(size, block_size + 1) if free[room]), None)
        if room is None:
            row, room = len(rows), block_size
            rows.append([])
        else:
            row = free[room].pop(0)
        rows[row].append(number)
        free[room - size].append(row)
    return Rows(found, tuple(map(tuple, rows)), block_size)


def gather(rows: Rows, numbers: Sequence[int]) -> Batch:
    """`tokens`, `targets` int64 and `documents` int32, [B, T], of the rows of these numbers; -1 is an empty one.

    A target is the next token of the same sample where the assistant writes it, else IGNORED. What is left of a row
    is a document of its own, without targets.
    """
    shape, found = (len(numbers), rows.block_size), rows.samples
    tokens = np.full(shape, found.delimiter, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    documents = np.zeros(shape, np.int32)
    for row, number in enumerate(numbers):
        place = 0
        for part, sample in enumerate(rows.members[number] if number >= 0 else (), 1):
            start, end = int(found.offsets[sample]), int(found.offsets[sample + 1])
            stop = place + end - start - 1
            tokens[row, place:stop] = found.tokens[start : end - 1]
            targets[row, place:stop] = np.where(found.learned[start + 1 : end], found.tokens[start + 1 : end], IGNORED)
            documents[row, place:stop] = part
            place = stop
    return {"tokens": tokens, "targets": targets, "documents": documents}


def batch(rows: Rows, step: int, batch_size: int, seed: int) -> Batch:
    """The batch of a step, a pure function of its arguments: row r of step s is the (s B + r)-th of all epochs."""
    return gather(rows, drawn(len(rows), step, batch_size, seed).tolist())


def pair_batch(rows: Rows, numbers: Sequence[int]) -> Batch:
    """[2 B, T] of pairs of these numbers (rows made without packing): first all chosen, then all rejected."""
    return gather(rows, [2 * n if n >= 0 else -1 for n in numbers] + [2 * n + 1 if n >= 0 else -1 for n in numbers])


def drawn(count: int, step: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """[B] which of `count` rows a step takes; every epoch has an order of its own."""
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    return np.array([_order(count, seed, int(place // count))[place % count] for place in places])


@lru_cache(maxsize=64)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    from functional_lm import keys

    key = keys.fold_in(keys.fold_in_name(keys.key(seed), "rows"), epoch)
    order = keys.permutation(key, count).numpy()
    order.flags.writeable = False  # the cache hands the same array to everyone
    return order


def windows(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows in order, for validation; the last batch is filled up with empty ones, so that all have one shape."""
    for first in range(0, len(rows), batch_size):
        yield gather(rows, [n if n < len(rows) else -1 for n in range(first, first + batch_size)])
