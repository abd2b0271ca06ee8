"""Memory of `import` and `export` (to Hugging Face and to GGUF): how much of a model's largest file they hold at once.

    python experiments/benchmark_import.py [--gigabytes 1.3] [--shards 1] [--folder DIR]

Writes a Llama with random weights as another program would (in shards, if asked), then imports it and exports it as
the commands would, each in a process of its own, and prints the peak resident memory beside the largest shard. A
process that only imports torch is the floor; what is mapped from files counts as memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LIMIT = 1.3  # times the largest shard


def make(folder: Path, gigabytes: float, shards: int) -> int:
    """A Llama of about so many bytes in float32; returns the size of its largest shard."""
    import torch

    from functional_lm import folder as folders
    from functional_lm import tree
    from functional_lm.model.account import parameters
    from functional_lm.model.config import ModelConfig
    from functional_lm.model.transformer import abstract
    from functional_lm.text import tokenizer

    def config_of(layers: int) -> ModelConfig:
        return ModelConfig(16000, 1536, layers, n_heads=12, d_ff=4096, max_len=64, tie_embeddings=False)

    layers = next(n for n in range(1, 1000) if 4 * parameters(config_of(n)) >= gigabytes * 1e9)
    config, words = config_of(layers), tokenizer.train(["a word and another word\n" * 20], "bytes")
    shapes = tree.flatten(abstract(config))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        return 0.02 * torch.randn(shapes[name].shape, generator=generator)

    folder.mkdir(parents=True)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    share = sum(leaf.numel() for leaf in shapes.values()) / shards
    written = 0
    for name, leaf in shapes.items():
        parts[min(shards - 1, int(written / share))][name] = leaf
        written += leaf.numel()
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        tree.save_each(folder / file, part, draw)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    folders.save_description(folder, config, words, torch.float32)
    return max((folder / file).stat().st_size for file in set(places.values()))


def measure(what: str, source: str, out: str) -> None:
    """Run in a process of its own: prints peak bytes and seconds."""
    import torch  # noqa: F401 (the floor)

    from functional_lm.interop import gguf, hugging_face

    work: dict[str, Callable[[str, str], object]] = {
        "nothing": lambda source, out: None,
        "import": hugging_face.import_folder,
        "export": hugging_face.export,
        **{f"export as {kind}": partial(gguf.export, kind=kind) for kind in gguf.TYPES},
    }
    started = time.perf_counter()
    work[what](source, out)
    print(json.dumps([peak(), time.perf_counter() - started]))


def peak() -> int:
    """The most bytes that this process held. Linux's `ru_maxrss` begins with what the parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        largest = make(Path(place) / "model", options.gigabytes, options.shards)
        print(f"largest shard: {largest / 1e6:.0f} MB\n")
        print("| process | peak MB | of the largest shard | s |\n|---|---|---|---|")
        for what in ("nothing", "import", "export", "export as f32", "export as bf16", "export as q8_0"):
            command = [sys.executable, __file__, "--measure", what, f"{place}/model", f"{place}/{what}"]
            held, seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(f"| {what} | {held / 1e6:.0f} | {held / largest:.2f} | {seconds:.1f} |")
            failed |= held > LIMIT * largest
    print(f"\nthe limit of {LIMIT} is {'broken' if failed else 'kept'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
