"""Tokenizers of other programs: the same ids, and nothing lost.

`transformers` is the counterparty; without it (`pip install 'functional_lm[hf]'`) the refusals remain.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign import CONFIG, TEXT, hf, save
from hypothesis import given
from hypothesis import strategies as st

from functional_lm.errors import DataError
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.tokenizer import Tokenizer

__all__ = ["hf"]  # fixtures


HOSTILE = [
    "  ",
    "    ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "e",
    "out",
    " promise",
    "😀",
    "e\u0301",
    "\u2581",
    "\0",
    "12",
    "<0x41>",
]
HOSTILE += ["ﬁ", "中文", "\ufeff", "\u200d", "<|user", "A folder is a"]
SPACED = (TEXT + "    spaces  \n\n\tand ends 2024: said the king to the queen, aa aaa aaaa ababab\n") * 20
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(scope="session", params=["bpe", "char", "bytes"])
def opened(request: Any, hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer, and what AutoTokenizer makes of the files that it saves."""
    made = tokenizers.train([SPACED], request.param, vocab_size=320)
    path = tmp_path_factory.mktemp("tokenizer")
    save(path, ModelConfig(**{**CONFIG, "vocab_size": made.vocab_size}), made)
    return made, hf.AutoTokenizer.from_pretrained(path)


@given(text=TEXTS)
def test_ids_are_the_same_there(opened: tuple[Tokenizer, Any], text: str) -> None:
    made, there = opened
    if any(name in text for name in made.special_ids):
        return  # theirs finds special tokens in a text
    ids = made.encode(text)
    assert there(text)["input_ids"] == ids
    assert there.decode(ids, skip_special_tokens=True) == text


@given(text=TEXTS)
def test_what_they_save_again_is_the_same_here(
    opened: tuple[Tokenizer, Any], saved_again: Tokenizer, text: str
) -> None:
    made, _ = opened
    assert saved_again.encode(text) == made.encode(text)
    assert saved_again.decode(made.encode(text)) == text
    assert dict(saved_again.special_ids) == dict(made.special_ids)


@pytest.fixture(scope="session")
def saved_again(opened: tuple[Tokenizer, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our vocabulary in the files that transformers writes, which has no SentencePiece model."""
    path = tmp_path_factory.mktemp("again")
    opened[1].save_pretrained(path)
    assert not (path / "tokenizer.model").exists()
    return tokenizers.load(path)


def test_special_tokens_are_the_same_there(opened: tuple[Tokenizer, Any]) -> None:
    made, there = opened
    assert (there.bos_token_id, there.eos_token_id) == (made.bos_id, made.eos_id)
    assert {name: there.convert_tokens_to_ids(name) for name in made.special_ids} == dict(made.special_ids)
    assert len(there) == made.vocab_size


@given(text=TEXTS)
def test_unigram_ids_are_as_likely_there(hf: Any, unigram: tuple[Tokenizer, Any], text: str) -> None:
    made, there = unigram
    if not any(name in text for name in made.special_ids):
        ids = there(text)["input_ids"]
        assert there.decode(ids, skip_special_tokens=True) == text
        assert "<0x" in text or sorted(ids) == sorted(made.encode(text))


@pytest.fixture(scope="session")
def unigram(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    made = tokenizers.train([SPACED], "unigram", vocab_size=300)
    path = tmp_path_factory.mktemp("tokenizer")
    save(path, ModelConfig(**{**CONFIG, "vocab_size": made.vocab_size}), made)
    return made, hf.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session", params=["gpt2", "llama-3"])
def byte_level(request: Any, hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A byte-level BPE of theirs: here, and there."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Theirs

    made = Theirs(models.BPE())
    if request.param == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
        parts = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        made.pre_tokenizer, made.normalizer = pre_tokenizers.Sequence(parts), normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT * 20], trainer)
    made.add_special_tokens(["<|begin|>", "<|end_of_text|>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    made.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 400)])
    assert made.token_to_id("<|begin|>") <= 400
    path = tmp_path_factory.mktemp("byte-level")
    there = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end_of_text|>")
    there.chat_template = "{{ messages }}"
    there.save_pretrained(path)
    return tokenizers.load(path), there


@given(texts=st.lists(TEXTS.map(lambda text: text.replace("e\u0301", "é")), min_size=1, max_size=3))
def test_byte_level_ids_are_theirs_and_lose_nothing(byte_level: tuple[Tokenizer, Any], texts: list[str]) -> None:
    import unicodedata

    here, there = byte_level
    for text, ids in zip(texts, here.encode_batch(texts), strict=True):
        assert here.encode(text) == ids.tolist()
        assert here.decode(ids) == text
        assert here.byte_lengths[ids].sum() == len(text.encode())
        if text == unicodedata.normalize("NFC", text):
            assert there(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_a_byte_level_tokenizer_keeps_the_interface(byte_level: tuple[Tokenizer, Any], hf: Any, tmp_path: Path) -> None:
    here, there = byte_level
    assert isinstance(here, Tokenizer)
    assert (here.bos_id, here.eos_id) == (there.bos_token_id, there.eos_token_id)
    assert dict(here.special_ids) == {"<|begin|>": here.bos_id, "<|end_of_text|>": here.eos_id}
    assert here.vocab_size == len(there)
    assert here.decode(list(here.special_ids.values())) == ""
    spelled = here.encode("<|begin|>e\u0301<tool>")
    assert here.bos_id not in spelled
    assert here.decode(spelled) == "<|begin|>e\u0301<tool>"
    with pytest.raises(DataError, match="surrogate"):
        here.encode("\ud800")
    with pytest.raises(DataError, match="outside the vocabulary"):
        here.decode([here.vocab_size])
    copied = pickle.loads(pickle.dumps(here))
    here.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    again = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == there.chat_template
    for other in (copied, loaded):
        assert other.digest == here.digest
        assert other.encode(TEXT) == here.encode(TEXT) == again(TEXT, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in here.encode_batch([TEXT, ""], threads=2)] == [here.encode(TEXT), []]


BYTE_LEVEL_REFUSED: dict[str, Callable[[Any], Any]] = {
    "only BPE that is byte-level": lambda made: made["pre_tokenizer"].update(type="Whitespace"),
    "a WordPiece cut by": lambda made: made["model"].update(type="WordPiece"),
    "adds a space": lambda made: made["pre_tokenizer"].update(add_prefix_space=True),
    "its normalizer is Lowercase": lambda made: made.update(normalizer={"type": "Lowercase"}),
    "its model has end_of_word_suffix '</w>'": lambda made: made["model"].update(end_of_word_suffix="</w>"),
    "lacks 1 of the 256 bytes": lambda made: made["model"]["vocab"].pop("!"),
    "ids that are no whole numbers": lambda made: made["model"]["vocab"].update({"!": 1 << 40}),
    "is not spelled in bytes": lambda made: made["model"]["vocab"].update({"a b": 300}),
    "takes text around it away": lambda made: made["added_tokens"].append(
        {"content": "<x>", "id": 301, "special": False, "lstrip": True}
    ),
    "not a tokenizer.json": lambda made: made.pop("model"),
}


def byte_level_json() -> dict[str, Any]:
    from functional_lm.text.byte_pairs import alphabet

    special = {"id": 256, "content": "<end>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        "version": "1.0",
        "added_tokens": [{**special, "normalized": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(alphabet())}, "merges": []},
    }


@pytest.mark.parametrize("message", BYTE_LEVEL_REFUSED)
def test_other_tokenizers_are_refused(message: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'functional_lm[hf]')")
    path = tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    made = byte_level_json()
    path.write_text(json.dumps(made))
    assert tokenizers.load(tmp_path).bos_id == 256
    BYTE_LEVEL_REFUSED[message](made)
    path.write_text(json.dumps(made))
    with pytest.raises(DataError, match=message) as caught:
        tokenizers.load(tmp_path)
    assert str(path) in str(caught.value)
    path.write_text(json.dumps(byte_level_json()))
    for beside, reason in (("{}", "no bos_token and no eos_token"), ('{"eos_token": "it"}', "'it' .* not in the voc")):
        (tmp_path / "tokenizer_config.json").write_text(beside)
        with pytest.raises(DataError, match=reason):
            tokenizers.load(tmp_path)


def test_a_space_that_a_model_puts_before_a_text_is_kept(hf: Any, tmp_path: Path) -> None:
    """Llama 2's SentencePiece models: the ids are those of transformers."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    here = tokenizers.load(tmp_path)
    save(tmp_path / "model", ModelConfig(**{**CONFIG, "vocab_size": 300}), here)
    there = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("A folder", " is", "two\nlines\n", "", "é 😀\t", "promise  what"):
        ids = here.encode(text)
        assert ids == plain.encode(text) == there(text)["input_ids"], text
        assert here.decode(ids) == (" " + text if text else "")
        assert there.decode(ids, skip_special_tokens=True) == text
    assert tokenizers.load(tmp_path / "model").digest == pickle.loads(pickle.dumps(here)).digest == here.digest
