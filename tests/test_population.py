"""A population through one call is the loop over its members: of losses, accuracies and of what they write.

Axes: P members, N prompts, M tokens of an answer.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_close, configs, token_rows, weights
from torch import Tensor

from functional_lm import compile as compiling
from functional_lm import kernels, keys, tree
from functional_lm.compile import compiled
from functional_lm.errors import DataError, UsageError
from functional_lm.evolution import answers, eggroll, fitness, genetic, gradient, merging, openai, population, spaces
from functional_lm.evolution.spaces import Space
from functional_lm.evolution.strategy import Strategy
from functional_lm.inference import generate
from functional_lm.model import lora, merge
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import IGNORED, forward
from functional_lm.tree import Tree

CONFIG = ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=32)


def strategy(name: str, population: int = 6) -> Strategy:
    how, at = gradient.Settings(population), {"sigma": 0.1}
    kinds = {
        "genetic": lambda: genetic.genetic(genetic.Settings(population)),
        "openai-es": lambda: openai.openai_es(how, numbers=at),
        "eggroll": lambda: eggroll.eggroll(how, 1, numbers=at),
        "regenerated": lambda: eggroll.eggroll(dataclasses.replace(how, noise="regenerated"), 2, numbers=at),
    }
    return kinds[name]()


def space(name: str, config: ModelConfig, seed: int) -> Space:
    params = weights(config, seed)
    if name == "lora":
        return spaces.adapter(params, lora.init(params, "all-linear", 3, keys.key(seed)))
    if name == "merge":
        return merging.merged([params, weights(config, seed + 1)], ["*", "*mlp*"])
    return spaces.full(params, ["*"] if name == "full" else ["*.mlp.*", "*norm*"])


def rows(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    tokens = token_rows(config, (3, 7), seed)
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED
    return {"tokens": tokens[:, :-1].contiguous(), "targets": targets, "bytes": torch.tensor(30)}


@pytest.mark.parametrize("kind", ["genetic", "openai-es", "eggroll", "regenerated"])
@pytest.mark.parametrize("where", ["full", "lora", "part"])
@given(config=configs(), seed=SEEDS, chunk=st.integers(1, 6), with_kernels=st.booleans())
@settings(max_examples=6)
def test_a_population_is_the_loop_over_its_members(
    kind: str, where: str, config: ModelConfig, seed: int, chunk: int, with_kernels: bool
) -> None:
    """Whatever the architecture, the chunk, and which leaves are evolved; of a first and of a later generation."""
    with_kernels &= kernels.obstacle() is None
    evolved, within, batch = strategy(kind), space(where, config, seed), rows(config, seed)
    figures = [fitness.objective(name, config) for name in ("loss", "bits", "accuracy")]
    state = evolved.init(keys.key(seed), within.start)
    if seed % 2:
        state = evolved.tell(state, torch.arange(6.0))
    candidates = evolved.ask(state)
    evaluate = population.evaluator(evolved, within, fitness.several(figures), chunk=chunk, with_kernels=with_kernels)
    together = evaluate(candidates, batch)
    reference = fitness.several([*figures, partial(undecided, config=config)])
    alone = population.looped(evolved, within, reference)(candidates, batch)
    assert_close(together[:, :2], alone[:, :2], 3e-4)
    assert ((together[:, 2] - alone[:, 2]).abs() <= alone[:, 3] + 1e-6).all()


@pytest.mark.parametrize("kind", ["genetic", "openai-es", "eggroll", "regenerated"])
@given(
    config=configs(), where=st.sampled_from(["full", "lora", "part"]), seed=SEEDS, chunk=st.integers(1, 3),
    ranks=st.integers(2, 6), temperature=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
@settings(max_examples=4)
def test_ranks_measure_what_one_process_does_bit_for_bit(
    kind: str, config: ModelConfig, where: str, seed: int, chunk: int, ranks: int, temperature: float
) -> None:
    """What is read and what is answered: each rank whole chunks, end to end the numbers of one alone."""
    evolved, within, batch = strategy(kind), space(where, config, seed), rows(config, seed)
    ranks = min(ranks, -(-evolved.population // chunk))
    candidates = evolved.ask(evolved.init(keys.key(seed), within.start))
    prompts = answers.padded(batch["tokens"][:, :3].tolist(), 4)

    def measured(part: population.Share) -> tuple[Tensor, Tensor]:
        read = population.evaluator(evolved, within, fitness.objective("loss", config), part=part)(candidates, batch)
        how = answers.Answering(4, (), temperature, part.size, part=part)
        return read, answers.answerer(evolved, within, config, how)(candidates, prompts, keys.key(seed))

    alone = measured(population.share(evolved.population, chunk))
    parts = [measured(population.share(evolved.population, chunk, rank, ranks)) for rank in range(ranks)]
    for found, wanted in zip(zip(*parts, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(found), wanted)


def undecided(model: Tree, batch: fitness.Batch, config: ModelConfig) -> Tensor:
    """The share of targets where rounding may choose between the two likeliest tokens."""
    first, second = forward(model, batch["tokens"], fitness.vmappable(config)).topk(2).values.unbind(-1)
    there = batch["targets"] != IGNORED
    return ((first - second < 1e-3 * first.abs().clamp(min=1)) & there).sum() / there.sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_it_is_compiled_once_and_not_once_a_generation(backend: str) -> None:
    evolved, within = strategy("eggroll", 10), space("full", CONFIG, 0)
    objective = fitness.objective("loss", CONFIG)
    evaluate = population.evaluator(evolved, within, objective, chunk=4, wrap=partial(compiled, backend=backend))
    loop = population.looped(evolved, within, objective)
    state, before = evolved.init(keys.key(0), within.start), compiling.graphs()
    for generation in range(3):
        candidates, batch = evolved.ask(state), rows(CONFIG, generation)
        found = evaluate(candidates, batch)
        assert_close(found, loop(candidates, batch), 1e-4)
        state = evolved.tell(state, found)
    assert compiling.graphs() == before + 2  # what makes the members, and what measures them


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_compiled_once_and_those_of_the_eager_form(temperature: float) -> None:
    """Three chunks, of which the last one is filled up; prompts differ from one generation to the next."""
    evolved, within = strategy("eggroll", 10), space("lora", CONFIG, 0)
    how = answers.Answering(5, (), temperature, 4)
    together, eager = (
        answers.answerer(evolved, within, CONFIG, dataclasses.replace(how, compile=compile))
        for compile in (True, False)
    )
    state, counts = evolved.init(keys.key(0), within.start), [compiling.graphs()]
    for generation in range(3):
        candidates, key = evolved.ask(state), keys.key(generation)
        prompts = answers.padded([[token + generation for token in prompt] for prompt in PROMPTS], 5)
        found = together(candidates, prompts, key)
        counts.append(compiling.graphs())
        assert torch.equal(found, eager(candidates, prompts, key))
        assert len({tuple(member) for member in found.flatten(1).tolist()}) > 1
        state = evolved.tell(state, found.float().mean((1, 2)))
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_fitness_is_what_it_says() -> None:
    params, batch = weights(CONFIG, 0), rows(CONFIG, 0)
    logits = forward(params, batch["tokens"], CONFIG)
    there = batch["targets"] != IGNORED
    likely = torch.log_softmax(logits, -1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0][there]
    assert_close(fitness.loss(CONFIG)(params, batch), likely.mean())
    assert_close(fitness.bits(CONFIG)(params, batch), likely.sum() / math.log(2) / 30)
    right = (logits.argmax(-1) == batch["targets"])[there].float().mean()
    assert_close(fitness.accuracy(CONFIG)(params, batch), right)


def test_a_merge_is_that_of_the_command() -> None:
    within = space("merge", CONFIG, 0)
    models = [within.base["0"], within.base["1"]]
    shares = {"0": {"weight": torch.tensor([0.2, 0.9])}, "1": {"weight": torch.tensor([1.0, 0.0])}}
    wanted = merge.linear(models, {"*": torch.tensor([0.2, 0.9]), "*mlp*": torch.tensor([1.0, 0.0])})
    assert tree.digest(within.whole(within.base, shares)) == tree.digest(wanted)
    evolved = strategy("openai-es")
    state = evolved.init(keys.key(0), within.start)
    objective, batch = fitness.objective("loss", CONFIG), rows(CONFIG, 0)
    found = population.evaluator(evolved, within, objective, chunk=4)(evolved.ask(state), batch)
    assert_close(found, population.looped(evolved, within, objective)(evolved.ask(state), batch), 1e-4)


# What they write ------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.mark.parametrize("kind", ["genetic", "eggroll", "regenerated"])
@pytest.mark.parametrize("where", ["full", "lora"])
def test_answers_are_those_of_generate(kind: str, where: str) -> None:
    evolved, within = strategy(kind), space(where, CONFIG, 0)
    candidates = evolved.ask(evolved.init(keys.key(1), within.start))
    answer = answers.answerer(evolved, within, CONFIG, answers.Answering(6, (), 0.0, 4))
    found = answer(candidates, answers.padded(PROMPTS, 5), keys.key(0))
    run, how = generate.decoder(CONFIG, compile=False), generate.GenerateOptions(6, 0.0)
    for i in (0, 3, 5):
        model = within.whole(within.base, evolved.dense(candidates, i))
        for n, prompt in enumerate(PROMPTS):
            assert found[i, n].tolist() == list(generate.generate(model, prompt, run, how))


def test_drawn_answers_are_common_to_equal_members() -> None:
    """The draws belong to the prompts: members that compute the same say the same, whatever the chunk."""
    within = space("lora", CONFIG, 0)
    evolved = openai.openai_es(gradient.Settings(6), numbers={"sigma": 1e-9})
    candidates = evolved.ask(evolved.init(keys.key(1), within.start))
    prompts = answers.padded(PROMPTS, 5)
    parts = [
        answers.answerer(evolved, within, CONFIG, answers.Answering(8, (), 1.0, chunk))(
            candidates, prompts, keys.key(7)
        )
        for chunk in (2, 6)
    ]
    assert torch.equal(*parts)
    assert (parts[0] == parts[0][:1]).all()
    assert len({tuple(row) for row in parts[0][0].tolist()}) == 3


def test_answers_end_where_all_have_stopped() -> None:
    within, evolved = space("lora", CONFIG, 0), strategy("openai-es")
    candidates = evolved.ask(evolved.init(keys.key(1), within.start))
    prompts = answers.padded(PROMPTS, 5)
    whole = answers.answerer(evolved, within, CONFIG, answers.Answering(6, ()))(candidates, prompts, keys.key(0))
    stops = tuple(set(whole[:, :, 0].flatten().tolist()))
    short = answers.answerer(evolved, within, CONFIG, answers.Answering(6, stops))(candidates, prompts, keys.key(0))
    assert torch.equal(short[..., 0], whole[..., 0])
    assert (short[..., 1:] == stops[0]).all()


class Letters:
    """A tokenizer of single letters, as far as it is needed here."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_texts_end_at_a_stop() -> None:
    tokens = torch.tensor([[[0, 1, 2, 3], [25, 0, 0, 0]], [[0, 1, 25, 1], [0, 1, 2, 3]]])
    assert answers.texts(tokens, Letters(), (25,)) == [["abcd", ""], ["ab", "abcd"]]  # type: ignore[arg-type]
    assert answers.texts(tokens, Letters(), (25,), ("c", "bc"))[0][0] == "a"  # type: ignore[arg-type]


ROWS = [{"prompt": "1+1=", "response": "2"}, {"prompt": "2+2=", "response": " 4\n"}]


def test_scores_are_means_over_the_rows() -> None:
    found = answers.scored([["2", "4"], ["2", "5"], [" 2 ", ""]], ROWS, answers.exact_match, "exact")
    assert found.tolist() == [1.0, 0.5, 0.5]


def test_a_score_gets_rows_of_its_own() -> None:
    """What it does to them is seen by no other member, and in no other generation."""

    def counting(texts: list[str], given_rows: list[dict[str, Any]]) -> list[float]:
        given_rows[0]["seen"].append(1)
        given_rows[0]["response"] = ""
        return [float(len(given_rows[0]["seen"]))] * len(texts)

    asked = [{"response": "2", "seen": []}]
    assert answers.scored([["a"], ["b"], ["c"]], asked, counting, "counting").tolist() == [1.0, 1.0, 1.0]
    assert asked == [{"response": "2", "seen": []}]


def short(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    return [1.0]


def raising(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    raise RuntimeError("no such luck")


def not_a_number(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    return [math.nan, 1.0]


def nothing(texts: list[str], given_rows: list[dict[str, str]]) -> None:
    return None


def nested(texts: list[str], given_rows: list[dict[str, str]]) -> list[list[float]]:
    return [[1.0] for _ in texts]


def by_place(texts: list[str], given_rows: list[dict[str, str]]) -> dict[int, float]:
    return {place: 1.0 for place, _ in enumerate(texts)}


def half_way(texts: list[str], given_rows: list[dict[str, str]]) -> Iterator[float]:
    yield 1.0
    raise ValueError("on the way")


def leaving(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    sys.exit()


def asleep(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    time.sleep(60)
    return [1.0, 1.0]


def stubborn(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    """Passes over every Exception."""
    while True:
        with suppress(Exception):
            time.sleep(60)


def deaf(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    """Passes over whatever comes, twice."""
    for _ in range(2):
        with suppress(BaseException):
            time.sleep(60)
    return [1.0, 1.0]


def offline(texts: list[str], given_rows: list[dict[str, str]]) -> list[float]:
    raise TimeoutError("timed out")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "returned 1 numbers for 2 answers; one for each"),
        ("raising", "raised RuntimeError: no such luck"),
        ("leaving", "raised SystemExit$"),
        ("half_way", "raised ValueError: on the way"),
        ("offline", "raised TimeoutError: timed out"),
        ("nothing", "returned NoneType; one number for each answer"),
        ("nested", "returned list of list; one number for each answer"),
        ("by_place", "returned dict; one number for each answer"),
        ("asleep", "took more than 0.2 s; give --timeout more"),
        ("stubborn", "took more than 0.2 s; give --timeout more"),
        ("deaf", "took more than 0.2 s; give --timeout more"),
    ],
)
def test_a_function_that_fails_is_named(function: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    score = answers.named(f"{__name__}:{function}")
    monkeypatch.setattr(answers, "AGAIN", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DataError, match=message):
        answers.limited(0.2, "the fitness", lambda: answers.scored([["2", "4"]], ROWS, score, function))
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_what_is_in_time_is_what_it_returned(seconds: float) -> None:
    assert answers.limited(seconds, "the fitness", lambda: 3) == 3
    with pytest.raises(TimeoutError, match="its own"):
        answers.limited(seconds, "the fitness", lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_score_that_is_no_number_is_nan() -> None:
    assert answers.scored([["2", "4"]], ROWS, answers.named(f"{__name__}:not_a_number"), "x").isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blue", "the fitness 'blue' is neither known nor of the form module:function"),
        ("no_such_module_:f", "cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "cannot be imported: AttributeError"),
        ("math:pi", "the fitness 'math:pi' is float, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        answers.named(name)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'\*nose\*' matches no leaf of the model"):
        spaces.full(weights(CONFIG, 0), ["*nose*"])
