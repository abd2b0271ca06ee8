"""A thousand requests of all kinds against the server: nothing is lost, nothing grows, every text is the offline one.

    python experiments/soak_server.py [--requests 1000] [--clients 12] [--slots 4] [--compile true]

A small model with random weights and two adapters behind a real socket. Clients ask with random prompts (many begin
alike), lengths, seeds, settings and adapters, in streams and not; some leave in the middle, some are too many. In the
end slots and queue are empty, the memory of the process is what it was after the first quarter, and every text that
came is the one that the plain loop of `generate` writes for the same request, one at a time, without engine and server
(of those who left: its beginning).
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from functional_lm import keys, tree
from functional_lm.inference import generate as tokens
from functional_lm.inference import text as writing
from functional_lm.inference.engine import Engine
from functional_lm.inference.generate import GenerateOptions
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.serving.app import Service, create
from functional_lm.serving.host import Host
from functional_lm.text import tokenizer as tokenizers

TOKENIZER = tokenizers.train((), "bytes")
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=32, n_layers=1, n_heads=4, max_len=192)
NAMES = ("base", "red", "blue")


@dataclass
class Found:
    """What came of it."""

    texts: list[tuple[dict[str, Any], str, bool]] = field(default_factory=list)  # asked, said, whole
    left: int = 0
    refused: int = 0
    other: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # resident bytes after each hundredth of the requests


def model() -> tuple[tree.Tree, list[tree.Tree]]:
    """Weights with opinions strong enough to differ, and two adapters."""
    params = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))
    adapters = []
    for seed in (1, 2):
        made, key = lora.init(params, "all-linear", 2, keys.key(seed)), keys.key(seed + 10)
        adapters.append(
            tree.map_named(
                lambda name, leaf, key=key: (
                    keys.normal(keys.fold_in_name(key, name), leaf.shape) if "lora_B" in name else leaf
                ),
                made,
            )
        )
    return params, adapters


@contextmanager
def served(slots: int = 4, waiting: int = 8, compile: bool = False) -> Iterator[tuple[Service, int]]:
    """A service at rest in the end, and its port."""
    params, adapters = model()
    engine = Engine(params, CONFIG, slots, waiting=waiting, compile=compile, bank=lora.stack(params, adapters)).start()
    service = Service(engine, TOKENIZER, NAMES)
    host = Host(create(service), "127.0.0.1", 0, slots + waiting + 16, 1 << 20).start()
    try:
        yield service, host.port
    finally:
        engine.close()
        host.close(1.0)


def drawn(draw: random.Random) -> dict[str, Any]:
    """A request as clients send them."""
    beginning = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2
    prompt = beginning[: draw.choice((0, 10, 64, 100, 150))] + "".join(draw.choices("abc é日", k=draw.randint(1, 20)))
    body = {"prompt": prompt, "model": draw.choice(NAMES), "seed": draw.randrange(2**40)}
    body |= {"max_tokens": draw.randint(1, 60), "temperature": draw.choice((0, 0.7, 1.0))}
    body |= draw.choice(({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"repetition_penalty": 1.2}))
    return {**body, "stream": draw.random() < 0.5}


def ask(port: int, body: dict[str, Any], leaves: int | None, found: Found) -> None:
    """One request, again and again until there is room for it."""
    while not asked(port, body, leaves, found):
        found.refused += 1
        time.sleep(0.05)


def asked(port: int, body: dict[str, Any], leaves: int | None, found: Found) -> bool:
    """False if there was no room; with `leaves` the client goes after so many pieces (0: before the answer)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if leaves == 0:
            found.left += 1
            return True
        answer = connection.getresponse()
        if answer.status == 429:
            return False
        if answer.status != 200:
            found.other.append(f"{answer.status} {answer.read()[:200]!r}")
        elif not body["stream"]:
            found.texts.append((body, json.loads(answer.read())["choices"][0]["text"], True))
        else:
            pieces, whole = [], True
            for line in answer:
                if line.startswith(b"data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if leaves is not None and len(pieces) >= leaves:
                    found.left, whole = found.left + 1, False
                    break
            found.texts.append((body, "".join(pieces), whole))
    except OSError as error:
        found.other.append(repr(error))
    finally:
        connection.close()
    return True


def soak(port: int, count: int, clients: int, seed: int = 0) -> Found:
    """`count` requests by so many clients at once."""
    found, draw, lock = Found(), random.Random(seed), threading.Lock()
    work = iter([(drawn(draw), draw.choice((None, None, None, 0, 1, 5))) for _ in range(count)])
    done = 0

    def client() -> None:
        nonlocal done
        while True:
            with lock:
                one = next(work, None)
                done += 1
                if done % max(1, count // 100) == 0:
                    found.memory.append(resident())
            if one is None:
                return
            ask(port, *one, found)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def at_rest(service: Service, seconds: float = 20.0) -> bool:
    """Whether slots and queue become empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stats = service.engine.stats()
        if stats["running"] == stats["waiting"] == 0:
            return True
        time.sleep(0.02)
    return False


def differing(found: Found) -> list[tuple[dict[str, Any], str, str]]:
    """Requests whose text is not the offline one: (asked, said, offline)."""
    params, adapters = model()
    models = dict(zip(NAMES, [params, *(lora.attach(params, adapter) for adapter in adapters)]))
    run = tokens.decoder(CONFIG, compile=False)
    wrong = []
    for body, said, whole in found.texts:
        own = {name: body[name] for name in body.keys() & {"top_k", "top_p", "min_p", "repetition_penalty"}}
        ids = TOKENIZER.encode(body["prompt"])
        most = min(body["max_tokens"], CONFIG.max_len - len(ids))
        how = GenerateOptions(most, body["temperature"], seed=body["seed"], stop_ids=(TOKENIZER.eos_id,), **own)
        text = "".join(writing.stream(models[body["model"]], run, TOKENIZER, ids or [TOKENIZER.bos_id], how))
        if said != text and (whole or not text.startswith(said)):
            wrong.append((body, said, text))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--waiting", type=int, default=8)
    parser.add_argument("--compile", default="true", choices=("true", "false"))
    flags = parser.parse_args()
    with served(flags.slots, flags.waiting, flags.compile == "true") as (service, port):
        soak(port, 50, flags.clients, seed=1)  # until every buffer has its size
        started = time.perf_counter()
        found = soak(port, flags.requests, flags.clients)
        seconds, rest = time.perf_counter() - started, at_rest(service)
        stats = service.engine.stats()
    quarter, end = found.memory[len(found.memory) // 4], found.memory[-1]
    wrong = differing(found)
    print(f"{flags.requests} requests by {flags.clients} clients in {seconds:.0f} s over {flags.slots} slots")
    print(f"{len(found.texts)} texts, {found.left} clients left, {found.refused} times told to come back (429)")
    print(f"other answers: {len(found.other)} {found.other[:3]}")
    print(f"at rest: {rest}; running {stats['running']}, waiting {stats['waiting']}")
    print(f"memory after a quarter {quarter / 2**20:.1f} MiB, at the end {end / 2**20:.1f} MiB")
    print(f"texts that differ from the offline ones: {len(wrong)} {wrong[:2]}")


if __name__ == "__main__":
    main()
