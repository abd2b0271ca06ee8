"""Study (a): exact match on arithmetic by supervised fine-tuning, by REINFORCE, and by evolution, at equal tokens.

    python experiments/study_evolution.py [--out runs/study-evolution]

A small transformer is pretrained briefly on sums written out ("47+85=132;") and then fine-tuned with supervision on a
few hundred of them, until more of the same no longer helps on problems that it has not seen. From there three ways go
on, each with the same number of tokens read and written:

- more supervised fine-tuning (all weights, the same problems),
- REINFORCE (arXiv 1909.08593's objective without its penalty: the reward is exact match, the baseline the mean of the
  other samples of the same problem), all weights,
- EGGROLL over a LoRA, whose fitness is exact match itself, which has no gradient.

The two that need no answers to imitate, only whether one is right, draw their problems from all there are but those
that are held out. Exact match is measured on held-out problems, greedily. Prints a table and writes a plot, and the
fine-tuned model with the evolved adapter as folders that can be served:

    python -m functional_lm.serve --model OUT/model --adapter sums=OUT/adapter
    curl localhost:8000/generate -d '{"model": "sums", "prompt": "#47+85=", "temperature": 0}'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_lm import files, folder, keys, tree
from functional_lm.compile import compiled
from functional_lm.evolution import answers, eggroll, gradient, spaces
from functional_lm.evolution.strategy import Candidates, unmoved
from functional_lm.interop import peft
from functional_lm.model import lora, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import optimizer, schedule, step
from functional_lm.tree import Tree

# Characters are tokens: 0-9 digits, then + = ; and the beginning.
PLUS, EQUALS, END, BEGIN = 10, 11, 12, 13
NEVER = 14  # a token that no text holds
PROMPT, ANSWER = 7, 4  # tokens: begin, two digits, +, two digits, =; three digits and the end
WIDTH = PROMPT + ANSWER - 1
CONFIG = ModelConfig(
    vocab_size=16, d_model=64, n_layers=2, n_heads=4, d_ff=192, max_len=32, attention="standard", positions="rope"
)


class Problems(NamedTuple):
    """Prompts [N, T] and answers [N, M], as tokens."""

    prompts: Tensor
    answers: Tensor


def problems(numbers: Tensor) -> Problems:
    """Sums of two numbers below 100, one for each entry of `numbers` [N] below 10000: `a = n // 100, b = n % 100`."""
    a, b = numbers // 100, numbers % 100
    total = a + b
    begin, plus, equals = (torch.full_like(a, token) for token in (BEGIN, PLUS, EQUALS))
    prompts = torch.stack([begin, a // 10, a % 10, plus, b // 10, b % 10, equals], -1)
    return Problems(prompts, torch.stack([total // 100, total // 10 % 10, total % 10, torch.full_like(a, END)], -1))


def supervised(given: Problems) -> dict[str, Tensor]:
    """Rows whose targets are the answers."""
    whole = torch.cat([given.prompts, given.answers], -1)
    targets = whole[:, 1:].clone()
    targets[:, : PROMPT - 1] = transformer.IGNORED
    return {"tokens": whole[:, :-1].contiguous(), "targets": targets}


def pick(pool: Tensor, count: int, key: Tensor) -> Problems:
    return problems(pool[keys.randint(key, (count,), 0, len(pool), torch.int64)])


class Run(NamedTuple):
    """One way: tokens seen and exact match on held-out problems, after each measurement."""

    name: str
    tokens: list[int]
    exact: list[float]


# Measuring ------------------------------------------------------------------------------------------------------------


def measurement(held_out: Problems) -> Callable[[Tree], float]:
    """Exact match of plain parameters, greedily, over all held-out problems."""
    space = spaces.full(transformer.init(CONFIG, keys.key(0)))
    how = answers.Answering(ANSWER, (), compile=False)
    answer = answers.answerer(unmoved(), space, CONFIG, how)
    last = torch.full((len(held_out.prompts),), PROMPT - 1)

    def exact(params: Tree) -> float:
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], params))
        written = answer(one, answers.Prompts(held_out.prompts, last), keys.key(0))[0]
        return float((written == held_out.answers).all(-1).double().mean())

    return exact


# The ways -------------------------------------------------------------------------------------------------------------


def train(
    name: str, params: Tree, batch: Callable[[int], dict[str, Tensor]], rate: float, steps: int, every: int,
    exact: Callable[[Tree], float], before: int = 0,
) -> tuple[Tree, Run]:  # fmt: skip
    """Supervised steps at a constant rate."""
    functions = step.training(CONFIG, optimizer.adamw(), schedule.constant(20), numbers={"learning_rate": rate})
    take = compiled(functions.train_step, donate=True)
    state, run = functions.init(tree.copy(params), keys.key(1)), Run(name, [before], [exact(params)])
    for number in range(1, steps + 1):
        rows = batch(number)
        state, _ = take(state, rows)
        if number % every == 0:
            run.tokens.append(before + number * rows["tokens"].numel())
            run.exact.append(exact(state.params))
            print(f"  {name}: {run.tokens[-1] / 1e6:6.2f} M tokens, exact match {run.exact[-1]:.3f}", flush=True)
    return tree.copy(state.params), run


def reinforce(
    params: Tree, pool: Tensor, rate: float, budget: int, count: int, samples: int, every: int,
    exact: Callable[[Tree], float], temperature: float = 1.0,
) -> Run:  # fmt: skip
    """Policy gradient on exact match; each problem is sampled several times, and the others' mean is the baseline."""
    space = spaces.full(params)
    how = answers.Answering(ANSWER, (), temperature, compile=True)
    answer = answers.answerer(unmoved(), space, CONFIG, how)

    def objective(
        copy: Tree, batch: Any, config: ModelConfig, key: Tensor | None, z_loss: float
    ) -> tuple[Tensor, dict[str, Any]]:
        logits = transformer.forward(copy, batch["tokens"], config)
        targets = batch["targets"]
        likely = torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        whole = (likely * (targets != transformer.IGNORED)).sum(-1)
        value = -(batch["advantage"] * whole).sum()
        return value, {"nll": value.detach(), "tokens": (targets != transformer.IGNORED).sum()}

    functions = step.training(
        CONFIG, optimizer.adamw(), schedule.constant(10), numbers={"learning_rate": rate, "weight_decay": 0.0},
        objective=objective,
    )  # fmt: skip
    take = compiled(functions.train_step, donate=True)
    state, run = functions.init(tree.copy(params), keys.key(1)), Run("REINFORCE", [0], [exact(params)])
    each = count * samples * (PROMPT + ANSWER - 1)
    for number in range(1, budget // each + 1):
        key = keys.fold_in(keys.key(7), number)
        asked = pick(pool, count, key)
        prompts, wanted = (x.repeat_interleave(samples, 0) for x in asked)
        one = Candidates({}, {}, tree.map(lambda leaf: leaf[None], state.params))
        last = torch.full((len(prompts),), PROMPT - 1)
        written = answer(one, answers.Prompts(prompts, last), keys.fold_in(key, 1))[0]
        reward = (written == wanted).all(-1).float().view(count, samples)
        others = (reward.sum(-1, keepdim=True) - reward) / (samples - 1)
        rows = supervised(Problems(prompts, written))
        state, _ = take(state, {**rows, "advantage": (reward - others).flatten()})
        if number % every == 0:
            run.tokens.append(number * each)
            run.exact.append(exact(state.params))
            print(f"  REINFORCE: {run.tokens[-1] / 1e6:6.2f} M tokens, exact match {run.exact[-1]:.3f}", flush=True)
    return run


def evolve(
    params: Tree, pool: Tensor, budget: int, members: int, count: int, rank: int, sigma: float, rate: float,
    every: int, exact: Callable[[Tree], float],
) -> tuple[Run, Tree]:  # fmt: skip
    """EGGROLL over an adapter on every projection; a generation's members answer the same problems, greedily."""
    start = lora.init(params, lora.ALL_LINEAR, rank, keys.key(2))
    space = spaces.adapter(params, start)
    how = gradient.Settings(members)
    numbers = {"sigma": sigma, "learning_rate": rate}
    strategy = eggroll.eggroll(how, rank, optimizer.adamw(), numbers, partial(compiled))
    answer = answers.answerer(strategy, space, CONFIG, answers.Answering(ANSWER, (), compile=True))
    state = strategy.init(keys.key(3), space.start)

    def whole(leaves: Tree) -> Tree:
        return lora.merge(params, tree.overlay(leaves, lora.split(start)[1]))

    run = Run("EGGROLL", [0], [exact(params)])
    each = members * count * (PROMPT + ANSWER - 1)
    last = torch.full((count,), PROMPT - 1)
    for number in range(1, budget // each + 1):
        key = keys.fold_in(keys.key(8), number)
        asked = pick(pool, count, key)
        written = answer(strategy.ask(state), answers.Prompts(asked.prompts, last), key)
        state = strategy.tell(state, (written == asked.answers).all(-1).float().mean(-1))
        if number % every == 0:
            run.tokens.append(number * each)
            run.exact.append(exact(whole(state.centre)))
            print(f"  EGGROLL: {run.tokens[-1] / 1e6:6.2f} M tokens, exact match {run.exact[-1]:.3f}", flush=True)
    return run, tree.overlay(state.centre, lora.split(start)[1])


def save(out: Path, params: Tree, adapter: Tree, rank: int) -> None:
    """Model and adapter for the tokenizer of bytes: `#` begins a problem, the end of a document ends it.

    Bytes that no problem holds look to the model like a token that it has never met.
    """
    words = tokenizers.train((), "bytes")
    spelled = {**{words.encode(text)[0]: number for number, text in enumerate("0123456789+=")}, words.eos_id: END}
    spelled[words.encode("#")[0]] = BEGIN
    rows = torch.tensor([spelled.get(token, NEVER) for token in range(words.vocab_size)])
    model = {**params["model"], "embed_tokens": {"weight": params["model"]["embed_tokens"]["weight"][rows]}}
    base = {**params, "model": model}
    config = dataclasses.replace(CONFIG, vocab_size=words.vocab_size)
    folder.save(out / "model", base, config, words)
    how = peft.Settings(rank, rank, (lora.ALL_LINEAR,), base=str(out / "model"), digest=tree.digest(base))
    peft.save(out / "adapter", adapter, how, base)


# The study ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/study-evolution")
    parser.add_argument("--examples", type=int, default=400, help="problems with answers, for supervision")
    parser.add_argument("--pretraining", type=int, default=300, help="steps of 64 rows on those")
    parser.add_argument("--sft", type=int, default=200, help="steps of 64 rows on those")
    parser.add_argument("--budget", type=float, default=10e6, help="tokens that each way has")
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=64, help="problems of a generation")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--sigma", type=float, default=0.08)
    parser.add_argument("--rate", type=float, default=0.008, help="of the optimizer behind the estimate")
    parser.add_argument("--policy_rate", type=float, default=3e-4, help="of REINFORCE's")
    given = parser.parse_args()
    started = time.perf_counter()
    order = keys.permutation(keys.key(0), 10000)
    held_out, few, rest = problems(order[:1000]), order[1000 : 1000 + given.examples], order[1000:]
    exact = measurement(held_out)

    def rows(pool: Tensor, seed: int, count: int = 64) -> Callable[[int], dict[str, Tensor]]:
        return lambda number: supervised(pick(pool, count, keys.fold_in(keys.key(seed), number)))

    print("pretraining", flush=True)
    fresh = transformer.init(CONFIG, keys.key(0))
    base, _ = train("pretraining", fresh, rows(rest, 4), 3e-3, given.pretraining, 100, exact)
    print(f"supervised fine-tuning on {given.examples} problems", flush=True)
    tuned, before = train("supervised", base, rows(few, 5), 1e-3, given.sft, 100, exact)
    print("three ways from there", flush=True)
    budget, width = int(given.budget), PROMPT + ANSWER - 1
    often = max(1, budget // (given.members * given.prompts * width) // 20)
    evolved, winner = evolve(
        tuned, rest, budget, given.members, given.prompts, given.rank, given.sigma, given.rate, often, exact
    )
    often = max(1, budget // (64 * 8 * width) // 20)
    policy = reinforce(tuned, rest, given.policy_rate, budget, 64, 8, often, exact)
    steps = budget // (64 * 8 * width)
    _, more = train("more supervision", tuned, rows(few, 6, 64 * 8), 3e-4, steps, often, exact)
    report(Path(given.out), before, [more, policy, evolved])
    save(Path(given.out), tuned, winner, given.rank)
    print(f"{time.perf_counter() - started:.0f} s in all")


def report(out: Path, before: Run, ways: list[Run]) -> None:
    """The table, the plot, the curves as JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print("\n| | tokens | exact match, 1000 held-out problems | best on the way |")
    print("|---|---|---|---|")
    print(
        f"| supervised fine-tuning, where the ways part | {before.tokens[-1] / 1e6:.1f} M | {before.exact[-1]:.3f} | |"
    )
    for run in ways:
        print(f"| then {run.name} | {run.tokens[-1] / 1e6:.1f} M | **{run.exact[-1]:.3f}** | {max(run.exact):.3f} |")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in ways:
        axes.plot([tokens / 1e6 for tokens in run.tokens], run.exact, marker="o", markersize=3, label=run.name)
    axes.axhline(before.exact[-1], color="grey", linewidth=0.8, linestyle="--", label="where supervision left it")
    axes.set(xlabel="million tokens read and written", ylabel="exact match, held-out problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    files.write_with(out / "evolution.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    pyplot.close(figure)
    files.write_text(out / "curves.json", json.dumps([run._asdict() for run in [before, *ways]]) + "\n")
    print(f"\nthe plot is in {out / 'evolution.png'}")


if __name__ == "__main__":
    main()
