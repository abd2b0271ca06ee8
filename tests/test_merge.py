"""Models as arithmetic: identities of every method, the papers' formulas, and a command that merges what fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, assert_trees_close, configs, numbers, token_rows, weights

from functional_lm import folder, keys, tree
from functional_lm.__main__ import COMMANDS
from functional_lm.cli import main
from functional_lm.model import merge
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward, init
from functional_lm.text import tokenizer as tokenizers
from functional_lm.tree import Tree

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def models_of(config: ModelConfig, seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tree]:
    return [weights(config, seed + number, dtype) for number in range(count)]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values)


# Identities ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(config=configs(), seed=SEEDS, dtype=DTYPES)
def test_one_weight_of_one_gives_that_model(config: ModelConfig, seed: int, dtype: torch.dtype) -> None:
    """To the bit of linear, slerp and task arithmetic; within rounding where differences are added."""
    first, second, base = models_of(config, seed, 3, dtype)
    assert tree.digest(merge.linear([first, second], vector(1, 0))) == tree.digest(first)
    assert tree.digest(merge.linear([first, second], vector(0, 1))) == tree.digest(second)
    assert tree.digest(merge.slerp(first, second, vector(1, 0))) == tree.digest(first)
    assert tree.digest(merge.slerp(first, second, vector(0, 2))) == tree.digest(second)
    assert tree.digest(merge.task_arithmetic(base, [first], vector(1))) == tree.digest(first)
    assert tree.digest(merge.task_arithmetic(base, [first, second], vector(0, 1))) == tree.digest(second)
    assert tree.digest(merge.task_arithmetic(base, [first, second], vector(0, 0))) == tree.digest(base)
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    assert_trees_close(merge.ties(base, [first], vector(1), 1.0), first, rounding)
    assert_trees_close(merge.dare(base, [first], vector(1), keys.key(seed), 1.0), first, rounding)
    assert tree.digest(merge.ties(base, [first, second], vector(1, 1), 0.0)) == tree.digest(base)


@settings(max_examples=20)
@given(config=configs(), seed=SEEDS, w=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_differences_are_added(config: ModelConfig, seed: int, w: tuple[float, float]) -> None:
    first, second, base = models_of(config, seed, 3)
    added = tree.add(
        tree.add(base, tree.scale(tree.subtract(first, base), w[0])), tree.scale(tree.subtract(second, base), w[1])
    )
    assert_trees_close(merge.task_arithmetic(base, [first, second], vector(*w)), added, 1e-5)
    soup = tree.add(tree.scale(first, w[0]), tree.scale(second, w[1]))
    assert_trees_close(merge.linear([first, second], vector(*w)), soup, 1e-6)


@settings(max_examples=20)
@given(config=configs(), seed=SEEDS, t=st.floats(0, 1))
def test_slerp_turns_at_a_constant_speed(config: ModelConfig, seed: int, t: float) -> None:
    """Between two leaves of length one the result has length one and stands at t times the angle from the first."""
    first, second = (
        tree.map(lambda leaf: leaf.double() / leaf.double().norm(), model) for model in models_of(config, seed, 2)
    )
    middle = merge.slerp(first, second, torch.tensor([1 - t, t], dtype=torch.float64))
    for a, b, c in zip(tree.leaves(first), tree.leaves(second), tree.leaves(middle)):
        angle = torch.arccos((a * b).sum().clamp(-1, 1))
        if 0.01 < angle < 3.13:
            assert abs(c.norm() - 1) < 1e-6
            assert abs(torch.arccos((a * c).sum().clamp(-1, 1)) - t * angle) < 1e-5


@settings(max_examples=15)
@given(config=configs(), seed=SEEDS, t=st.floats(0, 1), scale=st.sampled_from([1.0, -1.0, 3.0, 0.0]))
def test_slerp_of_parallel_leaves_is_the_line(config: ModelConfig, seed: int, t: float, scale: float) -> None:
    first = weights(config, seed)
    second = tree.scale(first, scale)
    assert_trees_close(merge.slerp(first, second, vector(1 - t, t)), tree.lerp(first, second, t), 1e-5)


# The papers ---------------------------------------------------------------------------------------------------------


def ties_reference(
    base: NDArray[np.float64], models: list[NDArray[np.float64]], weight: float, density: float
) -> NDArray[np.float64]:
    """Algorithm 1 of arXiv 2306.01708, number by number, with λ = weight."""
    count = round(density * len(base))
    trimmed = []
    for model in models:
        difference = model - base
        kept = np.zeros_like(difference)
        for place in sorted(range(len(base)), key=lambda p: -abs(difference[p]))[:count]:
            kept[place] = difference[place]
        trimmed.append(kept)
    result = base.copy()
    for place in range(len(base)):
        elected = np.sign(sum(kept[place] for kept in trimmed))
        agreeing = [kept[place] for kept in trimmed if np.sign(kept[place]) == elected]
        if elected and agreeing:
            result[place] += weight * sum(agreeing) / len(agreeing)
    return result


@settings(max_examples=40)
@given(
    seed=SEEDS,
    count=st.integers(1, 4),
    density=st.floats(0, 1),
    weight=st.floats(0.1, 2),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_ties_is_the_papers(seed: int, count: int, density: float, weight: float, sizes: list[int]) -> None:
    def tree_of(flat: torch.Tensor) -> Tree:
        return {str(i): {"weight": part} for i, part in enumerate(flat.split(sizes))}

    base, *models = (numbers((sum(sizes),), seed + i, torch.float64) for i in range(count + 1))
    merged = merge.ties(tree_of(base), [tree_of(m) for m in models], torch.full((count,), weight).double(), density)
    expected = ties_reference(base.numpy(), [m.numpy() for m in models], weight, density)
    assert np.allclose(torch.cat(tree.leaves(merged)).numpy(), expected, atol=1e-6)


@settings(max_examples=10)
@given(seed=SEEDS, density=st.floats(0.2, 0.9), w=st.floats(-1, 1))
def test_dare_drops_rescales_and_keeps_the_expectation(seed: int, density: float, w: float) -> None:
    base, model = {"a": {"weight": numbers((40, 50), seed)}}, {"a": {"weight": numbers((40, 50), seed + 1)}}
    difference = model["a"]["weight"] - base["a"]["weight"]
    merged = merge.dare(base, [model], vector(w), keys.key(seed), density)["a"]["weight"]
    change = merged - base["a"]["weight"]
    kept = change != 0
    assert torch.allclose(change[kept], (w * difference / density)[kept], rtol=1e-3, atol=1e-5)
    if abs(w) > 1e-3:
        assert abs(kept.float().mean() - density) < 5 * (density * (1 - density) / 2000) ** 0.5
    draws = keys.split(keys.key(seed), 400)
    mean = torch.vmap(lambda key: merge.dare(base, [model], vector(w), key, density)["a"]["weight"])(draws).mean(0)
    error = (mean - base["a"]["weight"] - w * difference).abs()
    deviation = abs(w) * difference.abs() * ((1 - density) / density / 400) ** 0.5
    assert (error <= 6 * deviation + 1e-5).all()


def test_dare_draws_for_each_leaf_and_model() -> None:
    zero, one = ({name: {"weight": torch.full((64,), value)} for name in "ab"} for value in (0.0, 1.0))
    merged = merge.dare(zero, [one], vector(1), keys.key(3))
    assert not torch.equal(merged["a"]["weight"], merged["b"]["weight"])
    twice = merge.dare(zero, [one, one], vector(1, 1), keys.key(3))
    assert (twice["a"]["weight"] == 2).any()  # kept of one, dropped of the other
    assert tree.digest(merge.dare(zero, [one], vector(1), keys.key(3))) == tree.digest(merged)


# Weights as tensors ---------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(config=configs(attention="standard"), seed=SEEDS)
def test_a_population_of_weights_is_a_vmap_axis(config: ModelConfig, seed: int) -> None:
    """Every method, with weights by pattern, mapped = looped; TIES with a density of each member's own."""
    first, second, base = models_of(config, seed, 3)
    w = {"*": numbers((3, 2), seed).abs(), "*.mlp.*": numbers((3, 2), seed + 1).abs()}
    density, key = torch.tensor([0.2, 0.5, 1.0]), keys.key(seed)
    methods = {
        "linear": lambda w, d: merge.linear([first, second], w),
        "slerp": lambda w, d: merge.slerp(first, second, w),
        "task arithmetic": lambda w, d: merge.task_arithmetic(base, [first, second], w),
        "ties": lambda w, d: merge.ties(base, [first, second], w, d),
        "dare": lambda w, d: merge.dare(base, [first, second], w, key, d),
    }
    for method in methods.values():
        looped = tree.stack([method(tree.index(w, i), density[i]) for i in range(3)])
        assert_trees_close(torch.vmap(method)(w, density), looped, 1e-5)
    tokens = token_rows(config, (1, 4), seed)
    logits = torch.vmap(lambda w: forward(merge.linear([first, second], w), tokens, config))(w)
    assert logits.shape == (3, 1, 4, config.vocab_size)
    gradient = torch.func.grad(lambda w: forward(merge.linear([first, second], w), tokens, config).sum())(
        tree.index(w, 0)
    )
    assert all(leaf.isfinite().all() for leaf in tree.leaves(gradient))


def test_the_last_pattern_that_matches_counts() -> None:
    first, second = ({"x": {"a": torch.full((2,), v), "b": torch.full((2,), v)}} for v in (0.0, 1.0))
    merged = merge.linear([first, second], {"*": vector(0.5, 0.5), "x.b": vector(0, 1), "*b": vector(1, 0)})
    assert merged["x"]["a"].tolist() == [0.5, 0.5]
    assert merged["x"]["b"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"no pattern gives weights to 'x\.a'; add '\*'"):
        merge.linear([first, second], {"x.b": vector(0, 1)})


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b, base: models of one kind; other: another vocabulary; wide: another architecture."""
    root, text = tmp_path_factory.mktemp("merge"), "Two models meet, and one goes on.\n"
    words, others = (tokenizers.train([text * 20 + more], vocab_size=290) for more in ("", "xyz " * 99))
    config = ModelConfig(words.vocab_size, d_model=8, n_layers=2, n_heads=2, d_ff=8)
    for number, name in enumerate(("a", "b", "base")):
        folder.save(root / name, init(config, keys.key(number)), config, words)
    folder.save(root / "other", init(config, keys.key(9)), config, others)
    wide = dataclasses.replace(config, d_ff=16)
    folder.save(root / "wide", init(wide, keys.key(9)), wide, words)
    return root


@pytest.fixture
def command(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    monkeypatch.chdir(saved)

    def call(*words: str, code: int = 0) -> str:
        assert main(COMMANDS, ["merge", "--out", str(tmp_path / "out"), *words]) == code
        said = capsys.readouterr()
        if code:
            assert not (tmp_path / "out").exists()
            assert said.err.count("\n") == 1
            return said.err
        return said.out

    return call


def test_the_command_writes_a_model(command: object, saved: Path, tmp_path: Path) -> None:
    assert callable(command)
    a, b, base = (folder.load(saved / name).params for name in ("a", "b", "base"))
    runs = {
        ("--models", "a,b"): merge.linear([a, b], vector(0.5, 0.5)),
        ("--models", "a,b", "--weights", "0.25,0.75", "--layer_weights", "*.mlp.*=1,0; *norm*=0,1"): merge.linear(
            [a, b], {"*": vector(0.25, 0.75), "*.mlp.*": vector(1, 0), "*norm*": vector(0, 1)}
        ),
        ("--models", "a,b", "--method", "slerp", "--weights", "1,3"): merge.slerp(a, b, vector(1, 3)),
        ("--models", "a", "--base", "base", "--method", "task_arithmetic"): a,
        ("--models", "a,b", "--base", "base", "--method", "ties"): merge.ties(base, [a, b], vector(1, 1), 0.2),
        ("--models", "a,b", "--base", "base", "--method", "dare", "--seed", "4", "--density", "0.25"): merge.dare(
            base, [a, b], vector(1, 1), keys.key(4), 0.25
        ),
    }
    for number, (words, expected) in enumerate(runs.items()):
        out = tmp_path / str(number)
        assert main(COMMANDS, ["merge", "--out", str(out), *words]) == 0
        back = folder.load(out)
        assert tree.digest(back.params) == tree.digest(expected), words
        assert (back.config, back.tokenizer.digest) == (folder.load("a").config, folder.load("a").tokenizer.digest)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--models a,wide", 1, "d_ff is 8 in a and 16 in wide"),
        ("--models a,other", 1, "a and other have different tokenizers"),
        ("--models a,nowhere", 1, "no model folder at nowhere"),
        ("--models a", 2, "--models names 1; linear merges at least 2"),
        ("--models a,b,base --method slerp", 2, "slerp merges two"),
        ("--models a,b --method ties", 2, "--method ties needs --base"),
        ("--models a,b --base base", 2, "--method linear has no --base"),
        ("--models a,b --density 0.5", 2, "--method linear has no --density"),
        ("--models a,b --weights 1", 2, "--weights has 1 numbers for 2 models"),
        ("--models a,b --method slerp --weights=-1,2", 2, "places on an arc are at least 0"),
        ("--models a,b --layer_weights mlp", 2, "'mlp' is not PATTERN=NUMBER,NUMBER"),
        ("--models a,b --layer_weights *.ffn.*=1,0", 2, "'*.ffn.*' matches no leaf, such as"),
        ("--models a,b --layer_weights *.mlp.*=nan,0", 2, "weights are finite numbers"),
        ("--models a,b --weights 1e38,1e38 --method linear --layer_weights *norm*=3e38,3e38", 1, "holds NaN or inf"),
    ],
)
def test_what_does_not_fit_is_refused(command: object, words: str, code: int, message: str) -> None:
    assert callable(command)
    assert message in command(*words.split(), code=code)


def test_an_existing_folder_stays(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "--models", f"{saved / 'a'},{saved / 'b'}", "--out", str(saved / "base")]
    assert main(COMMANDS, words) == 2
    assert "exists; remove it or choose another place" in capsys.readouterr().err
