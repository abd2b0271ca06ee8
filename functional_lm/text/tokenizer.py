"""Tokenizers by kind and by file: `train`, `load`, and text from a stream of ids.

The interface is in `interface.py`, the kinds are in `subword.py` (SentencePiece), `simple.py` (bytes; words and
characters) and `byte_pairs.py` (Hugging Face's). `TRAINERS` (by kind) and `LOADERS` (by the file in a folder) are the
places for more of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import SupportsIndex

from functional_lm.errors import DataError, UsageError
from functional_lm.text import subword
from functional_lm.text.byte_pairs import BytePairTokenizer
from functional_lm.text.interface import (
    BYTES_FILE,
    CHAT,
    DELIMITER,
    SENTENCEPIECE_FILE,
    TOKENIZERS_FILE,
    UNKNOWN,
    WORDCHAR_FILE,
    Tokenizer,
)
from functional_lm.text.sample import PASSAGE, sample
from functional_lm.text.simple import ByteTokenizer, WordCharTokenizer
from functional_lm.text.subword import SentencePieceTokenizer

__all__ = ["CHAT", "DELIMITER", "LOADERS", "PASSAGE", "SAMPLE_BYTES", "TRAINERS", "UNKNOWN"]
__all__ += ["SentencePieceTokenizer", "Tokenizer", "load", "sample", "stream", "train", "utf8_decoder"]

SAMPLE_BYTES = 8 << 20  # training reads at most this much of the corpus

# (documents, vocab_size, sample_bytes) -> tokenizer
TRAINERS: dict[str, Callable[[Iterable[str], int, int], Tokenizer]] = {
    "bpe": partial(subword.train, "bpe"),
    "unigram": partial(subword.train, "unigram"),
    "char": partial(subword.train, "char"),
    "bytes": lambda documents, vocab_size, sample_bytes: ByteTokenizer(),
    "wordchar": WordCharTokenizer.train,
}
LOADERS: dict[str, Callable[[Path], Tokenizer]] = {
    SENTENCEPIECE_FILE: SentencePieceTokenizer.load,
    WORDCHAR_FILE: WordCharTokenizer.load,
    BYTES_FILE: ByteTokenizer.load,
    TOKENIZERS_FILE: BytePairTokenizer.load,
}


def train(
    documents: Iterable[str], kind: str = "bpe", vocab_size: int = 4096, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train a tokenizer on an even sample of at most `sample_bytes` of the documents.

    Deterministic: the same documents give the same bytes on every machine. `documents` is read once (not at all for
    `bytes`) and need not fit into memory. `bpe` and `unigram` have exactly `vocab_size` ids, `char` and `wordchar` at
    most so many, `bytes` always 262.

    Raises UsageError for an unknown kind or a `vocab_size` that the text cannot fill or that cannot hold its
    characters, DataError where there is no text.
    """
    if kind not in TRAINERS:
        raise UsageError(f"unknown tokenizer type {kind!r}; there are {', '.join(TRAINERS)}")
    if sample_bytes < 1:
        raise UsageError(f"a sample of {sample_bytes} bytes trains no tokenizer; give at least 1")
    return TRAINERS[kind](documents, vocab_size, sample_bytes)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a (model) folder. Raises DataError if there is none or it cannot be used."""
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"no tokenizer at {path}: no such file or folder")
    if not path.is_dir():  # it may have another name: only what follows "tokenizer" tells
        kinds = (loader for name, loader in LOADERS.items() if path.name.endswith(name.removeprefix("tokenizer")))
        return next(kinds, SentencePieceTokenizer.load)(path)
    found = [name for name in LOADERS if (path / name).is_file()]
    found = [name for name in found if name != TOKENIZERS_FILE] or found  # beside another it is a translation of it
    if not found:
        raise DataError(f"no tokenizer in {path}: it has no {' or '.join(LOADERS)}")
    if len(found) > 1:
        raise DataError(f"{path} has several tokenizers, {' and '.join(found)}; remove those that do not belong to it")
    return LOADERS[found[0]](path / found[0])


def stream(tokenizer: Tokenizer, ids: Iterable[SupportsIndex]) -> Iterator[str]:
    """`decode`, one string for each id as it comes (empty while a character is incomplete), then what is left.

    The strings concatenate to `tokenizer.decode(ids)`.
    """
    decoder = utf8_decoder()
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def utf8_decoder() -> codecs.IncrementalDecoder:
    """For those who are handed one token at a time: bytes in, text out, incomplete characters held back."""
    return codecs.getincrementaldecoder("utf-8")("replace")
