"""Tokenizers without SentencePiece: plain bytes, and frequent words with characters for the rest. Both are lossless."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError, UsageError
from functional_lm.text import tokenizer_json
from functional_lm.text.interface import (
    BYTES_FILE,
    CHAT,
    DELIMITER,
    UNKNOWN,
    WORDCHAR_FILE,
    Table,
    save_model,
    utf8,
)
from functional_lm.text.sample import sample

FORMAT = 1
BYTES = [bytes([value]) for value in range(256)]


class ByteTokenizer(Table):
    """UTF-8 bytes. Ids: 0 `<unk>` (never produced), 1 the delimiter, 2-5 the chat roles, 6-261 the bytes."""

    specials = (UNKNOWN, DELIMITER, *CHAT)

    def __init__(self) -> None:
        super().__init__([b""] * len(self.specials) + BYTES)
        self.special_ids: Mapping[str, int] = {name: token for token, name in enumerate(self.specials)}
        self.unk_id: int | None = 0
        self.bos_id = self.eos_id = self.special_ids[DELIMITER]
        self._model = _canonical({"format": FORMAT, "type": "bytes", "special_tokens": self.specials})
        self.digest: str = hashlib.sha256(self._model).hexdigest()

    @classmethod
    def load(cls, path: Path) -> ByteTokenizer:
        made = cls()
        if _read(path, "bytes") != json.loads(made._model):
            raise DataError(f"{path}: a byte tokenizer with other special tokens; this version has {cls.specials}")
        return made

    def save(self, folder: str | Path) -> None:
        save_model(folder, BYTES_FILE, self._model)
        pieces = [*self.specials, *(f"<0x{value:02X}>" for value in range(256))]
        model = tokenizer_json.bpe(pieces, (), UNKNOWN)
        document = tokenizer_json.document(model, self.special_ids, "[^\n]*\n|[^\n]+")
        files.write_json(Path(folder) / tokenizer_json.FILE, document)
        settings = tokenizer_json.settings(self.special_ids, self.bos_id, self.eos_id, self.unk_id)
        files.write_json(Path(folder) / "tokenizer_config.json", settings)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        first = np.int32(len(self.specials))
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) + first for text in texts]


# Words and characters -----------------------------------------------------------------------------------------------

# What may be one token: a line's end; letters, with the space before them; a run of spaces but its last, or of tabs;
# any other character alone. Every character is in exactly one unit, and none reaches over a line's end.
UNIT = re.compile(r"\r?\n| ?[^\W\d_]{1,64}| {1,64}(?= )|\t{1,16}|.", re.DOTALL)
REMEMBERED = 1 << 16  # units whose ids are kept at hand


class WordCharTokenizer(Table):
    """The frequent units of a text as tokens; the others are spelled in characters, unseen characters in bytes.

    Ids: 0 `<|endoftext|>`, 1 `<|pad|>`, 2 `<|unk|>` (the last two are never produced), 3-6 the chat roles, 256 bytes,
    characters, units. Case and spaces are kept: a word carries the space before it.
    """

    specials = (DELIMITER, "<|pad|>", "<|unk|>", *CHAT)

    def __init__(self, characters: Sequence[str], units: Sequence[str]) -> None:
        """Raises DataError for lone surrogates, an empty entry, or one that occurs twice."""
        entries = [*characters, *units]
        if len(set(entries)) < len(entries) or "" in entries or max(map(len, characters), default=1) > 1:
            raise DataError("not a word and character vocabulary: an entry is empty, there twice, or no character")
        super().__init__([b""] * len(self.specials) + BYTES + [utf8(entry) for entry in entries])
        self.special_ids: Mapping[str, int] = {name: token for token, name in enumerate(self.specials)}
        self.unk_id: int | None = self.special_ids["<|unk|>"]
        self.bos_id = self.eos_id = self.special_ids[DELIMITER]
        self._characters, self._units = tuple(characters), tuple(units)
        self._model = _canonical(
            {"format": FORMAT, "type": "wordchar", "characters": self._characters, "units": self._units}
        )
        self.digest: str = hashlib.sha256(self._model).hexdigest()
        first = len(self.specials) + len(BYTES)
        self._spelled = _Spelling({entry: (first + i,) for i, entry in enumerate(entries)}, len(self.specials))

    def __reduce__(self) -> tuple[type[WordCharTokenizer], tuple[tuple[str, ...], tuple[str, ...]]]:
        return WordCharTokenizer, (self._characters, self._units)  # to the processes that encode

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, sample_bytes: int) -> WordCharTokenizer:
        """All characters of the sample (the most frequent, if they would take over three quarters of the room), then
        the most frequent units until the vocabulary is full. Raises as `tokenizer.train` does."""
        room = vocab_size - len(cls.specials) - len(BYTES)
        if room < 1:
            raise UsageError(
                f"vocab_size {vocab_size} cannot hold the special tokens and all bytes; give {vocab_size - room + 1} "
                "or more"
            )
        characters, units = Counter[str](), Counter[str]()
        for passage in sample(documents, sample_bytes):
            characters.update(passage)
            units.update(UNIT.findall(passage))
        if not characters:
            raise DataError("no text to train a tokenizer on; the documents are empty")
        alphabet = _most_frequent(characters, room - room // 4)
        repeated = {unit: count for unit, count in units.items() if count > 1 and len(unit) > 1}
        return cls(alphabet, _most_frequent(repeated, room - len(alphabet)))

    @classmethod
    def load(cls, path: Path) -> WordCharTokenizer:
        model = _read(path, "wordchar")
        entries: list[Any] = [model.get("characters"), model.get("units")]
        if not all(isinstance(part, list) and all(isinstance(entry, str) for entry in part) for part in entries):
            raise DataError(f"{path}: 'characters' and 'units' have to be lists of texts")
        try:
            return cls(entries[0], entries[1])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        save_model(folder, WORDCHAR_FILE, self._model)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return list(chain.from_iterable(map(self._spelled.__getitem__, UNIT.findall(text))))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        return [np.array(self.encode(text), np.int32) for text in texts]


class _Spelling(dict[str, tuple[int, ...]]):
    """Ids of a unit: of the vocabulary's own at once, of any other by its characters, remembered for a while."""

    def __init__(self, vocabulary: Mapping[str, tuple[int, ...]], first_byte: int) -> None:
        super().__init__(vocabulary)
        self._vocabulary, self._first_byte = vocabulary, first_byte

    def __missing__(self, unit: str) -> tuple[int, ...]:
        if len(self) > len(self._vocabulary) + REMEMBERED:
            self.clear()
            self.update(self._vocabulary)
        ids = self[unit] = tuple(chain.from_iterable(map(self._character, unit)))
        return ids

    def _character(self, character: str) -> tuple[int, ...]:
        known = self._vocabulary.get(character)
        return known or tuple(self._first_byte + value for value in character.encode("utf-8"))


def _most_frequent(counts: Mapping[str, int], limit: int) -> list[str]:
    """At most `limit` of the entries, the most frequent first, equally frequent ones in the order of their code."""
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:limit]


# Files --------------------------------------------------------------------------------------------------------------


def _canonical(model: Mapping[str, Any]) -> bytes:
    return (json.dumps(model, ensure_ascii=False, indent=0, allow_nan=False) + "\n").encode("utf-8")


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        model = files.read_json(path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a {kind} tokenizer ({error})") from None
    if not isinstance(model, dict) or (model.get("type"), model.get("format")) != (kind, FORMAT):
        raise DataError(f"{path}: not a {kind} tokenizer of format {FORMAT}")
    return model
