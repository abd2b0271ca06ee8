"""The server, asked by OpenAI's own client over a real connection, and by hostile hands through Flask's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

flask = pytest.importorskip("flask")
openai = pytest.importorskip("openai")
waitress = pytest.importorskip("waitress")

from served import (  # noqa: E402
    CONFIG,
    KEY,
    PARAMS,
    TEXT,
    TOKENIZER,
    drawn_adapter,
    events,
    listening,
    offline,
    post,
    serving,
)

from functional_lm.inference import generate as tokens  # noqa: E402
from functional_lm.inference import text as writing  # noqa: E402
from functional_lm.inference.engine import Engine, Handle, Request  # noqa: E402
from functional_lm.model import lora, transformer  # noqa: E402
from functional_lm.serving.answer import Answer  # noqa: E402
from functional_lm.serving.app import Service, create  # noqa: E402
from functional_lm.text import tokenizer as tokenizers  # noqa: E402
from functional_lm.text.interface import ASSISTANT, END, USER  # noqa: E402


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(api_keys=(KEY, "sk-another"), body_bytes=100_000) as made:
        yield made


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return create(service).test_client()


@pytest.fixture(scope="module")
def remote(service: Service) -> Iterator[Any]:
    """OpenAI's client at the other end of a socket."""
    with listening(service) as address:
        yield openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)


# OpenAI's client ------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_offline_text(remote: Any) -> None:
    answer = remote.completions.create(model="fox", prompt="The quick", max_tokens=12, temperature=0.8, seed=5)
    assert answer.choices[0].text == offline("The quick", 12, 0.8, 5)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("The quick"))
    assert 0 < answer.usage.completion_tokens <= 13


def test_a_stream_is_the_completion_in_pieces(remote: Any) -> None:
    how = {"model": "fox", "prompt": "日本", "max_tokens": 20, "temperature": 1.0, "seed": 9}
    chunks = list(remote.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    whole = remote.completions.create(**how)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_several_prompts_and_choices(remote: Any) -> None:
    prompts = ["The", TOKENIZER.encode("lazy")]
    answer = remote.completions.create(
        model="fox", prompt=["The", "lazy"], n=2, max_tokens=6, seed=3, temperature=1, echo=True
    )
    texts = [choice.text for choice in answer.choices]
    expected = [
        TOKENIZER.decode(TOKENIZER.encode(p) if isinstance(p, str) else p) + offline(p, 6, 1.0, 3 + i)
        for p in prompts
        for i in range(2)
    ]
    assert texts == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    same = remote.completions.create(model="fox", prompt=prompts[1], max_tokens=6, seed=3, temperature=1)
    assert same.choices[0].text == offline("lazy", 6, 1.0, 3)


def test_a_chat_reads_its_turns_as_special_tokens(remote: Any) -> None:
    messages = [{"role": "user", "content": "The <|end|> fox"}]
    special = TOKENIZER.special_ids
    prompt = [
        TOKENIZER.bos_id, special[USER], *TOKENIZER.encode("The <|end|> fox"), special[END], special[ASSISTANT],
    ]  # fmt: skip
    how = {"model": "fox", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
    answer = remote.chat.completions.create(**how)
    run = tokens.GenerateOptions(8, 0.0, stop_ids=(TOKENIZER.eos_id, special[END]))
    made = writing.stream(PARAMS, tokens.decoder(CONFIG, compile=False), TOKENIZER, prompt, run)
    assert answer.choices[0].message.content == "".join(made)
    chunks = list(remote.chat.completions.create(**how, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == answer.choices[0].message.content


def test_logprobs_are_those_of_the_forward(remote: Any) -> None:
    """Of the prompt and of what is said; the prompt is longer than a chunk."""
    prompt = TOKENIZER.encode(TEXT)[:70]
    answer = remote.completions.create(
        model="fox", prompt=prompt, max_tokens=5, temperature=0, logprobs=3, echo=True
    ).choices[0]
    said = answer.logprobs
    assert answer.text.startswith(TOKENIZER.decode(prompt))
    made = list(tokens.generate(PARAMS, prompt, tokens.decoder(CONFIG, compile=False), tokens.GenerateOptions(5, 0.0)))
    ids = [*prompt, *made][: len(said.tokens)]
    likely = torch.log_softmax(transformer.forward(PARAMS, torch.tensor([ids]), CONFIG)[0], -1)
    assert said.token_logprobs[0] is None
    expected = likely[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(torch.tensor(said.token_logprobs[1:]), expected, rtol=1e-3, atol=1e-4)
    for place, top in list(enumerate(said.top_logprobs))[1:]:
        assert max(top.values()) == pytest.approx(float(likely[place - 1].max()), abs=1e-4)
        assert 3 <= len(top) <= 4 or len(set(said.tokens)) < 4
    assert said.text_offset[0] == 0
    assert said.text_offset == sorted(said.text_offset)
    without = remote.completions.create(model="fox", prompt=prompt, max_tokens=5, temperature=0, logprobs=0).choices[0]
    assert without.logprobs.token_logprobs == pytest.approx(said.token_logprobs[70:], abs=1e-5)
    chat = remote.chat.completions.create(
        model="fox", messages=[{"role": "user", "content": "fox"}], max_tokens=4, logprobs=True, top_logprobs=2, seed=1
    ).choices[0]
    said_bytes = bytes(byte for entry in chat.logprobs.content for byte in entry.bytes)
    assert said_bytes.decode("utf-8", "replace") == chat.message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in chat.logprobs.content)


def test_models_are_listed_and_others_are_unknown(remote: Any) -> None:
    assert [model.id for model in remote.models.list()] == ["fox"]
    assert remote.models.retrieve("fox").id == "fox"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        remote.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        remote.with_options(api_key="sk-wrong").models.list()


def test_a_reader_who_leaves_gives_the_slot_back(remote: Any, service: Service) -> None:
    before = service.engine.stats()["requests"]
    stream = remote.completions.create(model="fox", prompt="The", max_tokens=90, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if service.engine.stats()["running"] == 0 and service.engine.stats()["requests"] > before:
            break
        threading.Event().wait(0.05)
    assert service.engine.stats()["running"] == 0
    assert remote.completions.create(model="fox", prompt="The", max_tokens=3, temperature=0).choices


def test_adapters_are_models_of_their_own() -> None:
    """Together in one batch, each says what the merged model says alone."""
    adapters = [drawn_adapter(seed) for seed in (1, 2)]
    engine = Engine(PARAMS, CONFIG, slots=4, compile=False, bank=lora.stack(PARAMS, adapters)).start()
    client = create(Service(engine, TOKENIZER, ("fox", "red", "blue"))).test_client()
    listed = client.get("/v1/models").get_json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [("fox", None), ("red", "fox"), ("blue", "fox")]
    handles = [engine.submit(Request((5, 6), 10, 0.0, adapter=i)) for i in (2, 0, 1, 2)]
    together = [list(handle) for handle in handles]
    assert together[0] == together[3]
    for said, i in zip(together[:3], (2, 0, 1)):
        params = lora.merge(PARAMS, adapters[i - 1]) if i else PARAMS
        how = tokens.GenerateOptions(10, 0.0)
        assert said == list(tokens.generate(params, [5, 6], tokens.decoder(CONFIG, compile=False), how))
    for i, name in enumerate(("fox", "red", "blue")):
        answer = client.post(
            "/v1/completions", json={"model": name, "prompt": [5, 6], "max_tokens": 10, "temperature": 0}
        )
        assert answer.get_json()["model"] == name
        assert answer.get_json()["choices"][0]["text"] == TOKENIZER.decode(together[(1, 2, 0)[i]])
    assert client.post("/v1/completions", json={"model": "green", "prompt": "x"}).status_code == 404
    engine.close()


# Other routes ---------------------------------------------------------------------------------------------------------


def test_the_originals_form(client: Any) -> None:
    for field in ("prompt", "inputs"):
        code, answer = post(client, "/generate", {field: "The", "max_new_tokens": 7, "temperature": 0})
        assert (code, answer["generated_text"]) == (200, offline("The", 7))
    code, answer = post(client, "/generate", {"prompt": "The", "max_new_tokens": 7, "temperature": 0, "stream": True})
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    assert "".join(event.get("token", "") for event in events) == offline("The", 7)
    assert answer.endswith("data: [DONE]\n\n")


def test_tokens_there_and_back(client: Any) -> None:
    _, answer = post(client, "/tokenize", {"prompt": "naïve 日"})
    assert answer["tokens"] == TOKENIZER.encode("naïve 日")
    assert post(client, "/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "naïve 日"}


def test_health_is_public_and_true(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/stats").status_code == 401
    monkeypatch.setattr(service.engine, "failure", SystemExit("gone"))
    answer = client.get("/health")
    assert (answer.status_code, "the engine has stopped" in answer.get_json()["error"]["message"]) == (503, True)
    assert post(client, "/v1/completions", {"prompt": "x"})[0] == 503


def test_the_page_brings_all_that_it_needs(client: Any) -> None:
    page = client.get("/", headers={"Authorization": f"Bearer {KEY}"}).get_data(as_text=True)
    assert "<textarea" in page
    assert "http://" not in page
    assert "https://" not in page


# Bad input ------------------------------------------------------------------------------------------------------------

HOSTILE = [0, -1, 10**400, 1e308, float("nan"), float("inf"), True, None, "9", "", [], {}, [[]], "x" * 2000]
FIELDS = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "stop", "stream", "n", "stream_options", "response_format", "tools", "tool_choice",
    "logprobs", "prompt", "max_tokens", "top_logprobs",
    "echo", "best_of", "suffix", "messages", "max_completion_tokens", "unheard_of",
)  # fmt: skip


@given(
    route=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/generate"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(HOSTILE), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_no_value_of_any_field_breaks_the_server(client: Any, route: str, fields: dict[str, Any]) -> None:
    own = {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"prompt": "x"}
    limit = {"max_new_tokens": 2} if route == "/generate" else {"max_tokens": 2}
    code, answer = post(client, route, {**own, **limit, **fields})
    assert code in (200, 400, 404, 422), answer
    if code != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": [0, 99999]}, "token 99999 is outside the vocabulary"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "x", "best_of": 3}, "best_of is 3"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not served"),
        ({"prompt": "x", "stream_options": {}}, "stream_options goes with stream"),
        ({"prompt": []}, "prompt holds nothing"),
        ({"prompt": "x", "tools": [1]}, "tools are not served"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format can only be text"),
        ({"prompt": "x", "logit_bias": {"one": 1}}, "'one' is no token id"),
        ({"prompt": "x", "stop": [""]}, "stop holds an empty text"),
        ("[1, 2", ""),
        ("[1, 2]", "the body has to be a JSON object"),
        ("[" * 20000, ""),
        (b"\xff\xfe", ""),
    ],
)
def test_what_is_wrong_is_named(client: Any, body: Any, words: str) -> None:
    code, answer = post(client, "/v1/completions", body)
    assert code == 400
    assert words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "x " * 3000}, "the prompt has"),
        ({"prompt": "x", "n": 17}, "n: "),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "max_tokens": 10**10}, "max_tokens"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop holds 17 texts"),
        ({"prompt": ["x"] * 65}, "prompt holds 65 prompts"),
        ({"prompt": ["x"] * 4, "n": 6}, "24 answers at once are more than the 20"),
    ],
)
def test_what_is_too_much_is_named(client: Any, body: Any, words: str) -> None:
    code, answer = post(client, "/v1/completions", body)
    assert code == 422
    assert words in answer["error"]["message"]


def test_large_bodies_and_missing_keys_are_turned_away(client: Any) -> None:
    assert post(client, "/v1/completions", {"prompt": "x" * 200_000})[0] == 413
    for key in (None, "", "sk-wrong", KEY[:-1], "ü"):
        assert post(client, "/v1/completions", {"prompt": "x"}, key)[0] == 401
    assert post(client, "/v1/completions", {"prompt": "x", "max_tokens": 1}, "sk-another")[0] == 200
    assert client.get("/nowhere", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404
    assert client.get("/v1/completions", headers={"Authorization": f"Bearer {KEY}"}).status_code == 405


# Stop texts -----------------------------------------------------------------------------------------------------------


@given(
    text=st.text("ab€ ", max_size=20),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=200)
def test_a_stop_text_is_cut_off_wherever_tokens_split_it(text: str, stops: list[str]) -> None:
    """Tokens here are bytes, so that characters fall apart too; the stop that is complete first counts."""
    tokenizer = tokenizers.train((), "bytes")
    handle = Handle(Request((1,)))
    for token in tokenizer.encode(text):
        handle.say(token)
    handle.end("length")
    answer = Answer(handle, tokenizer, stops)
    pieces = list(answer)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(found)[1]] if found else text)
    assert answer.finish_reason == ("stop" if found else "length")
    assert all(pieces)


def test_what_is_written_in_a_pause_goes_out_together() -> None:
    """The same text in fewer events; the end waits for no pause."""
    body = {"prompt": "The quick", "max_tokens": 30, "temperature": 0, "stream": True}
    texts, counts = [], []
    for pause in (0.0, 5.0):
        with serving(pause=pause) as service:
            client = create(service).test_client()
            before = time.monotonic()
            _, answer = post(client, "/v1/completions", body)
            assert time.monotonic() - before < 5
            pieces = [event["choices"][0]["text"] for event in events(answer) if event["choices"]]
            texts.append("".join(pieces))
            counts.append(sum(map(bool, pieces)))
    assert texts[0] == texts[1] == offline("The quick", 30)
    assert counts[1] <= 3


def test_events_come_further_apart_while_others_wait() -> None:
    """Up to a tenth of a second, unless more was asked for; an event for every token stays one."""
    engine = Engine(PARAMS, CONFIG, slots=2, compile=False)
    service = Service(engine, TOKENIZER, ("fox",), pause=0.02)
    breaths = []
    for _ in range(20):
        breaths.append(service.breath())
        engine.submit(Request((5,), 1))
    assert breaths == pytest.approx([0.02] * 3 + [min(0.1, 0.01 * number) for number in range(3, 20)])
    service.pause = 0.0
    assert service.breath() == 0.0
    service.pause = 0.5
    assert service.breath() == 0.5
