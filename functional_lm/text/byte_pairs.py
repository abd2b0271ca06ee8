"""BPE that spells every byte, from Hugging Face's `tokenizer.json`, through their `tokenizers` package.

Two kinds: byte-level (GPT-2's, Llama 3's, Qwen's), whose letters are bytes; and what this project's own vocabularies
are in such a file (`tokenizer_json.py`), whose letters are characters, with byte tokens for those that are unknown.
Both give back every text: a normal form that the file asks for (Qwen's NFC) is not taken, and special tokens are not
looked for in a text, which changes ids only where the text is not in that form or spells such a token. Unlike the
tokens of this project, byte-level ones may reach over a line's end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from functional_lm import files
from functional_lm.errors import DataError, json_kind
from functional_lm.text.interface import TOKENIZERS_FILE, Table, byte_count, save_model, utf8

# What cuts a text and takes nothing away.
CUTTING = ("ByteLevel", "Split", "Digits", "Punctuation")
ONLY = "only BPE that is byte-level, or falls back to bytes, is read"
BYTE_NAMES = {f"<0x{value:02X}>": value for value in range(256)}
MOST = 1 << 24  # ids
SETTINGS, TEMPLATE = ("tokenizer_config.json", "special_tokens_map.json"), "chat_template.jinja"
# Settings for Hugging Face's tools that are kept as they are; nothing here reads them.
KEPT = ("pad_token", "unk_token", "model_max_length", "padding_side", "chat_template")


def alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: themselves where they are printed, U+0100 and on in order otherwise."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in set(printed)]
    return {chr(value): value for value in printed} | {chr(256 + i): value for i, value in enumerate(others)}


class BytePairTokenizer(Table):
    """The text of a `tokenizer.json` and the settings beside it.

    `bos_token` and `eos_token` are names of its tokens; where there is only one, it is both.
    """

    def __init__(self, text: str, settings: Mapping[str, Any]) -> None:
        """Raises DataError for another kind of tokenizer, or where the `tokenizers` package is missing."""
        try:
            import tokenizers
        except ImportError as error:
            raise DataError("a tokenizer.json needs the package tokenizers: pip install 'functional_lm[hf]'") from error
        description = _description(text)
        added = {token["content"]: token for token in description.get("added_tokens", [])}
        vocabulary = {**description["model"]["vocab"], **{name: token["id"] for name, token in added.items()}}
        bos, eos = (_named(settings, *roles) for roles in (("bos_token", "eos_token"), ("eos_token", "bos_token")))
        if bos is None or eos is None:
            raise DataError(f"no bos_token and no eos_token in {' or '.join(SETTINGS)}; one must delimit documents")
        for name in (bos, eos):
            if name not in vocabulary:
                raise DataError(f"the token {name!r} that delimits documents is not in the vocabulary")
            if name in added:
                added[name]["special"] = True
        special = {name for name, token in added.items() if token["special"]} | {bos, eos}
        self.special_ids: Mapping[str, int] = {
            name: number for name, number in sorted(vocabulary.items(), key=lambda pair: pair[1]) if name in special
        }
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]
        self.unk_id: int | None = None
        super().__init__(_table(description, vocabulary, added, special))
        self._text, self._settings = text, {"bos_token": bos, "eos_token": eos}
        self._settings |= {name: settings[name] for name in KEPT if settings.get(name) is not None}
        plain = {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**description, **plain}))
        except Exception as error:  # the package raises nothing more precise
            raise DataError(f"the tokenizers package cannot use it ({error})") from error
        self._tokenizer.encode_special_tokens = True  # as ordinary text, that is
        self.digest: str = hashlib.sha256(json.dumps([text, bos, eos]).encode()).hexdigest()
        probe = " a  B\tﬁ e\u0301\r\n\n\0\u2581\U0001f600 " + "".join(self.special_ids)
        if self.decode(self.encode(probe)) != probe:
            raise DataError("this tokenizer changes text; only such that do not are read")

    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[str, dict[str, Any]]]:
        return BytePairTokenizer, (self._text, self._settings)  # to the processes that encode

    @classmethod
    def load(cls, path: Path) -> BytePairTokenizer:
        """The tokenizer of a `tokenizer.json`, with the names that the files beside it give."""
        try:
            return cls(path.read_text(encoding="utf-8"), _settings(path.parent))
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        save_model(folder, TOKENIZERS_FILE, self._text.encode("utf-8"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._settings,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        files.write_json(Path(folder) / "tokenizer_config.json", settings)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        for text in texts:
            byte_count(text)  # refuses half a surrogate pair
        if threads > 1:  # the package's own threads, as many as it likes
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        else:
            found = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [np.array(encoding.ids, np.int32) for encoding in found]


def _description(text: str) -> dict[str, Any]:
    """The file as JSON, held against what is read here. Raises DataError naming the part that is not."""
    try:
        description = files.parse_json(text)
        model = description["model"]
        kind, vocabulary = model["type"], model["vocab"]
        parts = list(_flat(description["pre_tokenizer"], "pretokenizers"))
        normal = [part["type"] for part in _flat(description.get("normalizer"), "normalizers")]
        added = description.get("added_tokens", [])
        strange = [token["content"] for token in added if not token["special"] and _reaching(token)]
        if not all(isinstance(token["content"], str) and isinstance(token["id"], int) for token in added):
            raise TypeError("added_tokens are names with numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a tokenizer.json ({_told(error)}); copy it again, or name another") from error
    names = [part["type"] for part in parts]
    fallback = bool(model.get("byte_fallback"))
    if kind != "BPE" or fallback == ("ByteLevel" in names) or not set(names) <= {*CUTTING}:
        raise DataError(f"a {kind} cut by {', '.join(names) or 'nothing'}; {ONLY}")
    if any(part.get("add_prefix_space") or part.get("behavior") == "Removed" for part in parts):
        raise DataError("its pre_tokenizer adds a space or removes text; only lossless ones are read")
    if not set(normal) <= {"NFC"}:
        raise DataError(
            f"its normalizer is {', '.join(normal)}; only NFC, which is not needed, can be left out (where the folder "
            "has a tokenizer.model too, that is read instead)"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise DataError(f"its model has {name} {model[name]!r}, which BPE over bytes does not have")
    if strange:
        raise DataError(f"the added token {strange[0]!r} takes text around it away; only lossless ones are read")
    if missing := (BYTE_NAMES if fallback else alphabet()).keys() - vocabulary.keys():
        raise DataError(f"its vocabulary lacks {len(missing)} of the 256 bytes; not every text could be encoded")
    numbers = [*vocabulary.values(), *(token["id"] for token in added)]
    if not all(isinstance(number, int) and 0 <= number < MOST for number in numbers):
        raise DataError(f"its vocabulary has ids that are no whole numbers from 0 to {MOST - 1}")
    return dict(description)


def _told(error: Exception) -> str:
    """What is wrong with the file, rather than with the code that reads it."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return f"no JSON: {error}" if isinstance(error, ValueError) else "a part of it is of another kind"


def _flat(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for child in part[inner]:
            yield from _flat(child, inner)
    else:
        yield part


def _reaching(token: dict[str, Any]) -> bool:
    return any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))


def _table(
    description: dict[str, Any], vocabulary: dict[str, int], added: Mapping[str, Any], special: set[str]
) -> list[bytes]:
    """The bytes of each id, none for special tokens."""
    letters, fallback = alphabet(), description["model"].get("byte_fallback")
    table = [b""] * (1 + max(vocabulary.values()))
    for name, number in vocabulary.items():
        if name in special:
            continue
        if fallback and name in BYTE_NAMES:
            table[number] = bytes([BYTE_NAMES[name]])
        elif name in added or fallback:
            table[number] = utf8(name)
        elif all(letter in letters for letter in name):
            table[number] = bytes([letters[letter] for letter in name])
        else:
            raise DataError(f"the token {name!r} is not spelled in bytes; {ONLY}")
    return table


def _settings(folder: Path) -> dict[str, Any]:
    """The settings beside a tokenizer; those of the first file that has one count."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        try:
            values = files.read_json(folder / name)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise DataError(f"{folder / name} is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise DataError(f"{folder / name} holds {json_kind(values)}, not an object of settings")
        found = {**values, **{key: value for key, value in found.items() if value is not None}}
    if (template := folder / TEMPLATE).is_file():
        try:
            found["chat_template"] = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{template} is no UTF-8 text ({error})") from error
    return found


def _named(settings: Mapping[str, Any], *roles: str) -> str | None:
    """The token of the first of these roles that has one; a token may be its name or an object with it."""
    values = [settings.get(role) for role in roles]
    names = [value.get("content") if isinstance(value, Mapping) else value for value in values]
    return next((name for name in names if isinstance(name, str) and name), None)
