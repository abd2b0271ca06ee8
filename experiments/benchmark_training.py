"""Training speed against nanoGPT, both compiled, in turn in one run.

    python experiments/benchmark_training.py --nanogpt PATH_OF_A_CHECKOUT [--shapes s,m,x] [--rounds 3]

The same shapes and nearly the same parameter counts (two-matrix GELU, tied embeddings; nanoGPT's learned positions are
its own). Each side runs in a process of its own, with its own defaults: nanoGPT with torch.compile in float32, its CPU
path; this project's whole step (gradients, clipping, AdamW) as one donated graph with a bfloat16 compute copy where the
processor multiplies in it. Each side has compiled before, in another process: both start from their caches. After the
first step and five more the two take turns, and the table shows medians and the peak of memory from there on. A step
that compiles anything after the first ends the run with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns

RESET = Path("/proc/self/clear_refs")
# name: layers, width, heads, block, batch, vocabulary, steps a round
SHAPES = {
    "s": (4, 128, 4, 64, 12, 65, 60),
    "m": (6, 384, 6, 256, 8, 65, 8),
    "x": (4, 256, 8, 128, 16, 8192, 12),
}


def ours(shape: str) -> tuple[Callable[[], float], int]:
    """One step of this project's trainer, and the parameter count."""
    import torch

    from functional_lm import compile as compiling
    from functional_lm import keys, tree
    from functional_lm.model import transformer
    from functional_lm.model.config import ModelConfig
    from functional_lm.training import loop, optimizer, schedule, step

    layers, width, heads, block, batch, vocabulary, _ = SHAPES[shape]
    config = ModelConfig(
        vocab_size=vocabulary, d_model=width, n_layers=layers, n_heads=heads, max_len=block, feed_forward="gelu"
    )
    params = transformer.init(config, keys.key(0))
    dtype = compiling.resolve_dtype("auto", torch.device("cpu"))
    functions = step.training(config, optimizer.optimizer("adamw"), schedule.cosine(100, 0.1), dtype)
    state = functions.init(params, keys.key(1))
    tokens = keys.randint(keys.key(2), (batch, block + 1), 0, vocabulary, torch.int64)
    data = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    take = loop.whole_step(functions, lambda number: data, 1, compile=True)
    compiled: int | None = None

    def once() -> float:
        nonlocal state, compiled
        state, report = take(state, 0)
        if compiled is not None and compiling.graphs() != compiled:
            raise SystemExit(f"shape {shape}: a step after the first one compiled again")
        compiled = compiling.graphs()
        return float(report["loss"])

    return once, tree.size(params)


def nanogpt(shape: str, checkout: str) -> tuple[Callable[[], float], int]:
    """One step as in nanoGPT's train.py: forward, backward, clip, optimizer."""
    import torch

    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig

    layers, width, heads, block, batch, vocabulary, _ = SHAPES[shape]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block, vocabulary, layers, heads, width, dropout=0.0, bias=False))
    count = sum(p.numel() for p in model.parameters())
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    forward = torch.compile(model)
    tokens = torch.randint(vocabulary, (batch, block + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def once() -> float:
        _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return once, count


def worker(side: str, shape: str, checkout: str) -> None:
    """Answer each line on standard input with a round of step times, as JSON."""
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints
        once, count = ours(shape) if side == "functional_lm" else nanogpt(shape, checkout)
    (first,) = turns.timed(once, 1)
    for _ in range(5):
        once()
    gc.collect()
    if RESET.exists():
        RESET.write_text("5")  # Linux: the peak from here on, so that compiling does not count as training

    def answer() -> dict[str, Any]:
        return {"times": turns.timed(once, SHAPES[shape][-1]), "peak_mib": peak_mib()}

    turns.serve({"parameters": count, "first": first}, answer)


def peak_mib() -> float:
    """The largest resident set since the reset."""
    if not RESET.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def compare(shape: str, checkout: str, rounds: int) -> dict[str, dict[str, float]]:
    sides = {}
    for side in ("functional_lm", "nanogpt"):  # one after the other: compiling takes all cores
        command = [sys.executable, __file__, "--worker", side, "--shapes", shape, "--nanogpt", checkout]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)  # fills its caches
        sides[side] = turns.started(command)
    result = {}
    for side, answers in turns.taken(sides, rounds).items():
        times = [seconds for answer in answers for seconds in answer["times"]]
        result[side] = {
            **sides[side].head, "peak_mib": answers[-1]["peak_mib"], "ms": 1e3 * statistics.median(times)
        }  # fmt: skip
    return result


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="path of a nanoGPT checkout")
    parser.add_argument("--shapes", default="s,m,x")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.shapes, arguments.nanogpt)
    import torch

    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    head = "| shape | layers x width, T, B, V | parameters (nanoGPT) | ms a step (nanoGPT) | tokens/s | ratio |"
    print(f"{head} peak MiB (nanoGPT) |")
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        layers, width, _, block, batch, vocabulary, _ = SHAPES[shape]
        found = compare(shape, arguments.nanogpt, arguments.rounds)
        a, b = found["functional_lm"], found["nanogpt"]
        print(
            f"| {shape} | {layers} x {width}, {block}, {batch}, {vocabulary} "
            f"| {a['parameters'] / 1e6:.3f} M ({b['parameters'] / 1e6:.3f} M) | {a['ms']:.1f} ({b['ms']:.1f}) "
            f"| {batch * block / a['ms'] * 1e3:,.0f} | **{b['ms'] / a['ms']:.2f}** "
            f"| {a['peak_mib']:.0f} ({b['peak_mib']:.0f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
