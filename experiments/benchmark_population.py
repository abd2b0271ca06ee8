"""What a population costs beside a plain batched forward of the same tokens, all compiled, in turn in one process.

    python experiments/benchmark_population.py [--shapes facts,base] [--cases 16x4x64,64x1x64] [--ranks 1,4]

For each P x B x T and rank: tokens/s of one vmapped call over P members with noise of that rank on every matrix of
every layer, on embedding, output and norms, stored (an adapter for each member) and regenerated (drawn inside the
forward), divided by those of one forward of P B rows without noise; and the loop over members. All read the same
rows and give the loss of each member (the plain forward that of each group of B rows). Members are computed as many at
once as `evolve` computes, if `--chunk` says nothing else. `--memory` runs 1,024 rank-1 members and the plain forward
each in a process of its own, and compares their peaks.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import console, kernels, keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution import eggroll, fitness, gradient, memory, population, spaces
from functional_lm.model import transformer
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.tree import Tree

SHAPES = {
    "tiny": ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, max_len=64, tie_embeddings=False),
    "facts": ModelConfig(vocab_size=65, d_model=384, n_layers=6, n_heads=6, max_len=256, tie_embeddings=False),
    "base": ModelConfig(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, max_len=512),
}
CASES = {"tiny": "8x2x16", "facts": "16x4x64,64x1x64,128x1x16,32x4x128", "base": "8x1x64"}


def inputs(config: ModelConfig, rows: int, length: int) -> dict[str, Tensor]:
    tokens = keys.randint(keys.key(1), (rows, length + 1), 0, config.vocab_size, torch.int64)
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def plain(config: ModelConfig, params: Tree, members: int, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One forward of members x rows, as a function without arguments."""
    dtype = compiling.resolve_dtype("auto", torch.device("cpu"))
    copy, static = compute_copy(params, dtype), fitness.vmappable(config)
    whole = tree.map(lambda leaf: leaf.repeat(members, 1), batch)

    def forward(copy: Tree, batch: dict[str, Tensor]) -> Tensor:
        logits = transformer.forward(copy, batch["tokens"], static).float()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten(), reduction="none")
        return nll.view(members, -1).mean(-1)

    run = compiled(forward)
    return lambda: run(copy, whole)


def side(
    config: ModelConfig, params: Tree, members: int, batch: dict[str, Tensor], rank: int, noise: str, chunk: int
) -> Callable[[], Tensor]:
    """The evaluation of a generation that has been asked, vmapped, as a function without arguments."""
    dtype = compiling.resolve_dtype("auto", torch.device("cpu"))
    space = spaces.full(params)
    strategy = eggroll.eggroll(gradient.Settings(members, noise=noise), rank, wrap=compiled)
    candidates = strategy.ask(strategy.init(keys.key(0), space.start))
    objective = fitness.loss(config)
    prepared = population.preparation(strategy, space, dtype)(candidates)
    make = compiled(population.making(strategy, space, dtype, with_kernels=kernels.obstacle() is None))
    measure = compiled(population.measuring(space, objective, dtype))
    parts = list(population.chunks(candidates.own, members, population.share(members, chunk)))
    frozen, shared = prepared
    return lambda: torch.cat([measure(frozen, make(frozen, shared, own), batch) for own in parts])


def at_once(config: ModelConfig, members: int, batch: dict[str, Tensor], given: argparse.Namespace) -> int:
    """Members of a call: by the flag, or as `evolve` chooses them."""
    if given.chunk:
        return min(int(given.chunk), members)
    tokens, dtype = batch["tokens"].numel(), compiling.resolve_dtype("auto", torch.device("cpu"))
    each = memory.member_bytes(config, tokens, 0, dtype)
    return memory.automatic_chunk(members, each, tokens, memory.free_memory(torch.device("cpu")))


def timed(once: Callable[[], Any], seconds: float) -> list[float]:
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        once()
        found.append(time.perf_counter() - start)
    return found


def compare(name: str, case: str, rank: int, given: argparse.Namespace) -> None:
    config = SHAPES[name]
    members, rows, length = (int(part) for part in case.split("x"))
    params, batch = transformer.init(config, keys.key(0)), inputs(config, rows, length)
    chunk = at_once(config, members, batch, given)
    with torch.no_grad():
        single = side(config, params, 2, batch, rank, "stored", 1)
        sides: dict[str, Callable[[], Any]] = {
            "plain": plain(config, params, members, batch),
            "stored": side(config, params, members, batch, rank, "stored", chunk),
            "regenerated": side(config, params, members, batch, rank, "regenerated", chunk),
            "loop": lambda: [single() for _ in range(members // 2)],
        }
        times: dict[str, list[float]] = {what: [] for what in sides}
        for once in sides.values():
            once()
        for _ in range(given.rounds):
            for what, once in sides.items():
                times[what] += timed(once, given.seconds)
    middle = {what: statistics.median(found) for what, found in times.items()}
    rate = console.count(members * rows * length / middle["plain"])
    print(
        f"| {name} | {case} | {chunk} | {rank} | {1e3 * middle['plain']:.0f} ms, {rate} | "
        f"**{middle['plain'] / middle['stored']:.2f}** | **{middle['plain'] / middle['regenerated']:.2f}** | "
        f"{middle['loop'] / middle['stored']:.2f} |",
        flush=True,
    )


def peak(name: str, what: str, case: str, given: argparse.Namespace) -> None:
    """Run one side and print this process's peak memory beyond what it had before, MiB."""
    config = SHAPES[name]
    members, rows, length = (int(part) for part in case.split("x"))
    params, batch = transformer.init(config, keys.key(0)), inputs(config, rows, length)

    def once(members: int, chunk: int) -> None:
        run = (
            plain(config, params, members, batch)
            if what == "plain"
            else side(config, params, members, batch, 1, what, chunk)
        )
        run()

    with torch.no_grad():
        once(2, 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        once(members, at_once(config, members, batch, given))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peaks(name: str, case: str, given: argparse.Namespace) -> None:
    members = int(case.split("x")[0])
    print(f"{case} members x rows x tokens, rank 1; peaks beyond a small call\n")
    print("| | at once | MiB | of the plain forward's |\n|---|---|---|---|")
    whole = 0.0
    for what, chunk in (("plain", members), *itertools.product(("stored", "regenerated"), (0, members))):
        command = [sys.executable, __file__, "--peak", what, "--shapes", name, "--cases", case, "--chunk", str(chunk)]
        found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        whole = whole or found
        print(f"| {what} | {chunk or 'as evolve'} | {found:.0f} | {found / whole:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="facts", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--cases", default="", help="P x B x T of each, commas between; the shape's own if not given")
    parser.add_argument("--ranks", default="1,4")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a side in a round")
    parser.add_argument("--chunk", type=int, default=0, help="members of a call; 0: as evolve")
    parser.add_argument("--memory", action="store_true", help="peaks of 1,024 rank-1 members")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.shapes, given.peak, given.cases, given)
        return
    if given.memory:
        peaks(given.shapes, given.cases or "1024x1x64", given)
        return
    dtype = str(compiling.resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    print(
        f"{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}; ratios of tokens/s to the plain one\n"
    )
    print("| shape | P x B x T | at once | rank | plain forward | stored | regenerated | times the loop |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.shapes.split(","):
        for case in (given.cases or CASES[name]).split(","):
            for rank in given.ranks.split(","):
                compare(name, case, int(rank), given)


if __name__ == "__main__":
    main()
