"""Decoding one sequence with weights of 16, 8 and 4 bits.

    python experiments/benchmark_quantized.py [--layers 8] [--width 1024] [--vocabulary 8192] [--tokens 100]

Makes a model with random weights (the numbers do not matter to the clock), compiles the decoder of `generate` for each
form of its weights, and lets the forms take turns, so that what else the machine does falls on all of them. Prints the
median time of a token and the bytes that a token reads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from functional_lm import kernels, keys, tree
from functional_lm.inference.generate import GenerateOptions, decoder, generate
from functional_lm.model import quantize
from functional_lm.model.account import parameters
from functional_lm.model.compute import decoding_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.quantize import Plan
from functional_lm.model.transformer import init

ROUNDS = 5


def times(run: Callable[[], Iterator[Any]], count: int) -> list[float]:
    """Seconds between one token and the next."""
    stream, found = run(), []
    next(stream)
    for _ in range(count):
        start = time.perf_counter()
        next(stream)
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=100)
    flags = parser.parse_args()

    config = ModelConfig(flags.vocabulary, flags.width, flags.layers, n_heads=flags.width // 64, max_len=256)
    params = init(config, keys.key(0), torch.bfloat16)
    forms = {
        "bfloat16": params,
        "int8": quantize.quantize(params, Plan(8)),
        "int4": quantize.quantize(params, Plan(4)),
    }
    copies = {name: kernels.prepared(decoding_copy(form, torch.bfloat16)) for name, form in forms.items()}
    print(f"{parameters(config) / 1e6:.0f}M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    run = decoder(config, truncating=False)
    options = GenerateOptions(flags.tokens + 1, temperature=0.8)
    found: dict[str, list[float]] = {name: [] for name in copies}
    for name, copy in copies.items():
        start = time.perf_counter()
        list(generate(copy, [1, 2, 3], run, GenerateOptions(2, temperature=0.8)))
        print(f"{name}: compiled in {time.perf_counter() - start:.0f} s")
    for _ in range(ROUNDS):
        for name, copy in copies.items():
            part = min(flags.tokens, 40)
            found[name] += times(lambda copy=copy: generate(copy, [1, 2, 3], run, options), part)  # type: ignore[misc]
    plain = statistics.median(found["bfloat16"])
    print("| weights | MiB | ms a token | GB/s | against bfloat16 |\n|---|---|---|---|---|")
    for name, copy in copies.items():
        size, median = tree.nbytes(copy), statistics.median(found[name])
        print(
            f"| {name} | {size / 2**20:.0f} | {1e3 * median:.1f} | {size / median / 1e9:.1f} | {plain / median:.2f} |"
        )


if __name__ == "__main__":
    main()
