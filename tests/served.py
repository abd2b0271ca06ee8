"""A small model behind the server, for the tests of serving."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from functional_lm import keys, tree
from functional_lm.inference import generate as tokens
from functional_lm.inference import text as writing
from functional_lm.inference.engine import Engine
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.serving.app import Service, create
from functional_lm.serving.host import Host
from functional_lm.text import tokenizer as tokenizers

TEXT = "The quick brown fox jumps over the lazy dog. Ünïcödé, naïve café, 日本語 too!\n" * 30
TOKENIZER = tokenizers.train([TEXT], "bpe", 330)
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=32, n_layers=1, n_heads=4, max_len=96)
PARAMS = tree.map(lambda leaf: 3 * leaf, transformer.init(CONFIG, keys.key(0)))  # opinions strong enough to differ
KEY = "sk-it-is-me"


@contextlib.contextmanager
def serving(names: tuple[str, ...] = ("fox",), **how: Any) -> Iterator[Service]:
    """A service with an engine of its own, at rest in the end. `engine` of `how` goes to the engine."""
    engine = Engine(PARAMS, CONFIG, **{"slots": 3, "waiting": 20, "compile": False, **how.pop("engine", {})}).start()
    yield Service(engine, TOKENIZER, names, **how)
    engine.close()
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


@contextlib.contextmanager
def listening(service: Service, threads: int = 16) -> Iterator[str]:
    """Its address on a real socket."""
    host = Host(create(service), "127.0.0.1", 0, threads, service.body_bytes).start()
    yield f"http://127.0.0.1:{host.port}"
    host.close(1.0)


def post(client: Any, path: str, body: Any, key: str | None = KEY, **headers: str) -> tuple[int, Any]:
    """Status and answer (JSON if it is) of Flask's test client."""
    headers = headers if key is None else {"Authorization": f"Bearer {key}", **headers}
    answer = client.post(path, data=body if isinstance(body, (str, bytes)) else json.dumps(body), headers=headers)
    found = answer.get_json(silent=True) or answer.get_data(as_text=True)
    answer.close()
    return answer.status_code, found


def events(text: str) -> list[Any]:
    """The objects of a stream that has ended as it should."""
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def offline(prompt: str | list[int], count: int, temperature: float = 0.0, seed: int = 0, params: Any = PARAMS) -> str:
    """The same text without engine and server."""
    how = tokens.GenerateOptions(count, temperature, seed=seed, stop_ids=(TOKENIZER.eos_id,))
    return "".join(writing.stream(params, tokens.decoder(CONFIG, compile=False), TOKENIZER, prompt, how))


def drawn_adapter(seed: int, rank: int = 2) -> tree.Tree:
    """One that has been trained, so to say: B is not zero any more."""
    adapter = lora.init(PARAMS, "all-linear", rank, keys.key(seed))
    key = keys.key(seed + 100)
    return tree.map_named(
        lambda name, leaf: keys.normal(keys.fold_in_name(key, name), leaf.shape) if "lora_B" in name else leaf, adapter
    )
