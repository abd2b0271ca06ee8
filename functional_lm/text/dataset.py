"""Datasets as views, and views as batches: what is learned, in which order, as pure functions of step and seed.

Axes: `B` batch, `T` time (tokens), `N` tokens of a view, `P` pieces of a view, `R` rows of an epoch.

A *view* is a sequence of tokens made of pieces of the file in some order, without copying. Batches are a pure
function of (view, step, seed): the position in the data is the step, and resuming needs no other state.

Rows come from a view in two ways. *Packed*, they are windows side by side over all of it, whatever begins or ends in
them, and nothing is padded. *Unpacked*, a row begins where a document does and holds (a part of) that document alone;
what is left of it is padding without targets. The files are read and written in `storage.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from functional_lm.errors import DataError, UsageError
from functional_lm.text.storage import Dataset, Writer, name_of, open_dataset, verify, writing

__all__ = ["Dataset", "Writer", "name_of", "open_dataset", "verify", "writing"]
__all__ += ["IGNORED", "Batch", "View", "batch", "order", "predicted_bytes", "read", "split", "view"]
__all__ += ["windows", "windows_per_epoch"]

IGNORED = -100  # a target that no loss counts

Batch = dict[str, NDArray[Any]]


# Views ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """A sequence of N tokens: pieces of a dataset's file, each (part of) one document, in an order of their own."""

    dataset: Dataset
    ends: NDArray[np.int64]  # [P] where each piece ends in the view
    shifts: NDArray[np.int64]  # [P] what to add to a place in the view to get the place in the file

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


def view(dataset: Dataset) -> View:
    """All of a dataset, each document once, in the file's order."""
    return View(dataset, dataset.offsets[1:], np.zeros(dataset.documents, np.int64))


def split(dataset: Dataset, val_fraction: float, seed: int) -> tuple[View, View]:
    """Training and validation view, disjoint and together complete.

    The documents are shuffled by a key; the first `(1 - val_fraction)` of all tokens train, the rest validates. The
    document on the border is cut there, so a single document gives "the first 90 % train, the last 10 % validate".
    A document of several copies is so many pieces of the training view, shuffled among the others, or one of the
    validation view: none is learned and measured on. Raises UsageError unless 0 <= val_fraction < 1.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}; it must be at least 0 and less than 1")
    order = _shuffled(dataset.documents, seed, "documents")
    starts, lengths = dataset.offsets[:-1][order], np.diff(dataset.offsets)[order]
    ends = np.cumsum(lengths)
    cut = int(ends[-1] * (1 - val_fraction))
    last = int(np.searchsorted(ends, cut))  # the piece in which (or at whose end) the border lies
    inside = cut - (ends[last] - lengths[last])
    left, right = np.array([inside]), np.array([lengths[last] - inside])
    often = _repeated(dataset.copies[order[: last + 1]], seed)
    train = _pieces(dataset, starts[: last + 1][often], np.concatenate([lengths[:last], left])[often])
    rest = np.concatenate([starts[last : last + 1] + inside, starts[last + 1 :]])
    return train, _pieces(dataset, rest, np.concatenate([right, lengths[last + 1 :]]))


def _repeated(copies: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    """Indices into `copies`, each so often as it says; in order where all are 1, else shuffled."""
    often = np.repeat(np.arange(len(copies)), copies)
    return often if (copies == 1).all() else often[_shuffled(len(often), seed, "copies")]


def _shuffled(count: int, seed: int, name: str) -> NDArray[np.int64]:
    from functional_lm import keys

    return keys.permutation(keys.fold_in_name(keys.key(seed), name), count).numpy()


def _pieces(dataset: Dataset, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> View:
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    ends = np.cumsum(lengths)
    return View(dataset, ends, starts - (ends - lengths))


def read(view: View, start: int, stop: int) -> NDArray[np.int32]:
    """[stop - start] tokens of a view."""
    return _gather(view, np.arange(start, stop))[0]


def _gather(view: View, places: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens at these places of the view, and the number of the piece that each belongs to; shapes as `places`."""
    piece = np.searchsorted(view.ends, places.ravel(), side="right").reshape(places.shape)
    return view.dataset.tokens[places + view.shifts[piece]], piece.astype(np.int32)


# Order --------------------------------------------------------------------------------------------------------------


def windows_per_epoch(view: View, block_size: int, packing: bool = True) -> int:
    """Rows of an epoch. Raises DataError for a view that has none.

    Packed: windows of block_size + 1 tokens (neighbours share one) that fit behind any shift below block_size; a view
    of less than two blocks has one window and as much room to shift as is left. Unpacked: for each piece as many rows
    of block_size as its targets need.
    """
    if block_size < 1:
        raise UsageError(f"block_size is {block_size}; it must be at least 1")
    if not packing:
        count = int(_rows(view, block_size).ends[-1]) if len(view) else 0
        if not count:
            raise DataError(f"{len(view)} tokens hold no row to learn; use more text or another val_fraction")
        return count
    if len(view) <= block_size:
        raise DataError(
            f"{len(view)} tokens are too few for one block: block_size {block_size} needs {block_size + 1}; "
            "use more text, a smaller block_size or another val_fraction"
        )
    return max(1, (len(view) - block_size) // block_size)


def order(view: View, block_size: int, seed: int, epoch: int, packing: bool = True) -> NDArray[np.int64]:
    """[R] where in the view each row of an epoch begins, in the order in which they are visited.

    Packed windows lie side by side behind a shift in [0, block_size); shift and permutation are drawn from
    (seed, epoch), and unpacked rows need the permutation alone.
    """
    shift, numbers = _drawn(view, block_size, seed, epoch, packing)
    return shift + block_size * numbers if packing else _row_places(view, block_size, numbers)[0]


class _Drawn(NamedTuple):
    shift: int
    numbers: NDArray[np.int64]  # [R] of the rows; not to be written


def _drawn(view: View, block_size: int, seed: int, epoch: int, packing: bool) -> _Drawn:
    count = windows_per_epoch(view, block_size, packing)
    room = min(block_size, len(view) - count * block_size) if packing else 1
    group = max(1, 1024 // count)  # tiny texts have several epochs in a batch; one call draws them together
    shifts, numbers = _draws(count, room, seed, epoch - epoch % group, group)
    return _Drawn(int(shifts[epoch % group]), numbers[epoch % group])


@lru_cache(maxsize=4)
def _draws(count: int, room: int, seed: int, first: int, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shifts [group] and permutations [group, R] of the epochs first..first + group - 1, alone or in company."""
    import torch  # takes seconds to import, and preparing data does not need it

    from functional_lm import keys

    root = keys.fold_in_name(keys.key(seed), "windows")

    def draw(epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift_key, order_key = keys.split(keys.fold_in(root, epoch)).unbind()
        return keys.randint(shift_key, (), 0, room), keys.permutation(order_key, count)

    shifts, numbers = (drawn.numpy() for drawn in torch.vmap(draw)(torch.arange(first, first + group)))
    numbers.flags.writeable = False  # the cache hands the same array to everyone
    return shifts, numbers


def batch(view: View, step: int, batch_size: int, block_size: int, seed: int, packing: bool = True) -> Batch:
    """The batch of a step, a pure function of its arguments: `tokens`, `targets` int64 and `documents` int32, [B, T].

    Row r of step s is sample s * B + r; the samples of an epoch are its rows (`order`), and epochs follow each other
    within a batch. `targets` are the tokens one place later; unpacked, a document's last target is the delimiter, and
    padding has the target IGNORED. `documents` numbers change where a document starts. Raises DataError if the view
    has no row.
    """
    count = windows_per_epoch(view, block_size, packing)
    samples = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs = samples // count
    shifts, numbers = np.empty(batch_size, np.int64), np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here, drawn = epochs == epoch, _drawn(view, block_size, seed, int(epoch), packing)
        shifts[here], numbers[here] = drawn.shift, drawn.numbers[samples[here] % count]
    if packing:
        return _windows_at(view, shifts + block_size * numbers, block_size)
    return _rows_at(view, numbers, block_size)


# Packed rows --------------------------------------------------------------------------------------------------------


def _windows_at(view: View, starts: NDArray[np.int64], block_size: int) -> Batch:
    """Windows that begin at `starts` [B]; what would lie behind the view's end has the target IGNORED."""
    places = starts[:, None] + np.arange(block_size + 1)
    last = len(view) - 1
    tokens, documents = _gather(view, np.minimum(places, last))
    targets = tokens[:, 1:].astype(np.int64)
    targets[places[:, 1:] > last] = IGNORED
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": targets, "documents": documents[:, :-1].copy()}


# Unpacked rows ------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of a view, piece by piece."""

    ends: NDArray[np.int64]  # [P] rows of all pieces up to this one
    whole: NDArray[np.bool_]  # [P] whether a piece ends where its document does, so that its end is known


@lru_cache(maxsize=4)
def _rows(view: View, block_size: int) -> _Rows:
    ends_in_file, offsets = view.ends + view.shifts, view.dataset.offsets
    whole = offsets[np.searchsorted(offsets, ends_in_file)] == ends_in_file
    targets = np.diff(view.ends, prepend=0) - 1 + whole
    return _Rows(np.cumsum(-(-targets // block_size)), whole)


def _row_places(view: View, block_size: int, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[B] where in the view the rows of these numbers begin, and the piece that each belongs to."""
    rows = _rows(view, block_size).ends
    piece = np.searchsorted(rows, numbers, side="right")
    before = np.where(piece > 0, rows[piece - 1], 0), np.where(piece > 0, view.ends[piece - 1], 0)
    return before[1] + block_size * (numbers - before[0]), piece


def _rows_at(view: View, numbers: NDArray[np.int64], block_size: int) -> Batch:
    """The rows of these numbers [B]; a number behind the last one gives a row of padding."""
    rows, data = _rows(view, block_size), view.dataset
    there = numbers < rows.ends[-1]
    starts, piece = _row_places(view, block_size, np.where(there, numbers, 0))
    places, end = starts[:, None] + np.arange(block_size + 1), view.ends[piece][:, None]
    tokens = data.tokens[np.minimum(places, end - 1) + view.shifts[piece][:, None]].astype(np.int64)
    tokens[places >= end] = data.delimiter
    known = (places < end + rows.whole[piece][:, None]) & there[:, None]
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": np.where(known, tokens, IGNORED)[:, 1:].copy(),
        "documents": np.repeat(piece.astype(np.int32)[:, None], block_size, axis=1),
    }


# Validation -----------------------------------------------------------------------------------------------------------


def windows(view: View, block_size: int, batch_size: int = 1, packing: bool = True) -> Iterator[Batch]:
    """The whole view in batches of rows without overlap, for validation; shapes and types as of `batch`.

    Every token but the view's first is a target exactly once (unpacked: every token but the pieces' first, and the
    end of each whole document). What is left over in the last row, and in the last batch, has the target -100, so
    that all batches have one shape. Raises DataError for a view without a target.
    """
    if len(view) < 2:
        raise DataError(f"{len(view)} tokens hold nothing to predict; use more text or a larger val_fraction")
    if not packing:
        for first in range(0, windows_per_epoch(view, block_size, packing), batch_size):
            yield _rows_at(view, first + np.arange(batch_size), block_size)
        return
    for first in range(0, len(view) - 1, block_size * batch_size):
        yield _windows_at(view, first + block_size * np.arange(batch_size), block_size)


def predicted_bytes(view: View, byte_lengths: NDArray[np.int32]) -> int:
    """UTF-8 bytes of all tokens that `windows` predicts: what bits per byte are divided by.

    `byte_lengths` [V] is the tokenizer's; delimiters count 0.
    """
    chunk = 1 << 20
    parts = (read(view, start, min(start + chunk, len(view))) for start in range(1, len(view), chunk))
    return sum(int(byte_lengths[part].sum()) for part in parts)
