"""Study (d): population-based training of 8 small models against grids of 8 learning rates, at equal steps.

    python experiments/study_pbt.py [--data stdlib] [--out runs/study-pbt]

All models begin at the same 8 sets of weights and read the same batches of bytes. Three ways to spend the steps:

- a grid: 8 constant learning rates, log-spaced over two decades,
- the same grid, each rate falling to nothing along a cosine,
- population-based training (arXiv 1711.09846): 8 rates drawn over the same two decades; every few steps the two worst
  go on from one of the two best, with its rate times or divided by 1.2, or one drawn anew.

Each way picks its best model by the loss on one half of the held-out text; the table has the loss on the other half.
Prints a table and writes a plot of the losses and of the rates that led to the winner.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import files, keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution import fitness, hyper
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import corpus, dataset, prepare, tokenizer
from functional_lm.training import optimizer, schedule, step
from functional_lm.training.population import with_numbers
from functional_lm.training.step import TrainState
from functional_lm.tree import Tree

MEMBERS, LOW, HIGH = 8, 3e-4, 3e-2
MIDDLE, SPREAD = math.sqrt(LOW * HIGH), math.sqrt(HIGH / LOW)


class Run(NamedTuple):
    """One way: steps taken, each member's loss on the text that chooses, and the rates that led to the chosen one."""

    name: str
    steps: list[int]
    losses: list[list[float]]
    rates: list[float]
    chosen: float  # loss on the text that chooses
    reported: float  # on the rest


class World(NamedTuple):
    """What all ways share."""

    config: ModelConfig
    batch: Callable[[int], Mapping[str, Tensor]]
    measure: Callable[[Tree], Tensor]  # stacked parameters -> [P] losses on the text that chooses
    report: Callable[[Tree], Tensor]  # the same on the rest
    steps: int
    every: int


def world(given: argparse.Namespace) -> World:
    """Bytes of the text, in windows of the model's length."""
    words = tokenizer.train([], "bytes", 0)
    config = ModelConfig(
        vocab_size=words.vocab_size, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_len=64, attention="standard"
    )
    data, _ = prepare.dataset_of(corpus.find(given.data), Path(given.out) / "data" / "text", words)
    train, held = dataset.split(data, 0.05, 0)
    objective = fitness.loss(config)
    scorer = compiled(torch.vmap(objective, in_dims=(0, None)))

    def tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(arrays[name]) for name in ("tokens", "targets")}

    def losses(first: int) -> Callable[[Tree], Tensor]:
        rows = [tensors(dataset.batch(held, number, 64, config.max_len, 1)) for number in range(first, first + 8)]
        return lambda params: -torch.stack([scorer(params, one) for one in rows]).mean(0)

    def batch(number: int) -> dict[str, Tensor]:
        return tensors(dataset.batch(train, number, given.batch_size, config.max_len, 0))

    return World(config, batch, losses(0), losses(8), given.steps, given.every)


def grid(name: str, at: World, rates: list[float], shape: schedule.Schedule) -> Run:
    """Members that know nothing of each other."""
    functions = _functions(at, shape)
    take = hyper.steps_of(functions, lambda function: compiled(function, donate=True))
    begun = [functions.init(_fresh(at, member), keys.key(member)) for member in range(MEMBERS)]
    states = with_numbers(tree.stack(begun), {"learning_rate": rates})
    steps, losses = [], []
    for first in range(0, at.steps, at.every):
        states = take(states, at.batch, first, at.every)
        steps.append(first + at.every)
        losses.append(at.measure(states.params).tolist())
        _say(name, steps[-1], losses[-1])
    best = min(range(MEMBERS), key=lambda member: losses[-1][member])
    at_steps = [
        rates[best] * float(shape(torch.tensor(done - at.every), torch.tensor(float(at.steps)))) for done in steps
    ]
    return Run(name, steps, losses, at_steps, losses[-1][best], float(at.report(states.params)[best]))


def population(at: World, key: Tensor) -> Run:
    """Exploit and explore after every `at.every` steps."""
    how = hyper.Settings(MEMBERS, SPREAD, exploit=0.25)
    functions, numbers = _functions(at, schedule.constant()), {"learning_rate": MIDDLE}
    strategy = hyper.pbt(how, functions, numbers)
    take = hyper.steps_of(functions, lambda function: compiled(function, donate=True))
    state = strategy.init(key, _fresh(at, 0))
    begun = tree.stack([_fresh(at, member) for member in range(MEMBERS)])
    state = state._replace(states=state.states._replace(params=begun))  # those of the grids
    steps, losses, measured = [], [], []
    trained: TrainState = state.states
    for first in range(0, at.steps, at.every):
        trained = take(state.states, at.batch, first, at.every)
        measured.append(-at.measure(trained.params))
        steps.append(first + at.every)
        losses.append((-measured[-1]).tolist())
        _say("population-based training", steps[-1], losses[-1])
        state = strategy.tell(state._replace(states=trained), measured[-1])
    best = min(range(MEMBERS), key=lambda member: losses[-1][member])
    rates = hyper.lineage(*hyper.history(key, measured, numbers, how), len(measured) - 1, best)["learning_rate"]
    name = "population-based training"
    return Run(name, steps, losses, rates, losses[-1][best], float(at.report(trained.params)[best]))


def _functions(at: World, shape: schedule.Schedule) -> step.Training:
    return step.training(at.config, optimizer.adamw(), shape, numbers={"total_steps": float(at.steps)})


def _fresh(at: World, member: int) -> Tree:
    return transformer.init(at.config, keys.fold_in(keys.key(0), member))


def _say(name: str, steps: int, losses: list[float]) -> None:
    print(f"  {name}: {steps:5} steps, losses {' '.join(f'{loss:.3f}' for loss in losses)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--out", default="runs/study-pbt")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=30, help="steps of a generation")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1, help="population-based trainings, each with draws of its own")
    given = parser.parse_args()
    started, at = time.perf_counter(), world(given)
    rates = [LOW * (HIGH / LOW) ** (i / (MEMBERS - 1)) for i in range(MEMBERS)]
    runs = [
        grid("grid of constant rates", at, rates, schedule.constant()),
        grid("grid of cosines", at, rates, schedule.cosine()),
    ]
    runs += [population(at, keys.key(seed)) for seed in range(given.seeds)]
    report(Path(given.out), runs)
    print(f"{time.perf_counter() - started:.0f} s in all")


def report(out: Path, runs: list[Run]) -> None:
    """The table, the plot, the curves as JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print("\n| 8 models | loss that chose (nats a byte) | loss on the rest | worst of the 8 | rate, first to last |")
    print("|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run.name} | {run.chosen:.3f} | **{run.reported:.3f}** | {max(run.losses[-1]):.3f} | "
            f"{run.rates[0]:.2g} to {run.rates[-1]:.2g} |"
        )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, run in enumerate(runs):
        color = f"C{number}"
        left.plot(run.steps, [min(losses) for losses in run.losses], color=color, label=f"{run.name}, best of 8")
        left.plot(run.steps, run.losses, color=color, linewidth=0.5, alpha=0.3)
        right.step(run.steps, run.rates, color=color, where="pre", label=run.name)
    best = min(min(losses) for run in runs for losses in run.losses)
    left.set(xlabel="step", ylabel="loss on the text that chooses, nats a byte", ylim=(best - 0.05, best + 1.2))
    right.set(xlabel="step", ylabel="learning rate that led to the winner", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    files.write_with(out / "pbt.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    pyplot.close(figure)
    files.write_text(out / "curves.json", json.dumps([run._asdict() for run in runs]) + "\n")
    print(f"\nthe plot is in {out / 'pbt.png'}")


if __name__ == "__main__":
    main()
