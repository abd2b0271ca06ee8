"""`python -m functional_lm.serve`: a model behind an API that clients already speak."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console
from functional_lm.cli import Command, main_single
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option
from functional_lm.training_flags import DEVICES

if TYPE_CHECKING:
    from functional_lm.serving.host import Door
    from functional_lm.serving.service import Service
    from functional_lm.tree import Tree


@dataclass(frozen=True)
class ServeFlags:
    """Flags of `api`."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    name: str | None = option(None, "what clients call it; the folder's name if not given")
    adapter: tuple[str, ...] = option((), "adapters of it (PEFT folders) as models of their own: NAME=DIR,NAME=DIR")
    any_base: bool = option(False, "use adapters that were trained on another base all the same")
    adapter_folder: str | None = option(None, "folder whose adapters clients may load while the server runs")
    max_adapters: int | None = option(
        None, "adapters that there is room for; as many as --adapter names if not given", low=0
    )
    max_adapter_rank: int = option(16, "largest rank that there is room for, with --max_adapters", low=1)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = option(8000, "port to listen on", low=1, high=65535)
    slots: int = option(8, "texts that are written at once", low=1, high=1024)
    context: int | None = option(None, "longest prompt and answer together, tokens; the model's if not given", low=2)
    pause: float = option(
        0.04, "seconds between two events of a stream, in which what is written meanwhile goes out; 0: every token",
        low=0, high=10,
    )  # fmt: skip
    max_tokens: int | None = option(None, "most tokens that a request may ask for; the context's if not given", low=1)
    waiting: int = option(64, "requests that may wait; the next is told to come back (429)", low=1)
    seconds: float = option(300.0, "longest time of a request", above=0)
    drain_seconds: float = option(30.0, "time to finish what is being written at the end", low=0)
    threads: int | None = option(
        None, "connections served at once; slots and waiting together and 16 more if not given", low=1
    )
    body_bytes: int = option(4 << 20, "largest body of a request", low=1)
    api_key: tuple[str, ...] = option((), "keys that clients have to show, commas between; none: everybody may ask")
    cors: tuple[str, ...] = option((), "origins whose pages may ask, commas between; *: all")
    guesses: int = option(
        0,
        "tokens that a step reads ahead on the chance that the text repeats itself; the texts stay the same",
        low=0,
        high=16,
    )
    reuse: bool = option(True, "read a prompt from where it differs from what a slot still holds")
    dtype: str = option("auto", "precision of weights and cache", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "where to run", choices=DEVICES)
    compile: bool = option(True, "compile reading and writing (eager where no C++ compiler is found)")


def run(flags: ServeFlags) -> int:
    """Listen, load, compile, serve until SIGTERM or Ctrl-C, then finish what is being written."""
    started = time.perf_counter()
    try:
        with console.announced("opening the libraries"):
            from functional_lm.serving import host
            from functional_lm.serving.app import create
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'functional_lm[serve]'") from error
    threads = flags.threads if flags.threads is not None else flags.slots + flags.waiting + 16
    if threads <= flags.slots + flags.waiting:
        raise UsageError(
            f"threads is {threads}; above {flags.slots + flags.waiting} (slots and waiting) others can be told to wait"
        )
    host.log_to()
    door = host.Door()
    listening = host.Host(door, flags.host, flags.port, threads, flags.body_bytes).start()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    service = load(flags, door)
    door.app = create(service)
    console.say(
        f"serving {', '.join(service.names)} on http://{flags.host}:{flags.port} ({flags.slots} slots; Ctrl-C ends), "
        f"ready after {time.perf_counter() - started:.1f} s"
    )
    try:
        threading.Event().wait()
    finally:
        console.say("finishing what is being written")
        host.drain(service, flags.drain_seconds)
        listening.close()
    return 0


def load(flags: ServeFlags, door: Door | None = None) -> Service:
    """The model in an engine that has compiled; `door` says which phase it is."""

    from functional_lm import compile as compiling
    from functional_lm import folder, kernels, sampling_settings, tree
    from functional_lm.inference.engine import Engine
    from functional_lm.interop import peft
    from functional_lm.model.compute import decoding_copy
    from functional_lm.serving.service import Service

    @contextmanager
    def phase(name: str, quiet: bool = False) -> Iterator[None]:
        if door is not None:
            door.reason = f"the server is starting: {name}"
        with console.announced(name, quiet=quiet):
            yield

    device = compiling.resolve_device(flags.device)
    dtype = compiling.resolve_dtype(flags.dtype, device)
    names = _names(flags)
    with phase(f"loading {flags.model}"):
        params, config, tokenizer = folder.load(flags.model, device, quantized=True)
        settings = sampling_settings.of_folder(flags.model)
        adapters = [peft.load_adapter(path, params, flags.any_base, device) for path in list(names.values())[1:]]
        bank = _bank(flags, params, adapters)
        bank = tree.map(lambda leaf: leaf.to(dtype) if leaf.dim() > 1 else leaf, bank)
    obstacle = compiling.obstacle(device) if flags.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    compile = flags.compile and obstacle is None
    with_kernels = compile and device.type == "cpu"
    if with_kernels:
        with phase("opening the decoding kernels"):
            obstacle = kernels.obstacle()
        if obstacle:
            console.say(f"decoding without kernels of its own, somewhat slower: {obstacle}")
    with phase("laying out the weights"):
        scaled = any(name.endswith("lora_gain") for name in tree.flatten(bank))  # DoRA: products of their own
        weights = kernels.prepared(decoding_copy(params, dtype, fuse=not scaled), with_kernels)
    engine = Engine(
        weights,
        config,
        flags.slots,
        flags.context,
        flags.waiting,
        compile,
        bank,
        len(adapters),
        flags.reuse,
        flags.guesses,
    )
    engine.start(lambda name: phase(f"compiling {name}", quiet=not compile))
    service = Service(engine, tokenizer, tuple(names), flags.api_key, flags.seconds, flags.body_bytes)
    service.settings = settings
    service.max_tokens, service.origins, service.pause = flags.max_tokens, flags.cors, flags.pause
    if flags.adapter_folder is not None:
        digest = None if flags.any_base else tree.digest(params)
        service.open_adapter = peft.opener(flags.adapter_folder, params, digest, device)
    return service


def _bank(flags: ServeFlags, params: Tree, adapters: list[Any]) -> Tree:
    """Room for the adapters that are there, and for those that may come."""
    from functional_lm.model import lora

    if flags.adapter_folder is not None and not flags.max_adapters:
        raise UsageError("--adapter_folder needs --max_adapters: how many there is room for")
    if flags.max_adapters:
        return lora.room(params, adapters, flags.max_adapters, flags.max_adapter_rank)
    return lora.stack(params, adapters) if adapters else {}


def _names(flags: ServeFlags) -> dict[str, str]:
    """What clients call the model and its adapters, and where they are; the model first."""
    names = {flags.name or Path(flags.model).resolve().name: flags.model}
    for word in flags.adapter:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--adapter {word!r} is not NAME=DIR")
        if name in names:
            raise UsageError(f"--adapter {word!r}: there is a model {name!r} already")
        names[name] = path
    return names


COMMAND = Command(
    "api",
    "serve a model over HTTP, in OpenAI's form",
    ServeFlags,
    run,
    details="Routes: /v1/completions, /v1/chat/completions, /v1/models, /v1/load_lora_adapter, "
    "/v1/unload_lora_adapter, /generate, /tokenize, /detokenize, /health, /stats, /metrics, /openapi.json, and a page "
    "for people at /.",
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.serve"))
