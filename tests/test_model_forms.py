"""The forms of one model are equal: adapter attached and merged, fused and plain, vmapped and looped, differentiated,
compiled and eager.

Axes: B batch, T time, P members of a population, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from batches import FEW, TIMES, batch_of, gradient, nll
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from strategies import (
    LONGEST,
    SEEDS,
    assert_close,
    assert_trees_close,
    configs,
    document_rows,
    numbers,
    token_rows,
    weights,
)
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.compile import compiled, graphs
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.linear import linear
from functional_lm.model.transformer import forward, loss
from functional_lm.tree import Tree

# Adapters -------------------------------------------------------------------------------------------------------------


def adapter(params: Tree, names: list[str], rank: int, seed: int) -> Tree:
    """Low-rank leaves for the matrices `names`: an embedding is used transposed."""
    flat = {}
    for i, name in enumerate(names):
        outputs, inputs = tree.flatten(params)[f"{name}.weight"].shape
        if "embed_tokens" in name:
            outputs, inputs = inputs, outputs
        flat[f"{name}.lora_A"] = numbers((rank, inputs), seed + 2 * i)
        flat[f"{name}.lora_B"] = 0.3 * numbers((outputs, rank), seed + 2 * i + 1)
        flat[f"{name}.lora_scale"] = torch.tensor(0.5 + i / 8)
    return tree.unflatten(flat)


def merged(params: Tree, low_rank: Tree, names: list[str]) -> Tree:
    flat, delta = tree.flatten(params), tree.flatten(low_rank)
    for name in names:
        product = delta[f"{name}.lora_scale"] * delta[f"{name}.lora_B"] @ delta[f"{name}.lora_A"]
        flat[f"{name}.weight"] = flat[f"{name}.weight"] + (product.mT if "embed_tokens" in name else product)
    return tree.unflatten(flat)


def adaptable(params: Tree) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name in tree.flatten(params)
        if name.endswith("_proj.weight") or name in ("lm_head.weight", "model.embed_tokens.weight")
    ]


@settings(max_examples=40)
@given(config=configs(), rank=st.integers(1, 3), time=TIMES, seed=SEEDS, fuse=st.booleans(), data=st.data())
def test_an_attached_adapter_is_a_merged_one(
    config: ModelConfig, rank: int, time: int, seed: int, fuse: bool, data: DataObject
) -> None:
    """In float64: a norm of next to nothing makes float32's rounding large."""
    params, tokens = weights(config, seed), token_rows(config, (2, time), seed)
    names = data.draw(st.lists(st.sampled_from(adaptable(params)), min_size=1, unique=True))
    params, low_rank = tree.cast((params, adapter(params, names, rank, seed)), torch.float64)
    attached = tree.overlay(params, low_rank)
    attached = compute_copy(attached, torch.float64) if fuse else attached
    assert_close(forward(attached, tokens, config), forward(merged(params, low_rank, names), tokens, config), 1e-6)


@FEW
@given(config=configs(attention="standard"), time=TIMES, seed=SEEDS)
def test_adapters_over_one_base_are_a_vmap_axis(config: ModelConfig, time: int, seed: int) -> None:
    params, tokens = weights(config, seed), token_rows(config, (2, time), seed)
    members = [adapter(params, adaptable(params), 2, seed + 1000 * i) for i in range(3)]
    population = tree.stack(members)
    together = torch.vmap(lambda member: forward(tree.overlay(params, member), tokens, config))(population)
    for found, member in zip(together, members):
        assert_close(found, forward(tree.overlay(params, member), tokens, config), 1e-4)


def test_low_rank_terms_keep_the_dtype_of_the_product() -> None:
    params = {"lora_A": numbers((2, 4), 0), "lora_B": numbers((3, 2), 1), "lora_scale": torch.tensor(2.0)}
    params["weight"] = numbers((3, 4), 2, torch.bfloat16)
    x = numbers((5, 4), 3)
    expected = x @ (params["weight"].float() + 2 * params["lora_B"] @ params["lora_A"]).mT
    found = linear(params, x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, 3e-2)


# The compute copy -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(config=configs(), rows=st.integers(1, 2), time=TIMES, seed=SEEDS, fuse=st.booleans())
def test_a_compute_copy_computes_the_same(config: ModelConfig, rows: int, time: int, seed: int, fuse: bool) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)
    grads, value = gradient(partial(nll, batch=batch, config=config), params)
    copied, same = gradient(lambda p: nll(compute_copy(p, torch.float32, fuse), batch, config), params)
    assert_close(same, value, 1e-4)
    assert_trees_close(copied, grads, 3e-4)
    names = tree.flatten(compute_copy(params, torch.float32, fuse)).keys()
    assert any("qkv_proj" in name for name in names) == fuse
    assert any("gate_up_proj" in name for name in names) == (fuse and config.feed_forward == "swiglu")


@FEW
@given(config=configs(), seed=SEEDS)
def test_a_compute_copy_casts_matrices_and_leaves_vectors(config: ModelConfig, seed: int) -> None:
    params = weights(config, seed)
    params["model"]["step"] = torch.ones(2, 2, dtype=torch.int64)
    copy = tree.flatten(compute_copy(params, torch.bfloat16))
    assert {leaf.dtype for leaf in copy.values() if leaf.dim() == 1} == {torch.float32}
    assert {leaf.dtype for leaf in copy.values() if leaf.dim() > 1} == {torch.bfloat16, torch.int64}
    assert tree.size(copy) == tree.size(params)


# Higher order functions -----------------------------------------------------------------------------------------------


@FEW
@given(config=configs(attention="standard"), time=TIMES, seed=SEEDS, packed=st.booleans())
def test_an_ensemble_is_a_vmap_axis(config: ModelConfig, time: int, seed: int, packed: bool) -> None:
    members = [weights(config, seed + i) for i in range(3)]
    tokens = token_rows(config, (3, 2, time), seed)
    documents = document_rows(2, time, seed) if packed else None
    population = tree.stack(members)
    shared = torch.vmap(lambda p: forward(p, tokens[0], config, documents=documents))(population)
    own = torch.vmap(lambda p, t: forward(p, t, config, documents=documents))(population, tokens)
    for i, member in enumerate(members):
        assert_close(shared[i], forward(member, tokens[0], config, documents=documents), 1e-4)
        assert_close(own[i], forward(member, tokens[i], config, documents=documents), 1e-4)


@FEW
@given(config=configs(attention="standard"), rows=st.integers(1, 4), time=TIMES, seed=SEEDS, fuse=st.booleans())
def test_per_example_gradients_are_those_of_single_rows(
    config: ModelConfig, rows: int, time: int, seed: int, fuse: bool
) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)

    def value(p: Tree, row: dict[str, Tensor]) -> Tensor:
        return nll(compute_copy(p, torch.float32) if fuse else p, row, config)

    each = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(params, batch)
    for i in range(rows):
        row = {name: column[i : i + 1] for name, column in batch.items()}
        assert_trees_close(tree.index(each, i), gradient(partial(nll, batch=row, config=config), params)[0], 3e-4)


@settings(max_examples=20)
@given(config=configs(attention="standard"), seed=SEEDS)
def test_a_gradient_and_a_hessian_are_slopes(config: ModelConfig, seed: int) -> None:
    """Central differences in float64; a kink of ReLU between the two points would be no slope, so there is none."""
    config = dataclasses.replace(config, feed_forward="gelu" if "relu" in config.feed_forward else config.feed_forward)
    params, batch = weights(config, seed, torch.float64), batch_of(config, 2, 6, seed)
    direction = weights(config, seed + 1, torch.float64)
    direction = tree.scale(direction, 1 / tree.norm(direction))
    step = 1e-4

    def value(p: Tree) -> Tensor:
        return nll(p, batch, config)

    ahead, behind = (tree.add(params, tree.scale(direction, sign * step)) for sign in (1, -1))
    grad = torch.func.grad(value)
    slope = sum((a * b).sum() for a, b in zip(tree.leaves(grad(params)), tree.leaves(direction)))
    assert_close(slope, (value(ahead) - value(behind)) / (2 * step), 1e-4)
    _, product = torch.func.jvp(grad, (params,), (direction,))
    secant = tree.scale(tree.subtract(grad(ahead), grad(behind)), 1 / (2 * step))
    assert_trees_close(product, secant, 1e-4)


@FEW
@given(config=configs(dropout=0.2), time=TIMES, seed=SEEDS)
def test_recomputing_activations_changes_no_gradient(config: ModelConfig, time: int, seed: int) -> None:
    params, batch = weights(config, seed), batch_of(config, 2, time, seed)
    results = [
        gradient(
            lambda p, saving=saving: loss(
                p, batch, dataclasses.replace(config, checkpoint_activations=saving), keys.key(seed)
            )[0],
            params,
        )
        for saving in (False, True)
    ]
    assert torch.equal(results[0][1], results[1][1])
    assert_trees_close(results[1][0], results[0][0], 1e-6)


# Compiled -------------------------------------------------------------------------------------------------------------


# One model with as many options at once as go together, so that few graphs cover many branches.
RICH = ModelConfig(
    vocab_size=40,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=24,
    max_len=LONGEST,
    rotary_fraction=0.7,
    rope_scaling=(8.0, 1.0, 4.0, 16.0),
    bias="qkv",
    qk_norm=True,
    sliding_window=5,
    logit_softcap=10.0,
    tie_embeddings=False,
)


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_computes_what_eager_does() -> None:
    params, run = weights(RICH, 0), compiled(partial(forward, config=RICH))
    for seed in (0, 1):
        tokens, documents = token_rows(RICH, (2, 12), seed), document_rows(2, 12, seed)
        before = graphs()
        found = run(params, tokens, documents=documents)
        assert graphs() == before + (seed == 0)
        assert_close(found, forward(params, tokens, RICH, documents=documents), 1e-4)


AOT = [
    dataclasses.replace(RICH, dropout=0.3),
    dataclasses.replace(
        RICH, positions="learned", norm="layernorm", norm_placement="post", bias="all", feed_forward="gelu"
    ),
    dataclasses.replace(RICH, positions="sinusoidal", feed_forward="relu2", parallel_residual=True, attention="flash"),
]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("config", AOT, ids=lambda config: config.positions)
def test_a_traced_gradient_is_the_eager_one(config: ModelConfig) -> None:
    params, batch, key = weights(config, 0), batch_of(config, 2, 12, 0), keys.key(0)

    def step(p: Tree, rows: dict[str, Tensor], dropout_key: Tensor) -> tuple[Tree, Tensor]:
        return torch.func.grad_and_value(lambda q: loss(compute_copy(q, torch.float32), rows, config, dropout_key)[0])(
            p
        )

    grads, value = compiled(step, backend="aot_eager")(params, batch, key)
    eager, expected = gradient(lambda p: loss(compute_copy(p, torch.float32), batch, config, key)[0], params)
    assert_close(value, expected, 1e-4)
    assert_trees_close(grads, eager, 3e-4)
