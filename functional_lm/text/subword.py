"""SentencePiece behind the tokenizer interface: `bpe`, `unigram` and `char`, all of them lossless.

`char` has the characters of the text as its vocabulary (the most frequent ones, if `vocab_size` cannot hold all) and
bytes for the rest. Ids: 0 is `<unk>` (never produced), 1 the delimiter, then the chat roles, 256 bytes, the pieces.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError, UsageError
from functional_lm.text import tokenizer_json
from functional_lm.text.interface import (
    CHAT,
    DELIMITER,
    SENTENCEPIECE_FILE,
    UNKNOWN,
    Table,
    byte_count,
    save_model,
)
from functional_lm.text.sample import sample

# SentencePiece writes a space as U+2581, reserves U+2585 in training, and drops longer sentences from training.
SPACE, RESERVED, SENTENCE_CHARACTERS = "\u2581", "\u2585", 1024
# A line with its end; cut after so many characters, because memory and time per character grow with the length.
LINES, WHOLE = f"[^\n{SPACE}]{{1,65536}}\n?|\n|{SPACE}", f"[^{SPACE}]+|{SPACE}"
SENTENCE = re.compile(f"[^\n{SPACE}{RESERVED}]{{1,{SENTENCE_CHARACTERS}}}\n?|\n")
BATCH_CHARACTERS = 1 << 20
FEWEST = 256 + 2 + len(CHAT)  # bytes and special tokens; the text's characters come on top
# Nothing is normalised, added or taken away. One thread, because the number of threads changes the result.
LOSSLESS: dict[str, Any] = {
    "byte_fallback": True,
    "character_coverage": 1.0,
    "required_chars": SPACE,  # without a piece of its own, a space would be spelled in the bytes of its sign
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "num_threads": 1,
}


class Piece(NamedTuple):
    """An entry of a SentencePiece vocabulary, spaces as U+2581."""

    text: str
    score: float  # of BPE the higher, the earlier it is merged; of unigram its log-probability
    kind: int  # 1 text, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte


class SentencePieceTokenizer(Table):
    """A lossless SentencePiece model.

    A text is encoded line by line (a line holds its line end, and is cut after 65,536 characters). In a model that
    was trained on lines no piece reaches over a line's end, so the ids are those of the whole text, only sooner. A
    literal U+2581, SentencePiece's own sign for a space, is emitted as its three byte pieces.

    Models of other projects that put a space before every text (`add_dummy_prefix`, Llama 2's) do so here: the ids
    of a text are those of `prefix + text`, which is what they decode to; an empty text stays empty.
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
        self._model, self.prefix = model, ""
        super().__init__([self._piece_bytes(token) for token in range(len(self._pieces))])
        self._space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.unk_id: int | None = self._processor.unk_id()
        self.bos_id, self.eos_id = self._delimiters()
        self.special_ids: Mapping[str, int] = {
            piece: token
            for token, piece in enumerate(self._pieces)
            if self._processor.is_control(token) or self._processor.is_unknown(token)
        }
        self.digest: str = hashlib.sha256(model).hexdigest()
        # Models of other projects may have pieces that reach over a line's end.
        across = any("\n" in piece[:-1] for piece in self._pieces)
        self._segment = WHOLE if across else LINES
        if not self._lossless():
            proto = _proto(model)
            if proto.normalizer_spec.add_dummy_prefix:
                proto.normalizer_spec.add_dummy_prefix = False
                self._processor.LoadFromSerializedProto(proto.SerializeToString())
                self.prefix = " "
            if not self._lossless():
                raise DataError("this SentencePiece model changes text (spaces, normal forms); train a lossless one")

    def _lossless(self) -> bool:
        probe = " a  B\tﬁ\r\n\0\u2581\U0001f600 "
        return self.decode(self.encode(probe)) == self.prefix + probe

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes]]:
        return SentencePieceTokenizer, (self._model,)  # to the processes that encode

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        try:
            return cls(path.read_bytes())
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        save_model(folder, SENTENCEPIECE_FILE, self._model)
        settings = tokenizer_json.settings(self.special_ids, self.bos_id, self.eos_id, self.unk_id)
        files.write_json(Path(folder) / "tokenizer_config.json", settings)
        if document := self._hugging_face():
            files.write_json(Path(folder) / tokenizer_json.FILE, document)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        counts: list[int] = []  # segments of each text
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]  # of each segment; one zero in front
        texts = [self.prefix + text if text else text for text in texts]
        for batch in _batches(_segments(texts, counts, re.compile(self._segment))):
            found = self._encode_segments(batch, threads)
            lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
            ids.append(np.fromiter(chain.from_iterable(found), np.int32, int(lengths[-1].sum())))
        ends = np.cumsum(np.concatenate(lengths))[np.cumsum(counts, dtype=np.int64)]
        return np.split(np.concatenate(ids), ends)[:-1]

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

    @property
    def unigram(self) -> bool:
        """Whether a text is cut into the likeliest pieces; otherwise neighbours are merged."""
        spec = _proto(self._model).trainer_spec
        return bool(spec.model_type == spec.UNIGRAM)

    def pieces(self) -> list[Piece]:
        """Every piece by id, as the model holds it."""
        return [Piece(piece.piece, piece.score, piece.type) for piece in _proto(self._model).pieces]

    def _hugging_face(self) -> dict[str, Any] | None:
        """`tokenizer.json`; None for a model with kinds of pieces that it has no place for."""
        proto = _proto(self._model)
        kinds = {number: piece.type for number, piece in enumerate(proto.pieces)}
        special = proto.SentencePiece.Type
        if {special.USER_DEFINED, special.UNUSED} & {*kinds.values()} or self.unk_id is None:
            return None
        is_text = [kinds[number] == special.NORMAL for number in range(self.vocab_size)]
        pieces = [
            piece.replace(SPACE, " ") if normal else piece for piece, normal in zip(self._pieces, is_text, strict=True)
        ]
        scores = [piece.score if normal else None for piece, normal in zip(proto.pieces, is_text, strict=True)]
        ranked = sorted((i for i, normal in enumerate(is_text) if normal), key=lambda i: -proto.pieces[i].score)
        if self.unigram:
            model = tokenizer_json.unigram(pieces, scores.__getitem__, self.unk_id)
        else:
            model = tokenizer_json.bpe(pieces, [pieces[i] for i in ranked], pieces[self.unk_id])
        return tokenizer_json.document(model, self.special_ids, self._segment, self.prefix)


def _proto(model: bytes) -> Any:
    """The model as a protocol buffer: what it was trained as, and each piece's score and kind."""
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = schema.ModelProto()
    proto.ParseFromString(model)
    return proto


def _segments(texts: Iterable[str], counts: list[int], segment: re.Pattern[str]) -> Iterator[str]:
    """The segments of all texts, one after another; how many each text has is appended to `counts`."""
    for text in texts:
        byte_count(text)
        found = 0
        for match in segment.finditer(text):
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


def train(model_type: str, documents: Iterable[str], vocab_size: int, sample_bytes: int) -> SentencePieceTokenizer:
    """A model of `model_type` (bpe, unigram or char); raises as `tokenizer.train` does."""
    import sentencepiece

    sentences = list(_sentences(sample(documents, sample_bytes)))
    if not sentences:
        raise DataError("no text to train a tokenizer on; the documents are empty")
    if model_type == "char":
        every, sentences = sentences, _of_frequent_characters(sentences, vocab_size)
        if not "".join(sentences).strip() and (most := len(set(chain.from_iterable(every)))):
            raise UsageError(
                f"vocab_size {vocab_size} has no room for the text's characters; give up to {FEWEST + most + 1}"
            )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=min(max(vocab_size, FEWEST), 1 << 24),  # outside, it does not say what would be possible
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


def _of_frequent_characters(sentences: list[str], vocab_size: int) -> list[str]:
    """The sentences without the rarest characters, if the vocabulary cannot hold all."""
    room = vocab_size - FEWEST
    if room < 1:
        raise UsageError(
            f"vocab_size {vocab_size} cannot hold the special tokens and all bytes; give {FEWEST + 1} or more"
        )
    counts = Counter(chain.from_iterable(sentences))
    counts[" "] = sum(counts.values()) + 1  # a space is needed in any case
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    rare = dict.fromkeys(map(ord, ranked[room:]))
    return [sentence.translate(rare) for sentence in sentences] if rare else sentences


class VocabularyTooLarge(UsageError):
    """More tokens were asked for than the text has pieces; `most` are possible."""

    def __init__(self, vocab_size: int, most: int) -> None:
        super().__init__(
            f"vocab_size {vocab_size} is more than this text supports; "
            f"give {most} or less (--vocab_size {most}), or more text"
        )
        self.most = most


def _training_error(message: str, vocab_size: int) -> Exception:
    if most := re.search(r"too high.*<= (\d+)", message):
        return VocabularyTooLarge(vocab_size, int(most[1]))
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UsageError(
            f"vocab_size {vocab_size} cannot hold the text's characters and all bytes; give {least[1]} or more"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return DataError("the text has no characters that a vocabulary could be made of; give other text, or more")
    return DataError(f"SentencePiece could not train on this text ({message}); try another --tokenizer_type")
