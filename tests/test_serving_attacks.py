"""Bad input and attack: whatever is sent, the answer is an error in one line, and the next request is served."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flask")
pytest.importorskip("waitress")
pytest.importorskip("prometheus_client")

from served import CONFIG, KEY, PARAMS, TOKENIZER, drawn_adapter, listening, offline, post, serving

from functional_lm import folder
from functional_lm.inference.engine import Request
from functional_lm.model import lora
from functional_lm.serve import ServeFlags, load
from functional_lm.serving import host
from functional_lm.serving.app import Service, create


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(api_keys=(KEY, "sk-other"), body_bytes=50_000) as made:
        yield made


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return create(service).test_client()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[tuple[str, int]]:
    with listening(service) as url:
        yield "127.0.0.1", int(url.rpartition(":")[2])


def served(client: Any) -> None:
    """It still says what it should."""
    code, answer = post(client, "/v1/completions", {"prompt": "The", "max_tokens": 4, "temperature": 0})
    assert (code, answer["choices"][0]["text"]) == (200, offline("The", 4))


# Values ---------------------------------------------------------------------------------------------------------------

NUMBERS = (
    "0",
    "-1",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "-0.0",
    "1e400",
    "1e308",
    "NaN",
    "Infinity",
    "-Infinity",
    "2.5",
)
OTHERS = (
    "true",
    "null",
    '"9"',
    '""',
    "[]",
    "{}",
    "[[]]",
    "[[[]]]",
    "[null]",
    '["x", 1]',
    "[1, -1]",
    "[1.5]",
    '"\\ud800"',
)
FIELDS = {
    "/v1/completions": ("n", "max_tokens", "stop", "logprobs", "prompt", "seed", "temperature", "top_p", "top_k",
                        "min_p",
                        "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "model",
                        "echo", "stream", "best_of", "stream_options"),
    "/v1/chat/completions": ("n", "max_tokens", "max_completion_tokens", "stop", "logprobs", "top_logprobs",
                             "messages"),
    "/generate": ("prompt", "inputs", "max_new_tokens", "stop", "temperature"),
    "/tokenize": ("prompt", "model"),
    "/detokenize": ("tokens",),
    "/v1/load_lora_adapter": ("lora_name", "lora_path"),
    "/v1/unload_lora_adapter": ("lora_name",),
}  # fmt: skip
WHOLE = {
    "/v1/completions": '"prompt": "x", "max_tokens": 1',
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "x"}], "max_tokens": 1',
    "/generate": '"prompt": "x", "max_new_tokens": 1',
    "/tokenize": '"prompt": "x"',
    "/detokenize": '"tokens": [5]',
    "/v1/load_lora_adapter": '"lora_name": "x", "lora_path": "y"',
    "/v1/unload_lora_adapter": '"lora_name": "x"',
}


@pytest.mark.parametrize("route", FIELDS)
def test_every_field_with_every_bad_value(client: Any, route: str) -> None:
    for field in FIELDS[route]:
        for value in NUMBERS + OTHERS:
            code, answer = post(client, route, f'{{{WHOLE[route]}, "{field}": {value}}}')
            assert code in (200, 400, 404, 422), (field, value, answer)
            if code != 200:
                assert len(answer["error"]["message"].splitlines()) == 1
                assert len(answer["error"]["message"]) < 400
    for field in ("n", "max_tokens", "logprobs", "seed", "stop"):
        for value in ("NaN", "Infinity", "true", '"9"' if field != "stop" else "9", "1" + "0" * 400):
            code, answer = post(client, "/v1/completions", f'{{{WHOLE["/v1/completions"]}, "{field}": {value}}}')
            assert code in (400, 422), (field, value, answer)
    served(client)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a\ud800"},
        {"prompt": "x", "stop": "\udfff"},
        {"prompt": "x", "stop": ["\ud800"], "stream": True},
        {"prompt": "x", "user": "\ud800"},
        {"prompt": "x", "model": "\ud800"},
        {"prompt": [-1]},
        {"prompt": [CONFIG.vocab_size]},
        {"prompt": [2**63]},
        {"prompt": [[1], [10**30]]},
        {"prompt": "x", "logit_bias": {"-1": 1}},
        {"prompt": "x", "logit_bias": {str(CONFIG.vocab_size): 1}},
        {"prompt": "x", "logit_bias": {"9" * 400: 1}},
    ],
)
def test_what_is_no_text_and_no_token(client: Any, body: dict[str, Any]) -> None:
    code, answer = post(client, "/v1/completions", {"max_tokens": 1, **body})
    assert code in (200, 400, 404), answer
    assert code != 200 or "stop" in body or "user" in body
    assert post(client, "/detokenize", {"tokens": [CONFIG.vocab_size]})[0] == 400
    assert post(client, "/tokenize", {"prompt": "\ud800"})[0] == 400
    served(client)


def test_an_empty_prompt_is_the_beginning_of_a_document(client: Any) -> None:
    for prompt in ("", []):
        code, answer = post(client, "/generate", {"prompt": prompt, "max_new_tokens": 4, "temperature": 0})
        assert code == 200 if prompt == "" else 400
    code, answer = post(client, "/v1/completions", {"prompt": "", "max_tokens": 4, "temperature": 0})
    assert answer["choices"][0]["text"] == offline([TOKENIZER.bos_id], 4)


def test_names_with_line_breaks_and_paths(client: Any, service: Service) -> None:
    for name in (
        "fox\r\nSet-Cookie: a=b",
        "../../etc/passwd",
        "/etc/passwd",
        "fox/../fox",
        "fox\0",
        "%2e%2e",
        "x" * 257,
    ):
        code, answer = post(client, "/v1/completions", {"prompt": "x", "model": name})
        assert code in (404, 422)
        assert len(answer["error"]["message"].splitlines()) == 1
        assert "root:" not in json.dumps(answer)
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/fox%0d%0aX: y", "/v1/models//etc/passwd"):
        answer = client.get(path, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code in (404, 308)
        assert "root:" not in answer.get_data(as_text=True)
        assert "X" not in answer.headers
    served(client)


# Bodies on a real socket ----------------------------------------------------------------------------------------------


def sent(address: tuple[str, int], data: bytes, seconds: float = 10.0) -> bytes:
    """What comes back until the server closes, or for a while."""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
                if got.endswith((b"}\n", b"\n\n")) or b"Content-Length: 0" in got:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return got


def head(*lines: str, method: str = "POST", path: str = "/v1/completions") -> bytes:
    own = (f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Connection: close", *lines)
    return "\r\n".join((*own, "", "")).encode()


BODY = b'{"prompt": "The", "max_tokens": 4, "temperature": 0}'


def test_chunked_bodies_are_read_and_limited(address: tuple[str, int], client: Any) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (1, BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\n\r\n"
    good = sent(address, head("Transfer-Encoding: chunked") + chunks)
    assert good.startswith(b"HTTP/1.1 200")
    assert json.loads(good.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == offline("The", 4)
    endless = b"".join(b"8000\r\n" + b"x" * 0x8000 + b"\r\n" for _ in range(20))
    for data in (
        head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
        head("Transfer-Encoding: chunked") + b"-5\r\n{}\r\n0\r\n\r\n",
        head("Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n",
        head("Transfer-Encoding: gzip, chunked") + chunks,
        head("Content-Length: 3", "Content-Length: 52") + BODY,
        head("Content-Length: -1") + BODY,
        head("Content-Length: 1e3") + BODY,
    ):
        answer = sent(address, data, 2.0)
        assert answer.split(b" ")[1] in (b"400", b"501"), answer[:80]
    answer = sent(address, head("Transfer-Encoding: chunked") + endless + b"0\r\n\r\n", 2.0)
    assert answer.split(b" ")[1] in (b"413",)
    served(client)


def test_deep_and_large_bodies(address: tuple[str, int], client: Any) -> None:
    for body in (b"[" * 40_000, b'{"a":' * 8_000, b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}"):
        code, answer = post(client, "/v1/completions", body)
        assert code == 400
        assert len(answer["error"]["message"].splitlines()) == 1
    assert post(client, "/v1/completions", b"x" * 60_000)[0] == 413
    assert sent(address, head("Content-Length: 99999999999") + b"x", 2.0).split(b" ")[1] == b"413"
    assert sent(address, head("X-Long: " + "y" * 400_000), 2.0).split(b" ")[1] == b"431"
    assert sent(address, head("X-Request-Id: a\rb\r\n c: d", "Content-Length: 0"), 2.0).split(b" ")[1] == b"400"
    assert sent(address, b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", 2.0).split(b" ")[1] == b"400"
    served(client)


def test_slow_bodies_hold_nobody_up(address: tuple[str, int], client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads, each a byte now and then."""
    monkeypatch.setattr(host, "BODY_SECONDS", 0.5)
    slow = [socket.create_connection(address, timeout=10) for _ in range(20)]
    for connection in slow:
        connection.sendall(head("Content-Length: 5000") + b"{")
    began, ended = time.monotonic(), set()
    answer = sent(address, head(f"Content-Length: {len(BODY)}") + BODY)
    assert answer.startswith(b"HTTP/1.1 200")
    while len(ended) < len(slow) and time.monotonic() < began + 20:
        for connection in set(slow) - ended:
            try:
                connection.sendall(b" ")
            except OSError:
                ended.add(connection)
        time.sleep(0.1)
    assert len(ended) == len(slow)
    for connection in slow:
        connection.close()


# Failure, flood, leaks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_a_step_is_told_and_the_next_request_is_served(
    service: Service, client: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise RuntimeError("a cosmic ray")

    with monkeypatch.context() as patch:
        patch.setitem(service.engine.board.steps, True, breaks)
        code, answer = post(client, "/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": stream})
    if stream:
        assert code == 200  # it had begun
        assert "the step failed: a cosmic ray" in answer
        assert answer.endswith("data: [DONE]\n\n")
    else:
        assert (code, answer["error"]["code"]) == (500, "step_failed")
    served(client)


def test_an_error_of_ours_says_nothing_of_the_inside(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from functional_lm.serving import plain

    def breaks(*arguments: Any) -> Any:
        raise KeyError("a secret")

    monkeypatch.setattr(plain, "_model", breaks)
    answer = client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 500
    assert "a secret" not in answer.get_data(as_text=True)


def test_a_flood_of_twice_the_capacity_is_told_to_come_back_and_passes() -> None:
    with serving(engine={"slots": 2, "waiting": 4}) as service, listening(service, threads=30) as url:
        step, gate = service.engine.board.steps[True], threading.Event()

        def held(*given: Any) -> Any:
            time.sleep(0.01)
            if service.engine.stats()["running"] == 2:
                gate.wait(20)
            return step(*given)

        service.engine.board.steps[True] = held
        holders = [service.engine.submit(Request((1,), 90)) for _ in range(2)]
        while service.engine.stats()["running"] < 2:
            time.sleep(0.001)
        found: list[tuple[int, Any]] = []

        def ask(seed: int) -> None:
            body = json.dumps({"prompt": "The", "max_tokens": 5, "seed": seed, "temperature": 1}).encode()
            try:
                with urllib.request.urlopen(f"{url}/v1/completions", data=body, timeout=30) as answer:
                    found.append((200, (seed, json.loads(answer.read())["choices"][0]["text"])))
            except urllib.error.HTTPError as error:
                found.append((error.code, error.headers["Retry-After"]))

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
        for each in clients:
            each.start()
        began = time.monotonic()
        while len(found) < 6 and time.monotonic() < began + 20:
            time.sleep(0.01)
        assert found == [(429, "1")] * 6
        assert urllib.request.urlopen(f"{url}/health", timeout=10).status == 200  # it is full, not ill
        gate.set()
        for each in clients:
            each.join()
        texts = [text for code, text in found if code == 200]
        assert len(texts) == 4
        assert [len(list(holder)) for holder in holders] == [90, 90]
        assert all(text == offline("The", 5, 1.0, seed) for seed, text in texts)
        ask(99)
        assert found[-1] == (200, (99, offline("The", 5, 1.0, 99)))


@pytest.mark.parametrize("where", ["queue", "prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_leaves_is_noticed_wherever_its_request_is(where: str, stream: bool) -> None:
    """Before a byte of the answer has gone, too: nothing fails to be written, and still the slot comes back."""
    with serving(engine={"slots": 1, "waiting": 4}) as service, listening(service) as url:
        step, read = service.engine.board.steps[True], service.engine.board.read
        pace = {"queue": (0.2, 0.0), "prefill": (0.0, 0.8), "decode": (0.15, 0.0)}[where]
        service.engine.board.steps[True] = lambda *given: (time.sleep(pace[0]), step(*given))[1]
        service.engine.board.read = lambda *given: (time.sleep(pace[1]), read(*given))[1]  # type: ignore[method-assign]
        ended: list[tuple[int, str]] = []
        service.engine.listeners.append(lambda handle: ended.append((handle.made, handle.finish_reason)))
        holder = service.engine.submit(Request((1,), 90)) if where == "queue" else None
        while holder is not None and service.engine.stats()["waiting"]:
            time.sleep(0.005)  # until it has the slot: what waits below is the client's
        body = json.dumps({"prompt": list(range(3, 83)), "max_tokens": 10, "stream": stream, "logprobs": None})
        body = body.replace('"max_tokens": 10', '"max_tokens": 16') if where == "decode" else body
        raw = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
        connection.sendall(raw.encode())
        began = time.monotonic()
        state = "waiting" if where == "queue" else "running"
        while not service.engine.stats()[state] and time.monotonic() < began + 20:
            time.sleep(0.005)
        connection.close()
        while not ended and time.monotonic() < began + 20:
            time.sleep(0.005)
        made, reason = ended[0]
        assert reason == "cancelled"
        assert made < 16
        assert where == "decode" or made == 0 or where == "prefill"
        if holder is not None:
            assert service.engine.stats()["running"] == 1  # it left from the queue, before those that write
            holder.cancel()


def test_a_request_leaves_nothing_to_the_next(service: Service, client: Any) -> None:
    """Penalties, biases, keys of draws, adapters' rows: what came before in a slot is not seen."""
    strange = {"temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0, "frequency_penalty": 2.0,
               "logit_bias": {str(i): 50.0 for i in range(20)}, "seed": 77, "logprobs": 5}  # fmt: skip
    for _ in range(4):
        assert post(client, "/v1/completions", {"prompt": "The", "max_tokens": 30, **strange})[0] == 200
        served(client)
        _, answer = post(client, "/v1/completions", {"prompt": "The", "max_tokens": 9, "temperature": 1, "seed": 5})
        assert answer["choices"][0]["text"] == offline("The", 9, 1.0, 5)
        assert answer["choices"][0]["logprobs"] is None


def test_a_key_does_not_learn_what_another_has_asked(client: Any) -> None:
    prompt = [(11 * i) % 300 + 3 for i in range(80)]

    def cached(key: str) -> int:
        _, answer = post(client, "/v1/completions", {"prompt": prompt, "max_tokens": 1}, key)
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [cached(KEY), cached(KEY), cached("sk-other"), cached("sk-other")] == [0, 64, 0, 64]


def test_an_adapter_does_not_use_what_another_has_read() -> None:
    adapters = [drawn_adapter(seed) for seed in (1, 2)]
    with serving(("fox", "red", "blue"), engine={"bank": lora.stack(PARAMS, adapters), "slots": 1}) as service:
        client, prompt = create(service).test_client(), [(11 * i) % 300 + 3 for i in range(80)]
        for name, params in (
            ("red", lora.merge(PARAMS, adapters[0])), ("blue", lora.merge(PARAMS, adapters[1])), ("fox", PARAMS),
        ):  # fmt: skip
            body = {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0}
            for _ in range(2):
                _, answer = post(client, "/v1/completions", body, None)
                assert answer["choices"][0]["text"] == offline(prompt, 6, params=params)


def test_what_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    """A template, code for its class, a pickle: they lie in the folder, and the model is served without them."""
    place, trap = tmp_path / "model", tmp_path / "sprung"
    folder.save(place, PARAMS, CONFIG, TOKENIZER)
    code = f"open({str(trap)!r}, 'w').close()\n"
    template = "{{ self.__init__.__globals__.__builtins__.open(" + repr(str(trap)) + ", 'w') }}"
    for name in ("modeling_fox.py", "tokenization_fox.py", "configuration_fox.py", "__init__.py", "conftest.py"):
        (place / name).write_text(code)
    (place / "chat_template.jinja").write_text(template)
    (place / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((place / name).read_text())
        values |= {
            "auto_map": {"AutoModelForCausalLM": "modeling_fox.Fox", "AutoTokenizer": ["tokenization_fox.Fox"] * 2}
        }
        (place / name).write_text(json.dumps({**values, **({"chat_template": template} if "tok" in name else {})}))
    service = load(ServeFlags(model=str(place), compile=False, dtype="float32", slots=1))
    client = create(service).test_client()
    assert post(client, "/v1/completions", {"prompt": "The", "max_tokens": 4, "temperature": 0}, None)[1]["choices"]
    messages = [{"role": "user", "content": "{{ 7 * 7 }}"}]
    assert post(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 2}, None)[0] == 200
    service.engine.close()
    assert not trap.exists()
