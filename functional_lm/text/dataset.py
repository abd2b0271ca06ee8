"""Token files: written as a stream, memory-mapped, split into views, and turned into batches by a pure function.

A dataset is two files. `NAME.bin` holds the tokens, little-endian int32, nothing else; every document is the
delimiter followed by its tokens, so that the end of a document is predicted as the next one's delimiter.
`NAME.index`, little-endian throughout:

    byte  bytes
       0      8  magic "FLMINDEX"
       8      4  version of this layout, 1
      12      4  type of the tokens: 1 = little-endian int32
      16      8  vocabulary size
      24      8  id of the delimiter
      32      8  number of documents, n
      40      8  number of tokens, delimiters included
      48      8  tokens in a checksum block (the last block may be shorter)
      56      8  number of checksum blocks, b
      64     32  sha256 of the tokenizer
      96     32  BLAKE2b of everything behind the header
     128     16  BLAKE2b of the bytes 0..127; as it covers all the rest, it names the dataset (`Dataset.digest`)
     144   16 b  BLAKE2b of each checksum block of NAME.bin
       +  8(n+1)  int64 offsets of the documents in tokens: where each starts (at its delimiter), then the total

Axes: `B` batch, `T` time (tokens), `N` tokens of a view, `P` pieces of a view.

A *view* is a sequence of tokens made of pieces of the file in some order, without copying. Batches are a pure
function of (view, step, seed): the position in the data is the step, and resuming needs no other state.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError, UsageError
from functional_lm.text.tokenizer import Tokenizer

MAGIC, VERSION, INT32 = b"FLMINDEX", 1, 1
FIELDS = struct.Struct("<8sIIQQQQQQ32s32s")
HEADER_BYTES = FIELDS.size + 16
BLOCK_TOKENS = 1 << 20
TOKEN, OFFSET = np.dtype("<i4"), np.dtype("<i8")
IGNORED = -100  # a target that no loss counts

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened dataset; both arrays are memory-mapped and read-only."""

    path: Path  # without suffix
    tokens: NDArray[np.int32]  # [all tokens]
    offsets: NDArray[np.int64]  # [documents + 1]
    vocab_size: int
    delimiter: int
    tokenizer_digest: str
    digest: str  # names the contents: equal digests, equal tokens and documents

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray[np.int32]:
        """[T] tokens of one document, without the delimiter before them."""
        start, end = self.offsets[index : index + 2]
        return self.tokens[start + 1 : end]


# Writing --------------------------------------------------------------------------------------------------------


class _BlockHash:
    """BLAKE2b of every `size` bytes of a stream."""

    def __init__(self, size: int) -> None:
        self.size, self.filled, self.digests = size, 0, b""
        self.hash = hashlib.blake2b(digest_size=16)

    def update(self, data: memoryview) -> None:
        rest = data
        while rest:
            part = rest[: self.size - self.filled]
            self.hash.update(part)
            self.filled += len(part)
            rest = rest[len(part) :]
            if self.filled == self.size:
                self._close()

    def _close(self) -> None:
        self.digests += self.hash.digest()
        self.hash, self.filled = hashlib.blake2b(digest_size=16), 0

    def finish(self) -> bytes:
        if self.filled:
            self._close()
        return self.digests


class Writer:
    """Takes documents one after another; made by `writing`."""

    def __init__(self, tokens: IO[bytes], offsets: IO[bytes], vocab_size: int, delimiter: int) -> None:
        self._tokens, self._offsets = tokens, offsets
        self._vocab_size, self._delimiter = vocab_size, delimiter
        self._blocks = _BlockHash(BLOCK_TOKENS * TOKEN.itemsize)
        self.documents, self.tokens = 0, 0

    def append(self, document: NDArray[Any]) -> None:
        """Add a document: [T] integer ids without a delimiter. Raises DataError for ids outside the vocabulary."""
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise DataError(f"a document is a row of integers, not {ids.dtype} of shape {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"ids {ids.min()}..{ids.max()} are outside the vocabulary of {self._vocab_size}")
        stored = np.empty(ids.size + 1, TOKEN)
        stored[0], stored[1:] = self._delimiter, ids
        data = stored.view(np.uint8).data
        self._tokens.write(data)
        self._blocks.update(data)
        self._offsets.write(struct.pack("<q", self.tokens))
        self.documents, self.tokens = self.documents + 1, self.tokens + ids.size + 1

    def finish(self, index: IO[bytes], tokenizer_digest: str) -> None:
        """Write the index: a placeholder, the tables while they are hashed, then the header over the placeholder."""
        if not self.documents:
            raise DataError("a dataset needs at least one document")
        self._offsets.write(struct.pack("<q", self.tokens))
        self._offsets.seek(0)
        digests = self._blocks.finish()
        index.write(bytes(HEADER_BYTES) + digests)
        shutil.copyfileobj(self._offsets, index)
        index.flush()
        with open(index.name, "rb") as written:
            table = _hash_from(written, HEADER_BYTES)
        # fmt: off
        fields = FIELDS.pack(
            MAGIC, VERSION, INT32, self._vocab_size, self._delimiter, self.documents, self.tokens,
            BLOCK_TOKENS, len(digests) // 16, bytes.fromhex(tokenizer_digest), table,
        )
        # fmt: on
        index.seek(0)
        index.write(fields + _short_hash(fields))


@contextmanager
def writing(path: str | Path, vocab_size: int, delimiter: int, tokenizer_digest: str) -> Iterator[Writer]:
    """Write a dataset: `with writing(...) as writer: writer.append(ids)`.

    Nothing is seen under its name before the block ends without an error; then an older pair is replaced. The old
    index goes first and the new one comes last, so that a crash in between cannot leave a pair that does not match.
    """
    name = name_of(path)
    name.parent.mkdir(parents=True, exist_ok=True)
    index_path, tokens_path = _with(name, ".index"), _with(name, ".bin")
    with (
        tempfile.TemporaryFile(dir=name.parent) as offsets,
        files.writing(index_path) as index,
        files.writing(tokens_path) as tokens,
    ):
        writer = Writer(tokens, offsets, vocab_size, delimiter)
        yield writer
        writer.finish(index, tokenizer_digest)
        files.sync(Path(index.name))
        files.remove(index_path)
        files.sync(name.parent)


def _hash_from(file: IO[bytes], start: int) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    file.seek(start)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.digest()


def _short_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _with(name: Path, suffix: str) -> Path:
    return name.parent / (name.name + suffix)


def name_of(path: str | Path) -> Path:
    """NAME of NAME, NAME.bin or NAME.index (other dots belong to the name)."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".index") else path


# Opening --------------------------------------------------------------------------------------------------------


def open_dataset(path: str | Path, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open NAME.bin with NAME.index. Cheap: header, sizes and digests are checked, contents by `verify`.

    Raises DataError if either file is missing, damaged, cut off, of another kind or version, if they do not belong
    together, or if the tokens were made by another tokenizer than `tokenizer`.
    """
    name = name_of(path)
    for suffix in (".bin", ".index"):
        if not _with(name, suffix).is_file():
            raise DataError(f"no dataset at {name}: {_with(name, suffix).name} is missing; make it with `prepare`")
    header, blocks = _header(_with(name, ".index"))
    _, _, _, vocab_size, delimiter, documents, tokens, _, _, tokenizer_digest, _ = header
    _check_size(_with(name, ".index"), HEADER_BYTES + 16 * blocks + OFFSET.itemsize * (documents + 1))
    _check_size(_with(name, ".bin"), TOKEN.itemsize * tokens)
    if tokenizer is not None and tokenizer_digest.hex() != tokenizer.digest:
        raise DataError(
            f"{name} was made with another tokenizer ({tokenizer_digest.hex()[:12]}, not {tokenizer.digest[:12]}); "
            "prepare it again"
        )
    offsets = np.memmap(_with(name, ".index"), OFFSET, "r", HEADER_BYTES + 16 * blocks, (documents + 1,))
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise DataError(f"{name}.index is damaged: its table does not span the tokens; prepare it again")
    mapped = np.memmap(_with(name, ".bin"), TOKEN, "r", 0, (tokens,))
    digest = _short_hash(FIELDS.pack(*header)).hex()
    return Dataset(name, np.asarray(mapped), np.asarray(offsets), vocab_size, delimiter, tokenizer_digest.hex(), digest)


def verify(dataset: Dataset) -> None:
    """Read everything and compare with the checksums. Raises DataError naming the first damaged block."""
    index = _with(dataset.path, ".index")
    header, blocks = _header(index)
    with open(index, "rb") as file:
        if _hash_from(file, HEADER_BYTES) != header[-1]:
            raise DataError(f"{index} is damaged behind its header; prepare it again")
        file.seek(HEADER_BYTES)
        digests = file.read(16 * blocks)
    block_tokens = header[7]
    for block in range(blocks):
        data = dataset.tokens[block * block_tokens : (block + 1) * block_tokens].tobytes()
        if _short_hash(data) != digests[16 * block : 16 * block + 16]:
            where = f"tokens {block * block_tokens}..{block * block_tokens + len(data) // TOKEN.itemsize - 1}"
            raise DataError(f"{dataset.path}.bin is damaged in block {block} ({where}); prepare it again")


def _header(path: Path) -> tuple[tuple[Any, ...], int]:
    """The header's fields, and the number of blocks."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if raw[:8] != MAGIC:
        raise DataError(f"{path} is no dataset index (it does not begin with {MAGIC.decode()})")
    if len(raw) < HEADER_BYTES or raw[FIELDS.size :] != _short_hash(raw[: FIELDS.size]):
        raise DataError(f"{path} has a damaged header; prepare it again")
    header = FIELDS.unpack(raw[: FIELDS.size])
    if header[1:3] != (VERSION, INT32):
        raise DataError(f"{path} has layout {header[1]} and type {header[2]}; this version reads {VERSION} and {INT32}")
    return header, header[8]


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size
    if actual != expected:
        raise DataError(
            f"{path} has {actual} bytes, not {expected}: cut off, damaged or of another pair; prepare it again"
        )


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
    """All of a dataset, in the file's order."""
    return View(dataset, dataset.offsets[1:], np.zeros(dataset.documents, np.int64))


def split(dataset: Dataset, val_fraction: float, seed: int) -> tuple[View, View]:
    """Training and validation view, disjoint and together complete.

    The documents are shuffled by a key; the first `(1 - val_fraction)` of all tokens train, the rest validates. The
    document on the border is cut there, so a single document gives "the first 90 % train, the last 10 % validate".
    Raises UsageError unless 0 <= val_fraction < 1.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}; it must be at least 0 and less than 1")
    order = _shuffled(dataset.documents, seed)
    starts, lengths = dataset.offsets[:-1][order], np.diff(dataset.offsets)[order]
    ends = np.cumsum(lengths)
    cut = int(ends[-1] * (1 - val_fraction))
    last = int(np.searchsorted(ends, cut))  # the piece in which (or at whose end) the border lies
    inside = cut - (ends[last] - lengths[last])
    left, right = np.array([inside]), np.array([lengths[last] - inside])
    train = _pieces(dataset, starts[: last + 1], np.concatenate([lengths[:last], left]))
    rest = np.concatenate([starts[last : last + 1] + inside, starts[last + 1 :]])
    return train, _pieces(dataset, rest, np.concatenate([right, lengths[last + 1 :]]))


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


def windows_per_epoch(view: View, block_size: int) -> int:
    """Windows of block_size + 1 tokens (neighbours share one) that fit behind any shift below block_size.

    A view of less than two blocks has one window and as much room to shift as is left. Raises DataError for a view
    that has no window.
    """
    if block_size < 1:
        raise UsageError(f"block_size is {block_size}; it must be at least 1")
    if len(view) <= block_size:
        raise DataError(
            f"{len(view)} tokens are too few for one block: block_size {block_size} needs {block_size + 1}; "
            "use more text, a smaller block_size or another val_fraction"
        )
    return max(1, (len(view) - block_size) // block_size)


def order(view: View, block_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[windows] first token of every window of an epoch, in the order in which they are visited; not to be written.

    Windows lie side by side behind a shift in [0, block_size); shift and permutation are drawn from (seed, epoch).
    """
    count = windows_per_epoch(view, block_size)
    room = min(block_size, len(view) - count * block_size)
    group = max(1, 1024 // count)  # tiny texts have several epochs in a batch; one call draws them together
    return _orders(count, block_size, room, seed, epoch - epoch % group, group)[epoch % group]


@lru_cache(maxsize=4)
def _orders(count: int, block_size: int, room: int, seed: int, first: int, group: int) -> NDArray[np.int64]:
    """[group, windows] orders of the epochs first..first + group - 1. A draw does not depend on its company."""
    import torch  # takes seconds to import, and preparing data does not need it

    from functional_lm import keys

    root = keys.fold_in_name(keys.key(seed), "windows")

    def draw(epoch: torch.Tensor) -> torch.Tensor:
        shift_key, order_key = keys.split(keys.fold_in(root, epoch)).unbind()
        return keys.randint(shift_key, (), 0, room) + block_size * keys.permutation(order_key, count)

    starts: NDArray[np.int64] = torch.vmap(draw)(torch.arange(first, first + group)).numpy()
    starts.flags.writeable = False  # the cache hands the same array to everyone
    return starts


def _shuffled(documents: int, seed: int) -> NDArray[np.int64]:
    from functional_lm import keys

    return keys.permutation(keys.fold_in_name(keys.key(seed), "documents"), documents).numpy()


def batch(view: View, step: int, batch_size: int, block_size: int, seed: int) -> Batch:
    """The batch of a step, a pure function of its arguments: `tokens`, `targets` int64 and `documents` int32, [B, T].

    Row r of step s is sample s * B + r; the samples of an epoch are its windows (`order`), and epochs follow each
    other within a batch. `targets` are the tokens one place later. `documents` numbers change where a document
    starts. Raises DataError if the view is shorter than one window.
    """
    count = windows_per_epoch(view, block_size)
    samples = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs = samples // count
    starts = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        starts[here] = order(view, block_size, seed, int(epoch))[samples[here] % count]
    return _windows_at(view, starts, block_size)


def _windows_at(view: View, starts: NDArray[np.int64], block_size: int) -> Batch:
    """Windows that begin at `starts` [B]; what would lie behind the view's end has the target IGNORED."""
    places = starts[:, None] + np.arange(block_size + 1)
    last = len(view) - 1
    tokens, documents = _gather(view, np.minimum(places, last))
    targets = tokens[:, 1:].astype(np.int64)
    targets[places[:, 1:] > last] = IGNORED
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": targets, "documents": documents[:, :-1].copy()}


# Validation -----------------------------------------------------------------------------------------------------------


def windows(view: View, block_size: int, batch_size: int = 1) -> Iterator[Batch]:
    """The whole view in batches of windows without overlap, for validation; shapes and types as of `batch`.

    Every token but the view's first is a target exactly once. What is left over in the last window, and in the last
    batch, has the target -100, so that all batches have one shape. Raises DataError for a view without a target.
    """
    if len(view) < 2:
        raise DataError(f"{len(view)} tokens hold nothing to predict; use more text or a larger val_fraction")
    for first in range(0, len(view) - 1, block_size * batch_size):
        yield _windows_at(view, first + block_size * np.arange(batch_size), block_size)


def predicted_bytes(view: View, byte_lengths: NDArray[np.int32]) -> int:
    """UTF-8 bytes of all tokens that `windows` predicts: what bits per byte are divided by.

    `byte_lengths` [V] is the tokenizer's; delimiters count 0.
    """
    chunk = 1 << 20
    parts = (read(view, start, min(start + chunk, len(view))) for start in range(1, len(view), chunk))
    return sum(int(byte_lengths[part].sum()) for part in parts)
