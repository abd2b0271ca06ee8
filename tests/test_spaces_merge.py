"""Merges as a space: every method is that of the command, mergekit's definitions, and a run finds what is better."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, assert_close, assert_trees_close, numbers, token_rows, weights
from torch import Tensor

from functional_lm import evolve, files, folder, keys, tree
from functional_lm import merge as command
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main, main_single
from functional_lm.compile import compiled
from functional_lm.errors import UsageError
from functional_lm.evolution import answers, cma, fitness, merging, population
from functional_lm.evolution.strategy import Candidates
from functional_lm.model import merge, transformer
from functional_lm.model.config import ModelConfig
from functional_lm.text import tokenizer as tokenizers
from functional_lm.training import optimizer, schedule, step
from functional_lm.tree import Tree

CONFIG = ModelConfig(vocab_size=24, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_len=16)
GROUPS = ("*", "*.mlp.*")


def space_of(method: str, seed: int = 0) -> tuple[merging.Space, list[Tree], Tree]:
    first, second, base = (weights(CONFIG, seed + i) for i in range(3))
    given = base if method in merge.FROM_BASE else None
    return merging.merged([first, second], GROUPS, method, given, keys.key(seed)), [first, second], base


def candidate(space: merging.Space, seed: int) -> Tree:
    return tree.map_named(lambda name, leaf: leaf + 0.3 * numbers(tuple(leaf.shape), seed + len(name)), space.start)


def by_function(method: str, models: list[Tree], base: Tree, found: merging.Recipe, seed: int) -> Tree:
    w = {group: torch.tensor(values) for group, values in found.weights.items()}
    if method == "linear":
        return merge.linear(models, w)
    if method == "slerp":
        first, second = models
        return merge.slerp(first, second, w)
    if method == "task_arithmetic":
        return merge.task_arithmetic(base, models, w)
    assert found.density is not None
    if method == "ties":
        return merge.ties(base, models, w, found.density)
    return merge.dare(base, models, w, keys.key(seed), found.density)


@pytest.mark.parametrize("method", merge.METHODS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=4)
def test_a_candidate_is_the_merge_that_its_recipe_names(method: str, seed: int) -> None:
    space, models, base = space_of(method, seed)
    leaves = candidate(space, seed)
    expected = by_function(method, models, base, merging.recipe(leaves, GROUPS), seed)
    assert_trees_close(space.whole(space.base, leaves), expected, 1e-5)


@pytest.mark.parametrize("method", merge.METHODS)
def test_a_population_of_merges_is_the_loop_over_them(method: str) -> None:
    """Losses and greedy answers of all members in vmapped calls."""
    space, _, _ = space_of(method)
    strategy = cma.cma_es(5, 0.2)
    candidates = strategy.ask(strategy.init(keys.key(1), space.start))
    tokens = token_rows(CONFIG, (2, 6), 3)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    objective = fitness.loss(CONFIG)
    together = population.evaluator(strategy, space, objective, chunk=2)(candidates, batch)
    assert_close(together, population.looped(strategy, space, objective)(candidates, batch), 1e-4)
    prompts = answers.padded([[1, 2, 3], [4, 5]], 3)
    found = answers.answerer(strategy, space, CONFIG, answers.Answering(4, (), chunk=2))(
        candidates, prompts, keys.key(0)
    )
    for member in range(5):
        model = space.whole(space.base, strategy.dense(candidates, member))
        for row, prompt in enumerate(([1, 2, 3], [4, 5])):
            text = list(prompt)
            for _ in range(4):
                text.append(int(transformer.forward(model, torch.tensor([text]), CONFIG)[0, -1].argmax()))
            assert found[member, row].tolist() == text[len(prompt) :]


@pytest.mark.parametrize("method", ["ties", *(pytest.param(m, marks=pytest.mark.long) for m in merge.METHODS[:3])])
def test_a_population_of_merges_compiles(method: str) -> None:
    small = ModelConfig(vocab_size=8, d_model=4, n_layers=1, n_heads=1, d_ff=4)
    first, second, base = (weights(small, seed) for seed in range(3))
    space = merging.merged([first, second], ["*", "*.mlp.*"], method, base, keys.key(0))
    strategy = cma.cma_es(3, 0.2)
    own = strategy.ask(strategy.init(keys.key(1), space.start)).own
    frozen = space.freeze(space.base, {}, [], torch.float32)
    many = torch.vmap(lambda frozen, own: space.model(frozen, own, torch.float32), (None, 0))
    assert_trees_close(compiled(many, backend="aot_eager")(frozen, own), many(frozen, own), 1e-5)


def test_groups_are_globs_or_layers_and_cover_the_model() -> None:
    params = weights(CONFIG, 0)
    assert merging.grouped(params, "*") == ("*",)
    assert merging.grouped(params, "*.mlp.*; *norm*") == ("*", "*.mlp.*", "*norm*")
    assert merging.grouped(params, "*;*.mlp.*") == ("*", "*.mlp.*")
    assert merging.grouped(params, "layers") == ("*", "model.layers.0.*", "model.layers.1.*")
    for words, message in {
        " ; ": "--groups is empty; it is globs over leaves",
        "*.ffn.*": "'*.ffn.*' matches no leaf",
        "*.mlp.*;*": "'*.mlp.*' keeps no leaf",
        "*norm*;*norm*": "'*norm*' keeps no leaf",
    }.items():
        with pytest.raises(UsageError) as error:
            merging.grouped(params, words)
        assert message in str(error.value)


def test_names_are_those_of_the_functions() -> None:
    assert (command.METHODS, command.FROM_BASE, command.THINNED) == (merge.METHODS, merge.FROM_BASE, merge.THINNED)


# mergekit's definitions, written anew over flat arrays ----------------------------------------------------------------

Array = NDArray[np.float64]


def kept_of_a_tensor(difference: Array, density: float) -> Array:
    """Its `magnitude`: ⌊density n⌋ numbers of one tensor."""
    order = np.argsort(-np.abs(difference), kind="stable")[: int(density * difference.size)]
    mask = np.zeros_like(difference)
    mask[order] = 1
    return difference * mask


def mergekit_ties(base: Array, models: list[Array], w: list[float], density: float) -> Array:
    """Its `ties`, normalised as it is by default."""
    weighted = np.stack([factor * kept_of_a_tensor(model - base, density) for model, factor in zip(models, w)])
    majority = np.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agreeing = np.sign(weighted) == majority
    divisor = (np.array(w)[:, None] * agreeing).sum(0)
    return base + (weighted * agreeing).sum(0) / np.where(divisor == 0, 1, divisor)


def mergekit_slerp(t: float, a: Array, b: Array) -> Array:
    dot = float(np.sum(a / np.linalg.norm(a) * b / np.linalg.norm(b)))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(dot)
    mixed: Array = (np.sin(angle - angle * t) * a + np.sin(angle * t) * b) / np.sin(angle)
    return mixed


def one(flat: Tensor) -> Tree:
    return {"x": {"weight": flat}}


@settings(max_examples=30)
@given(seed=SEEDS, count=st.integers(1, 4), size=st.integers(3, 24), kept=st.floats(0, 1), w=st.floats(0.2, 2))
def test_ties_is_mergekits_for_one_tensor_and_equal_weights(
    seed: int, count: int, size: int, kept: float, w: float
) -> None:
    """There equal weights cancel, so that any of them are 1 here; the differences are in the docstring."""
    density = max(1, round(kept * size)) / size + 1e-9
    base, *models = (numbers((size,), seed + i, torch.float64) for i in range(count + 1))
    ours = merge.ties(one(base), [one(model) for model in models], torch.ones(count).double(), density)
    theirs = mergekit_ties(base.numpy(), [model.numpy() for model in models], [w] * count, density)
    assert np.allclose(ours["x"]["weight"].numpy(), theirs, atol=1e-6)


@settings(max_examples=30)
@given(seed=SEEDS, size=st.integers(2, 24), t=st.floats(0, 1), near=st.sampled_from([0.0, 0.9, 0.99, 0.99999]))
def test_slerp_is_mergekits(seed: int, size: int, t: float, near: float) -> None:
    a, other = (numbers((size,), seed + i, torch.float64) for i in range(2))
    b = near * a + (1 - near) * other
    ours = merge.slerp(one(a), one(b), torch.tensor([1 - t, t], dtype=torch.float64))["x"]["weight"]
    theirs = mergekit_slerp(t, a.numpy(), b.numpy())
    assert np.abs(ours.numpy() - theirs).max() <= 1e-3 * float(a.norm() + b.norm())
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    if abs(cosine) < 0.9995:
        assert np.allclose(ours.numpy(), theirs, atol=1e-6)


@settings(max_examples=20)
@given(
    seed=SEEDS, size=st.integers(3, 24), density=st.floats(0.1, 0.9), w=st.tuples(st.floats(-1, 2), st.floats(-1, 2))
)
def test_dare_is_mergekits_dare_linear(seed: int, size: int, density: float, w: tuple[float, float]) -> None:
    """With the masks that these keys draw: Σ wₘ maskₘ difference / density."""
    base, *models = (numbers((size,), seed + i) for i in range(3))
    key = keys.key(seed)
    ours = merge.dare(one(base), [one(model) for model in models], torch.tensor(w), key, density)["x"]["weight"]
    own = keys.fold_in_name(key, "x.weight")
    masks = [keys.bernoulli(keys.fold_in(own, m), density, (size,)) for m in range(2)]
    parts = [factor * mask * (model - base) / density for factor, mask, model in zip(w, masks, models)]
    assert_close(ours, base + parts[0] + parts[1], 1e-4)


# The command ----------------------------------------------------------------------------------------------------------

WORDS = "the cat sat on the mat and the dog sat on the log " * 40


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: new; good: trained on the text; worse: that with noise; other, wide: what does not fit."""
    place = tmp_path_factory.mktemp("merges")
    (place / "text.txt").write_text(WORDS)
    rows = [{"prompt": f"the {a} ", "response": "sat"} for a in ("cat", "dog") for _ in range(4)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers.train([WORDS], "char", 280)
    config = ModelConfig(tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=32)
    base = transformer.init(config, keys.key(0))
    functions = step.training(config, optimizer.adamw(), schedule.constant(5), numbers={"learning_rate": 0.01})
    state, ids = functions.init(tree.copy(base), keys.key(1)), torch.tensor(tokenizer.encode(WORDS))
    for number in range(60):
        start = 13 * number % 700
        text = torch.stack([ids[start + 40 * i : start + 40 * i + 25] for i in range(8)])
        state, _ = functions.train_step(state, {"tokens": text[:, :-1].clone(), "targets": text[:, 1:].clone()})
    good = tree.copy(state.params)
    noise = tree.map_named(
        lambda name, leaf: 0.03 * keys.normal(keys.fold_in_name(keys.key(9), name), tuple(leaf.shape)), good
    )
    for name, params in (("base", base), ("good", good), ("worse", tree.add(good, noise))):
        folder.save(place / name, params, config, tokenizer)
    wide = dataclasses.replace(config, d_ff=32)
    folder.save(place / "wide", transformer.init(wide, keys.key(3)), wide, tokenizer)
    other = tokenizers.train([WORDS.replace("o", "u")], "char", 280)
    folder.save(place / "other", transformer.init(config, keys.key(3)), config, other)
    return place


@pytest.fixture
def at(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return tmp_path


def evolved(out: Path, *more: str, models: str = "good,worse", data: str = "text.txt") -> int:
    short = {"--block_size": "24", "--batch_size": "4", "--population": "6", "--generations": "3", "--sigma": "0.2"}
    fixed = [word for flag, value in short.items() if flag not in more for word in (flag, value)]
    chosen = [] if "--strategy" in more else ["--strategy", "cma-es"]
    words = ["--space", "merge", "--models", models, "--data", data, "--out", str(out), *fixed, *chosen]
    return main_single(evolve.COMMAND, [*words, "--compile", "false", "--dtype", "float32", *map(str, more)])


def held_out(path: Path) -> float:
    """Mean log-likelihood on the run's own validation text."""
    words = ["--model", str(path), "--data", "text.txt", "--space", "full", "--strategy", "genetic"]
    out = str(path) + "-measured"
    short = ["--population", "4", "--generations", "1", "--minutes", "0.000001", "--out", out, "--block_size", "24"]
    assert main_single(evolve.COMMAND, [*words, *short, "--compile", "false", "--dtype", "float32"]) == 0
    return float(files.read_json(f"{out}/summary.json")["held_out"]["start"])


def test_a_model_merged_with_a_worse_one_is_no_worse_than_either(at: Path, there: Path) -> None:
    assert evolved(at / "run", "--generations", "25", "--population", "10", "--groups", "layers") == 0
    found = files.read_json(at / "run" / "summary.json")["held_out"]
    good, worse = held_out(there / "good"), held_out(there / "worse")
    assert worse < good
    assert found["start"] < good  # where equal shares are
    assert held_out(at / "run") >= good


@pytest.mark.parametrize(
    "more",
    [
        ["--groups", "*.mlp.*"],
        ["--method", "slerp"],
        ["--method", "task_arithmetic", "--base", "base", "--strategy", "eggroll"],
        ["--method", "ties", "--base", "base", "--density", "0.4", "--strategy", "snes"],
        ["--method", "dare", "--base", "base", "--strategy", "genetic"],
    ],
)
def test_resumed_replayed_and_merged_by_its_recipe_are_one(
    more: list[str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evolved(at / "whole", *more) == 0
    assert evolved(at / "parts", *more, "--generations", "2", "--save_every", "1") == 0
    assert evolved(at / "parts", *more) == 0
    weights = tree.digest(folder.load(at / "whole").params)
    assert weights == tree.digest(folder.load(at / "parts").params)
    capsys.readouterr()
    assert main_single(evolve.COMMAND, ["replay", str(at / "parts" / "journal.jsonl"), "--out", str(at / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    recipe = files.read_json(at / "whole" / "merge.json")
    words = [
        "merge",
        "--out",
        str(at / "by-hand"),
        "--models",
        ",".join(recipe["models"]),
        "--method",
        recipe["method"],
    ]
    words += [f"--weights={','.join(map(repr, recipe['weights']))}", "--seed", str(recipe["seed"])]
    for name in ("layer_weights", "base", "density"):
        words += [] if recipe[name] is None else [f"--{name}={recipe[name]}"]
    assert main(COMMANDS, words) == 0
    assert_trees_close(folder.load(at / "by-hand").params, folder.load(at / "whole").params, 1e-6)


def test_a_merge_is_evolved_by_answers(at: Path) -> None:
    more = ["--fitness", "exact", "--max_tokens", "3", "--batch_size", "2", "--val_fraction", "0.25"]
    assert evolved(at / "run", *more, data="rows.jsonl") == 0
    assert files.read_json(at / "run" / "summary.json")["held_out"]["best"] is not None


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ("good,other", [], "good and other have different tokenizers; merge models of one vocabulary"),
        ("good,wide", [], "d_ff is 24 in good and 32 in wide"),
        ("good,nowhere", [], "no model folder at nowhere"),
        ("good", [], "--models names 1; linear merges at least 2"),
        ("good,worse,base", ["--method", "slerp"], "--models names 3; slerp merges two"),
        ("good,worse", ["--method", "ties"], "--method ties needs --base"),
        ("good,worse", ["--density", "0.5"], "--method linear has no --density"),
        ("good,worse", ["--groups", "*.ffn.*"], "the group '*.ffn.*' matches no leaf"),
        ("good,worse", ["--model", "good"], "--space merge takes --models A,B and no --model"),
        ("good,worse", ["--leaves", "*norm*"], "--leaves chooses in --space full; merge has --groups"),
    ],
)
def test_what_does_not_fit_is_one_line(
    models: str, more: list[str], message: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evolved(at / "run", *more, models=models) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (at / "run").exists()


def test_its_flags_belong_to_it(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--groups", "layers"], ["--models", "good,worse"], ["--base", "base"]):
        assert main_single(evolve.COMMAND, ["--model", "good", "--data", "text.txt", *words]) == 2
        assert f"{words[0]} belongs to --space merge, not to lora" in capsys.readouterr().err


def test_a_candidates_noise_is_dense_for_every_strategy() -> None:
    """Coefficients are vectors: nothing of them lies beside a weight."""
    space, _, _ = space_of("dare")
    strategy = cma.cma_es(4, 0.2)
    candidates = strategy.ask(strategy.init(keys.key(0), space.start))
    assert isinstance(candidates, Candidates)
    assert {name: leaf.shape for name, leaf in tree.flatten(candidates.own).items()} == {
        "0.weight": (4, 2), "1.weight": (4, 2), "trim.logit": (4,)
    }  # fmt: skip
