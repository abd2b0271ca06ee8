"""Study (c): two models fine-tuned on different books, merged by evolved coefficients, against the uniform soup.

    python experiments/study_merge.py [--books A,B | --books stdlib]

The two books are Emma and Moby-Dick, which are downloaded once, or two others: files or http(s) addresses. Where there
is no network, and with `--books stdlib`, they are two parts of what every Python has: its reference, in English, and as
much of its library's source.

A small transformer is pretrained on the first halves of both books together, and two copies of it are fine-tuned on the
next 30 % of one book each. Then merges of the two are measured on the last tenth of both books, which nothing has seen:
the soup (equal shares), task arithmetic and TIES with the coefficients that are usual, and linear, task arithmetic and
TIES whose coefficients CMA-ES evolves for the loss on the tenth before the last (half of the rows from either book; the
same rows for all). A base, the parents, and one model fine-tuned on both parts for as many steps are the marks to
compare with. Prints a table.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled
from functional_lm.errors import DataError, FunctionalLMError, UsageError
from functional_lm.evolution import cma, fitness, merging, population
from functional_lm.evolution.spaces import Space
from functional_lm.model import merge, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import corpus
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import optimizer, schedule, step
from functional_lm.tree import Tree

TIME = 64
PARTS = {"pretraining": (0.0, 0.5), "tuning": (0.5, 0.8), "fitness": (0.8, 0.9), "held out": (0.9, 1.0)}
Tensors = dict[str, Tensor]
CLASSICS = "https://raw.githubusercontent.com/mlschmitt/classic-books-markdown/f9edc0ac68ef4d4bc6b16cbc1a3d68d5783a7e28"
BOOKS = (
    f"{CLASSICS}/Jane%20Austen/Emma.md#sha256=39784d345f2156f3a89384bbf9a3a9d902f80391339d295a30d13c2d1213203f,"
    f"{CLASSICS}/Herman%20Melville/Moby-Dick.md"
    "#sha256=664746ebf8a3532450f24cb76022c34e54547f61480602c57efa4c73c83ec6ca"
)


class Books(NamedTuple):
    """The ids of each part of each book."""

    names: list[str]
    parts: dict[str, list[Tensor]]
    vocab_size: int
    byte_lengths: Tensor


def texts_of(books: str) -> dict[str, str]:
    """The two texts by their names. Raises UsageError, DataError for what cannot be read or downloaded."""
    if books == corpus.STDLIB:
        return library()
    try:
        paths = corpus.find(books).files
    except DataError as error:
        if books != BOOKS:
            raise
        print(f"{error}; two parts of Python's own library take the place of the books", flush=True)
        return library()
    if len(paths) != 2:
        raise UsageError(f"--books {books}: {len(paths)} files; name two texts, A,B")
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def library() -> dict[str, str]:
    """What `help()` says of the language, in English, and as many characters of the library's source."""
    from pydoc_data.topics import topics

    prose = "\n".join(topics.values())
    source = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in corpus.find(corpus.STDLIB).files)
    return {"reference": prose, "source": source[: len(prose)]}


def read(books: dict[str, str], vocab: int) -> Books:
    texts = list(books.values())
    firsts = [text[: len(text) // 2] for text in texts]
    tokenizer = tokenizers.train(firsts, "bpe", vocab)
    parts = {
        name: [torch.tensor(tokenizer.encode(text[int(a * len(text)) : int(b * len(text))])) for text in texts]
        for name, (a, b) in PARTS.items()
    }
    return Books(list(books), parts, vocab, torch.from_numpy(tokenizer.byte_lengths.copy()))


def drawn(ids: Tensor, key: Tensor, count: int) -> Tensor:
    """Windows of one token more than a row."""
    starts = keys.randint(key, (count,), 0, len(ids) - TIME - 1, torch.int64)
    return ids[starts[:, None] + torch.arange(TIME + 1)]


def batch(rows: Tensor) -> Tensors:
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def trainer(config: ModelConfig, rows: int) -> Callable[[Tree, Sequence[Tensor], int, float, int], Tree]:
    """`(params, sources, steps, rate, seed) -> params`, compiled once; rows come from the sources in equal numbers."""
    functions = step.training(config, optimizer.adamw(), schedule.schedule("cosine", 20, 0.05))
    take = compiled(functions.train_step, donate=True)

    def trained(params: Tree, sources: Sequence[Tensor], steps: int, rate: float, seed: int) -> Tree:
        state = functions.init(tree.copy(params), keys.key(seed))
        own = {"learning_rate": torch.tensor(rate), "total_steps": torch.tensor(float(steps))}
        state = state._replace(numbers={**state.numbers, **own})
        for number in range(steps):
            key, each = keys.fold_in(keys.key(seed), number), rows // len(sources)
            parts = [drawn(ids, keys.fold_in(key, i), each) for i, ids in enumerate(sources)]
            state, _ = take(state, batch(torch.cat(parts)))
        return tree.copy(state.params)

    return trained


# Measuring and evolving -----------------------------------------------------------------------------------------------


def measurement(books: Books, config: ModelConfig) -> Callable[[Tree], list[float]]:
    """Bits per byte of each book's held-out part, all of it, in windows side by side."""
    written = fitness.vmappable(config)

    def bits(params: Tree) -> list[float]:
        found = []
        for ids in books.parts["held out"]:
            count = (len(ids) - 1) // TIME // 32 * 32
            windows = torch.stack([ids[TIME * i : TIME * i + TIME + 1] for i in range(count)])
            with torch.no_grad():
                nll = sum(float(transformer.loss(params, batch(rows), written)[0]) for rows in windows.split(32))
            found.append(nll / math.log(2) / float(books.byte_lengths[windows[:, 1:]].sum()))
        return found

    return bits


def evolved(
    space: Space, config: ModelConfig, rows: Tensors, members: int, generations: int, sigma: float
) -> tuple[Tree, int]:
    """The mean that CMA-ES ends at, as a model, and how many coefficients there were."""
    strategy = cma.cma_es(members, sigma)
    evaluate = population.evaluator(strategy, space, fitness.loss(config), chunk=5)
    state = strategy.init(keys.key(0), space.start)
    for _ in range(generations):
        state = strategy.tell(state, evaluate(strategy.ask(state), rows))
    return space.whole(space.base, state.centre), tree.size(space.start)


# The study ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", default=BOOKS, help="two texts, A,B: files or http(s) addresses; or stdlib")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pretraining", type=int, default=500, help="steps of 8 rows")
    parser.add_argument("--tuning", type=int, default=250, help="steps of 8 rows, on each book")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--generations", type=int, default=15)
    parser.add_argument("--rows", type=int, default=32, help="that fitness is measured on")
    given = parser.parse_args()
    try:
        texts = texts_of(given.books)
    except FunctionalLMError as error:
        parser.error(f"{error}")
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{text} ({time.perf_counter() - started:.0f} s)", flush=True)

    books = read(texts, given.vocab)
    config = ModelConfig(
        given.vocab, d_model=given.width, n_layers=2, n_heads=4, d_ff=3 * given.width, max_len=TIME,
        attention="standard",
    )  # fmt: skip
    fresh = transformer.init(config, keys.key(0))
    trained = trainer(config, 8)
    base = trained(fresh, books.parts["pretraining"], given.pretraining, 3e-3, 1)
    say("pretrained")
    tuning = books.parts["tuning"]
    parents = [trained(base, [ids], given.tuning, 1e-3, 2 + i) for i, ids in enumerate(tuning)]
    both = trained(base, tuning, given.tuning, 1e-3, 4)
    say("fine-tuned")
    bits = measurement(books, config)
    ones = torch.ones(2)
    models: dict[str, tuple[Tree, str]] = {
        "base": (base, ""),
        **{f"fine-tuned on {name}": (model, "") for name, model in zip(books.names, parents)},
        "soup: equal shares": (merge.linear(parents, ones / 2), ""),
        "task arithmetic, 1 each": (merge.task_arithmetic(base, parents, ones), ""),
        "TIES, density 0.2, 1 each": (merge.ties(base, parents, ones), ""),
    }
    each = given.rows // 2
    parts = [drawn(ids, keys.fold_in(keys.key(9), i), each) for i, ids in enumerate(books.parts["fitness"])]
    rows = batch(torch.cat(parts))
    layers = merging.grouped(base, "layers")
    for name, method, groups in (
        ("linear", "linear", ("*",)), ("linear, by layer", "linear", layers),
        ("task arithmetic", "task_arithmetic", ("*",)), ("task arithmetic, by layer", "task_arithmetic", layers),
        ("TIES, density too", "ties", ("*",)),
    ):  # fmt: skip
        space = merging.merged(parents, groups, method, base)
        model, count = evolved(space, config, rows, given.members, given.generations, 0.2)
        models[f"evolved {name}"] = (model, str(count))
        say(f"evolved {name}")
    models["one model fine-tuned on both"] = (both, "")
    print(f"\n| | coefficients | {books.names[0]} | {books.names[1]} | mean |\n|---|---|---|---|---|")
    for name, (model, coefficients) in models.items():
        first, second = bits(model)
        print(f"| {name} | {coefficients} | {first:.4f} | {second:.4f} | {(first + second) / 2:.4f} |")
    say(f"\n{tree.size(base)} parameters; bits per byte of held-out text")


if __name__ == "__main__":
    main()
