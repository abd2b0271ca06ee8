"""Low-rank evolution of an MLP: eggroll beside VirtualLoRAES of EvoX, in the setting of EvoX's own benchmark.

    python experiments/benchmark_evox.py --python PYTHON_THAT_HAS_EVOX_1.4 [--widths 64,256,512] [--rounds 5]

An MLP 784-width-10 with ReLU, 1,000 rows in batches of 64, cross-entropy; 64 members, rank 8, sigma 0.1, Adam at 0.01,
20 steps after a first one. Data are drawn from keys: `noise` is what EvoX's benchmark has (normal inputs, classes at
random, so that there is nothing to learn in 20 steps), `classes` has ten centres to be told apart. Starting weights,
data and the batch of every step are the same on both sides; each side draws its own noise. EvoX's noise is B A and ours
B A / sqrt(rank): at equal sigma its members lie sqrt(8) further out, so it is run with sigma 0.1 / sqrt(8), too.

The sides take turns, each in a process of its own, a whole run of 20 steps each. Ours is compiled as `evolve` compiles
it; EvoX runs eagerly, as its benchmark does. The table shows the median of all steps; the loss of the best member of
the last step on its batch, which is what EvoX's benchmark prints; and that of the final centre on all rows. Losses are
medians over rounds, which differ in their keys.

Axes: P members, B rows, C classes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import turns
from torch import Tensor

ROWS, INPUTS, CLASSES, BATCH = 1000, 784, 10, 64
MEMBERS, RANK, SIGMA, LEARNING_RATE, STEPS = 64, 8, 0.1, 0.01, 20
SIDES = {"ours": SIGMA, "EvoX": SIGMA, "EvoX, sigma / sqrt(8)": SIGMA / math.sqrt(RANK)}
DATA = ("noise", "classes")


class Setting(NamedTuple):
    """Rows, classes, the rows of each step's batch [STEPS + 1, BATCH], and starting weights by layer."""

    x: Tensor
    y: Tensor
    order: Tensor
    weights: dict[str, dict[str, Tensor]]


class Run(NamedTuple):
    """Seconds of each step, the best member's loss on the last batch, the final centre's on all rows."""

    seconds: list[float]
    best: float
    centre: float


def make(data: str, width: int) -> dict[str, np.ndarray]:
    """A setting as arrays; weights as `torch.nn.Linear` has them, uniform within 1 / sqrt(inputs)."""
    from functional_lm import keys

    key = keys.key(0)

    def drawn(name: str, shape: tuple[int, ...], draw: Callable[..., Tensor] = keys.normal) -> Tensor:
        return draw(keys.fold_in_name(key, name), shape)

    y = keys.randint(keys.fold_in_name(key, "classes"), (ROWS,), 0, CLASSES, torch.int64)
    x = drawn("rows", (ROWS, INPUTS))
    if data == "classes":
        x = x + 0.1 * drawn("centres", (CLASSES, INPUTS))[y]
    epochs = -(-(STEPS + 1) // (ROWS // BATCH))
    orders = [keys.permutation(keys.fold_in(key, epoch), ROWS)[: ROWS // BATCH * BATCH] for epoch in range(epochs)]
    made = {"x": x, "y": y, "order": torch.cat(orders)[: (STEPS + 1) * BATCH].view(-1, BATCH)}
    for layer, (inputs, outputs) in {"0": (INPUTS, width), "2": (width, CLASSES)}.items():
        for name, shape in {"weight": (outputs, inputs), "bias": (outputs,)}.items():
            path = f"{layer}.{name}"
            made[path] = (2 * drawn(path, shape, keys.uniform) - 1) / math.sqrt(inputs)
    return {name: tensor.numpy() for name, tensor in made.items()}


def setting(path: str) -> Setting:
    with np.load(path) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    weights = {layer: {name: found[f"{layer}.{name}"] for name in ("weight", "bias")} for layer in ("0", "2")}
    return Setting(found["x"], found["y"], found["order"], weights)


def batches(given: Setting) -> list[tuple[Tensor, Tensor]]:
    return [(given.x[index], given.y[index]) for index in given.order]


def whole(given: Setting, weights: dict[str, dict[str, Tensor]]) -> float:
    """The loss of plain weights on all rows."""
    hidden = F.linear(given.x, weights["0"]["weight"], weights["0"]["bias"]).relu()
    return float(F.cross_entropy(F.linear(hidden, weights["2"]["weight"], weights["2"]["bias"]), given.y))


def timed(step: Callable[[int], Any]) -> list[float]:
    """The seconds of each step but the first."""
    step(0)
    found = []
    for number in range(1, STEPS + 1):
        start = time.perf_counter()
        step(number)
        found.append(time.perf_counter() - start)
    return found


def ours(given: Setting, sigma: float) -> Callable[[int], Run]:
    from functional_lm import keys, tree
    from functional_lm.compile import compiled
    from functional_lm.evolution import eggroll, gradient
    from functional_lm.model.linear import linear
    from functional_lm.training import optimizer

    numbers = {"sigma": sigma, "learning_rate": LEARNING_RATE, "beta1": 0.9, "beta2": 0.999}
    strategy = eggroll.eggroll(gradient.Settings(MEMBERS), RANK, optimizer.adamw(), numbers, compiled)

    def fitness(params: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = linear(params["0"], x).relu()
        return -F.cross_entropy(linear(params["2"], hidden), y)

    def member(fixed: Any, own: Any, x: Tensor, y: Tensor) -> Tensor:
        return fitness(tree.overlay(fixed, own), x, y)

    together = compiled(torch.vmap(member, in_dims=(None, 0, None, None)))
    every = batches(given)

    def run(seed: int) -> Run:
        state = strategy.init(keys.key(seed), given.weights)
        best = torch.zeros(())

        def step(number: int) -> None:
            nonlocal state, best
            asked = strategy.ask(state)
            found = together(asked.fixed, strategy.members(asked.shared, asked.own), *every[number])
            state, best = strategy.tell(state, found), found.max()

        seconds = timed(step)
        return Run(seconds, -float(best), whole(given, state.centre))

    return run


def evox(given: Setting, sigma: float) -> Callable[[int], Run]:
    # By their modules: in EvoX 1.4 the short names stand for noise of full rank.
    from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
    from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem
    from evox.utils import ParamsAndVector
    from evox.workflows import EvalMonitor, StdWorkflow
    from torch import nn

    width = len(given.weights["0"]["bias"])
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, CLASSES))
    model.load_state_dict(
        {f"{layer}.{name}": leaf for layer, node in given.weights.items() for name, leaf in node.items()}
    )
    start = ParamsAndVector(model).to_vector(dict(model.named_parameters())).detach()
    shapes = [tuple(leaf.shape) for leaf in model.parameters()]

    def run(seed: int) -> Run:
        torch.manual_seed(seed)
        algorithm = VirtualLoRAES(shapes, RANK, MEMBERS, start.clone(), LEARNING_RATE, sigma, optimizer="adam")
        loss = nn.CrossEntropyLoss(reduction="none")
        problem = VirtualLoRAProblem(model, batches(given), loss, RANK)
        monitor = EvalMonitor(full_fit_history=True)
        workflow = StdWorkflow(algorithm, problem, monitor)
        seconds = timed(lambda number: workflow.step() if number else workflow.init_step())
        flat = ParamsAndVector(model).to_params(algorithm.center)
        centre = {layer: {name: flat[f"{layer}.{name}"] for name in node} for layer, node in given.weights.items()}
        return Run(seconds, float(monitor.latest_fitness.min()), whole(given, centre))

    return run


def worker(side: str, path: str) -> None:
    """Answer each line on standard input with a run; one before them warms up."""
    with torch.no_grad():
        run = (ours if side == "ours" else evox)(setting(path), SIDES[side])
        run(0)
        seeds: Iterator[int] = count(1)
        turns.serve("ready", lambda: run(next(seeds)))


def compare(python: str, data: str, width: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "setting.npz")
        arrays: dict[str, Any] = make(data, width)
        np.savez(path, **arrays)
        sides = {
            side: turns.started([sys.executable if side == "ours" else python, __file__, "--worker", side, path], True)
            for side in SIDES
        }
        found = {side: [Run(*run) for run in runs] for side, runs in turns.taken(sides, rounds).items()}
    middle = {side: statistics.median(one for run in runs for one in run.seconds) for side, runs in found.items()}
    for side, runs in found.items():
        best, centre = (statistics.median(getattr(run, what) for run in runs) for what in ("best", "centre"))
        print(
            f"| {data} | {width} | {side} | {1e3 * middle[side]:.1f} ms | {middle[side] / middle['ours']:.2f} | "
            f"{best:.3f} | {centre:.3f} |",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter that has EvoX 1.4")
    parser.add_argument("--widths", default="64,256,512")
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{MEMBERS} members, rank {RANK}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| data | width | side | a step | times ours | loss of the best member | of the centre, all rows |")
    print("|---|---|---|---|---|---|---|")
    for data in given.data.split(","):
        for width in map(int, given.widths.split(",")):
            compare(given.python, data, width, given.rounds)
    return None


if __name__ == "__main__":
    main()
