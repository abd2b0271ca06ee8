"""Chats and documents: markers are tokens that no content can spell, and a digest names what a document says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_lm.errors import DataError
from functional_lm.text import chat, document, tokenizer
from functional_lm.text.chat import Turn
from functional_lm.text.document import Encoded, Segment, Special
from functional_lm.text.tokenizer import CHAT, Tokenizer

TEXT = st.lists(st.text(max_size=5) | st.sampled_from([*CHAT, "<|endoftext|>"]), max_size=4).map(
    lambda parts: "".join(parts).encode("utf-8", "replace").decode()
)
TURNS = st.lists(st.builds(Turn, st.sampled_from(sorted(chat.MARKERS)), TEXT), max_size=5)


@pytest.fixture(scope="module", params=list(tokenizer.TRAINERS))
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer.train([f"{chat.__doc__}"], request.param, 300)


@given(turns=TURNS)
def test_a_chat_can_be_read_back_from_its_ids(made: Tokenizer, turns: list[Turn]) -> None:
    ids, lengths = document.encode(made, [list(chat.document(turns))])
    assert lengths.tolist() == [len(ids)]
    names = {token: name for name, token in made.special_ids.items()}
    roles = {marker: role for role, marker in chat.MARKERS.items()}
    found: list[Turn] = []
    content: list[int] = []
    for token in ids.tolist():
        name = names.get(token)
        if name in roles:
            found.append(Turn(roles[name], ""))
            content = []
        elif name == "<|end|>":
            found[-1] = Turn(found[-1].role, made.decode(content))
        else:
            assert name is None
            content.append(token)
    assert found == turns


@given(turns=TURNS)
def test_the_assistant_writes_its_words_and_the_end(turns: list[Turn]) -> None:
    spoken = chat.layout(turns)
    assert tuple(part.segment for part in spoken) == chat.document(turns)
    learned = [part.segment for part in spoken if part.learned]
    said = [content for role, content in turns if role == "assistant"]
    assert [segment for segment in learned if isinstance(segment, str)] == [text for text in said if text]
    assert [segment for segment in learned if isinstance(segment, Special)] == [Special("<|end|>")] * len(said)


@pytest.mark.parametrize(("name", "role"), [*chat.ALIASES.items(), *((role, role) for role in chat.MARKERS)])
def test_roles_of_other_data_sets(name: str, role: str) -> None:
    assert chat.turns([{"from": name, "value": "x"}]) == chat.turns([{"role": name, "content": "x"}]) == [(role, "x")]


# Documents ----------------------------------------------------------------------------------------------------------

SEGMENTS = st.lists(TEXT | st.sampled_from([Special(name) for name in CHAT]), max_size=6)


@given(parts=st.lists(SEGMENTS, max_size=4))
def test_parts_are_encoded_alone_and_end_to_end(made: Tokenizer, parts: list[list[Segment]]) -> None:
    ids, lengths = document.encode(made, parts)
    expected = [
        [token for part in parts for segment in part for token in _ids(made, segment)],
        [sum(len(_ids(made, segment)) for segment in part) for part in parts],
    ]
    assert [ids.tolist(), lengths.tolist()] == expected
    assert ids.dtype == np.int32


def _ids(made: Tokenizer, segment: Segment) -> list[int]:
    assert not isinstance(segment, Encoded)
    return made.encode(segment) if isinstance(segment, str) else [made.special_ids[segment.name]]


def test_a_marker_that_a_tokenizer_lacks_is_text(made: Tokenizer) -> None:
    ids, _ = document.encode(made, [[Special("<|tool|>"), "x"]])
    assert made.decode(ids) == "<|tool|>x"


def test_ids_made_earlier_pass_if_the_tokenizer_agrees(made: Tokenizer) -> None:
    earlier = Encoded(np.array([3, 4], np.int32), made.digest, "a.bin")
    assert document.encode(made, [[earlier], []])[0].tolist() == [3, 4]
    with pytest.raises(DataError, match=r"a\.bin was made with another tokenizer \(abababababab, not"):
        document.encode(made, [[Encoded(earlier.ids, "ab" * 32, "a.bin")]])


@given(text=TEXT, cuts=st.lists(st.integers(0, 20), max_size=3))
def test_a_digest_does_not_depend_on_segments(text: str, cuts: list[int]) -> None:
    places = sorted([0, *cuts, len(text)])
    parts = tuple(text[start:end] for start, end in zip(places, [*places[1:], len(text)]))
    assert document.digest(parts) == document.digest((text,))


@given(first=TURNS, second=TURNS)
def test_chats_of_one_digest_are_equal(first: list[Turn], second: list[Turn]) -> None:
    same = document.digest(chat.document(first)) == document.digest(chat.document(second))
    assert same == (first == second)
    spelled = "".join(part if isinstance(part, str) else part.name for part in chat.document(first))
    assert document.digest((spelled,)) != document.digest(chat.document(first)) or not first
