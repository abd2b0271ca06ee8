"""Rows and adapters that come and go: what a request says is the same to the bit, whatever a slot held before."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import compile as compiling
from functional_lm import keys, tree
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.inference import board, generate
from functional_lm.inference.engine import Closed, Engine, Request
from functional_lm.inference.prefixes import Prefixes
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=37, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, max_len=64)
PARAMS = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))
BEGINNINGS = tuple(tuple((i * j + i) % 37 for j in range(40)) for i in (1, 5))


def adapter(seed: int, rank: int = 2, targets: Any = lora.ALL_LINEAR) -> tree.Tree:
    """One that has been trained, so to say: B is not zero any more."""
    made = lora.init(PARAMS, targets, rank, keys.key(seed))
    key = keys.key(seed + 100)
    return tree.map_named(
        lambda name, leaf: keys.normal(keys.fold_in_name(key, name), leaf.shape) if "lora_B" in name else leaf, made
    )


def engine(**how: Any) -> Engine:
    return Engine(PARAMS, CONFIG, **{"slots": 3, "compile": False, **how}).start()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    """With and without reuse; chunks so short that prompts hold several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "CHUNKS", (2, 8))
        made = [engine(reuse=reuse, bank=lora.stack(PARAMS, [adapter(1), adapter(2)])) for reuse in (True, False)]
    yield made[0], made[1]
    for each in made:
        each.close()


REQUESTS = st.builds(
    Request,
    prompt=st.builds(
        lambda which, length, end: (*BEGINNINGS[which][:length], *end),
        st.sampled_from([0, 1]),
        st.integers(1, 40),
        st.lists(st.integers(0, 36), max_size=12),
    ),
    max_tokens=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.booleans(),
    adapter=st.integers(0, 2),
).filter(lambda request: request.logprobs is not None or not request.prompt_logprobs)


@given(rounds=st.lists(st.lists(REQUESTS, min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_rows_that_are_there_change_nothing(pair: tuple[Engine, Engine], rounds: list[list[Request]]) -> None:
    """Texts and likelihoods, to the bit, in whatever order and company prompts come."""
    for requests in rounds:
        both = [[each.submit(request) for request in requests] for each in pair]
        for one, other in zip(*both):
            assert list(one) == list(other)
            assert (one.scores, one.prompt_scores) == (other.scores, other.prompt_scores)
            assert other.cached == 0
            assert one.cached % 8 == 0
            assert one.cached < len(one.request.prompt)


def test_a_prompt_that_begins_alike_is_read_from_there(pair: tuple[Engine, Engine]) -> None:
    def cached(prompt: tuple[int, ...], **how: Any) -> int:
        handle = pair[0].submit(Request(prompt, 2, 0.0, **how))
        assert len(list(handle)) == 2
        return handle.cached

    own = tuple(range(36, -1, -1))
    assert cached(own) == 0
    assert cached(own) == 32
    assert cached(own[:32]) == 24  # the last token has to be read: the next one follows from it
    assert cached((*own[:20], 1, 2, 3)) == 16
    assert cached(own, adapter=1) == 0
    assert cached(own, adapter=1) == 32
    assert cached(own, logprobs=0, prompt_logprobs=True) == 0  # the likelihoods come from reading it
    assert cached((0, *own[1:])) == 0


@given(data=st.data())
@settings(max_examples=60)
def test_the_slot_that_holds_most_is_taken(data: st.DataObject) -> None:
    words = st.lists(st.integers(0, 1), max_size=12).map(tuple)
    prefixes, held = Prefixes(3, 2), {}
    for slot in range(3):
        held[slot] = data.draw(words), data.draw(st.integers(0, 1))
        prefixes.note(slot, *held[slot])
    prompt = data.draw(words.filter(bool))
    free = data.draw(st.lists(st.sampled_from(range(3)), min_size=1, unique=True))
    number = data.draw(st.integers(0, 1))
    slot, shared = prefixes.best(free, prompt, number)

    def common(other: int) -> int:
        tokens, owner = held[other]
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt[:-1])))
        return same // 2 * 2 if owner == number else 0

    assert slot in free
    assert shared == common(slot) == max(map(common, free))


def test_a_short_prompt_does_not_wait_for_a_long_one(pair: tuple[Engine, Engine]) -> None:
    here, long, short = pair[1], Request(tuple(range(36)) + (1,) * 20, 1), Request((3,), 1)
    held, reached = threading.Event(), threading.Event()
    read, order = here.board.read, []

    def slowly(slot: int, prompt: Any, start: int, scored: bool) -> Any:
        reached.set()
        held.wait(10)
        order.append(len(prompt))
        return read(slot, prompt, start, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(here.board, "read", slowly)
        first = here.submit(long)
        reached.wait(10)
        second = here.submit(short)
        held.set()
        assert len([*first, *second]) == 2
    assert len(order) == 8
    assert order.index(1) <= 2


# Adapters -------------------------------------------------------------------------------------------------------------


def test_adapters_in_one_batch_say_what_each_says_alone(pair: tuple[Engine, Engine]) -> None:
    requests = [
        Request(BEGINNINGS[0][: 9 + i], 8, 1.0, seed=i, logprobs=3, adapter=i % 3) for i in range(9)
    ]  # more than slots: the company changes
    for here in pair:
        alone = []
        for request in requests:
            handle = here.submit(request)
            alone.append((list(handle), handle.scores))
        handles = [here.submit(request) for request in requests]
        assert [(list(handle), handle.scores) for handle in handles] == alone
    assert len({tuple(tokens) for tokens, _ in alone}) > 3


def test_adapters_come_and_go_and_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded while it runs, an adapter says what it says from the start; so does the next one in its entry."""
    monkeypatch.setattr(board, "compiled", partial(compiling.compiled, backend="eager"))  # graphs are counted alike
    first, second, thin = adapter(1), adapter(2, 3), adapter(3, 1, ["q_proj"])
    bank = lora.room(PARAMS, [first], 2, 4)
    here = Engine(PARAMS, CONFIG, slots=3, compile=True, bank=bank, adapters=1).start(scored=(False,), plain=(True,))
    graphs = compiling.graphs()
    whole = engine(bank=lora.stack(PARAMS, [first, second, thin]))

    def said(where: Engine, number: int) -> list[int]:
        return list(where.submit(Request((5, 6), 10, 0.0, adapter=number)))

    assert said(here, 1) == said(whole, 1)
    number = here.load_adapter(second)
    assert said(here, number) == said(whole, 2)
    with pytest.raises(UsageError, match="all 2 entries for adapters are in use"):
        here.load_adapter(thin)
    here.unload_adapter(number)
    with pytest.raises(UsageError, match=f"adapter {number} is none of"):
        said(here, number)
    other = here.load_adapter(thin)
    assert other != number
    assert said(here, other) == said(whole, 3)  # nothing of the second one is left
    assert said(here, 0) == said(whole, 0)
    assert compiling.graphs() == graphs
    for each in (here, whole):
        each.close()


def test_an_adapter_stays_for_those_who_go_through_it() -> None:
    here = engine(bank=lora.room(PARAMS, [], 1, 2), adapters=0, slots=1)
    number = here.load_adapter(adapter(1))
    expected = list(here.submit(Request((5,), 50, 0.0, adapter=number)))
    handles = [here.submit(Request((5,), 50, 0.0, adapter=number)) for _ in range(3)]
    here.unload_adapter(number)
    with pytest.raises(UsageError, match="in use"):
        here.load_adapter(adapter(2))
    assert [list(handle) for handle in handles] == [expected] * 3
    assert here.load_adapter(adapter(2)) > number
    here.close()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: adapter(1, 5), "has rank 5 at .* there is room for 4"),
        (lambda: adapter(1, 2, ["embed_tokens"]), "'model.embed_tokens', for which there is no room"),
        (lambda: lora.init(PARAMS, ["q_proj"], 2, keys.key(1), dora=True), "is DoRA's"),
    ],
)
def test_what_the_bank_has_no_room_for_is_refused_and_forgotten(made: Any, words: str) -> None:
    here = engine(bank=lora.room(PARAMS, [], 1, 4), adapters=0)
    with pytest.raises(DataError, match=words):
        here.load_adapter(made())
    number = here.load_adapter(adapter(1, 4))
    assert len(list(here.submit(Request((1,), 3, adapter=number)))) == 3
    here.close()


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_failed_step_leaves_no_rows_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNKS", (2, 8))
    here, request = engine(slots=2), Request(BEGINNINGS[0], 5, 0.0)
    expected = list(here.submit(request))
    assert here.submit(dataclasses.replace(request, max_tokens=1)).cached in (0, 32)

    def breaks(*arguments: Any) -> Any:
        here.board._cache["0"]["k"].fill_(float("nan"))
        monkeypatch.undo()
        raise RuntimeError("a cosmic ray")

    monkeypatch.setitem(here.board.steps, True, breaks)
    with pytest.raises(FunctionalLMError, match="a cosmic ray"):
        list(here.submit(request))
    here.board._cache["0"]["k"].zero_()
    handle = here.submit(request)
    assert list(handle) == expected
    assert handle.cached == 0
    here.close()


def test_when_the_thread_ends_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    here = engine(slots=1)

    def breaks(*arguments: Any) -> Any:
        raise SystemExit("out of everything")

    monkeypatch.setitem(here.board.steps, True, breaks)
    handles = [here.submit(Request((1,), 20, seed=seed)) for seed in range(3)]
    for handle in handles:
        with pytest.raises(FunctionalLMError, match="the engine has stopped: out of everything"):
            list(handle)
    with pytest.raises(Closed, match="the engine has stopped"):
        here.submit(Request((1,)))
    assert here.stats()["running"] == here.stats()["waiting"] == 0
