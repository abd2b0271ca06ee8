"""The server under 1, 8 and 32 clients: time to first token, time per token, tokens/s, goodput; and what HTTP costs.

    python experiments/benchmark_server.py [--model DIR] [--layers 12] [--width 768] [--vocabulary 32000] [--slots 8]
        [--clients 1,8,32] [--requests 3] [--prompt 64] [--tokens 64] [--rounds 3] [--dtype bfloat16|float32|int8]

Random weights if no model is given (the numbers do not matter to the clock). Every client asks one streaming request
after the other, with prompts of their own. The same requests go through HTTP, sent by another process, and straight to
the engine from threads of this one; the two take turns, and the table has the medians over the rounds. A request is
good if its first token came within `--first` seconds and the others every `--each` seconds on average: goodput counts
the tokens of good ones. The cost of HTTP is the share of the engine's own tokens/s that is lost through it, the median
over the rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """One request: seconds to its first token and to its end, and its tokens."""

    first: float
    whole: float
    tokens: int


class Run(NamedTuple):
    """What all requests of one run did."""

    seconds: float
    requests: list[Timed]


def crowd(clients: int, requests: int, ask: Callable[[int], Timed]) -> Run:
    """So many clients, each with so many requests one after the other; `ask(number)` is one of them."""
    found: list[Timed] = []

    def client(number: int) -> None:
        found.extend([ask(number * requests + i) for i in range(requests)])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Run(time.perf_counter() - started, found)


def prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """Token ids that no other request begins with."""
    return [(number * 7919 + i * 104729 + i * i * number) % (vocabulary - 2) + 1 for i in range(length)]


def through_http(port: int, flags: dict[str, Any]) -> Run:
    """The crowd, over connections to the server: one thread that reads what comes and parses it afterwards.

    Clients live elsewhere; these share the processors with the server and take as little of them as they can.
    """
    waiting, found = selectors.DefaultSelector(), []

    def ask(client: int, request: int) -> None:
        number = client * flags["requests"] + request
        body = {"prompt": prompt(number, flags["prompt"], flags["vocabulary"]), "max_tokens": flags["tokens"]}
        body |= {"stream": True, "seed": number, "stream_options": {"include_usage": True}}
        text = json.dumps(body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(text)}"
        state: dict[str, Any] = {"client": client, "request": request, "started": time.perf_counter(), "parts": []}
        connection = socket.create_connection(("127.0.0.1", port), timeout=600)
        connection.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{text}".encode())
        waiting.register(connection, selectors.EVENT_READ, state)

    def ended(state: dict[str, Any]) -> Timed:
        answer = b"".join(state["parts"])
        said = re.search(rb'"completion_tokens": (\d+)', answer)
        assert said is not None, answer[:500]
        return Timed(state["first"] - state["started"], time.perf_counter() - state["started"], int(said[1]))

    started = time.perf_counter()
    for client in range(flags["clients"]):
        ask(client, 0)
    while waiting.get_map():
        for key, _ in waiting.select():
            connection, state = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            part = connection.recv(1 << 16)
            state["parts"].append(part)
            if "first" not in state and b"data: {" in part:
                state["first"] = time.perf_counter()
            if not part:
                waiting.unregister(connection)
                connection.close()
                found.append(ended(state))
                if state["request"] + 1 < flags["requests"]:
                    ask(state["client"], state["request"] + 1)
    return Run(time.perf_counter() - started, found)


def client_process(words: str) -> None:
    """The other process: asks, and prints what it measured."""
    flags = json.loads(words)
    print(json.dumps(through_http(flags["port"], flags)))


def row(name: str, runs: list[Run], first: float, each: float) -> str:
    """A line of the table."""
    every = [timed for run in runs for timed in run.requests]
    pace = [(timed.whole - timed.first) / max(1, timed.tokens - 1) for timed in every]
    good = [
        sum(t.tokens for t in run.requests if t.first <= first and (t.whole - t.first) / max(1, t.tokens - 1) <= each)
        / run.seconds
        for run in runs
    ]
    firsts = sorted(timed.first for timed in every)
    return (
        f"| {name} | {1e3 * statistics.median(firsts):.0f} | {1e3 * firsts[int(0.95 * (len(firsts) - 1))]:.0f} "
        f"| {1e3 * statistics.median(pace):.1f} | {speed(runs):.0f} | {statistics.median(good):.0f} |"
    )


def speed(runs: list[Run]) -> float:
    """Median tokens/s."""
    return statistics.median(sum(timed.tokens for timed in run.requests) / run.seconds for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name, value in (("layers", 12), ("width", 768), ("vocabulary", 32000), ("context", 512), ("slots", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("requests", 3), ("prompt", 64), ("tokens", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--first", type=float, default=1.0)
    parser.add_argument("--each", type=float, default=0.1)
    parser.add_argument("--pause", type=float, default=0.04)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "int8"))
    parser.add_argument("--compile", default="true", choices=("true", "false"))
    flags = parser.parse_args()
    measure(flags)


def measure(flags: argparse.Namespace) -> None:
    """Start the server, let the two ways take turns, print the table."""
    import torch

    from functional_lm.inference.engine import Engine, Request
    from functional_lm.serving.answer import Answer
    from functional_lm.serving.app import Service, create
    from functional_lm.serving.host import Host

    weights, config, tokenizer = opened(flags)
    engine = Engine(weights, config, flags.slots, flags.context, waiting=256, compile=flags.compile == "true").start()
    service = Service(engine, tokenizer, ("model",), pause=flags.pause)
    host = Host(create(service), "127.0.0.1", 0, 300, 1 << 22).start()
    asked = {"port": host.port, "prompt": flags.prompt, "tokens": flags.tokens, "vocabulary": config.vocab_size}

    def outside(clients: int) -> Run:
        words = json.dumps({**asked, "clients": clients, "requests": flags.requests})
        done = subprocess.run([sys.executable, __file__, "--as-client", words], capture_output=True, check=True)
        seconds, requests = json.loads(done.stdout)
        return Run(seconds, [Timed(*timed) for timed in requests])

    def inside(clients: int) -> Run:
        def ask(number: int) -> Timed:
            ids = tuple(prompt(number, flags.prompt, config.vocab_size))
            handle = engine.submit(Request(ids, flags.tokens, seed=number, stop_ids=(tokenizer.eos_id,)))
            answer = Answer(handle, tokenizer)
            started = time.perf_counter()
            first = 0.0
            for _ in answer:
                first = first or time.perf_counter() - started
            return Timed(first, time.perf_counter() - started, answer.tokens)

        return crowd(clients, flags.requests, ask)

    print(
        f"{sum(leaf.numel() for leaf in leaves(weights)) / 1e6:.0f}M numbers, {flags.dtype}, {flags.slots} slots, "
        f"prompts of {flags.prompt} and answers of {flags.tokens} tokens, {torch.get_num_threads()} threads"
    )
    print("| clients | first token ms | its 95 % | ms a token | tokens/s | good tokens/s |\n|---|---|---|---|---|---|")
    for clients in map(int, flags.clients.split(",")):
        outside(1), inside(1)
        own: list[Any] = []
        http_: list[Any] = []
        for number in range(flags.rounds):
            for here in (True, False) if number % 2 else (False, True):  # who begins changes
                (own if here else http_).append((inside if here else outside)(clients))
        cost = statistics.median(1 - speed([two]) / speed([one]) for one, two in zip(own, http_, strict=True))
        print(row(f"{clients} in the process", own, flags.first, flags.each))
        print(row(f"{clients} through HTTP", http_, flags.first, flags.each), flush=True)
        print(f"    HTTP costs {100 * cost:.1f} %", file=sys.stderr)
    host.close()
    engine.close()


def opened(flags: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Weights as the engine wants them, their architecture, and a tokenizer."""
    import torch

    from functional_lm import folder, keys
    from functional_lm.model import quantize
    from functional_lm.model.compute import decoding_copy
    from functional_lm.model.config import ModelConfig
    from functional_lm.model.quantize import Plan
    from functional_lm.model.transformer import init

    dtype = torch.float32 if flags.dtype == "float32" else torch.bfloat16
    if flags.model:
        params, config, tokenizer = folder.load(flags.model, quantized=True)
    else:
        config = ModelConfig(
            flags.vocabulary, flags.width, flags.layers, n_heads=flags.width // 64, max_len=flags.context
        )
        params, tokenizer = init(config, keys.key(0), dtype), numbers(flags.vocabulary)
    if flags.dtype == "int8":
        params = quantize.quantize(params, Plan(8))
    return decoding_copy(params, dtype), config, tokenizer


def numbers(size: int) -> Any:
    """A tokenizer of `size` words for a model that has learned none."""
    from functional_lm.text.interface import Table

    table: Any = Table([b" %d" % i for i in range(size)])
    table.eos_id, table.bos_id, table.special_ids = size - 1, 0, {}
    return table


def leaves(weights: Any) -> list[Any]:
    from functional_lm import tree

    return list(tree.leaves(weights))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-client"]:
        client_process(sys.argv[2])
    else:
        main()
