"""nanoGPT's CPU recipe on tiny Shakespeare, against this project's AdamW and Muon: loss and wall time.

    python experiments/study_characters.py --nanogpt PATH_OF_A_CHECKOUT --text tinyshakespeare.txt [--steps 2000]

The recipe is that of nanoGPT's README for a machine without GPU: 4 layers, width 128, 4 heads, 12 rows of 64
characters, no dropout, 2000 steps. nanoGPT runs its own train.py (AdamW, peak rate 1e-3, torch.compile); this project
runs `functional_lm.train` with its defaults (rotary positions, RMSNorm, SwiGLU; AdamW and the schedule as they come)
and nothing changed but the shape, then again with Muon. Each in a process of its own, one after the other; all are
measured in the end over the last tenth of the text, in windows of 64 without overlap, by the same function. Wall time
is that of the whole command: imports, compiling, training, writing.

Prints a table and draws the curves to characters.png in --out.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

LAYERS, WIDTH, HEADS, BLOCK, BATCH = 4, 128, 4, 64, 12


class Found(NamedTuple):
    """What a training came to."""

    loss: float  # nats a character of the validation text
    parameters: int
    seconds: float  # of the whole command
    curve: list[tuple[int, float]]  # training loss by step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="path of a nanoGPT checkout; left out without")
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/characters"))
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("flags", nargs="*", help="further flags of functional_lm.train, after --")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    train, validation = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "train.txt").write_text(train, encoding="utf-8")
    found: dict[str, Found] = {}
    if arguments.nanogpt:
        found["nanoGPT, AdamW"] = nanogpt(arguments.nanogpt, text, validation, arguments.steps, arguments.out)
        show("nanoGPT, AdamW", found)
    for name in arguments.optimizers.split(","):
        found[f"functional_lm, {name}"] = ours(name, validation, arguments.steps, arguments.out, arguments.flags)
        show(f"functional_lm, {name}", found)
    draw(found, arguments.out / "characters.png")


def show(name: str, found: dict[str, Found]) -> None:
    if len(found) == 1:
        print("| run | parameters | nats a character | wall time |\n|---|---|---|---|")
    made = found[name]
    print(f"| {name} | {made.parameters / 1e6:.3f} M | **{made.loss:.4f}** | {made.seconds:.0f} s |", flush=True)


def windows(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets [B, BLOCK] of windows side by side; what is left over at the end is dropped for all."""
    count = (len(ids) - 1) // BLOCK
    inputs, targets = (ids[shift : shift + count * BLOCK].reshape(count, BLOCK) for shift in (0, 1))
    return [(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, count, 64)]


def mean_loss(logits: Callable, ids: Sequence[int]) -> float:
    """Nats a token of a function from ids [B, T] to logits [B, T, V], in float32."""
    import torch
    from torch.nn import functional as F

    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in windows(np.asarray(ids, np.int64)):
            predicted = logits(torch.from_numpy(inputs)).float().flatten(0, 1)
            total += float(F.cross_entropy(predicted, torch.from_numpy(targets).flatten(), reduction="sum"))
            count += targets.size
    return total / count


def ours(name: str, validation: str, steps: int, out: Path, flags: Sequence[str]) -> Found:
    """Train with this project's command, and measure."""
    folder = out / name
    command = [sys.executable, "-m", "functional_lm.train", "--data", str(out / "train.txt"), "--out", str(folder)]
    shape = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "d_ff": 344, "max_len": BLOCK}
    recipe = {"tokenizer_type": "char", "batch_size": BATCH, "steps": steps, "optimizer": name, "val_fraction": 0}
    quiet = {"sample_tokens": 0, "save_every": 0, "overwrite": "true"}
    for flag, value in {**shape, **recipe, **quiet}.items():
        command += [f"--{flag}", str(value)]
    started = time.perf_counter()
    subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    import functional_lm as flm

    params, config, tokenizer = flm.load(folder)
    loss = mean_loss(lambda ids: flm.forward(params, ids, config), tokenizer.encode(validation))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return Found(loss, summary["parameters"], seconds, [(row["step"], row["loss"]) for row in rows])


def nanogpt(checkout: Path, text: str, validation: str, steps: int, out: Path) -> Found:
    """Train with nanoGPT's own train.py on its own format, and measure."""
    copy = out / "nanogpt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in characters], np.uint16)
    table = dict(zip(characters, ids))
    encoded = np.array([table[c] for c in text], np.uint16)
    encoded[: int(0.9 * len(text))].tofile(data / "train.bin")
    encoded[int(0.9 * len(text)) :].tofile(data / "val.bin")
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": dict(zip(characters, range(65))),
    }
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=True"]
    recipe: dict[str, int | str] = {
        "eval_iters": 20,
        "eval_interval": steps,
        "log_interval": 10,
        "block_size": BLOCK,
        "batch_size": BATCH,
    }
    recipe |= {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "max_iters": steps, "lr_decay_iters": steps}
    recipe |= {"always_save_checkpoint": "True", "out_dir": "out"}
    command += [f"--{name}={value}" for name, value in recipe.items()] + ["--dropout=0.0"]
    started = time.perf_counter()
    said = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - started
    sys.path.insert(0, str(copy))
    import torch
    from model import GPT, GPTConfig

    checkpoint = torch.load(copy / "out" / "ckpt.pt", weights_only=False)  # written a moment ago by the run above
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): leaf for name, leaf in checkpoint["model"].items()})
    loss = mean_loss(lambda inputs: model(inputs, inputs)[0], [int(table[c]) for c in validation])
    parameters = sum(p.numel() for p in model.parameters())
    curve = [(int(step), float(value)) for step, value in re.findall(r"iter (\d+): loss ([\d.]+)", said)]
    return Found(loss, parameters, seconds, curve)


def draw(found: dict[str, Found], path: Path) -> None:
    """Training loss over steps, each a running mean of some 50 steps, and the final validation loss as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, (name, made) in enumerate(found.items()):
        steps, values = (np.array(column) for column in zip(*made.curve))
        width = max(1, round(50 / (steps[1] - steps[0])))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(
            steps[width - 1 :], smooth, color=f"C{color}", label=f"{name}: {made.loss:.3f} in {made.seconds:.0f} s"
        )
        axes.axhline(made.loss, color=f"C{color}", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="nats a character", ylim=(1.3, 2.8), title="tiny Shakespeare, characters")
    axes.grid(alpha=0.3)
    axes.legend(title="training loss (dotted: validation)")
    figure.savefig(path, dpi=110)
    print(f"\nthe curves are in {path}")


if __name__ == "__main__":
    main()
