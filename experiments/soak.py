"""Kill training at random instants, go on, and compare bytes with a run that nobody killed.

    python experiments/soak.py --kills 100

One round is one run: dropout, accumulation, a mean of the weights, validations with patience, a checkpoint at every
other step. Its processes get SIGKILL after a random time, from before the first checkpoint to the writing of the
model, until one of them comes to the end; then every file that a run is made of has to be the same, bit for bit.
Rounds follow each other until there have been so many kills. Processes are forked from a server that has imported
torch, which is what makes a hundred of them affordable.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = {
    "compile": "false", "dtype": "float32", "device": "cpu", "threads": 1, "d_model": 32, "n_layers": 2, "n_heads": 2,
    "d_ff": 64, "max_len": 32, "vocab_size": 320, "batch_size": 4, "gradient_accumulation_steps": 2, "dropout": 0.1,
    "ema_decay": 0.9, "steps": 30, "warmup_steps": 5, "learning_rate": 0.01, "eval_every": 3, "eval_batches": 2,
    "patience": 1000, "save_every": 3, "keep": 2, "sample_tokens": 4, "val_fraction": 0.2, "spike": 3,
}  # fmt: skip
NONE = "no checkpoint yet"
# Of a finished run; times, rates and the sizes of logs are not the same.
COMPARED = ("model.safetensors", "config.json", "tokenizer.model", "data/text.bin", "data/text.index", "best")
SUMMARY = ("val_loss", "val_bits_per_byte", "val_tokens", "tokens", "steps", "skipped", "best_step", "ended")


class Soaked(NamedTuple):
    """What came of it."""

    kills: int
    rounds: int
    resumed: Counter[str]  # the newest checkpoint, as each killed process left it
    seconds: float


def words(**flags: Any) -> list[str]:
    return [word for name, value in {**FLAGS, **flags}.items() for word in (f"--{name}", str(value))]


def train(argv: list[str], log: str) -> None:
    """The command, in a process of its own."""
    from functional_lm.__main__ import COMMANDS
    from functional_lm.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(COMMANDS, ["pretrain", *argv]))


def stuck(argv: list[str], log: str) -> None:
    """The command with a batch that never comes: for those who press Ctrl-C twice."""
    from functional_lm.text import dataset

    def never(*arguments: Any) -> Any:
        print("stuck", flush=True)
        while True:
            time.sleep(0.01)

    setattr(dataset, "batch", never)  # noqa: B010 (a function of another form)
    train(argv, log)


def held(argv: list[str], log: str, gate: str) -> None:
    """The command with a disk that takes nothing of a checkpoint until there is a file `gate`."""
    from functional_lm import disk

    def waiting(operation: disk.Operation) -> Any:
        if threading.current_thread().name == "saver" and not Path(gate).exists():
            print("held", flush=True)
            while not Path(gate).exists():
                time.sleep(0.01)
        return operation.act(1.0)

    with disk.watched_by(waiting):
        train(argv, log)


def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch", "functional_lm.train", "functional_lm.training.loop", "tensorboardX"])
    return made


def begun(argv: list[str], log: Path) -> BaseProcess:
    process: BaseProcess = context().Process(target=train, args=(argv, str(log)))
    process.start()
    return process


def finished(argv: list[str], log: Path) -> None:
    process = begun(argv, log)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a process ended with {process.exitcode}:\n{log.read_text()[-2000:]}")


def facts(run: Path) -> dict[str, Any]:
    """Everything that has to be equal."""
    paths = [run / name for name in COMPARED] + sorted((run / "checkpoints").iterdir())[-1:]
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    found: dict[str, Any] = {str(file.relative_to(run)): file.read_bytes() for file in files}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    summary = json.loads((run / "summary.json").read_text())
    return {**found, "summary": {name: summary.get(name) for name in SUMMARY}}


def text(path: Path) -> Path:
    path.write_text("".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} lazy dogs.\n" for i in range(200)))
    return path


def soak(kills: int, folder: Path, seed: int = 0, quiet: bool = True, compile: bool = False, behind: int = 0) -> Soaked:
    """Kill so often; SystemExit at the first difference. With `compile` all processes run the compiled step.

    It goes on until `behind` of the kills have left a checkpoint: few of them may all come before the first one, where
    there is nothing to go on from.
    """
    draw, started, log = random.Random(seed), time.perf_counter(), folder / "log"
    data = {"data": text(folder / "text.txt"), "compile": str(compile).lower()}
    finished(words(**data, out=folder / "whole"), log)  # the server is up from here on
    shutil.rmtree(folder / "whole")
    begin = time.perf_counter()
    finished(words(**data, out=folder / "whole"), log)
    longest, expected = time.perf_counter() - begin, facts(folder / "whole")
    done, rounds, resumed = 0, 0, Counter[str]()

    def enough() -> bool:
        return done >= kills and done - resumed[NONE] >= behind

    while not enough():
        out = folder / f"round-{rounds}"
        while True:
            process = begun(words(**data, out=out), log)
            process.join(None if enough() else draw.uniform(0, 0.7 * longest))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            done += 1
            there = sorted((out / "checkpoints").glob("step-????????")) if out.exists() else []
            resumed[there[-1].name if there else NONE] += 1
        rounds += 1
        if process.exitcode != 0:
            raise SystemExit(f"a process ended with {process.exitcode}:\n{log.read_text()[-2000:]}")
        found = facts(out)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if different or any(out.rglob(".tmp-*")):
            raise SystemExit(f"after {done} kills {sorted(different)} of {out} differ from {folder / 'whole'}")
        shutil.rmtree(out)
        if not quiet:
            print(f"{done} kills, {rounds} runs, every byte the same", flush=True)
    return Soaked(done, rounds, resumed, time.perf_counter() - started)


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore"  # of semaphores that a killed process leaves
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="the compiled step, whose processes begin slowly")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = soak(given.kills, Path(temporary), given.seed, quiet=False, compile=given.compile)
    places = len(result.resumed)
    print(
        f"{result.kills} kills in {result.rounds} runs of {FLAGS['steps']} steps, at {places} different places: no byte"
    )
    print(f"differs ({result.seconds:.0f} s; {result.resumed[NONE]} kills before the first checkpoint)")
