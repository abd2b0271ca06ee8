"""What a step of a low-rank adapter costs beside a step of full fine-tuning, both compiled, in turn in one process.

    python experiments/benchmark_lora.py [--shapes nano,small] [--layers 0] [--targets q_proj,k_proj,v_proj,o_proj]

The same rows (packed documents, a third of the tokens are targets), the same precision (bfloat16 where the processor
multiplies in it), AdamW for both. After the first step, which compiles, and three more, the two take turns; the table
shows medians, and what each side trains and keeps. `--layers N` shortens the architecture, the same for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch
import turns
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import console, keys, tree
from functional_lm.model import lora, transformer
from functional_lm.model.compute import freeze
from functional_lm.model.config import ModelConfig, preset
from functional_lm.training import loop, optimizer, schedule, step

# preset: rows, tokens in a row
SHAPES = {"nano": (8, 256), "small": (4, 256)}
WARM = 3


def rows(config: ModelConfig, count: int, time_: int) -> dict[str, Tensor]:
    """Random tokens in four documents a row, two thirds of the targets ignored."""
    one, two = keys.split(keys.key(2)).unbind()
    tokens = keys.randint(one, (count, time_ + 1), 0, config.vocab_size, torch.int64)
    targets = torch.where(keys.bernoulli(two, 1 / 3, (count, time_)), tokens[:, 1:], transformer.IGNORED)
    documents = (torch.arange(time_) // (time_ // 4)).expand(count, -1).to(torch.int32).contiguous()
    return {"tokens": tokens[:, :-1].contiguous(), "targets": targets, "documents": documents}


def side(config: ModelConfig, batch: dict[str, Tensor], adapter: tuple[int, list[str]] | None) -> tuple[Any, int, int]:
    """One compiled step as a function without arguments, the numbers that it trains, and the bytes of its state."""
    dtype = compiling.resolve_dtype("auto", torch.device("cpu"))
    params = transformer.init(config, keys.key(0))
    frozen = None
    if adapter is not None:
        rank, targets = adapter
        trained, constant = lora.split(lora.init(params, targets, rank, keys.key(1)))
        frozen = freeze(lora.attach(params, constant), trained, dtype)
        params = trained
    functions = step.training(config, optimizer.adamw(), schedule.cosine(10, 0.1), dtype, frozen=frozen)
    state = functions.init(params, keys.key(3))
    take = loop.whole_step(functions, lambda number: batch, 1, compile=True)

    def once() -> float:
        nonlocal state
        state, report = take(state, 0)
        return float(report["loss"])

    return once, tree.size(params), tree.nbytes((state.params, state.optimizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="nano,small")
    parser.add_argument("--layers", type=int, default=0, help="layers of the architecture; 0: the preset's")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in a round")
    given = parser.parse_args()
    print(f"rank {given.rank} on {given.targets}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| shape | layers x width, V, B x T | trained, full (adapter) | state, full (adapter) | ms a step | ratio |")
    print("|---|---|---|---|---|---|")
    for name in given.shapes.split(","):
        config = preset(name)
        config = dataclasses.replace(config, n_layers=given.layers or config.n_layers)
        batch = rows(config, *SHAPES[name])
        full, all_numbers, all_bytes = side(config, batch, None)
        adapter, numbers, size = side(config, batch, (given.rank, given.targets.split(",")))
        times: dict[Any, list[float]] = {full: [], adapter: []}
        for once in times:
            turns.timed(once, 1 + WARM)
        for _ in range(given.rounds):
            for once, found in times.items():
                found += turns.timed(once, given.steps)
        whole, part = (1e3 * statistics.median(found) for found in times.values())
        count, length = SHAPES[name]
        print(
            f"| {name} | {config.n_layers} x {config.d_model}, {config.vocab_size}, {count} x {length} "
            f"| {console.count(all_numbers)} ({console.count(numbers)}) "
            f"| {console.size(all_bytes)} ({console.size(size)}) | {whole:.0f} ({part:.0f}) | **{part / whole:.2f}** |",
            flush=True,
        )


if __name__ == "__main__":
    main()
