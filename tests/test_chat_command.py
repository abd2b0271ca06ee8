"""Chats with a model: the prompt is Hugging Face's, nothing typed is a special token, the terminal ends with Ctrl-D."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import TEXT
from training_runs import command, one_line

from functional_lm import folder, keys
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import chat
from functional_lm.text import tokenizer as tokenizers
from functional_lm.text.chat import Turn
from functional_lm.text.interface import Tokenizer

CONFIG = ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_len=64)
CONVERSATIONS = st.tuples(st.booleans(), st.lists(TEXT, min_size=1, max_size=6)).map(
    lambda pair: [Turn("system", "S"), *_alternating(pair[1])] if pair[0] else _alternating(pair[1])
)


def _alternating(texts: list[str]) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizers.train([f"{chat.__doc__}" * 4], request.param, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    made = tokenizers.train([f"{chat.__doc__}" * 4], "bpe", 300)
    folder.save(path, transformer.init(CONFIG, keys.key(0)), CONFIG, made)
    return path


def test_a_prompt_is_what_hugging_faces_template_makes(made: Tokenizer, tmp_path: Path) -> None:
    """For texts that spell no special token: those Hugging Face's tools would read as one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @given(turns=CONVERSATIONS, asked=st.booleans())
    @settings(max_examples=40)
    def same(turns: list[Turn], asked: bool) -> None:
        turns = [Turn(role, text.replace("<|", "<")) for role, text in turns]
        rows = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(rows, tokenize=True, add_generation_prompt=asked, return_dict=False)
        ours = chat.prompt(made, turns)
        assert ids == (ours if asked else ours[:-1])

    same()
    with pytest.raises(Exception, match="a role is system, user or assistant, not tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


@given(turns=CONVERSATIONS)
def test_what_is_typed_is_never_a_special_token(made: Tokenizer, turns: list[Turn]) -> None:
    special = [token for token in chat.prompt(made, turns) if token in made.special_ids.values()]
    names = [chat.MARKERS[role] for role, _ in turns]
    expected = ["<|endoftext|>", *(part for name in names for part in (name, "<|end|>")), "<|assistant|>"]
    assert [made.special_ids[name] for name in expected] == special


@given(turns=CONVERSATIONS, room=st.integers(1, 120))
def test_the_latest_turns_that_fit_are_kept(made: Tokenizer, turns: list[Turn], room: int) -> None:
    turns = turns if turns[-1].role == "user" else turns[:-1]
    first = int(turns[0].role == "system")
    shortest = [*turns[:first], turns[-1]]
    if len(chat.prompt(made, shortest)) > room:
        with pytest.raises(ValueError, match=f"longer than {room} tokens"):
            chat.latest(made, turns, room)
        return
    kept = chat.latest(made, turns, room)
    dropped = len(turns) - len(kept)
    assert dropped % 2 == 0
    assert kept == [*turns[:first], *turns[first + dropped :]]
    assert len(chat.prompt(made, kept)) <= room
    longer = [*turns[:first], *turns[first + dropped - 2 :]]
    assert not dropped or len(chat.prompt(made, longer)) > room


def talk(monkeypatch: pytest.MonkeyPatch, model: Path, said: str, **flags: Any) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    fixed = {"model": model, "compile": "false", "dtype": "float32", "device": "cpu", "max_tokens": 6}
    return command("chat", **{**fixed, **flags})


def test_answers_follow_turns_until_the_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params, config, made = folder.load(model)
    assert talk(monkeypatch, model, "Hi\n\n<|end|>\n", temperature=0, system="S") == 0
    found = capsys.readouterr().out
    turns, expected = [Turn("system", "S")], ""
    for text in ("Hi", "<|end|>"):
        turns.append(Turn("user", text))
        ids = chat.prompt(made, turns)
        answer = _continued(params, config, made, ids)
        turns.append(Turn("assistant", answer))
        expected += f"{answer}\n"
    assert found == expected + "\n"


def _continued(params: Any, config: ModelConfig, made: Tokenizer, ids: list[int]) -> str:
    from functional_lm.inference import generate, text

    how = generate.GenerateOptions(6, 0.0, stop_ids=chat.stops(made))
    return "".join(text.stream(params, generate.decoder(config, compile=False), made, ids, how))


def test_a_conversation_may_outgrow_the_context(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "one two three\n" * 6 + "x" * 200 + "\nHi\n"
    assert talk(monkeypatch, model, said) == 0
    notes = capsys.readouterr().err
    assert "its beginning is forgotten" in notes
    assert "the last turn is longer than 58 tokens" in notes


def test_a_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert talk(monkeypatch, tmp_path / "none", "Hi\n") == 1
    assert "no model folder at" in one_line(capsys)
