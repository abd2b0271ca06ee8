"""Tokenizers lose nothing: any text comes back, in one piece or streamed, and no text spells a special token."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from functional_lm.errors import DataError, UsageError
from functional_lm.text import corpus, tokenizer
from functional_lm.text.tokenizer import CHAT, DELIMITER, SentencePieceTokenizer, Tokenizer

CODE = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (corpus, tokenizer, np.ma.core)]
HOSTILE = (
    *("\0", "\r\n", "\n", "\n\n", "\t", " ", "    ", "\u2581", "\u2585", "\u2047", "\ufeff", "\u2028", "\x85"),
    *("e\u0301", "\ufb01", "\U0001f600", "\U0010ffff", "\ufffd", "日本語", "1234", "<0x41>", "<s>", "<unk>"),
    *(DELIMITER, *CHAT, "def f(x):\n", "return"),
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TEXT = st.lists(PLAIN | st.sampled_from(HOSTILE), max_size=12).map("".join)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train(CODE, vocab_size=600)


# Encoding and decoding --------------------------------------------------------------------------------------------


@given(text=TEXT)
@example(text="".join(HOSTILE))
@example(text="\n".join(HOSTILE))
@example(text="x" * 140_000 + "\u2581\n" + " " * 70_000)
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(ids) == text.encode()
    assert bpe.byte_lengths[ids].sum() == len(text.encode())


@given(text=TEXT)
def test_no_text_spells_a_special_token(bpe: Tokenizer, text: str) -> None:
    assert not set(bpe.encode(text)) & set(bpe.special_ids.values())


@given(texts=st.lists(TEXT, max_size=6), threads=st.integers(1, 3))
def test_company_and_threads_change_nothing(bpe: Tokenizer, texts: list[str], threads: int) -> None:
    together = bpe.encode_batch(texts, threads)
    assert [ids.tolist() for ids in together] == [bpe.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in together)


@given(before=TEXT, after=TEXT)
def test_lines_are_encoded_alone(bpe: Tokenizer, before: str, after: str) -> None:
    assert bpe.encode(before + "\n" + after) == bpe.encode(before + "\n") + bpe.encode(after)


@given(text=TEXT.map(lambda text: text.replace("\u2581", "")))
def test_ids_are_those_of_the_whole_text(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "whole"
    if not folder.exists():
        bpe.save(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert bpe.encode(text) == reference.encode(text)


@given(ids=st.lists(st.integers(0, 599) | st.integers(6, 261)))
def test_streaming_is_decoding(bpe: Tokenizer, ids: list[int]) -> None:
    parts = list(tokenizer.stream(bpe, ids))
    assert "".join(parts) == bpe.decode(ids)
    assert len(parts) in (len(ids), len(ids) + 1)


@given(text=TEXT)
def test_a_stream_holds_back_incomplete_characters(bpe: Tokenizer, text: str) -> None:
    sent = ""
    for part in tokenizer.stream(bpe, bpe.encode(text)):
        sent += part
        assert text.startswith(sent)
    assert sent == text


def test_the_special_tokens(bpe: Tokenizer) -> None:
    assert list(bpe.special_ids.items()) == [(name, i) for i, name in enumerate(["<unk>", DELIMITER, *CHAT])]
    assert (bpe.unk_id, bpe.bos_id, bpe.eos_id, bpe.vocab_size) == (0, 1, 1, 600)
    assert bpe.decode(list(bpe.special_ids.values())) == ""
    assert not bpe.byte_lengths[:6].any()
    assert bpe.byte_lengths.shape == (600,)
    assert bpe.byte_lengths[6:].all()


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused(bpe: Tokenizer, text: str) -> None:
    for attempt in (bpe.encode, lambda text: bpe.encode_batch(["a", text]), lambda text: tokenizer.train([text])):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            attempt(text)


@pytest.mark.parametrize("ids", [[-100], [600], [5, -1, 7]])
def test_ids_outside_the_vocabulary_are_refused(bpe: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        bpe.decode(ids)


# Training ---------------------------------------------------------------------------------------------------------


def pieces(trained: Tokenizer) -> set[str]:
    return {trained.decode([i]) for i in range(262, trained.vocab_size)}


def test_training_twice_gives_the_same_bytes(bpe: Tokenizer) -> None:
    assert tokenizer.train(iter(CODE), vocab_size=600).digest == bpe.digest
    assert tokenizer.train(CODE[:2], vocab_size=600).digest != bpe.digest


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
    with pytest.raises(UsageError, match="unknown tokenizer type 'magic'; there are bpe"):
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


def test_a_saved_tokenizer_is_the_same(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = tokenizer.load(path)
        assert loaded.digest == bpe.digest
        assert loaded.encode(CODE[0]) == bpe.encode(CODE[0])
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}


def test_the_settings_that_hugging_face_needs(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert settings["bos_token"] == settings["eos_token"] == DELIMITER
    assert settings["unk_token"] == "<unk>"
    assert settings["additional_special_tokens"] == list(CHAT)
    for flag in ("legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
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


def test_a_model_that_changes_text_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE[0].splitlines()), model_writer=model, vocab_size=120, minloglevel=2
    )
    with pytest.raises(DataError, match="changes text"):
        SentencePieceTokenizer(model.getvalue())
