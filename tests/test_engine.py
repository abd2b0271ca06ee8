"""The engine: what a request says is what it says alone; slots, queue and threads come back to nothing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_lm import keys, tree
from functional_lm.errors import FunctionalLMError, UsageError
from functional_lm.inference import generate
from functional_lm.inference.engine import Busy, Engine, Request
from functional_lm.inference.sampling import Penalties, Sampling, penalize, sample
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_len=96, qk_norm=True)
PARAMS = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))  # opinions strong enough to differ


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(PARAMS, CONFIG, slots=3, compile=False).start()
    yield made
    made.close()
    assert made.stats()["running"] == made.stats()["waiting"] == 0


def offline(request: Request) -> list[int]:
    """The same text by the plain loop, which knows neither slots nor threads (nor penalties)."""
    how = generate.GenerateOptions(
        request.max_tokens, request.temperature, request.top_k, request.top_p, request.seed, request.stop_ids
    )
    run = generate.decoder(CONFIG, compile=False, truncating=True)
    made = list(generate.generate(PARAMS, list(request.prompt), run, how))
    return [token for token in made if token not in request.stop_ids]


TOKENS = st.integers(0, CONFIG.vocab_size - 1)
REQUESTS = st.builds(
    Request,
    prompt=st.lists(TOKENS, min_size=1, max_size=80).map(tuple),
    max_tokens=st.integers(1, 15),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**31),
    stop_ids=st.lists(TOKENS, max_size=2).map(tuple),
)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_a_text_does_not_depend_on_slot_or_company(engine: Engine, requests: list[Request]) -> None:
    handles = [engine.submit(request) for request in requests]
    for handle, request in zip(handles, requests):
        assert list(handle) == offline(request)
        assert handle.finish_reason in ("stop", "length")
        assert handle.first_token is not None or handle.finish_reason == "stop"


PENALIZED = st.builds(
    Request,
    prompt=st.lists(TOKENS, min_size=1, max_size=70).map(tuple),
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.8]),
    logit_bias=st.dictionaries(TOKENS, st.floats(-5, 5), max_size=2),
    seed=st.integers(0, 2**31),
)


@given(requests=st.lists(PENALIZED, min_size=2, max_size=6))
@settings(max_examples=10, deadline=None)
def test_penalties_are_a_requests_own(engine: Engine, requests: list[Request]) -> None:
    together = [list(handle) for handle in [engine.submit(request) for request in requests]]
    assert together == [list(engine.submit(request)) for request in requests]


def test_greedy_with_penalties_is_the_formula(engine: Engine) -> None:
    """Step by step from the full forward: Keskar et al.'s division, then presence, frequency and bias."""
    request = Request((1, 2, 3), 14, 0.0, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4,
                      logit_bias={5: 1.5})  # fmt: skip
    text: list[int] = [1, 2, 3]
    for token in engine.submit(request):
        logits = transformer.forward(PARAMS, torch.tensor([text]), CONFIG)[0, -1]
        for other in set(text):
            logits[other] = logits[other] / 1.2 if logits[other] > 0 else logits[other] * 1.2
        for other in text[3:]:
            logits[other] -= 0.4
        for other in set(text[3:]):
            logits[other] -= 0.3
        logits[5] += 1.5
        assert token == int(logits.argmax())
        text.append(token)
    assert len(text) == 17


@given(seed=st.integers(0, 2**31), least=st.floats(0.01, 1.0), temperature=st.floats(0.2, 3.0))
@settings(max_examples=40)
def test_min_p_keeps_tokens_that_are_likely_enough(seed: int, least: float, temperature: float) -> None:
    logits = 3 * keys.normal(keys.key(seed), (1, 12)).expand(200, 12)
    by = Penalties.none(200, 12)._replace(min_p=torch.full((200,), least))
    drawn = sample(logits, keys.split(keys.key(seed + 1), 200), Sampling.uniform(200, temperature), False, by)
    likely = torch.softmax(logits[0] / temperature, -1)
    assert set(drawn.tolist()) <= set(torch.nonzero(likely >= 0.999 * least * likely.max())[:, 0].tolist())


def test_penalties_that_are_off_change_nothing() -> None:
    logits = keys.normal(keys.key(3), (2, 9))
    by = Penalties.none(2, 9).counted(torch.tensor([1, 2]))
    assert torch.equal(penalize(logits, by), logits)


# Coming and going -----------------------------------------------------------------------------------------------------


def test_a_cancelled_request_gives_its_slot_back(engine: Engine) -> None:
    handle = engine.submit(Request((1,), 90))
    tokens = iter(handle)
    first = [next(tokens) for _ in range(3)]
    handle.cancel()
    rest = list(tokens)
    assert handle.finish_reason == "cancelled"
    assert 3 <= len(first + rest) < 90
    assert (first + rest) == offline(Request((1,), 90))[: len(first + rest)]
    deadline = time.monotonic() + 10
    while engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["running"] == 0


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    handle = engine.submit(Request((1,), 90, seconds=0.0))
    assert list(handle) == []
    assert handle.finish_reason == "timeout"


def test_a_full_cache_ends_a_text(engine: Engine) -> None:
    handle = engine.submit(Request(tuple([1] * 90), 50))
    assert len(list(handle)) == 6
    assert handle.finish_reason == "length"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda: Request(()), "the prompt is empty"),
        (lambda: Request((1,), 0), "max_tokens is 0"),
        (lambda: Request((1, 37)), "token 37 is outside the vocabulary"),
        (lambda: Request((-1,)), "token -1 is outside"),
        (lambda: Request((1,), logit_bias={99: 1.0}), "token 99 is outside"),
        (lambda: Request(tuple([1] * 96)), "the prompt has 96 tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(engine: Engine, request_: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.submit(request_())


def test_a_flood_is_refused_and_forgotten() -> None:
    small = Engine(PARAMS, CONFIG, slots=2, waiting=3, compile=False).start()
    accepted, refused = [], 0
    for seed in range(30):
        try:
            accepted.append(small.submit(Request((1, 2), 8, seed=seed)))
        except Busy:
            refused += 1
    assert refused > 0
    assert [list(handle) for handle in accepted] == [offline(handle.request) for handle in accepted]
    assert list(small.submit(Request((1, 2), 8, seed=99))) == offline(Request((1, 2), 8, seed=99))
    small.close()
    with pytest.raises(Busy, match="going down"):
        small.submit(Request((1,)))


def test_a_failing_step_fails_its_requests_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Engine(PARAMS, CONFIG, slots=2, compile=False).start()
    step, calls = small.board.steps[True], []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a cosmic ray")
        return step(*arguments)

    monkeypatch.setitem(small.board.steps, True, breaks)
    handle = small.submit(Request((1,), 20))
    with pytest.raises(FunctionalLMError, match="a cosmic ray"):
        list(handle)
    assert handle.finish_reason == "error"
    assert list(small.submit(Request((1,), 5))) == offline(Request((1,), 5))
    small.close()


def test_closing_drains_or_cancels() -> None:
    for drain in (True, False):
        small = Engine(PARAMS, CONFIG, slots=2, compile=False).start()
        handles = [small.submit(Request((1,), 60, seed=seed)) for seed in range(4)]
        small.close(drain)
        lengths = [len(list(handle)) for handle in handles]
        assert (lengths == [60] * 4) == drain
        assert not small._thread.is_alive()


def test_many_threads_may_ask_at_once(engine: Engine) -> None:
    requests = [Request((seed % 37, 2), 6, seed=seed) for seed in range(12)]
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = list(engine.submit(requests[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(12)] == [offline(request) for request in requests]


def test_the_compiled_engine_says_the_same_and_compiles_nothing_more() -> None:
    from functional_lm import compile as compiling

    config = ModelConfig(vocab_size=37, d_model=32, n_layers=1, n_heads=4, max_len=64)
    params = tree.map(lambda leaf: 3 * leaf, transformer.init(config, keys.key(0)))
    requests = [
        Request(tuple(j % 37 for j in range(1, 5 + 20 * i)), 10, 0.9, top_k=5 * (i % 2), seed=i) for i in range(3)
    ]
    eager = Engine(params, config, slots=2, compile=False).start()
    expected = [list(eager.submit(request)) for request in requests]
    eager.close()
    fast = Engine(params, config, slots=2, compile=True).start()
    before = compiling.graphs()
    assert [list(handle) for handle in [fast.submit(request) for request in requests]] == expected
    assert compiling.graphs() == before
    fast.close()


def plainly(request: Request) -> list[int]:
    """The same by the plain loop, which knows all but biases."""
    names = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    own = {name: getattr(request, name) for name in names}
    how = generate.GenerateOptions(request.max_tokens, request.temperature, **own)
    return list(generate.generate(PARAMS, list(request.prompt), generate.decoder(CONFIG, compile=False), how))


@given(request=PENALIZED)
@settings(max_examples=12, deadline=None)
def test_the_plain_loop_knows_the_same_penalties(engine: Engine, request: Request) -> None:
    own = dataclasses.replace(request, logit_bias={})
    assert plainly(own) == list(engine.submit(own))


@given(
    requests=st.lists(
        st.tuples(PENALIZED, st.sampled_from([1, 60, 95, 96, 97, 150]), st.integers(1, 130)), min_size=1, max_size=4
    )
)
@settings(max_examples=3, deadline=None)
def test_a_text_that_fills_the_context_goes_on_from_its_newer_half(
    engine: Engine, requests: list[tuple[Request, int, int]]
) -> None:
    long = [
        dataclasses.replace(one, prompt=(one.prompt * length)[:length], max_tokens=count, logit_bias={}, rolls=True)
        for one, length, count in requests
    ]
    for handle, request in zip([engine.submit(request) for request in long], long):
        assert list(handle) == plainly(request)
        assert handle.finish_reason == "length"
