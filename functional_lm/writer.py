"""A model that a command writes with: opened as the flags say, in an engine of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from functional_lm import compile as compiling
from functional_lm import console, folder, kernels
from functional_lm.decoding_flags import DecodingFlags
from functional_lm.inference.engine import Engine
from functional_lm.inference.generate import fitting
from functional_lm.inference.requests import Request
from functional_lm.interop.peft import load_adapter
from functional_lm.model import lora, quantize
from functional_lm.model.compute import decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.text.tokenizer import Tokenizer
from functional_lm.tree import Tree


class Opened(NamedTuple):
    """What the flags name, ready to write: a compute copy with its adapter merged, and whether to compile."""

    weights: Tree
    config: ModelConfig
    tokenizer: Tokenizer
    compile: bool


def opened(options: DecodingFlags) -> Opened:
    """The model, its adapter and the machine that the flags name."""
    device = compiling.resolve_device(options.device)
    dtype = compiling.resolve_dtype(options.dtype, device)
    params, config, tokenizer = folder.load(options.model, device, quantized=True)
    if options.adapter is not None:
        add = lora.attach if quantize.is_quantized(params) else lora.merge
        params = add(params, load_adapter(options.adapter, params, options.any_base, device))
    obstacle = compiling.obstacle(device) if options.compile else None
    if obstacle:
        console.note(f"running without compilation: {obstacle}")
    compile = options.compile and obstacle is None
    copy = kernels.prepared(decoding_copy(params, dtype), wanted=compile and device.type == "cpu")
    return Opened(copy, config, tokenizer, compile)


@contextmanager
def engine(
    model: Opened, requests: Sequence[Request], slots: int = 1, guesses: int = 0, others: bool = False
) -> Iterator[Engine]:
    """An engine for these requests: what they need is compiled, and said so. What runs at the end is given up.

    With `others` there will be more requests with the same settings, and other prompts.
    """
    made = Engine(
        model.weights, model.config, slots, waiting=max(1, len(requests)), compile=model.compile, guesses=guesses
    )
    with console.announced("compiling", quiet=not model.compile, file=sys.stderr):
        ways = sorted({request.plain for request in requests})
        made.start(scored=(False,), plain=ways, sizes=() if others else _sizes(made, requests))
    if long := [len(request.prompt) for request in requests if len(request.prompt) > made.longest]:
        console.note(f"of a prompt of {max(long)} tokens the model reads the last {made.longest}, its longest context")
    try:
        yield made
    finally:
        made.close(drain=False)


def _sizes(made: Engine, requests: Sequence[Request]) -> list[int]:
    """The chunks in which their prompts are read, and those of a text that outgrows the context."""
    lengths = [min(len(request.prompt), made.longest) for request in requests]
    if any(length + request.max_tokens > made.longest for length, request in zip(lengths, requests)):
        lengths.append(made.longest // 2 + 1)
    block = made.board.chunk
    whole = [block for length in lengths if length >= block]
    rests = [fitting(length % block, made.board.sizes) for length in lengths if length % block]
    return sorted({*whole, *rests})
