"""Tokenizers lose nothing: any text comes back, in one piece or streamed, and no text spells a special token."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from functional_lm.errors import DataError, UsageError
from functional_lm.text import corpus, simple, subword, tokenizer
from functional_lm.text.simple import WordCharTokenizer
from functional_lm.text.tokenizer import CHAT, DELIMITER, SentencePieceTokenizer, Tokenizer

CODE = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (corpus, subword, np.ma.core)]
HOSTILE = (
    *("\0", "\r\n", "\n", "\n\n", "\t", " ", "    ", "\u2581", "\u2585", "\u2047", "\ufeff", "\u2028", "\x85"),
    *("e\u0301", "\ufb01", "\U0001f600", "\U0010ffff", "\ufffd", "日本語", "1234", "<0x41>", "<s>", "<unk>"),
    *(DELIMITER, *CHAT, "def f(x):\n", "return"),
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TEXT = st.lists(PLAIN | st.sampled_from(HOSTILE), max_size=12).map("".join)


@pytest.fixture(scope="module", params=list(tokenizer.TRAINERS))
def made(request: pytest.FixtureRequest) -> Tokenizer:
    """One of every kind."""
    return tokenizer.train(CODE, request.param, vocab_size=600)


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def pieces_of(request: pytest.FixtureRequest) -> Tokenizer:
    """One of every kind that is a SentencePiece model."""
    return tokenizer.train(CODE, request.param, vocab_size=600)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train(CODE, vocab_size=600)


# Encoding and decoding --------------------------------------------------------------------------------------------


@given(text=TEXT)
@example(text="".join(HOSTILE))
@example(text="\n".join(HOSTILE))
@example(text="x" * 140_000 + "\u2581\n" + " " * 70_000)
def test_any_text_comes_back(made: Tokenizer, text: str) -> None:
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert made.decode_bytes(ids) == text.encode()
    assert made.byte_lengths[ids].sum() == len(text.encode())


@given(text=TEXT)
def test_no_text_spells_a_special_token(made: Tokenizer, text: str) -> None:
    assert not set(made.encode(text)) & set(made.special_ids.values())


@given(texts=st.lists(TEXT, max_size=6), threads=st.integers(1, 3))
def test_company_and_threads_change_nothing(made: Tokenizer, texts: list[str], threads: int) -> None:
    together = made.encode_batch(texts, threads)
    assert [ids.tolist() for ids in together] == [made.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in together)


@given(before=TEXT, after=TEXT)
def test_lines_are_encoded_alone(made: Tokenizer, before: str, after: str) -> None:
    assert made.encode(before + "\n" + after) == made.encode(before + "\n") + made.encode(after)


@given(text=TEXT.map(lambda text: text.replace("\u2581", "")))
def test_ids_are_those_of_the_whole_text(
    pieces_of: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / pieces_of.digest
    if not folder.exists():
        pieces_of.save(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert pieces_of.encode(text) == reference.encode(text)


@given(ids=st.lists(st.integers(0, 599) | st.integers(6, 261)))
def test_streaming_is_decoding(made: Tokenizer, ids: list[int]) -> None:
    ids = [token % made.vocab_size for token in ids]
    parts = list(tokenizer.stream(made, ids))
    assert "".join(parts) == made.decode(ids)
    assert len(parts) in (len(ids), len(ids) + 1)


@given(text=TEXT)
def test_a_stream_holds_back_incomplete_characters(made: Tokenizer, text: str) -> None:
    sent = ""
    for part in tokenizer.stream(made, made.encode(text)):
        sent += part
        assert text.startswith(sent)
    assert sent == text


def test_the_special_tokens(made: Tokenizer) -> None:
    names = ["<unk>", DELIMITER, *CHAT]
    if isinstance(made, WordCharTokenizer):
        names = [DELIMITER, "<|pad|>", "<|unk|>", *CHAT]
    assert list(made.special_ids.items()) == [(name, i) for i, name in enumerate(names)]
    assert made.bos_id == made.eos_id == made.special_ids[DELIMITER]
    assert made.unk_id == next(i for i, name in enumerate(names) if "unk" in name)
    assert made.decode(list(made.special_ids.values())) == ""
    assert not made.byte_lengths[: len(names)].any()
    assert made.byte_lengths.shape == (made.vocab_size,)
    assert made.byte_lengths[len(names) :].all()
    assert isinstance(made, Tokenizer)


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused(made: Tokenizer, text: str) -> None:
    for attempt in (made.encode, lambda text: made.encode_batch(["a", text]), lambda text: tokenizer.train([text])):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            attempt(text)


@pytest.mark.parametrize("ids", [[-100], [600], [5, -1, 7]])
def test_ids_outside_the_vocabulary_are_refused(made: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        made.decode(ids)


def test_a_tokenizer_in_another_process_is_the_same(made: Tokenizer) -> None:
    other = pickle.loads(pickle.dumps(made))
    assert other.digest == made.digest
    for text in HOSTILE:
        assert other.encode(text) == made.encode(text)


# Training ---------------------------------------------------------------------------------------------------------


def pieces(trained: Tokenizer) -> set[str]:
    return {trained.decode([i]) for i in range(262, trained.vocab_size)}


@pytest.mark.parametrize("kind", tokenizer.TRAINERS)
def test_training_twice_gives_the_same_bytes(kind: str) -> None:
    first = tokenizer.train([CODE[0]], kind, 400)
    assert tokenizer.train(iter([CODE[0]]), kind, 400).digest == first.digest
    other = tokenizer.train([CODE[0] + "\n# ж"], kind, 400)
    assert (other.digest != first.digest) == (kind != "bytes")


@pytest.mark.parametrize("kind", ["char", "wordchar"])
def test_a_small_vocabulary_keeps_the_frequent_characters(kind: str) -> None:
    text = "".join(chr(0x400 + i) * (200 - i) for i in range(200))
    fixed = 262 if kind == "char" else 263  # the latter has <|pad|> too
    trained = tokenizer.train([text], kind, fixed + 40)
    alphabet = 40 if kind == "char" else 30  # a quarter is left for words
    kept = [trained.decode([i]) for i in range(fixed, fixed + alphabet)]
    if kind == "char":
        kept.remove(" ")  # always there
    assert set(kept) == {chr(0x400 + i) for i in range(len(kept))}
    assert trained.vocab_size <= fixed + 40
    assert trained.decode(trained.encode(text + "new")) == text + "new"
    with pytest.raises(UsageError, match=rf"vocab_size 8 .* give {fixed + 1} or more"):
        tokenizer.train([text], kind, 8)
    with pytest.raises(DataError, match="no text"):
        tokenizer.train([], kind)


def test_char_has_the_characters_of_the_text_and_no_more() -> None:
    text = "To be, or not to be\n" * 5
    trained = tokenizer.train([text], "char")
    assert trained.vocab_size == 262 + len(set(text))
    assert len(trained.encode(text)) == len(text)
    assert {trained.decode([i]) for i in range(262, trained.vocab_size)} == set(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "wordchar"])
def test_a_text_without_a_space_trains_a_lossless_tokenizer(kind: str) -> None:
    trained = tokenizer.train(["abcabcabc"], kind, 267)
    assert trained.decode(trained.encode("a  b c")) == "a  b c"


def test_words_are_learned_with_their_space_and_case() -> None:
    trained = tokenizer.train(["The cat saw the cat.\n    the end\r\n" * 5], "wordchar", 300)
    ids = trained.encode("The cat saw the dog.\n    the end\r\n")
    tokens = ["The", " cat", " saw", " the", " ", "d", "o", "g", ".", "\n", "   ", " the", " end", "\r\n"]
    assert [trained.decode([token]) for token in ids] == tokens  # o and g are bytes: the text had none
    assert tokenizer.train(["ab ab"], "wordchar").vocab_size == 263 + 3  # no unit occurs twice


def test_many_rare_words_are_spelled_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple, "REMEMBERED", 3)
    trained = tokenizer.train(["ab"], "wordchar", 300)
    text = " ".join(f"{i}a" * i for i in range(40)) + " ab" * 9 + "日本"
    assert trained.decode(trained.encode(text)) == text


def test_line_ends_and_indentation_are_learned(bpe: Tokenizer) -> None:
    assert {"    ", "        ", ")\n", ":\n"} <= pieces(bpe)


def test_windows_line_ends_and_tabs_are_learned() -> None:
    trained = tokenizer.train(["\t\tx;\r\n\r\n" * 20], vocab_size=270)
    assert {"\r\n", "\t\t"} <= pieces(trained)


def test_long_lines_are_learned() -> None:
    line = " ".join(f"verylongword{i % 7}" for i in range(4000))
    assert {"verylongword", " verylongword"} & pieces(tokenizer.train([line], vocab_size=300))


def test_reserved_characters_do_not_hide_their_line() -> None:
    assert "hello" in pieces(tokenizer.train(["hello\u2585hello\u2581hello\n"] * 9, vocab_size=272))


def test_a_vocabulary_that_does_not_fit_names_one_that_does() -> None:
    for wrong in (-1, 0, 50, 30_000, 10**12):
        with pytest.raises(UsageError, match=rf"vocab_size {wrong} .* give \d+ or") as caught:
            tokenizer.train(CODE[:1], vocab_size=wrong)
        number = re.search(r"give (\d+) or", str(caught.value))
        assert number
        assert tokenizer.train(CODE[:1], vocab_size=int(number[1])).vocab_size == int(number[1])


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(
        UsageError, match="unknown tokenizer type 'magic'; there are bpe, unigram, char, bytes, wordchar"
    ):
        tokenizer.train(CODE, kind="magic")
    with pytest.raises(DataError, match="no text"):
        tokenizer.train([])
    with pytest.raises(UsageError, match="sample"):
        tokenizer.train(CODE, sample_bytes=0)


@given(documents=st.lists(st.integers(0, 60_000), max_size=8), limit=st.integers(20_000, 400_000))
def test_a_sample_is_even_bounded_and_in_order(documents: list[int], limit: int) -> None:
    lines = io.StringIO("".join(f"{i:>39}\n" for i in range(sum(documents) // 40 + 1)))
    corpus_ = [lines.read(length) for length in documents]
    kept = tokenizer.sample(iter(corpus_), limit)
    total, held = sum(documents), sum(map(len, kept))
    assert held <= limit
    assert held == total if total <= limit else held >= limit / 2 - tokenizer.PASSAGE * 5
    everything, place = "".join(corpus_), 0
    for passage in kept:
        place = everything.index(passage, place) + len(passage)
    if total > limit:  # neither end is left out
        assert everything.startswith(kept[0])
        assert place > total - total / len(kept) * 2 - 5 * tokenizer.PASSAGE


# Files ------------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_the_same(made: Tokenizer, tmp_path: Path) -> None:
    made.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    translated = {"tokenizer.json", "tokenizer_config.json"}  # for Hugging Face's tools, which know no words
    (model,) = names - translated
    assert names - {model} == (set() if model == "tokenizer.wordchar.json" else translated)
    renamed = shutil.copy(tmp_path / model, tmp_path / model.replace("tokenizer", "other"))
    for path in (renamed, tmp_path / model, tmp_path):
        loaded = tokenizer.load(path)
        assert type(loaded) is type(made)
        assert loaded.digest == made.digest
        assert loaded.encode("".join(HOSTILE)) == made.encode("".join(HOSTILE))


def test_a_folder_has_one_tokenizer(made: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    for saved in (bpe, made, bpe):
        saved.save(tmp_path)
        assert tokenizer.load(tmp_path).digest == saved.digest
    (tmp_path / "tokenizer.bytes.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"several tokenizers, tokenizer\.model and tokenizer\.bytes\.json"):
        tokenizer.load(tmp_path)


def test_the_settings_that_hugging_face_needs(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["bos_token"] == settings["eos_token"] == DELIMITER
    assert settings["unk_token"] == "<unk>"
    assert settings["additional_special_tokens"] == list(CHAT)
    for flag in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        assert settings[flag] is False


def test_what_is_no_tokenizer_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tokenizer.load(tmp_path / "missing.model")
    with pytest.raises(DataError, match=r"it has no tokenizer\.model"):
        tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for damaged in (b"", b"junk" * 50, whole[:100], whole[:-3]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenizer\.model: not a SentencePiece model"):
            tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.bytes.json", "tokenizer.wordchar.json"])
@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 2, "type": "bytes"}', '{"format": 1, "type": "bytes"}', "[" * 10**5),
        '{"format": 1, "type": "wordchar"}',
        '{"format": 1, "type": "wordchar", "characters": ["a"], "units": [3]}',
        '{"format": 1, "type": "wordchar", "characters": ["a", "a"], "units": []}',
        '{"format": 1, "type": "wordchar", "characters": ["ab"], "units": []}',
        '{"format": 1, "type": "wordchar", "characters": ["a"], "units": ["b", ""]}',
        r'{"format": 1, "type": "wordchar", "characters": ["\ud800"], "units": []}',
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(name)):
        tokenizer.load(tmp_path)


def test_a_model_that_changes_text_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE[0].splitlines()), model_writer=model, vocab_size=120, minloglevel=2
    )
    with pytest.raises(DataError, match="changes text"):
        SentencePieceTokenizer(model.getvalue())
