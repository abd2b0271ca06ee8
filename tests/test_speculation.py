"""Guessing ahead changes how many tokens a pass gives, and no text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.inference.engine import Engine, Request
from functional_lm.inference.speculation import SIZES, History
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=23, d_model=16, n_layers=1, n_heads=2, max_len=96, positions="learned")
PARAMS = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))
GUESSES = 3


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    bank = lora.stack(PARAMS, [lora.init(PARAMS, lora.ALL_LINEAR, 2, keys.key(1))])
    made = [
        Engine(PARAMS, CONFIG, slots=3, length=length, compile=False, bank=bank, guesses=guesses).start()
        for guesses, length in ((GUESSES, 96), (0, 96 - GUESSES))
    ]
    yield made[0], made[1]
    for each in made:
        each.close()


@given(tokens=st.lists(st.integers(0, 3), max_size=40), count=st.integers(1, 5))
@settings(max_examples=200)
def test_a_guess_is_what_followed_last(tokens: list[int], count: int) -> None:
    expected = [0] * count
    for size in SIZES:
        places = [i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[len(tokens) - size :]]
        if places:
            going_on = list(tokens)
            for i in range(count):
                going_on.append(going_on[places[-1] + i])
            expected = going_on[len(tokens) :]
            break
    assert History(tokens).guess(count) == expected


TOKENS = st.integers(0, 4)
REQUESTS = st.builds(
    Request,
    prompt=st.lists(TOKENS, min_size=1, max_size=70).map(tuple),
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 2]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {1: 9.0}, {1: 9.0, 2: 9.0}]),
    seed=st.integers(0, 2**31),
    stop_ids=st.lists(TOKENS, max_size=1).map(tuple),
    logprobs=st.sampled_from([None, 1]),
    adapter=st.integers(0, 1),
)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_texts_are_those_without_it(pair: tuple[Engine, Engine], requests: list[Request]) -> None:
    with_, without = ([each.submit(request) for request in requests] for each in pair)
    for one, other in zip(with_, without):
        assert list(one) == list(other)
        assert one.finish_reason == other.finish_reason
        assert [scored.token for scored in one.scores] == [scored.token for scored in other.scores]
        expected = [scored.logprob for scored in other.scores]
        assert [scored.logprob for scored in one.scores] == pytest.approx(expected, abs=1e-4)


def test_a_text_that_repeats_itself_takes_fewer_steps(pair: tuple[Engine, Engine], monkeypatch: Any) -> None:
    here, calls = pair[0], []
    for plain, step in list(here.board.steps.items()):
        monkeypatch.setitem(here.board.steps, plain, lambda *given, step=step: (calls.append(1), step(*given))[1])
    said = list(here.submit(Request((5, 6, 7) * 4, 40, 0.0, logit_bias={9: 100.0})))  # nothing but 9
    assert said == [9] * 40
    assert len(calls) <= 40 // (GUESSES + 1) + 4
    calls.clear()
    assert len(list(here.submit(Request((1,), 20, 5.0, seed=3)))) == 20  # noise: nothing to guess
    assert len(calls) >= 15


def test_what_leaves_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match="95 guesses leave nothing"):
        Engine(PARAMS, CONFIG, compile=False, guesses=95)
