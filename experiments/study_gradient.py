"""Study (b): how well a population's estimate points along the gradient, by its size and the rank of its noise.

    python experiments/study_gradient.py [--out runs/study-gradient]

A small transformer is trained briefly on the standard library's source. Then, on one batch, the cosine between the
true gradient of its loss and the estimate ĝ = 1/(2Nσ) Σ (f(θ + σEᵢ) - f(θ - σEᵢ)) Eᵢ of N = P/2 antithetic pairs is
measured for noise of rank 1 and 4 (EGGROLL) and of full rank (OpenAI-ES), all leaves perturbed, against what follows
for a linear fitness f = ⟨g, θ⟩:

    cos = ⟨ĝ, g⟩ / |ĝ| |g| ≈ √(N / (N + D + 1 + Σ wₗ (2 mₗ + 2 nₗ + 2) / r))

of D numbers, where the sum goes over the matrices [mₗ, nₗ] with low-rank noise, wₗ their share of |g|².

Derivation: E⟨ĝ, g⟩ = |g|², and E|ĝ|² = (1 - 1/N) |g|² + E[⟨g, E⟩² |E|²] / N. The last expectation is (D + 2) |g|² for
normal noise, Gaussian moments as in Nesterov and Spokoiny, "Random gradient-free minimization of convex functions"
(2017), section 2, who bound it. For one matrix of rank-r noise E = A Bᵀ/√r Wick's rule gives
((m + 2)(n + 2) + (r - 1)(mn + 2)) / r, which is mn + 2 plus (2m + 2n + 2) / r; leaves are independent of each other,
and add their sizes.

Prints two tables and draws gradient.png.

Axes: P members, N pairs, D numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import files, keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution import eggroll, fitness, gradient, openai, population, shaping, spaces
from functional_lm.evolution import strategy as common
from functional_lm.evolution.gradient import Perturbation
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import corpus
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import optimizer, schedule, step
from functional_lm.training.transformation import chain, scale_by_learning_rate
from functional_lm.tree import Tree

RANKS: dict[str, int | None] = {"rank 1": 1, "rank 4": 4, "full": None}
TIME, ROWS = 48, 2
PART = 128  # pairs whose noise is in memory at once


class Trained(NamedTuple):
    params: Tree
    config: ModelConfig
    batch: dict[str, Tensor]  # the one that everything is measured on
    loss: float


def pairs_of(rank: int | None) -> Perturbation:
    return openai.dense() if rank is None else eggroll.low_rank(rank)


# The model ------------------------------------------------------------------------------------------------------------


def trained(steps: int, vocab: int, width: int) -> Trained:
    """A model of the standard library's source, and rows that it has not seen."""
    text = "".join(itertools.islice(corpus.texts("stdlib"), 200))[:2_000_000]
    tokenizer = tokenizers.train([text], "bpe", vocab)
    ids = torch.tensor(tokenizer.encode(text))
    config = ModelConfig(vocab, d_model=width, n_layers=2, n_heads=2, d_ff=3 * width, max_len=64, attention="standard")
    functions = step.training(config, optimizer.adamw(), schedule.constant(20), numbers={"learning_rate": 3e-3})
    take, state = (
        compiled(functions.train_step, donate=True),
        functions.init(transformer.init(config, keys.key(0)), keys.key(1)),
    )

    def rows(key: Tensor, count: int, low: int, high: int) -> dict[str, Tensor]:
        starts = keys.randint(key, (count,), low, high - TIME - 1, torch.int64)
        whole = ids[starts[:, None] + torch.arange(TIME + 1)]
        return {"tokens": whole[:, :-1].contiguous(), "targets": whole[:, 1:].contiguous()}

    border = int(0.95 * len(ids))
    for number in range(steps):
        state, _ = take(state, rows(keys.fold_in(keys.key(2), number), 16, 0, border))
    batch = rows(keys.key(3), ROWS, border, len(ids))
    params = tree.copy(state.params)
    return Trained(params, config, batch, -float(fitness.loss(config)(params, batch)))


# Estimates ------------------------------------------------------------------------------------------------------------


def measuring(model: Trained, rank: int | None, size: int) -> Callable[[float], tuple[Tensor, Tensor]]:
    """`sigma -> (fitness [P], keys of the pairs [N, 2])`; compiled once, the noise is drawn inside the forward."""
    plain = chain(rate=scale_by_learning_rate())
    settings = gradient.Settings(size, noise="regenerated")
    strategy = gradient.estimating("study", settings, pairs_of(rank), plain)
    space = spaces.full(model.params)
    evaluate = population.evaluator(strategy, space, fitness.loss(model.config), torch.float32, PART, compiled)
    state = strategy.init(keys.key(10), space.start)
    own = common.member_keys(common.generation_key(state), size // 2)

    def measured(sigma: float) -> tuple[Tensor, Tensor]:
        at = state._replace(numbers={**state.numbers, "sigma": torch.tensor(sigma)})
        return evaluate(strategy.ask(at), model.batch), own

    return measured


def estimate(params: Tree, rank: int | None, own: Tensor, weights: Tensor) -> Tree:
    """Σ wᵢ Eᵢ of pairs, drawn again from their keys."""
    perturbation, shapes = pairs_of(rank), common.shapes_of(params)
    total = tree.zeros_like(params)
    for some, of in zip(own.split(PART), weights.split(PART)):
        noises = torch.vmap(lambda key: perturbation.draw(key, shapes))(some)
        total = tree.add(total, perturbation.sum(of, noises, shapes))
    return total


def cosine(a: Tree, b: Tree) -> float:
    return float(tree.dot(a, b) / tree.norm(a) / tree.norm(b))


def cosines(
    model: Trained, true: Tree, rank: int | None, found: Tensor, own: Tensor, sizes: Sequence[int], most: int,
    ranks: bool = False,
) -> dict[int, list[float]]:  # fmt: skip
    """By P, over up to `most` disjoint blocks of members; `ranks`: by centred ranks instead of the fitness itself."""
    made: dict[int, list[float]] = {}
    for size in sizes:
        for block in range(min(most, len(found) // size)):
            of = found[block * size : (block + 1) * size]
            shaped = shaping.centered_rank(of) if ranks else of
            weights = (shaped.view(-1, 2)[:, 0] - shaped.view(-1, 2)[:, 1]) / 2
            keys_of = own[block * size // 2 : (block + 1) * size // 2]
            made.setdefault(size, []).append(cosine(estimate(model.params, rank, keys_of, weights), true))
    return made


def law(true: Tree, rank: int | None, size: int) -> float:
    """The formula above."""
    flat, pairs = tree.flatten(true), size // 2
    whole = sum(float(leaf.double().square().sum()) for leaf in flat.values())
    more = 0.0
    for leaf in flat.values():
        if rank is not None and eggroll.factored(tuple(leaf.shape), rank):
            more += float(leaf.double().square().sum()) / whole * (2 * leaf.shape[0] + 2 * leaf.shape[1] + 2) / rank
    return math.sqrt(pairs / (pairs + tree.size(true) + 1 + more))


# The study ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study-gradient")
    parser.add_argument("--steps", type=int, default=300, help="of training, 16 rows each")
    parser.add_argument("--vocab", type=int, default=400)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--sigma", type=float, default=0.003)
    parser.add_argument(
        "--blocks", type=int, default=8, help="estimates of each size, where there are members for them"
    )
    parser.add_argument("--sizes", default="4,16,64,256,1024,4096", help="members P, even, the most of them last")
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    if sizes != sorted(set(sizes)) or any(size < 2 or size % 2 for size in sizes):
        parser.error(f"--sizes {given.sizes} are not even numbers, each larger than the one before")
    started = time.perf_counter()
    model = trained(given.steps, given.vocab, given.width)
    size = tree.size(model.params)
    print(f"{size} numbers, loss {model.loss:.3f} after {given.steps} steps ({time.perf_counter() - started:.0f} s)")
    objective = fitness.loss(model.config)
    true = torch.func.grad(lambda params: objective(params, model.batch))(model.params)
    found: dict[str, dict[int, list[float]]] = {}
    measured: dict[str, Callable[[float], tuple[Tensor, Tensor]]] = {}
    for name, rank in RANKS.items():
        measured[name] = measuring(model, rank, sizes[-1])
        values, own = measured[name](given.sigma)
        found[name] = cosines(model, true, rank, values, own, sizes, given.blocks)
        if name == "rank 1":
            found["rank 1, centred ranks"] = cosines(model, true, rank, values, own, sizes, given.blocks, ranks=True)
        print(f"  {name} ({time.perf_counter() - started:.0f} s)", flush=True)
    laws = {name: [law(true, rank, p) for p in sizes] for name, rank in RANKS.items()}
    table(found, laws, sizes)
    print(f"\n| σ | cosine at P = {sizes[-1]}, rank 1 | with centred ranks |\n|---|---|---|")
    for sigma in (0.001, 0.003, 0.01, 0.03, 0.1):
        values, own = measured["rank 1"](sigma)
        both = [cosines(model, true, 1, values, own, sizes[-1:], 1, ranks)[sizes[-1]][0] for ranks in (False, True)]
        print(f"| {sigma} | {both[0]:.3f} | {both[1]:.3f} |", flush=True)
    plot(Path(given.out), found, laws, sizes, size)
    print(f"{time.perf_counter() - started:.0f} s in all")


def table(found: dict[str, dict[int, list[float]]], laws: dict[str, list[float]], sizes: Sequence[int]) -> None:
    names = list(found)
    print(f"\n| P | law, full | {' | '.join(names)} | law, rank 1 |\n|{'---|' * (len(names) + 3)}")
    for number, size in enumerate(sizes):
        cells = []
        for name in names:
            values = torch.tensor(found[name][size])
            spread = f" ± {values.std(correction=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        print(f"| {size} | {laws['full'][number]:.3f} | {' | '.join(cells)} | {laws['rank 1'][number]:.3f} |")


def plot(
    out: Path, found: dict[str, dict[int, list[float]]], laws: dict[str, list[float]], sizes: Sequence[int], size: int
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(sizes, laws["full"], color="grey", linestyle="--", label=f"√(N / (N + D + 1)), N = P / 2, D = {size}")
    for name, by_size in found.items():
        at = [p for p in sizes for _ in by_size[p]]
        line = axes.plot(sizes, [sum(by_size[p]) / len(by_size[p]) for p in sizes], linewidth=0.8, label=name)
        axes.scatter(at, [value for p in sizes for value in by_size[p]], s=8, color=line[0].get_color())
    axes.set(xscale="log", yscale="log", xlabel="members P", ylabel="cosine with the gradient")
    axes.set_xticks(sizes, [str(p) for p in sizes])
    axes.set_ylim(bottom=1e-3)
    axes.grid(alpha=0.3)
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    files.write_with(out / "gradient.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    pyplot.close(figure)
    print(f"\nthe plot is in {out / 'gradient.png'}")


if __name__ == "__main__":
    main()
