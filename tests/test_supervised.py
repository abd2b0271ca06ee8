"""Fine-tuning data: targets are exactly the assistant's tokens, no answer loses its end, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm.errors import DataError
from functional_lm.text import chat, conversations, corpus, document, supervised
from functional_lm.text.chat import Turn
from functional_lm.text.conversations import Conversation
from functional_lm.text.dataset import IGNORED
from functional_lm.text.simple import ByteTokenizer

BYTES = ByteTokenizer()
WORDS = st.text(max_size=6) | st.sampled_from([*chat.MARKERS.values(), "<|end|>", "<|endoftext|>"])
SAID = WORDS.map(lambda text: text.encode("utf-8", "replace").decode())


@st.composite
def chats(draw: st.DrawFn) -> Conversation:
    turns = [Turn("system", draw(SAID))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [Turn("user", draw(SAID)), Turn("assistant", draw(SAID.filter(str.strip)))]
    return Conversation((*turns, Turn("user", "and?")) if draw(st.booleans()) else tuple(turns), "here")


def learned(ids: np.ndarray[Any, Any]) -> list[int]:
    """What the assistant writes, found by the markers alone."""
    said, inside = [], False
    for token in ids.tolist():
        if inside:
            said.append(token)
            inside = token != BYTES.special_ids["<|end|>"]
        inside = inside or token == BYTES.special_ids["<|assistant|>"]
    return said


@given(found=st.lists(chats(), min_size=1, max_size=6), block=st.integers(8, 90), packing=st.booleans())
@settings(max_examples=80)
def test_targets_are_exactly_the_assistants_tokens(found: list[Conversation], block: int, packing: bool) -> None:
    try:
        made = supervised.samples(BYTES, found, block)
    except DataError as error:
        assert "fits into a row" in str(error)  # noqa: PT017
        return
    rows = supervised.pack(made, block, packing)
    assert sorted(i for members in rows.members for i in members) == list(range(len(made)))
    assert packing or len(rows) == len(made)
    batch = next(supervised.windows(rows, len(rows)))
    assert batch["tokens"].shape == (len(rows), block)
    count = 0
    for tokens, targets, documents in zip(*(batch[name] for name in ("tokens", "targets", "documents"))):
        for number in set(documents.tolist()) - {0}:
            own, due = tokens[documents == number], targets[documents == number]
            whole = np.append(own, due[-1])
            assert own[0] == BYTES.bos_id
            assert due[-1] == BYTES.special_ids["<|end|>"]
            assert due[due != IGNORED].tolist() == learned(whole)
            assert all(target in (IGNORED, following) for target, following in zip(due, whole[1:]))
            count += int((due != IGNORED).sum())
        assert (targets[documents == 0] == IGNORED).all()
    assert count == made.targets
    answers = [turn.content for one in found for turn in one.turns if turn.role == "assistant"]
    said = sum(len(BYTES.encode(text)) + 1 for text in answers)
    assert count <= said
    assert (count == said) == (made.left_out == 0)


@given(found=st.lists(chats(), min_size=1, max_size=4))
def test_a_sample_is_the_chat_as_a_document(found: list[Conversation]) -> None:
    made = supervised.samples(BYTES, found, 400)
    assert (made.split, made.left_out, len(made)) == (0, 0, len(found))
    for number, one in enumerate(found):
        turns = one.turns[:-1] if one.turns[-1].role == "user" else one.turns
        ids, _ = document.encode(BYTES, [list(chat.document(turns))])
        own = made.tokens[made.offsets[number] : made.offsets[number + 1]]
        assert own.tolist() == [BYTES.bos_id, *ids.tolist()]


@given(count=st.integers(1, 9), size=st.integers(1, 5), seed=st.integers(0, 99), first=st.integers(0, 20))
@settings(max_examples=30)
def test_an_epoch_takes_each_row_once(count: int, size: int, seed: int, first: int) -> None:
    order = np.concatenate([supervised.drawn(count, step, size, seed) for step in range(4 * count)])
    epochs = order[: 4 * count].reshape(4, count)
    assert (np.sort(epochs) == np.arange(count)).all()
    assert (supervised.drawn(count, first, size, seed) == supervised.drawn(count, first, size, seed)).all()


def test_a_long_conversation_is_split_between_exchanges_and_counted() -> None:
    turns = [Turn("system", "S")]
    for i in range(4):
        turns += [Turn("user", f"q{i}"), Turn("assistant", "a" * (60 if i == 2 else 3))]
    made = supervised.samples(BYTES, [Conversation(tuple(turns), "here")], 28)
    assert (made.split, made.left_out, len(made)) == (1, 1, 2)
    texts = [BYTES.decode(made.tokens[a:b]) for a, b in zip(made.offsets, made.offsets[1:])]
    assert texts == ["Sq0aaaq1aaa", "Sq3aaa"]
    with pytest.raises(DataError, match="none of the 4 exchanges fits into a row of 5 tokens"):
        supervised.samples(BYTES, [Conversation(tuple(turns), "here")], 5)


@given(count=st.integers(1, 30), fraction=st.floats(0, 0.9), seed=st.integers(0, 9))
def test_a_split_loses_nothing_and_trains_on_something(count: int, fraction: float, seed: int) -> None:
    found = [Conversation((Turn("user", str(i)), Turn("assistant", "x")), "here") for i in range(count)]
    train, validation = supervised.split(found, fraction, seed)
    assert train
    assert sorted(one.turns[0].content for one in train + validation) == sorted(str(i) for i in range(count))


# Files ----------------------------------------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PLAIN = (Turn("user", "Hi"), Turn("assistant", "Hello"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "response": "Hello"},
        {"messages": [USER, BOT]},
        {"conversation": [USER, BOT], "model": "x"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "1"},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_every_form_gives_the_same_turns(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"chat{suffix}"
    path.write_text(json.dumps([row, row]) if suffix == ".json" else f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    found = conversations.read(corpus.find(str(path)))
    assert [one.turns for one in found] == [PLAIN, PLAIN]
    assert found[1].where == f"{path}, {'row 2' if suffix == '.json' else 'line 3'}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [BOT, USER]}, "line 2: turn 1 is the assistant's where the user's was due"),
        ({"messages": [USER, USER, BOT]}, "line 2: turn 2 is the user's where the assistant's was due"),
        (
            {"messages": [USER, BOT, {"role": "system", "content": "x"}]},
            "line 2: turn 3 is the system's where the user's",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "line 2: turn 2, the assistant's, is empty"),
        ({"prompt": "x", "response": ""}, "line 2: turn 2, the assistant's, is empty"),
        ({"prompt": "x", "response": " \n"}, "line 2: turn 2, the assistant's, is empty"),
        ({"prompt": "x", "response": "\ud800"}, "line 2: turn 2: character 0 (U+D800) is half of a surrogate pair"),
        ({"messages": [USER]}, "line 2: the assistant says nothing"),
        ({"messages": []}, "line 2: the assistant says nothing"),
        ({"messages": "x"}, "line 2: field 'messages' is no conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"prompt": 3, "response": "x"}, "'prompt' is a number, not text"),
        ({"text": "x"}, "line 2: no field 'prompt' with 'response' or field 'messages'"),
        ([1], "line 2: a JSON object was expected, not a list"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [USER, BOT]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        conversations.read(corpus.find(str(path)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_text_holds_no_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("Hi")
    with pytest.raises(DataError, match=r"rows are read from \.jsonl"):
        conversations.read(corpus.find(str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "are the same; nothing is preferred"),
        ({"prompt": "x", "chosen": "a", "rejected": ""}, "turn 2, the assistant's, is empty"),
        ({"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, "turn 3 is the assistant's where the user's was due"),
        ({"prompt": "x", "chosen": [BOT, USER], "rejected": "b"}, "each answer is one turn"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a number, not text"),
    ],
)
def test_a_bad_preference_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 1: ") as caught:
        conversations.read_preferences(corpus.find(str(path)))
    assert message in str(caught.value)


def test_preferences_are_texts_or_turns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": [USER], "chosen": [BOT], "rejected": "No"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for chosen, rejected in conversations.read_preferences(corpus.find(str(path))):
        assert chosen.turns == PLAIN
        assert rejected.turns == (PLAIN[0], Turn("assistant", "No"))


def test_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [USER, BOT]}))
    with pytest.raises(DataError, match=r"has the weight 0\.5; conversations are each learned once an epoch"):
        conversations.read(corpus.find(f"{path}=0.5"))
