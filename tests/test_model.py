"""The model is a function: equal to a plain oracle, causal, additive over batches, random by its key alone.

Its forms are compared in test_model_forms.py, what a layer is made of in test_attention.py.

Axes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import oracle
import pytest
import torch
from batches import FEW, TIMES, batch_of, gradient, nll
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from strategies import LONGEST, SEEDS, assert_close, assert_trees_close, configs, document_rows, token_rows, weights
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import UsageError
from functional_lm.model import attention as attentions
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.model.families import family_of
from functional_lm.model.linear import drop
from functional_lm.model.transformer import IGNORED, abstract, forward, init, loss

# Initialisation -------------------------------------------------------------------------------------------------------


@FEW
@given(config=configs(), seed=SEEDS)
def test_init_makes_what_is_described_leaf_by_leaf(config: ModelConfig, seed: int) -> None:
    params, shapes = init(config, keys.key(seed)), abstract(config)
    assert tree.map(lambda leaf: tuple(leaf.shape), params) == tree.map(lambda leaf: tuple(leaf.shape), shapes)
    assert tree.digest(params) == tree.digest(init(config, keys.key(seed)))
    wider = init(dataclasses.replace(config, vocab_size=config.vocab_size + 1, tie_embeddings=False), keys.key(seed))
    mine, others = tree.flatten(params), tree.flatten(wider)
    for name, leaf in mine.items():  # a leaf draws from its own name: the others do not matter
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(leaf, others[name])
        assert leaf.dtype == torch.float32
        assert leaf.unique().numel() > 1 or leaf.dim() == 1 or leaf.numel() == 1
    matrices = [leaf.flatten() for leaf in mine.values() if leaf.dim() == 2 and leaf.numel() > 1]
    assert len({tuple(leaf[:4].tolist()) for leaf in matrices}) == len(matrices)  # and none draws what another did


def test_the_start_has_the_promised_spread() -> None:
    shape = {"vocab_size": 400, "d_model": 96, "n_layers": 8, "n_heads": 4, "bias": "all", "norm": "layernorm"}
    assert ModelConfig(**shape).initializer_range == math.sqrt(2 / (5 * 96))
    config = ModelConfig(**shape, initializer_range=0.02)
    for name, leaf in tree.flatten(init(config, keys.key(0))).items():
        if leaf.dim() == 1:
            assert torch.equal(leaf, torch.full_like(leaf, 1.0 if name.endswith("weight") else 0.0)), name
        else:
            std = 0.02 / 4 if "down_proj" in name or "o_proj" in name else 0.02
            assert leaf.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(leaf.mean().item()) < 5 * std / leaf.numel() ** 0.5, name


def test_a_llama_has_the_names_and_shapes_of_hugging_face() -> None:
    config = ModelConfig(
        vocab_size=50, d_model=24, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, tie_embeddings=False
    )
    assert family_of(config) == "llama"
    assert {name: list(leaf.shape) for name, leaf in tree.flatten(abstract(config)).items()} == {
        "lm_head.weight": [50, 24],
        "model.embed_tokens.weight": [50, 24],
        "model.layers.0.input_layernorm.weight": [24],
        "model.layers.0.mlp.down_proj.weight": [24, 40],
        "model.layers.0.mlp.gate_proj.weight": [40, 24],
        "model.layers.0.mlp.up_proj.weight": [40, 24],
        "model.layers.0.post_attention_layernorm.weight": [24],
        "model.layers.0.self_attn.k_proj.weight": [16, 24],
        "model.layers.0.self_attn.o_proj.weight": [24, 32],
        "model.layers.0.self_attn.q_proj.weight": [32, 24],
        "model.layers.0.self_attn.v_proj.weight": [16, 24],
        "model.norm.weight": [24],
    }


def test_a_population_of_fresh_models_is_one_vmapped_call() -> None:
    config = ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=8)
    members = keys.split(keys.key(3), 3)
    population = torch.vmap(partial(init, config))(members)
    assert_trees_close(population, tree.stack([init(config, member) for member in members]), 1e-6)


# The whole function ---------------------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(config=configs(), time=TIMES, seed=SEEDS)
def test_forward_is_the_plain_oracle(config: ModelConfig, time: int, seed: int) -> None:
    params, tokens = weights(config, seed), token_rows(config, (time,), seed)
    expected = torch.from_numpy(oracle.logits(params, tokens.tolist(), config))
    assert_close(forward(params, tokens, config), expected, 1e-4)


@FEW
@given(config=configs(), time=TIMES, seed=SEEDS)
def test_rows_of_a_batch_do_not_meet(config: ModelConfig, time: int, seed: int) -> None:
    params, tokens = weights(config, seed), token_rows(config, (2, 2, time), seed)
    together = forward(params, tokens, config)
    alone = torch.stack([forward(params, row, config) for row in tokens.flatten(0, 1)]).unflatten(0, (2, 2))
    assert_close(together, alone)
    assert_close(forward(params, tokens[0], config), alone[0])


@FEW
@given(config=configs(), seed=SEEDS, data=st.data())
def test_a_token_is_seen_by_its_future_alone_and_by_no_more_than_the_windows_reach(
    config: ModelConfig, seed: int, data: DataObject
) -> None:
    time = data.draw(st.integers(2, LONGEST))
    at = data.draw(st.integers(0, time - 1))
    assume(config.vocab_size > 1)
    params, tokens = weights(config, seed, torch.float64), token_rows(config, (2, time), seed)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % config.vocab_size
    before, after = forward(params, tokens, config), forward(params, changed, config)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])
    if config.sliding_window:
        reach = at + config.n_layers * (config.sliding_window - 1)
        assert torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])


@FEW
@given(config=configs(), rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_packed_documents_are_separate_documents(config: ModelConfig, rows: int, time: int, seed: int) -> None:
    """Whatever the positions: restarted where they are absolute, relative where they are rotary."""
    params, tokens = weights(config, seed), token_rows(config, (rows, time), seed)
    documents = document_rows(rows, time, seed)
    packed = forward(params, tokens, config, documents=documents)
    for row, numbering, found in zip(tokens, documents, packed):
        for number in numbering.unique():
            inside = numbering == number
            assert_close(found[inside], forward(params, row[inside], config), 1e-4)


@FEW
@given(config=configs(), time=TIMES, seed=SEEDS)
def test_integers_of_any_width_are_tokens(config: ModelConfig, time: int, seed: int) -> None:
    params, batch = weights(config, seed), batch_of(config, 2, time, seed)
    narrow = {name: column.to(torch.int32) for name, column in batch.items()}
    assert torch.equal(nll(params, narrow, config), nll(params, batch, config))


def test_a_learned_table_that_is_too_short_is_an_error() -> None:
    config = ModelConfig(vocab_size=5, d_model=4, n_layers=1, n_heads=1, max_len=3, positions="learned")
    with pytest.raises(UsageError, match=r"4 tokens .* max_len 3"):
        forward(init(config, keys.key(0)), torch.zeros(1, 4, dtype=torch.int64), config)


@FEW
@given(config=configs(), time=TIMES, seed=SEEDS)
def test_logits_have_the_precision_of_the_parameters(config: ModelConfig, time: int, seed: int) -> None:
    tokens = token_rows(config, (2, time), seed)
    exact = forward(weights(config, seed, torch.float64), tokens, config)
    for dtype, tolerance in ((torch.float64, 0.0), (torch.float32, 1e-4), (torch.bfloat16, math.inf)):
        found = forward(tree.cast(weights(config, seed, torch.float64), dtype), tokens, config)
        assert found.dtype == dtype
        assert_close(found, exact, tolerance)
        assert found.isfinite().all()


# Loss -----------------------------------------------------------------------------------------------------------------


@FEW
@given(config=configs(), rows=st.integers(1, 4), time=TIMES, seed=SEEDS, data=st.data())
def test_losses_and_gradients_of_parts_add_up(
    config: ModelConfig, rows: int, time: int, seed: int, data: DataObject
) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, rows - 1)), max_size=rows - 1)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, rows])]
    parts = [dict(zip(batch, piece)) for piece in zip(*(value.split(sizes) for value in batch.values()))]
    whole, metrics = loss(params, batch, config)
    each = [loss(params, part, config) for part in parts]
    assert_close(torch.stack([value for value, _ in each]).sum(), whole, 1e-4)
    assert sum(int(m["tokens"]) for _, m in each) == int(metrics["tokens"]) == int((batch["targets"] != IGNORED).sum())
    assert torch.equal(metrics["nll"], whole)
    total, _ = gradient(partial(nll, batch=batch, config=config), params)
    sums = [gradient(partial(nll, batch=part, config=config), params)[0] for part in parts]
    for other in sums[1:]:
        sums[0] = tree.add(sums[0], other)
    assert_trees_close(sums[0], total, 1e-4)


@FEW
@given(config=configs(), rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_loss_is_the_log_probability_of_the_predicted_targets(
    config: ModelConfig, rows: int, time: int, seed: int
) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)
    probabilities = forward(params, batch["tokens"], config, documents=batch["documents"]).double().softmax(-1)
    total = 0.0
    for row in range(rows):
        for t in range(time):
            target = int(batch["targets"][row, t])
            total -= math.log(probabilities[row, t, target]) if target != IGNORED else 0.0
    assert nll(params, batch, config).item() == pytest.approx(total, rel=1e-4, abs=1e-4)


@FEW
@given(config=configs(), time=TIMES, seed=SEEDS)
def test_a_batch_with_nothing_to_predict_weighs_nothing(config: ModelConfig, time: int, seed: int) -> None:
    tokens = token_rows(config, (2, time), seed)
    batch = {"tokens": tokens, "targets": torch.full_like(tokens, IGNORED)}
    grads, value = gradient(partial(nll, batch=batch, config=config), weights(config, seed))
    assert value == 0
    assert tree.norm(grads) == 0
    assert loss(weights(config, seed), batch, config)[1]["tokens"] == 0


# Dropout --------------------------------------------------------------------------------------------------------------


@FEW
@given(config=configs(), seed=SEEDS, p=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_is_a_function_of_its_key(config: ModelConfig, seed: int, p: float) -> None:
    dropping = dataclasses.replace(config, dropout=p)
    params, tokens = weights(config, seed), token_rows(config, (2, 8), seed)
    plain, key = forward(params, tokens, config), keys.key(seed)
    assert torch.equal(forward(params, tokens, dropping), plain)
    assert torch.equal(forward(params, tokens, config, key), plain)
    dropped = forward(params, tokens, dropping, key)
    assert torch.equal(dropped, forward(params, tokens, dropping, key))
    assert not torch.equal(dropped, plain)
    members = keys.split(key, 3)
    together = torch.vmap(lambda member: forward(params, tokens, dropping, member))(members)
    for found, member in zip(together, members):
        assert_close(found, forward(params, tokens, dropping, member), 1e-4)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.95])
def test_dropout_keeps_the_expectation(p: float) -> None:
    ones = torch.ones(400, 500)
    dropped = drop(ones, p, keys.key(7))
    assert set(dropped.unique().tolist()) <= {0.0, (ones[0, 0] * (1 / (1 - p))).item()}
    spread = math.sqrt(p / (1 - p) / ones.numel())
    assert abs(dropped.mean().item() - 1) <= 4 * spread + 1e-5
    each = dropped.mean(0)  # no column, and so no unit, is treated differently
    assert (each - 1).abs().max().item() <= 5 * math.sqrt(p / (1 - p) / 400) + 1e-5
    assert drop(ones.bfloat16(), p, keys.key(7)).dtype == torch.bfloat16


def test_every_place_of_every_layer_has_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=7, d_model=8, n_layers=3, n_heads=2, d_ff=8, dropout=0.5)
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, probability: float, key: Tensor) -> Tensor:
        seen.append(tuple(key.tolist()))
        return drop(x, probability, key)

    monkeypatch.setattr(transformer, "drop", spy)
    monkeypatch.setattr(attentions, "drop", spy)
    forward(init(config, keys.key(0)), token_rows(config, (2, 5), 0), config, keys.key(1))
    assert len(seen) == len(set(seen)) == 3 * config.n_layers + 1
