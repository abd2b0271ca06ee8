"""What the server tells, and to whom: logprobs in streams, reuse, adapters, metrics, health, ids, logs, origins."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

openai = pytest.importorskip("openai")
pytest.importorskip("flask")
pytest.importorskip("waitress")
parser = pytest.importorskip("prometheus_client.parser")

from served import (  # noqa: E402
    KEY,
    PARAMS,
    TEXT,
    drawn_adapter,
    events,
    listening,
    offline,
    post,
    serving,
)

from functional_lm.inference.engine import Request  # noqa: E402
from functional_lm.interop import peft  # noqa: E402
from functional_lm.model import lora  # noqa: E402
from functional_lm.serving import host  # noqa: E402
from functional_lm.serving.app import Service, create  # noqa: E402


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(api_keys=(KEY,), origins=("https://example.org",)) as made:
        yield made


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return create(service).test_client()


# Logprobs in streams --------------------------------------------------------------------------------------------------


@given(
    prompt=st.sampled_from(["The", "日本", TEXT[:60], [5, 300, 7]]),
    count=st.integers(1, 20),
    seed=st.integers(0, 100),
    logprobs=st.integers(0, 4),
    echo=st.booleans(),
    n=st.integers(1, 2),
    stop=st.sampled_from([None, "e", ["qu", " "]]),
)
@settings(max_examples=15, deadline=None)
def test_the_lists_of_a_stream_are_those_of_the_whole(client: Any, **how: Any) -> None:
    body = {"max_tokens": how.pop("count"), **how}
    _, whole = post(client, "/v1/completions", body)
    chunks = events(post(client, "/v1/completions", {**body, "stream": True})[1])
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values
        assert len(set(map(len, choice["logprobs"].values()))) == 1


def test_a_chat_tells_them_in_a_stream_too(client: Any) -> None:
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 12, "seed": 4}
    body |= {"logprobs": True, "top_logprobs": 2}
    _, whole = post(client, "/v1/chat/completions", body)
    chunks = events(post(client, "/v1/chat/completions", {**body, "stream": True})[1])
    parts = [chunk["choices"][0] for chunk in chunks]
    told = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]
    assert len(told) == whole["usage"]["completion_tokens"]
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["choices"][0]["message"]["content"]


def test_openais_client_reads_them(service: Service) -> None:
    with listening(service) as address:
        remote = openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)
        chunks = list(
            remote.completions.create(model="fox", prompt="The", max_tokens=5, logprobs=1, stream=True, seed=1)
        )
        assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks) >= 5
        stream = remote.chat.completions.create(
            model="fox", messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, stream=True, seed=1
        )
        told = [chunk.choices[0].logprobs for chunk in stream]
        assert sum(len(entry.content) for entry in told if entry) == 3


# Reuse ----------------------------------------------------------------------------------------------------------------


def test_usage_tells_what_was_there_already(client: Any) -> None:
    prompt = [(7 * i) % 300 + 3 for i in range(80)]
    answers = [
        post(client, "/v1/completions", {"prompt": prompt, "max_tokens": 4, "seed": 3, "temperature": 1})[1]
        for _ in range(2)
    ]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 64]
    assert answers[0]["choices"] == answers[1]["choices"]
    last = events(
        post(
            client,
            "/v1/completions",
            {"prompt": prompt, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
        )[1]
    )[-1]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}


# Adapters at run time -------------------------------------------------------------------------------------------------


def test_adapters_come_and_go_over_http(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for seed, name in ((1, "red"), (2, "blue")):
        peft.save(root / name, drawn_adapter(seed), peft.Settings(2, 2.0, ("all-linear",)), PARAMS)
    peft.save(tmp_path / "secret", drawn_adapter(3), peft.Settings(2, 2.0, ("all-linear",)), PARAMS)
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "empty").mkdir()
    room = {"bank": lora.room(PARAMS, [], 1, 4), "adapters": 0}
    with serving(engine=room, open_adapter=peft.opener(root, PARAMS)) as service:
        client = create(service).test_client()

        def load(name: Any, path: Any) -> tuple[int, Any]:
            return post(client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, None)

        def said(name: str) -> Any:
            body = {"model": name, "prompt": [5, 6], "max_tokens": 8, "temperature": 0}
            return post(client, "/v1/completions", body, None)

        for name, path in (
            ("../x", "red"), ("a/b", "red"), ("a\r\nX: y", "red"), ("", "red"), ("x" * 200, "red"), ("fox", "red"),
            ("x", "../secret"), ("x", "/etc"), ("x", "link"), ("x", "red\0"), ("x", ""), ("x", "nowhere"),
            ("x", "empty"), ("x", "a/../../secret"), ("x", 7), (None, "red"),
        ):  # fmt: skip
            code, answer = load(name, path)
            assert code in (400, 422), (name, path, answer)
            assert str(tmp_path) not in answer["error"]["message"]
            assert len(answer["error"]["message"].splitlines()) == 1
        assert service.names == ["fox"]

        assert load("red", "red")[0] == 200
        merged = offline([5, 6], 8, params=lora.merge(PARAMS, drawn_adapter(1)))
        assert said("red")[1]["choices"][0]["text"] == merged
        assert [model["id"] for model in client.get("/v1/models").get_json()["data"]] == ["fox", "red"]
        assert load("red", "red")[0] == 400
        assert "in use" in load("blue", "blue")[1]["error"]["message"]
        assert post(client, "/v1/unload_lora_adapter", {"lora_name": "fox"}, None)[0] == 400
        assert post(client, "/v1/unload_lora_adapter", {"lora_name": "red"}, None)[0] == 200
        assert post(client, "/v1/unload_lora_adapter", {"lora_name": "red"}, None)[0] == 404
        assert said("red")[0] == 404
        assert load("blue", "blue")[0] == 200
        assert said("blue")[1]["choices"][0]["text"] == offline([5, 6], 8, params=lora.merge(PARAMS, drawn_adapter(2)))
        assert said("fox")[1]["choices"][0]["text"] == offline([5, 6], 8)
    with serving() as service:
        client = create(service).test_client()
        code, answer = post(client, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "red"}, None)
        assert (code, "loads no adapters" in answer["error"]["message"]) == (400, True)


# Metrics, health ------------------------------------------------------------------------------------------------------


def numbers(client: Any) -> dict[str, float]:
    text = client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).get_data(as_text=True)
    families = parser.text_string_to_metric_families(text)
    return {
        sample.name + "".join(f",{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_metrics_count_what_happened(client: Any) -> None:
    before = numbers(client)
    for _ in range(3):
        _, answer = post(client, "/v1/completions", {"prompt": "The quick", "max_tokens": 6, "seed": 1})
    post(client, "/v1/completions", {"prompt": "x", "max_tokens": 0})
    client.get("/v1/secret-path-of-somebody", headers={"Authorization": f"Bearer {KEY}"})
    after = numbers(client)

    def change(name: str) -> float:
        return after.get(f"functional_lm_{name}", 0.0) - before.get(f"functional_lm_{name}", 0.0)

    assert change("http_requests_total,POST,/v1/completions,200") == 3
    assert change("errors_total,/v1/completions,400") == change("errors_total,none,404") == 1
    assert change("tokens_total,prompt") == 3 * answer["usage"]["prompt_tokens"]
    assert change("tokens_total,completion") == 3 * answer["usage"]["completion_tokens"]
    for name in ("time_to_first_token_seconds", "time_per_token_seconds", "request_seconds"):
        assert change(f"{name}_count") == 3
        assert change(f"{name}_sum") > 0
    assert change("time_to_first_token_seconds_sum") < change("request_seconds_sum")
    assert after["functional_lm_slots"] == 3
    assert after["functional_lm_running"] == after["functional_lm_waiting"] == 0
    assert not any("secret-path" in name for name in after)


def test_health_says_when_nothing_is_delivered() -> None:
    with serving(patience=0.2) as service:
        client = create(service).test_client()
        step, held, inside = service.engine.board.steps[True], threading.Event(), threading.Event()

        def stuck(*arguments: Any) -> Any:
            inside.set()
            held.wait(20)
            return step(*arguments)

        service.engine.board.steps[True] = stuck

        assert client.get("/health").status_code == 200
        handle = service.engine.submit(Request((1,), 5))
        inside.wait(10)
        time.sleep(0.3)
        answer = client.get("/health")
        assert answer.status_code == 503
        assert "has delivered nothing for" in answer.get_json()["error"]["message"]
        held.set()
        assert len(list(handle)) == 5
        assert client.get("/health").status_code == 200


def test_the_door_says_what_is_being_waited_for() -> None:
    door = host.Door()
    with serving() as service:
        app = create(service)
        here = host.Host(door, "127.0.0.1", 0, 4, 1000).start()
        door.reason = "the server is starting: compiling"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{here.port}/health", timeout=10)
        assert refused.value.code == 503
        assert json.loads(refused.value.read())["error"]["message"] == door.reason
        assert refused.value.headers["Retry-After"] == "5"
        door.app = app
        assert urllib.request.urlopen(f"http://127.0.0.1:{here.port}/health", timeout=10).status == 200
        here.close()


def test_a_drain_finishes_what_is_there_and_takes_no_more() -> None:
    with serving(engine={"slots": 1}) as service:
        client = create(service).test_client()
        with listening(service) as address:
            remote = openai.OpenAI(api_key="any", base_url=f"{address}/v1", max_retries=0)
            stream = iter(
                remote.completions.create(model="fox", prompt="The", max_tokens=60, temperature=0, stream=True)
            )
            text = next(stream).choices[0].text
            ending = threading.Thread(target=host.drain, args=(service, 30.0))
            ending.start()
            while not service.draining:
                time.sleep(0.001)
            answer = client.get("/health")
            assert (answer.status_code, "going down" in answer.get_json()["error"]["message"]) == (503, True)
            code, answer = post(client, "/v1/completions", {"prompt": "x"}, None)
            assert code == 503
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == offline("The", 60)
            ending.join()


def test_a_drain_gives_up_in_the_end() -> None:
    with serving(engine={"slots": 1}) as service:
        step = service.engine.board.steps[True]
        service.engine.board.steps[True] = lambda *given: (time.sleep(0.05), step(*given))[1]
        handle = service.engine.submit(Request((1,), 90))
        host.drain(service, 0.2)
        assert 0 < len(list(handle)) < 90
        assert handle.finish_reason == "cancelled"


# Ids, logs, origins ---------------------------------------------------------------------------------------------------


@given(given_id=st.text(max_size=80))
@settings(max_examples=50, deadline=None)
def test_an_id_is_the_clients_where_it_is_harmless(client: Any, given_id: str) -> None:
    environ = {"HTTP_X_REQUEST_ID": given_id.encode("utf-8").decode("latin-1")}
    answer = client.get("/health", environ_overrides=environ)
    harmless = 0 < len(given_id) <= 64 and all(
        letter.isascii() and (letter.isalnum() or letter in "._-") for letter in given_id
    )
    if harmless:
        assert answer.headers["X-Request-Id"] == given_id
    else:
        assert answer.headers["X-Request-Id"].startswith("req-")


def test_ids_differ_and_stand_in_the_answer(client: Any) -> None:
    found = {client.get("/health").headers["X-Request-Id"] for _ in range(20)}
    assert len(found) == 20
    _, answer = post(client, "/v1/completions", {"prompt": "x", "max_tokens": 1}, **{"X-Request-Id": "mine-7"})
    assert answer["id"] == "cmpl-mine-7"


def test_the_log_is_json_without_texts(client: Any) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(host.Lines())
    logger = logging.getLogger("functional_lm.serve")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        secret = "Zanzibar\nx: 1"
        body = {"prompt": secret, "user": secret, "stop": [secret], "max_tokens": 3, "seed": 1}
        for stream_ in (False, True):
            post(client, "/v1/completions", {**body, "stream": stream_}, **{"X-Request-Id": "mine"})
        post(client, "/v1/completions", {"prompt": secret, secret: 1})
        post(client, f"/nowhere/{secret}?{secret}", {"prompt": secret})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 404]
    assert lines[0]["id"] == lines[1]["id"] == "mine"
    assert lines[0]["completion_tokens"] == lines[1]["completion_tokens"] == 3
    assert lines[0]["ends"] == ["length"]
    assert {"time", "level", "event", "method", "route", "ms"} <= lines[0].keys()
    assert "Zanzibar" not in stream.getvalue()
    assert KEY not in stream.getvalue()


def test_only_pages_of_named_origins_may_ask(service: Service) -> None:
    client = create(service).test_client()
    here = client.options("/v1/completions", headers={"Origin": "https://example.org"})
    assert here.status_code == 204
    assert here.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "Authorization" in here.headers["Access-Control-Allow-Headers"]
    for origin in ("https://example.org.evil.com", "https://evil.com", "null", "https://example.org:8443"):
        other = client.options("/v1/completions", headers={"Origin": origin})
        assert other.status_code in (401, 405)
        assert not [name for name, _ in other.headers if name.startswith("Access-Control")]
    answer = client.get("/health", headers={"Origin": "https://example.org"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "Origin" in answer.headers["Vary"]


def test_without_names_no_page_of_another_origin_may_ask() -> None:
    with serving() as service:
        client = create(service).test_client()
        for ask in (client.get, client.options):
            answer = ask("/v1/models", headers={"Origin": "https://example.org"})
            assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]
        service.origins = ("*",)
        assert client.get("/v1/models", headers={"Origin": "x://y"}).headers["Access-Control-Allow-Origin"] == "x://y"


def test_a_browser_shows_the_key_as_a_password_and_only_for_the_page(client: Any) -> None:
    refused = client.get("/")
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Basic")
    assert client.get("/", auth=("anybody", KEY)).status_code == 200
    assert client.get("/", auth=("anybody", "sk-wrong")).status_code == 401
    assert client.get("/v1/models", auth=("anybody", KEY)).status_code == 401
