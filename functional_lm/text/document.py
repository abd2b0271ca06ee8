"""What a document is between a file and its tokens: segments of text, special tokens by name, or ids made earlier.

Special tokens are no text: the reader of a chat puts them between the turns, and whoever types `<|user|>` inside a
turn gets the characters. A document can be gone through more than once; a long one reads its file as it goes, in
segments that end where a line ends (no token reaches over that place, see `interface.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from functional_lm.errors import DataError
from functional_lm.text.interface import Tokenizer, utf8


class Special(NamedTuple):
    """A special token, by its name."""

    name: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """Ids that the tokenizer of this digest made; `origin` says where they lie."""

    ids: NDArray[np.int32]  # [T]
    tokenizer_digest: str
    origin: str
    copies: int = 1  # how often training on that dataset sees the document


Segment = str | Special | Encoded
Document = Iterable[Segment]


def text_of(documents: Iterable[Document]) -> Iterator[str]:
    """The text in documents, segment by segment, without special tokens: what a tokenizer is trained on."""
    for document in documents:
        for segment in document:
            if isinstance(segment, Encoded):
                raise DataError(f"{segment.origin} holds tokens, not text; give the --tokenizer that made them")
            if isinstance(segment, str):
                yield segment


def repeats(document: Document) -> int:
    """How often a document counts that comes from a dataset; 1 for any other."""
    first = document[0] if isinstance(document, tuple) and document else None
    return first.copies if isinstance(first, Encoded) else 1


def digest(document: Document) -> bytes:
    """16 bytes that name the contents of a document, however it is cut into segments."""
    found = hashlib.blake2b(digest_size=16)
    for segment in document:
        if isinstance(segment, str):
            found.update(utf8(segment))
        elif isinstance(segment, Special):
            found.update(b"\xff" + utf8(segment.name) + b"\xff")  # a byte that is in no text
        else:
            found.update(b"\xfe" + np.ascontiguousarray(segment.ids).tobytes())
    return found.digest()


def encode(
    tokenizer: Tokenizer, parts: Sequence[Sequence[Segment]], threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids of all parts one after another, and how many each part has.

    A special token that the tokenizer lacks is written as its name. Raises DataError for ids of another tokenizer.
    """
    segments = [_known(tokenizer, segment) for part in parts for segment in part]
    texts = iter(tokenizer.encode_batch([segment for segment in segments if isinstance(segment, str)], threads))
    special = {name: np.array([token], np.int32) for name, token in tokenizer.special_ids.items()}

    def ids(segment: Segment) -> NDArray[Any]:
        if isinstance(segment, Special):
            return special[segment.name]
        return next(texts) if isinstance(segment, str) else segment.ids

    found = [ids(segment) for segment in segments]
    ends = np.cumsum([0, *map(len, found)])[np.cumsum([0, *map(len, parts)])]
    return np.concatenate([np.zeros(0, np.int32), *found]), np.diff(ends)


def _known(tokenizer: Tokenizer, segment: Segment) -> Segment:
    if isinstance(segment, Special) and segment.name not in tokenizer.special_ids:
        return segment.name
    if isinstance(segment, Encoded) and segment.tokenizer_digest != tokenizer.digest:
        raise DataError(
            f"{segment.origin} was made with another tokenizer ({segment.tokenizer_digest[:12]}, not "
            f"{tokenizer.digest[:12]}); give that one as --tokenizer, or prepare the text again"
        )
    return segment
