"""Tokenizers behind one small interface: text to ids and back without losing a byte.

Every tokenizer here is *lossless*: `decode(encode(text)) == text` for every text, and the bytes of a sequence are the
bytes of its tokens one after another, so that they can be streamed and counted. Special tokens (document delimiter,
chat roles) stand outside the text: they are never matched in it, a text that spells `<|endoftext|>` round-trips as
that text, and they decode to nothing.

The id 0 is `<unk>` (never produced), 1 is `<|endoftext|>`, the one delimiter of documents: it begins each document
and so also ends the one before, which makes it `bos` and `eos` at once.

`TRAINERS` (by kind) and `LOADERS` (by the file in a folder) are the places for more kinds of tokenizers.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError, UsageError

UNKNOWN, DELIMITER = "<unk>", "<|endoftext|>"
CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MODEL_FILE = "tokenizer.model"
SAMPLE_BYTES = 8 << 20  # training reads at most this much of the corpus


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
        """Ids by name of every token that no text encodes to (`<unk>`, delimiter, chat roles)."""
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
        """Write the tokenizer's files into `folder`, from which `load` and Hugging Face read them."""
        ...


def train(
    documents: Iterable[str], kind: str = "bpe", vocab_size: int = 4096, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train a tokenizer on an even sample of at most `sample_bytes` of the documents.

    Deterministic: the same documents give the same bytes on every machine. `documents` is read once and need not fit
    into memory. Raises UsageError for an unknown kind or a `vocab_size` that the text cannot fill or that cannot hold
    its characters, DataError where there is no text.
    """
    if kind not in TRAINERS:
        raise UsageError(f"unknown tokenizer type {kind!r}; there are {', '.join(TRAINERS)}")
    if sample_bytes < 1:
        raise UsageError(f"a sample of {sample_bytes} bytes trains no tokenizer; give at least 1")
    return TRAINERS[kind](sample(documents, sample_bytes), vocab_size)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a (model) folder. Raises DataError if there is none or it cannot be used."""
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"no tokenizer at {path}: no such file or folder")
    if path.is_dir():
        for name, loader in LOADERS.items():
            if (path / name).is_file():
                return loader(path / name)
        raise DataError(f"no tokenizer in {path}: it has no {' or '.join(LOADERS)}")
    return LOADERS.get(path.name, SentencePieceTokenizer.load)(path)


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


# The sample that a tokenizer is trained on ------------------------------------------------------------------------

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
        held += _byte_count(passage)
        while held > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            held = sum(map(_byte_count, kept))
    return kept


def _passages(document: str) -> Iterator[str]:
    """Whole lines of some PASSAGE characters; a line that is far longer is cut."""
    start = 0
    while start < len(document):
        line_end = document.find("\n", start + PASSAGE - 1, start + 4 * PASSAGE)
        end = line_end + 1 if line_end >= 0 else start + 4 * PASSAGE
        yield document[start:end]
        start = end


def _byte_count(text: str) -> int:
    """UTF-8 bytes of a text. Raises DataError for lone surrogates, which have none."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} (U+{ord(text[error.start]):04X}) is half of a surrogate pair, which is no text; "
            "decode the input as UTF-8 or UTF-16 first"
        ) from None


# SentencePiece ----------------------------------------------------------------------------------------------------

# SentencePiece writes a space as U+2581, reserves U+2585 in training, and drops longer sentences from training.
SPACE, RESERVED, SENTENCE_CHARACTERS = "\u2581", "\u2585", 1024
# A line with its end; cut after so many characters, because memory and time per character grow with the length.
SEGMENT = re.compile(f"[^\n{SPACE}]{{1,65536}}\n?|\n|{SPACE}")
SENTENCE = re.compile(f"[^\n{SPACE}{RESERVED}]{{1,{SENTENCE_CHARACTERS}}}\n?|\n")
BATCH_CHARACTERS = 1 << 20
FEWEST = 256 + 2 + len(CHAT)  # bytes and special tokens; the text's characters come on top
# Nothing is normalised, added or taken away. One thread, because the number of threads changes the result.
LOSSLESS: dict[str, Any] = {
    "byte_fallback": True,
    "character_coverage": 1.0,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "num_threads": 1,
}


class SentencePieceTokenizer:
    """A lossless SentencePiece model.

    A text is encoded line by line (a line holds its line end, and is cut after 65,536 characters). In a model that
    was trained on lines no piece reaches over a line's end, so the ids are those of the whole text, only sooner. A
    literal U+2581, SentencePiece's own sign for a space, is emitted as its three byte pieces.
    """

    def __init__(self, model: bytes) -> None:
        """Raises DataError if `model` is no SentencePiece model, or one that changes text."""
        import sentencepiece

        if not model:
            raise DataError("not a SentencePiece model (empty)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._pieces = [self._processor.id_to_piece(i) for i in range(self._processor.vocab_size())]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError("not a SentencePiece model (damaged, or another kind of file)") from error
        self._model = model
        self._bytes = [self._piece_bytes(token) for token in range(len(self._pieces))]
        self._space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.vocab_size: int = len(self._pieces)
        self.unk_id: int | None = self._processor.unk_id()
        self.bos_id, self.eos_id = self._delimiters()
        self.special_ids: Mapping[str, int] = {
            piece: token
            for token, piece in enumerate(self._pieces)
            if self._processor.is_control(token) or self._processor.is_unknown(token)
        }
        self.digest: str = hashlib.sha256(model).hexdigest()
        self.byte_lengths: NDArray[np.int32] = np.array([len(piece) for piece in self._bytes], np.int32)
        probe = " a  B\tﬁ\r\n\0\u2581\U0001f600 "
        if self.decode(self.encode(probe)) != probe:
            raise DataError("this SentencePiece model changes text (spaces, normal forms); train a lossless one")

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        try:
            return cls(path.read_bytes())
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        with files.writing(Path(folder) / MODEL_FILE) as file:
            file.write(self._model)
        files.write_json(Path(folder) / "tokenizer_config.json", self._hugging_face())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        counts: list[int] = []  # segments of each text
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]  # of each segment; one zero in front
        for batch in _batches(_segments(texts, counts)):
            found = self._encode_segments(batch, threads)
            lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
            ids.append(np.fromiter(chain.from_iterable(found), np.int32, int(lengths[-1].sum())))
        ends = np.cumsum(np.concatenate(lengths))[np.cumsum(counts, dtype=np.int64)]
        return np.split(np.concatenate(ids), ends)[:-1]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        tokens = [int(token) for token in ids]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise DataError(f"ids {min(tokens)}..{max(tokens)} are outside the vocabulary (0..{self.vocab_size - 1})")
        return b"".join([self._bytes[token] for token in tokens])

    def _encode_segments(self, segments: list[str], threads: int) -> list[list[int]]:
        found: list[list[int]] = self._processor.encode(segments, out_type=int, num_threads=threads)
        if SPACE in segments:
            found = [self._space if segment == SPACE else ids for segment, ids in zip(segments, found)]
        return found

    def _piece_bytes(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._pieces[token]
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def _delimiters(self) -> tuple[int, int]:
        """bos and eos; a model that has only one of them uses it for both."""
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        if max(bos, eos) < 0:
            raise DataError("this SentencePiece model has neither bos nor eos; one must delimit documents")
        return (bos if bos >= 0 else eos), (eos if eos >= 0 else bos)

    def _hugging_face(self) -> dict[str, Any]:
        """`tokenizer_config.json`: with these settings `LlamaTokenizer` gives the same ids."""
        named = {self._pieces[token] for token in (self.bos_id, self.eos_id, self.unk_id) if token is not None}
        return {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": self._pieces[self.bos_id],
            "eos_token": self._pieces[self.eos_id],
            "unk_token": UNKNOWN if self.unk_id is None else self._pieces[self.unk_id],
            "additional_special_tokens": [name for name in self.special_ids if name not in named],
            "legacy": False,
            "add_prefix_space": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }


def _segments(texts: Iterable[str], counts: list[int]) -> Iterator[str]:
    """The segments of all texts, one after another; how many each text has is appended to `counts`."""
    for text in texts:
        _byte_count(text)
        found = 0
        for match in SEGMENT.finditer(text):
            found += 1
            yield match.group()
        counts.append(found)


def _batches(segments: Iterable[str]) -> Iterator[list[str]]:
    """Lists of segments of some BATCH_CHARACTERS: lists of Python integers exist for one of them at a time."""
    batch: list[str] = []
    held = 0
    for segment in segments:
        batch.append(segment)
        held += len(segment)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _sentences(passages: Iterable[str]) -> Iterator[str]:
    """What SentencePiece learns from: lines, none of them long enough to be dropped.

    The reader of `sentence_iterator` strips line ends from the end of a sentence, so a space stands behind them; a
    piece never continues over a space, so that pieces such as "):\\n" are learned, and none beyond the line's end.
    """
    for passage in passages:
        for match in SENTENCE.finditer(passage):
            sentence = match.group()
            yield sentence + " " if sentence.endswith("\n") else sentence


def _train_sentencepiece(passages: list[str], vocab_size: int) -> Tokenizer:
    import sentencepiece

    sentences = list(_sentences(passages))
    if not sentences:
        raise DataError("no text to train a tokenizer on; the documents are empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=min(max(vocab_size, FEWEST), 1 << 30),  # outside, it does not say what would be possible
            unk_id=0,
            unk_piece=UNKNOWN,
            eos_id=1,
            eos_piece=DELIMITER,
            bos_id=-1,
            pad_id=-1,
            control_symbols=list(CHAT),
            minloglevel=2,
            **LOSSLESS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_error(message: str, vocab_size: int) -> Exception:
    if most := re.search(r"too high.*<= (\d+)", message):
        return UsageError(
            f"vocab_size {vocab_size} is more than this text supports; give {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UsageError(
            f"vocab_size {vocab_size} cannot hold the text's characters and all bytes; give {least[1]} or more"
        )
    return DataError(f"SentencePiece could not train on this text: {message}")


TRAINERS: dict[str, Callable[[list[str], int], Tokenizer]] = {"bpe": _train_sentencepiece}
LOADERS: dict[str, Callable[[Path], Tokenizer]] = {MODEL_FILE: SentencePieceTokenizer.load}
