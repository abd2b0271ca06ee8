"""Generation against transformers' compiled static cache: the same weights, several requests at once.

    python experiments/benchmark_generation.py [--shapes 109M] [--dtype bfloat16] [--requests 1,8] [--tokens 100]
        [--rounds 5]

Needs `transformers`. Makes a model with random weights, exports it for transformers, and lets the sides take turns,
each in a process of its own. Each request has a prompt of 100 tokens and wants `--tokens` more, the likeliest
ones. The engine gets all requests at once; transformers, whose `generate` knows no request that comes later, gets them
one after the other, and, as a third side, as one batch, which they can only be because they have one length here. The
times hold reading the prompts. That all are the same model is seen from the first tokens that they say.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns
from benchmark_decoding import CONTEXT, PROMPT, SHAPES, shaped

Texts = list[list[int]]
Run = Callable[[Texts], Texts]


def prompts(count: int, vocabulary: int) -> Texts:
    import torch

    from functional_lm import keys

    drawn: Texts = keys.randint(keys.key(count), (count, PROMPT), 0, vocabulary - 1, torch.int64).tolist()
    return drawn


def ours(folder: Path, dtype: str, requests: int, count: int) -> Run:
    import torch

    from functional_lm import folder as folders
    from functional_lm.inference.engine import Engine, Request
    from functional_lm.model.compute import decoding_copy

    params, config, _ = folders.load(folder / "model")
    engine = Engine(decoding_copy(params, getattr(torch, dtype)), config, requests, reuse=False)
    engine.start(scored=(False,), plain=(True,))

    def run(texts: Texts) -> Texts:
        return [list(handle) for handle in [engine.submit(Request(tuple(text), count, 0.0)) for text in texts]]

    return run


def theirs(folder: Path, dtype: str, batch: int, count: int) -> Run:
    """transformers, `batch` texts a call."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=getattr(torch, dtype)).eval()
    how = CompileConfig(mode="default")
    how._compile_all_devices = True  # type: ignore[assignment]
    settings: dict[str, Any] = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
    }
    settings |= {"cache_implementation": "static", "compile_config": how}

    def run(texts: Texts) -> Texts:
        said = []
        for start in range(0, len(texts), batch):
            ids = torch.tensor(texts[start : start + batch])
            with torch.no_grad():
                said += model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, PROMPT:].tolist()
        return said

    return run


def worker(side: str, folder: str, shape: str, dtype: str, requests: int, count: int) -> None:
    """Say the first tokens of all texts, then the seconds of each round."""
    if side == "functional_lm":
        run = ours(Path(folder), dtype, requests, count)
    else:
        run = theirs(Path(folder), dtype, 1 if "one by one" in side else requests, count)
    texts = prompts(requests, SHAPES[shape][-1])
    head = [text[:3] for text in run(texts)]

    def once() -> float:
        started = time.perf_counter()
        run(texts)
        return time.perf_counter() - started

    once()
    turns.serve(head, once)


def compare(folder: Path, shape: str, dtype: str, requests: int, count: int, rounds: int) -> None:
    """A row of the table for each side."""
    names = ["functional_lm", "transformers, one by one", *(["transformers, one batch"] if requests > 1 else [])]
    command = [sys.executable, __file__, "--worker"]
    given = [str(folder), shape, dtype, str(requests), str(count)]
    sides = {name: turns.started([*command, name, *given], quiet=True) for name in names}
    median = {name: statistics.median(found) for name, found in turns.taken(sides, rounds).items()}
    for name, seconds in median.items():
        alike = sum(one == other for one, other in zip(sides[name].head, sides["functional_lm"].head))
        print(
            f"| {shape} {dtype} | {requests} | {name} | {requests * count / seconds:.0f} "
            f"| **{seconds / median['functional_lm']:.2f}** | {alike} of {requests} |",
            flush=True,
        )


def write(folder: Path, shape: str) -> None:
    import torch

    from functional_lm import folder as folders
    from functional_lm import keys
    from functional_lm.interop import hugging_face
    from functional_lm.model.transformer import init
    from functional_lm.text import tokenizer

    config = shaped(shape)
    words = tokenizer.train([Path(__file__).read_text(encoding="utf-8") * 5], vocab_size=400)
    folders.save(folder / "model", init(config, keys.key(0), torch.float32), config, words)
    hugging_face.export(folder / "model", folder / "exported")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        side, folder, shape, dtype, requests, count = sys.argv[2:]
        return worker(side, folder, shape, dtype, int(requests), int(count))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="109M")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--requests", default="1,8")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    if PROMPT + flags.tokens > CONTEXT:
        sys.exit(f"--tokens is {flags.tokens}; behind a prompt of {PROMPT} there is room for {CONTEXT - PROMPT}")
    import torch
    import transformers

    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    print(f"{machine}, transformers {transformers.__version__}")
    print("| model | requests at once | | tokens/s | time beside functional_lm | same beginning |")
    print("|---|---|---|---|---|---|")
    for shape in flags.shapes.split(","):
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), shape)
            for side_by_side in map(int, flags.requests.split(",")):
                compare(Path(name), shape, flags.dtype, side_by_side, flags.tokens, flags.rounds)
    return None


if __name__ == "__main__":
    main()
