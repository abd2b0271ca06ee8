"""What a tokenizer is to the rest of the package, and what all of them share.

Every tokenizer here is *lossless*: `decode(encode(text)) == text` for every text, and the bytes of a sequence are the
bytes of its tokens one after another, so that they can be streamed and counted. Special tokens (document delimiter,
chat roles) stand outside the text: they are never matched in it, a text that spells `<|endoftext|>` round-trips as
that text, and they decode to nothing. No token reaches over a line's end, so the ids of a text are those of its lines
one after another.

`<|endoftext|>` is the one delimiter of documents: it begins each document and so also ends the one before, which
makes it `bos` and `eos` at once.

Tokenizers of other projects have delimiters of their own, and keep two of these laws less strictly: tokens of
byte-level BPE may reach over a line's end, and SentencePiece models with a dummy prefix put a space before a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError

UNKNOWN, DELIMITER = "<unk>", "<|endoftext|>"
SYSTEM, USER, ASSISTANT, END = CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# The file that tells the kind of a saved tokenizer; a folder has one of them.
SENTENCEPIECE_FILE, WORDCHAR_FILE, BYTES_FILE = "tokenizer.model", "tokenizer.wordchar.json", "tokenizer.bytes.json"
# Hugging Face's, which stands for itself where it is alone; beside one of the others it is a translation of it.
TOKENIZERS_FILE = "tokenizer.json"
MODEL_FILES = (SENTENCEPIECE_FILE, WORDCHAR_FILE, BYTES_FILE, TOKENIZERS_FILE)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int | None: ...
    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by name of every token that no text encodes to (unknown, delimiter, chat roles)."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of the model, in hex: equal digests give equal ids."""
        ...

    @property
    def byte_lengths(self) -> NDArray[np.int32]:
        """[V] UTF-8 bytes that each id stands for; 0 for special tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token. Raises DataError for lone surrogates."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """`encode` of each text; the ids do not depend on `threads` nor on the company."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Bytes of ids: the concatenation of each id's bytes. Raises DataError for ids outside the vocabulary."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder`, from which `load` (and Hugging Face, if it can) read them."""
        ...


class Table:
    """Decoding for every kind: a table of the bytes that each id stands for, b"" for special tokens."""

    def __init__(self, table: list[bytes]) -> None:
        self._bytes = table
        self.vocab_size: int = len(table)
        self.byte_lengths: NDArray[np.int32] = np.array([len(entry) for entry in table], np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        tokens = [int(token) for token in ids]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise DataError(f"ids {min(tokens)}..{max(tokens)} are outside the vocabulary (0..{self.vocab_size - 1})")
        return b"".join([self._bytes[token] for token in tokens])


def byte_count(text: str) -> int:
    """UTF-8 bytes of a text. Raises DataError for lone surrogates, which have none."""
    return len(text) if text.isascii() else len(utf8(text))


def utf8(text: str) -> bytes:
    """A text's bytes. Raises DataError for lone surrogates, which have none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} (U+{ord(text[error.start]):04X}) is half of a surrogate pair, which is no text; "
            "decode the input as UTF-8 or UTF-16 first"
        ) from None


def save_model(folder: str | Path, name: str, model: bytes) -> None:
    """Write the file that tells a tokenizer's kind; one of another kind that lay there goes."""
    with files.writing(Path(folder) / name) as file:
        file.write(model)
    for other in sorted({*MODEL_FILES, "tokenizer_config.json"} - {name}):
        files.remove(Path(folder) / other)
