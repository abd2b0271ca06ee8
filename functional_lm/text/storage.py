"""Token files: written as a stream that survives a kill, memory-mapped, checked when they are opened.

A dataset is two files. `NAME.bin` holds the tokens, little-endian int32, nothing else; every document is the
delimiter followed by its tokens, so that the end of a document is predicted as the next one's delimiter.
`NAME.index`, little-endian throughout:

    byte  bytes
       0      8  magic "FLMINDEX"
       8      4  version of this layout, 2
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
       +    4 n  int32 copies: how often training sees each document in an epoch
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from functional_lm import files, unfinished
from functional_lm.errors import DataError
from functional_lm.text.interface import Tokenizer
from functional_lm.unfinished import Journal

MAGIC, VERSION, INT32 = b"FLMINDEX", 2, 1
FIELDS = struct.Struct("<8sIIQQQQQQ32s32s")
HEADER_BYTES = FIELDS.size + 16
BLOCK_TOKENS = 1 << 20
TOKEN, OFFSET, COPIES = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<i4")


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened dataset; its arrays are memory-mapped and read-only."""

    path: Path  # without suffix
    tokens: NDArray[np.int32]  # [all tokens]
    offsets: NDArray[np.int64]  # [documents + 1]
    copies: NDArray[np.int32]  # [documents] how often training sees each in an epoch
    vocab_size: int
    delimiter: int
    tokenizer_digest: str
    digest: str  # names the contents: equal digests, equal tokens, documents and copies

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray[np.int32]:
        """[T] tokens of one document, without the delimiter before them."""
        start, end = self.offsets[index : index + 2]
        return self.tokens[start + 1 : end]


# Writing --------------------------------------------------------------------------------------------------------


class _BlockHash:
    """BLAKE2b of every `size` bytes of a stream, written to `digests`; goes on from what both hold already."""

    def __init__(self, size: int, data: IO[bytes], digests: IO[bytes]) -> None:
        self._size, self._digests = size, digests
        self._hash, self._filled = hashlib.blake2b(digest_size=16), 0
        data.seek(digests.tell() // 16 * size)
        while chunk := data.read(1 << 20):
            self.update(memoryview(chunk))

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: self._size - self._filled]
            self._hash.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == self._size:
                self.finish()

    def finish(self) -> None:
        if self._filled:
            self._digests.write(self._hash.digest())
        self._hash, self._filled = hashlib.blake2b(digest_size=16), 0


class Writer:
    """Takes documents one after another; made by `writing`. What `journal` commits survives a kill."""

    def __init__(self, journal: Journal, vocab_size: int, delimiter: int) -> None:
        self.journal, self._vocab_size, self._delimiter = journal, vocab_size, delimiter
        self._tokens, self._offsets, self._copies, self._digests = map(
            journal.open, ("tokens", "offsets", "copies", "digests")
        )
        self.documents = self._offsets.tell() // OFFSET.itemsize
        self.tokens = self._tokens.tell() // TOKEN.itemsize
        self._blocks = _BlockHash(BLOCK_TOKENS * TOKEN.itemsize, self._tokens, self._digests)

    def append(self, document: NDArray[Any], copies: int = 1) -> None:
        """Add a document: [T] integer ids without a delimiter. Raises DataError for ids outside the vocabulary."""
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise DataError(f"a document is a row of integers, not {ids.dtype} of shape {ids.shape}")
        self.extend(ids, np.array([len(ids)]), np.array([copies]))

    def extend(self, ids: NDArray[Any], lengths: NDArray[Any], copies: NDArray[Any]) -> None:
        """Add parts of documents: [N] ids one part after another, the length of each [P], and for each [P] how often
        the document that it begins is seen, 0 where it goes on with the one before."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"ids {ids.min()}..{ids.max()} are outside the vocabulary of {self._vocab_size}")
        begins = copies > 0
        places = (np.cumsum(lengths) - lengths)[begins]  # in ids
        stored = np.insert(ids.astype(TOKEN), places, self._delimiter)
        data = stored.view(np.uint8).data
        self._tokens.write(data)
        self._blocks.update(data)
        self._offsets.write((self.tokens + places + np.arange(len(places))).astype(OFFSET).tobytes())
        self._copies.write(copies[begins].astype(COPIES).tobytes())
        self.documents, self.tokens = self.documents + len(places), self.tokens + len(stored)

    def finish(self, tokenizer_digest: str) -> None:
        """Write the index: a placeholder, the tables while they are hashed, then the header over the placeholder."""
        if not self.documents:
            raise DataError("a dataset needs at least one document")
        self._offsets.write(struct.pack("<q", self.tokens))
        self._blocks.finish()
        index = self.journal.open("index")
        index.write(bytes(HEADER_BYTES))
        for table in (self._digests, self._offsets, self._copies):
            table.seek(0)
            shutil.copyfileobj(table, index)
        # fmt: off
        fields = FIELDS.pack(
            MAGIC, VERSION, INT32, self._vocab_size, self._delimiter, self.documents, self.tokens,
            BLOCK_TOKENS, self._digests.tell() // 16, bytes.fromhex(tokenizer_digest), _hash_from(index, HEADER_BYTES),
        )
        # fmt: on
        index.seek(0)
        index.write(fields + _short_hash(fields))


@contextmanager
def writing(
    path: str | Path, vocab_size: int, delimiter: int, tokenizer_digest: str, inputs: str = ""
) -> Iterator[Writer]:
    """Write a dataset: `with writing(...) as writer: writer.append(ids)`.

    Nothing is seen under its name before the block ends without an error; then an older pair is replaced. The old
    index goes first and the new one comes last, so that a crash in between cannot leave a pair that does not match.
    After a kill, a call with the same `inputs` goes on behind the last `writer.journal.commit`.
    """
    name = name_of(path)
    index_path, tokens_path = _with(name, ".index"), _with(name, ".bin")
    with unfinished.journal(name, inputs) as journal:
        writer = Writer(journal, vocab_size, delimiter)
        yield writer
        writer.finish(tokenizer_digest)
        files.remove(index_path)
        files.sync(name.parent)
        journal.finish("tokens", tokens_path)
        journal.finish("index", index_path)


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
    tables = OFFSET.itemsize * (documents + 1) + COPIES.itemsize * documents
    _check_size(_with(name, ".index"), HEADER_BYTES + 16 * blocks + tables)
    _check_size(_with(name, ".bin"), TOKEN.itemsize * tokens)
    if tokenizer is not None and tokenizer_digest.hex() != tokenizer.digest:
        raise DataError(
            f"{name} was made with another tokenizer ({tokenizer_digest.hex()[:12]}, not {tokenizer.digest[:12]}); "
            "give that one as --tokenizer, or prepare the text again"
        )
    table = HEADER_BYTES + 16 * blocks
    offsets = np.memmap(_with(name, ".index"), OFFSET, "r", table, (documents + 1,))
    copies = np.memmap(_with(name, ".index"), COPIES, "r", table + offsets.nbytes, (documents,))
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise DataError(f"{name}.index is damaged: its table does not span the tokens; prepare it again")
    mapped = np.memmap(_with(name, ".bin"), TOKEN, "r", 0, (tokens,))
    digest = _short_hash(FIELDS.pack(*header)).hex()
    arrays = np.asarray(mapped), np.asarray(offsets), np.asarray(copies)
    return Dataset(name, *arrays, vocab_size, delimiter, tokenizer_digest.hex(), digest)


def verify(dataset: Dataset) -> None:
    """Read everything and compare with the checksums and the vocabulary.

    Raises DataError naming the first damaged block, or the first token that is not in the vocabulary.
    """
    index = _with(dataset.path, ".index")
    header, blocks = _header(index)
    with open(index, "rb") as file:
        if _hash_from(file, HEADER_BYTES) != header[-1]:
            raise DataError(f"{index} is damaged behind its header; prepare it again")
        file.seek(HEADER_BYTES)
        digests = file.read(16 * blocks)
    block_tokens = header[7]
    for block in range(blocks):
        tokens = dataset.tokens[block * block_tokens : (block + 1) * block_tokens]
        data = tokens.tobytes()
        if _short_hash(data) != digests[16 * block : 16 * block + 16]:
            where = f"tokens {block * block_tokens}..{block * block_tokens + len(data) // TOKEN.itemsize - 1}"
            raise DataError(f"{dataset.path}.bin is damaged in block {block} ({where}); prepare it again")
        check_ids(dataset, tokens, block * block_tokens)


def check_ids(dataset: Dataset, tokens: NDArray[np.int32], first: int) -> None:
    """What was written elsewhere may have digests that are right and ids that are not."""
    if tokens.min(initial=0) >= 0 and tokens.max(initial=0) < dataset.vocab_size:
        return
    place = int(np.argmax((tokens < 0) | (tokens >= dataset.vocab_size)))
    raise DataError(
        f"{dataset.path}.bin: token {first + place} is {tokens[place]}, outside the vocabulary of "
        f"{dataset.vocab_size}; prepare it again"
    )


def _header(path: Path) -> tuple[tuple[Any, ...], int]:
    """The header's fields, and the number of blocks."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
    if raw[:8] != MAGIC:
        raise DataError(f"{path} is no dataset index (it does not begin with {MAGIC.decode()})")
    if len(raw) < HEADER_BYTES or raw[FIELDS.size :] != _short_hash(raw[: FIELDS.size]):
        raise DataError(f"{path} has a damaged header; prepare it again")
    header = FIELDS.unpack(raw[: FIELDS.size])
    if struct.unpack(">II", raw[8:16]) == (VERSION, INT32):
        raise DataError(
            f"{path} has its bytes in the other order (big-endian; a dataset is little-endian): prepare it again"
        )
    if header[1:3] != (VERSION, INT32):
        raise DataError(
            f"{path} has layout {header[1]} and type {header[2]}; this version reads {VERSION} and {INT32}: "
            "prepare it again"
        )
    return header, header[8]


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size
    if actual != expected:
        raise DataError(
            f"{path} has {actual} bytes, not {expected}: cut off, damaged or of another pair; prepare it again"
        )
