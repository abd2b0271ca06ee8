"""`python -m functional_lm.serve`: a model behind an API that clients already speak."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_lm import console
from functional_lm.cli import Command, main_single
from functional_lm.errors import UsageError
from functional_lm.options import REQUIRED, option
from functional_lm.training_flags import DEVICES

if TYPE_CHECKING:
    from functional_lm.serving.app import Service


@dataclass(frozen=True)
class ServeFlags:
    """Flags of `api`."""

    model: str = option(REQUIRED, "model folder", aliases=("model_path",))
    name: str | None = option(None, "what clients call it; the folder's name if not given")
    adapter: tuple[str, ...] = option((), "adapters of it (PEFT folders) as models of their own: NAME=DIR,NAME=DIR")
    any_base: bool = option(False, "use adapters that were trained on another base all the same")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = option(8000, "port to listen on", low=1, high=65535)
    slots: int = option(8, "texts that are written at once", low=1, high=1024)
    context: int | None = option(None, "longest prompt and answer together, tokens; the model's if not given", low=2)
    waiting: int = option(64, "requests that may wait; the next is told to come back (429)", low=1)
    seconds: float = option(300.0, "longest time of a request", above=0)
    threads: int = option(72, "connections served at once; more than slots and waiting together", low=1)
    api_key: tuple[str, ...] = option((), "keys that clients have to show, commas between; none: everybody may ask")
    dtype: str = option("auto", "precision of weights and cache", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "where to run", choices=DEVICES)
    compile: bool = option(True, "compile reading and writing (eager where no C++ compiler is found)")


def run(flags: ServeFlags) -> int:
    """Load, compile, serve until SIGTERM or Ctrl-C, then finish what is being written."""
    try:
        import waitress

        from functional_lm.serving.app import create
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'functional_lm[serve]'") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    service = load(flags)
    app = create(service)
    server: Any = waitress.create_server(
        app,
        host=flags.host,
        port=flags.port,
        threads=flags.threads,
        max_request_body_size=service.body_bytes,
        channel_timeout=60,
        channel_request_lookahead=1,  # lets a stream notice that its reader has gone
        ident="functional_lm",
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    console.say(
        f"serving {', '.join(service.names)} on http://{flags.host}:{flags.port} ({flags.slots} slots; Ctrl-C ends)"
    )
    try:
        server.run()
    finally:
        console.say("finishing what is being written")
        service.engine.close(drain=True)
        server.close()
    return 0


def load(flags: ServeFlags) -> Service:
    """The model in an engine that has compiled."""
    from functional_lm import compile as compiling
    from functional_lm import folder, tree
    from functional_lm.inference.engine import Engine
    from functional_lm.interop import peft
    from functional_lm.model import lora
    from functional_lm.model.compute import decoding_copy
    from functional_lm.serving.app import Service

    device = compiling.resolve_device(flags.device)
    dtype = compiling.resolve_dtype(flags.dtype, device)
    names = _names(flags)
    with console.announced(f"loading {flags.model}"):
        params, config, tokenizer = folder.load(flags.model, device, quantized=True)
        adapters = [peft.load_adapter(path, params, flags.any_base, device) for path in list(names.values())[1:]]
        bank = lora.stack(params, adapters) if adapters else {}
        bank = tree.map(lambda leaf: leaf.to(dtype) if leaf.dim() > 1 else leaf, bank)
        scaled = any(name.endswith("lora_gain") for name in tree.flatten(bank))  # DoRA: products of their own
        weights = decoding_copy(params, dtype, fuse=not scaled)
    obstacle = compiling.obstacle(device) if flags.compile else None
    if obstacle:
        console.say(f"running without compilation, several times slower: {obstacle}")
    compile = flags.compile and obstacle is None
    engine = Engine(weights, config, flags.slots, flags.context, flags.waiting, compile, bank)
    with console.announced("compiling", quiet=not compile):
        engine.start()
    return Service(engine, tokenizer, tuple(names), flags.api_key, flags.seconds)


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
    details="Routes: /v1/completions, /v1/chat/completions, /v1/models, /generate, /tokenize, /detokenize, /health, "
    "/stats, and a page for people at /.",
)

if __name__ == "__main__":
    sys.exit(main_single(COMMAND, prog="python -m functional_lm.serve"))
