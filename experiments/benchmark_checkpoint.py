"""What saving costs: steps with a checkpoint every 50 of them, in the background, beside steps with none.

    python experiments/benchmark_checkpoint.py --sizes 10,100

All in one process: 50 steps, then a save and as many steps as it takes to write, sync and hash, again and again. What
those steps and the copy took longer than as many usual steps (the median) is the cost of a save; the table shows it as
a share of 50 usual steps, its median and range, with the longest copy and how many steps a save lasted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from functional_lm import console, keys, tree
from functional_lm.compile import compiled
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import checkpoint, optimizer, schedule, step
from functional_lm.training.saving import Saver, Verified

# layers, width, feed-forward, vocabulary; rows, tokens in a row
SIZES = {
    1: (2, 128, 256, 4096, 4, 64),  # to see that it runs
    10: (6, 256, 1024, 16384, 8, 128),
    100: (12, 768, 2048, 19000, 8, 128),
}


def measured(millions: int, every: int, saves: int, folder: Path) -> list[str]:
    layers, width, wide, vocabulary, rows, length = SIZES[millions]
    config = ModelConfig(
        vocab_size=vocabulary, d_model=width, n_layers=layers, n_heads=width // 64, d_ff=wide, max_len=length
    )
    params = transformer.init(config, keys.key(0))
    functions = step.training(config, optimizer.adamw(), schedule.cosine(10, 0.1), torch.bfloat16)
    state = functions.init(params, keys.key(1))
    run = compiled(functions.train_step, donate=True)
    tokenizer, whole = tokenizers.train((), "bytes"), Verified(checkpoint.reason)

    def write(now: Any, memory: Any) -> None:
        whole.add(checkpoint.save(folder, now, config, tokenizer, memory))
        checkpoint.prune(folder, 2, whole)

    def batch(number: int) -> dict[str, torch.Tensor]:
        drawn = keys.randint(keys.key(number), (rows, length + 1), 0, vocabulary)
        return {"tokens": drawn[:, :-1].contiguous(), "targets": drawn[:, 1:].contiguous()}

    saver, batches = Saver(write), [batch(number) for number in range(8)]

    def timed(number: int) -> float:
        nonlocal state
        started = time.perf_counter()
        state, report = run(state, batches[number % 8])
        report["loss"].item()
        return time.perf_counter() - started

    for number in range(5):
        timed(number)
    plain: list[float] = []
    copies: list[float] = []
    beside: list[list[float]] = []
    for _ in range(saves):
        plain += [timed(number) for number in range(every)]
        started = time.perf_counter()
        saver.save(state, {})
        copies.append(time.perf_counter() - started)
        beside.append([])
        while saver.busy():
            beside[-1].append(timed(len(beside[-1])))
        saver.wait()
    usual = statistics.median(plain)
    costs = [
        100 * (copy + sum(times) - len(times) * usual) / (every * usual)
        for copy, times in zip(copies, beside, strict=True)
    ]
    size = sum(path.stat().st_size for path in (checkpoint.listing(folder)[-1]).iterdir())
    return [
        f"{tree.size(params) / 1e6:.1f} M", console.size(size), f"{1e3 * usual:.1f}", f"{1e3 * max(copies):.0f}",
        f"{statistics.median(map(len, beside)):.0f}", f"{statistics.median(costs):+.1f} %",
        f"{min(costs):+.1f} to {max(costs):+.1f} %",
    ]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", default="10,100", help="millions of parameters")
    options.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    options.add_argument("--saves", type=int, default=7)
    options.add_argument("--folder", help="disk to write to; the system's folder for temporary files if not given")
    given = options.parse_args()
    print(
        "| parameters | checkpoint | ms a step | longest copy, ms | steps beside a save | cost of saving every "
        f"{given.every} | range |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in map(int, given.sizes.split(",")):
        folder = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            print("| " + " | ".join(measured(size, given.every, given.saves, folder)) + " |", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
