"""Decoding against llama.cpp: one to sixteen sequences at once, the same shapes, in turn in one run.

    python experiments/benchmark_decoding.py [--shapes 109M,360M] [--weights bf16,int8] [--slots 1,4,8,16] [--rounds 5]

Needs `llama-cpp-python` (`make test-all` builds it). Makes a model with random weights, writes it as GGUF (bf16, and
q8_0 for int8), and lets the engine's step and llama.cpp's `llama_decode` take turns, each in a process of its own with
as many threads. Every sequence has a prompt of 100 tokens behind it. A step of the engine draws its tokens; llama.cpp
is given its next tokens and computes the logits alone. The share is that of the bytes of the weights, read once a step,
over the bandwidth at which this machine sums up 1 GiB in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import turns

# name: layers, width, heads, key/value heads, feed-forward, vocabulary
SHAPES = {
    "tiny": (2, 128, 2, 2, 256, 512),
    "109M": (12, 768, 12, 12, 2048, 32000),
    "360M": (24, 1024, 16, 16, 2816, 32000),
}
CONTEXT, PROMPT, STEPS = 512, 100, 20


def shaped(name: str) -> Any:
    from functional_lm.model.config import ModelConfig

    layers, width, heads, shared, inner, vocabulary = SHAPES[name]
    return ModelConfig(vocabulary, width, layers, heads, shared, d_ff=inner, max_len=CONTEXT, tie_embeddings=True)


def write(shape: str, folder: Path) -> None:
    """The model as a folder and as GGUF files."""
    import torch

    from functional_lm import folder as folders
    from functional_lm import keys
    from functional_lm.interop import gguf
    from functional_lm.model.transformer import init
    from functional_lm.text import tokenizer

    words = tokenizer.train([Path(__file__).read_text(encoding="utf-8") * 5], vocab_size=400)
    config = shaped(shape)
    params = init(config, keys.key(0), torch.bfloat16)
    folders.save(folder / "model", params, config, words)
    for kind in ("bf16", "q8_0"):
        gguf.export(folder / "model", folder / f"{kind}.gguf", kind)


Step = Callable[[], None]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def SILENT(level: int, text: bytes, data: None) -> None:
    """llama.cpp's log goes nowhere; the callback has to outlive the call that sets it."""


def ours(folder: Path, weights: str, slots: int) -> tuple[Step, int]:
    import torch

    from functional_lm import folder as folders
    from functional_lm import keys, tree
    from functional_lm.inference.board import Board
    from functional_lm.inference.requests import Request
    from functional_lm.model import quantize
    from functional_lm.model.compute import decoding_copy
    from functional_lm.model.quantize import Plan

    params, config, _ = folders.load(folder / "model")
    if weights == "int8":
        params = quantize.quantize(params, Plan(8))
    copy = decoding_copy(params, torch.bfloat16)
    board = Board(copy, config, slots, CONTEXT)
    with torch.no_grad():
        for slot in range(slots):
            prompt = keys.randint(keys.key(slot), (PROMPT,), 0, config.vocab_size, torch.int64).tolist()
            request = Request(tuple(prompt), max_tokens=CONTEXT - PROMPT, seed=slot)
            board.settle(slot, request, 0, 0)
            for start in range(0, PROMPT, board.chunk):
                logits, _ = board.read(slot, prompt, start, False)
            board.begin(slot, logits, request)

    def step() -> None:
        with torch.no_grad():
            board.step(range(slots), True)

    return step, tree.nbytes(copy)


def llama(folder: Path, weights: str, slots: int) -> tuple[Step, int]:
    import llama_cpp

    threads = threads_here()
    path = folder / f"{'bf16' if weights == 'bf16' else 'q8_0'}.gguf"
    llama_cpp.llama_log_set(SILENT, None)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = CONTEXT * slots, slots, 2048
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(2048, 0, 1)
    position = 0

    def put(rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, at, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    for sequence in range(slots):
        put([(7 + i, i, sequence, i == PROMPT - 1) for i in range(PROMPT)])
    position = PROMPT

    def step() -> None:
        nonlocal position
        put([(11 + sequence, position, sequence, True) for sequence in range(slots)])
        llama_cpp.llama_get_logits(context)
        position += 1

    return step, path.stat().st_size


def threads_here() -> int:
    import torch

    return torch.get_num_threads()


def worker(side: str, folder: str, weights: str, slots: int) -> None:
    """Answer each line on standard input with the times of STEPS steps."""
    step, size = (ours if side == "ours" else llama)(Path(folder), weights, slots)
    for _ in range(5):
        step()
    turns.serve({"bytes": size}, lambda: turns.timed(step, STEPS))


def bandwidth() -> float:
    """Bytes a second at which 1 GiB is summed up; the best of some times."""
    import torch

    big = torch.ones(2**28)
    return 2**30 / min(turns.timed(big.sum, 7))


def compare(folder: Path, weights: str, slots: int, rounds: int) -> dict[str, float]:
    """Tokens a second of both, and the bytes of weights that our step reads in a second."""
    command = [sys.executable, __file__, "--worker"]
    sides = {side: turns.started([*command, side, str(folder), weights, str(slots)]) for side in ("ours", "llama")}
    median = {side: statistics.median(chain.from_iterable(found)) for side, found in turns.taken(sides, rounds).items()}
    size = sides["ours"].head["bytes"]
    return {"ours": slots / median["ours"], "llama": slots / median["llama"], "rate": size / median["ours"]}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        side, folder, weights, slots = sys.argv[2:]
        return worker(side, folder, weights, int(slots))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="109M,360M")
    parser.add_argument("--weights", default="bf16,int8")
    parser.add_argument("--slots", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    import torch

    stream = bandwidth()
    machine = f"{threads_here()} threads, torch {torch.__version__}, {platform.machine()}"
    print(f"{machine}; a sum reads {stream / 1e9:.0f} GB/s")
    print("| shape | weights | slots | tokens/s | llama.cpp | ratio | GB/s of weights (share) |")
    print("|---|---|---|---|---|---|---|")
    for shape in flags.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write(shape, Path(folder))
            for weights in flags.weights.split(","):
                for rows in map(int, flags.slots.split(",")):
                    found = compare(Path(folder), weights, rows, flags.rounds)
                    ratio, rate = found["ours"] / found["llama"], found["rate"]
                    speeds = f"{found['ours']:.0f} | {found['llama']:.0f} | **{ratio:.2f}**"
                    read = f"{rate / 1e9:.0f} ({rate / stream:.0%})"
                    print(f"| {shape} | {weights} | {rows} | {speeds} | {read} |", flush=True)
    return None


if __name__ == "__main__":
    main()
