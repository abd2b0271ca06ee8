"""Adapters as trees: attached = merged, a vmap axis = a loop, a bank's rows = each alone, and what is refused.

Axes: B batch, T time, R rank, N entries of a bank.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from strategies import SEEDS, assert_close, configs, numbers, token_rows, weights

from functional_lm import keys, tree
from functional_lm.errors import DataError, UsageError
from functional_lm.inference import cache as kv
from functional_lm.model import lora
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward, forward_cached
from functional_lm.tree import Tree

SMALL = ModelConfig(vocab_size=19, d_model=12, n_layers=2, n_heads=2, d_ff=16, max_len=16, bias="qkv")


@st.composite
def adapters(draw: st.DrawFn, params: Tree, dora: bool | None = None) -> Tree:
    """A trained adapter of any rank for any places, with DoRA where it can be."""
    known = sorted(lora.places(params))
    targets = draw(st.lists(st.sampled_from(known), min_size=1, unique=True), label="targets")
    doing = draw(st.booleans(), label="dora") if dora is None else dora
    doing = doing and not any(target.endswith("embed_tokens") for target in targets)
    rank, seed = draw(st.integers(1, 3), label="R"), draw(SEEDS)
    made = lora.init(params, targets, rank, keys.key(seed), 2.0 * rank, draw(st.booleans(), label="rslora"), doing)
    flat = tree.flatten(made)
    for number, (name, leaf) in enumerate(flat.items()):
        if name.endswith("lora_B"):
            flat[name] = 0.3 * numbers(tuple(leaf.shape), seed + number)
        elif name.endswith("lora_magnitude"):
            flat[name] = leaf * (1 + 0.3 * numbers(tuple(leaf.shape), seed + number))
    return tree.unflatten(flat)


@given(config=configs(), seed=SEEDS, fuse=st.booleans(), data=st.data())
@settings(max_examples=60)
def test_attached_is_merged(config: ModelConfig, seed: int, fuse: bool, data: DataObject) -> None:
    params, tokens = weights(config, seed), token_rows(config, (2, 5), seed)
    adapter = data.draw(adapters(params))
    attached = lora.attach(params, adapter)
    attached = compute_copy(attached, torch.float32) if fuse else attached
    found, merged = forward(attached, tokens, config), lora.merge(params, adapter)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    assert_close(found, forward(merged, tokens, config), 2e-4)


@given(config=configs(), seed=SEEDS, data=st.data())
@settings(max_examples=20)
def test_a_fresh_adapter_changes_nothing_and_shares_the_base(config: ModelConfig, seed: int, data: DataObject) -> None:
    params, tokens = weights(config, seed), token_rows(config, (2, 5), seed)
    targets = data.draw(st.lists(st.sampled_from(sorted(lora.places(params))), min_size=1, unique=True))
    dora = not any("embed" in target for target in targets) and data.draw(st.booleans())
    adapter = lora.init(params, targets, 2, keys.key(seed), dora=dora)
    attached = lora.attach(params, adapter)
    assert_close(forward(attached, tokens, config), forward(params, tokens, config), 1e-5)
    held = tree.flatten(attached)
    assert all(held[name] is leaf for name, leaf in tree.flatten(params).items())


@given(seed=SEEDS)
@settings(max_examples=10)
def test_a_draw_depends_on_the_path_alone(seed: int) -> None:
    params = weights(SMALL, 0)
    whole = tree.flatten(lora.init(params, lora.ALL_LINEAR, 3, keys.key(seed)))
    part = tree.flatten(lora.init(tree.select(params, "*.1.mlp.*"), "up_proj", 3, keys.key(seed)))
    assert part
    assert all(torch.equal(whole[name], leaf) for name, leaf in part.items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_adapters_over_one_base_are_a_vmap_axis(dora: bool, fuse: bool) -> None:
    config = dataclasses.replace(SMALL, attention="standard")
    params, tokens = weights(config, 0), token_rows(config, (2, 5), 1)
    targets = lora.ALL_LINEAR if dora else ["*"]
    members = [lora.init(params, targets, 2, keys.key(i), dora=dora) for i in range(3)]
    members = [tree.map(lambda leaf, i=i: leaf + 0.1 * (i + 1), member) for i, member in enumerate(members)]
    base = compute_copy(params, torch.float32) if fuse and not dora else params
    together = torch.vmap(lambda base, own: forward(lora.attach(base, own), tokens, config), in_dims=(None, 0))(
        base, tree.stack(members)
    )
    for found, member in zip(together, members, strict=True):
        assert_close(found, forward(lora.attach(params, member), tokens, config), 1e-4)


@given(config=configs(), seed=SEEDS, fuse=st.booleans(), data=st.data())
@settings(max_examples=40)
def test_a_bank_gives_each_row_its_own_adapter(config: ModelConfig, seed: int, fuse: bool, data: DataObject) -> None:
    """Of other ranks and other targets; entry 0 is the base. So with a cache, one token at a time."""
    params = weights(config, seed)
    given_ = [data.draw(adapters(params)) for _ in range(2)]
    index = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    tokens = token_rows(config, (len(index), 4), seed)
    banked = lora.attach(params, lora.select(lora.stack(params, given_), index))
    banked = compute_copy(banked, torch.float32) if fuse else banked
    found = forward(banked, tokens, config)
    alone = [lora.attach(params, *given_[number - 1 : number]) if number else params for number in index.tolist()]
    for row, (model, own) in enumerate(zip(alone, tokens, strict=True)):
        assert_close(found[row : row + 1], forward(model, own[None], config), 2e-4)
    cache = kv.init(config, len(index), 16, torch.float32)
    for place in range(4):
        at = torch.full((len(index),), place)
        cache, logits = forward_cached(banked, cache, tokens[:, place : place + 1], at, config)
        assert_close(logits[:, 0], found[:, place], 2e-4)


def test_dropout_draws_by_key_and_place() -> None:
    params, tokens = weights(SMALL, 0), token_rows(SMALL, (2, 6), 0)
    adapter = lora.init(params, lora.ALL_LINEAR, 2, keys.key(0))
    adapter = tree.map(lambda leaf: leaf + 0.2, adapter)
    model = lora.attach(params, lora.with_dropout(adapter, 0.5))
    assert lora.drops(model)
    assert not lora.drops(params)
    plain = forward(lora.attach(params, adapter), tokens, SMALL)
    assert_close(forward(model, tokens, SMALL), plain)  # no key, no dropout
    one, same, other = (forward(lora.keyed(model, keys.key(i)), tokens, SMALL) for i in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, plain)
    fused = compute_copy(lora.keyed(model, keys.key(1)), torch.float32)
    assert_close(forward(fused, tokens, SMALL), one, 1e-4)
    held = tree.flatten(lora.keyed(model, keys.key(1)))
    drawn = [tuple(leaf.tolist()) for name, leaf in held.items() if name.endswith("lora_key")]
    assert len(set(drawn)) == len(drawn) == 14


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        ("q_proj", 0, "the rank is 0; an adapter needs at least 1"),
        ("q_proj", -2, "the rank is -2"),
        (["q_proj", "w_proj"], 2, "the target 'w_proj' matches nothing; there are down_proj, embed_tokens, "),
        ("norm", 2, "the target 'norm' matches nothing"),
        ([], 2, "an adapter needs targets"),
    ],
)
def test_what_adapts_nothing_is_refused(targets: str | list[str], rank: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lora.init(weights(SMALL, 0), targets, rank, keys.key(0))


def test_targets_are_names_paths_and_globs() -> None:
    params = weights(dataclasses.replace(SMALL, tie_embeddings=False), 0)
    known = lora.places(params)
    assert len(known) == 16
    assert lora.targeted(params, "q_proj").keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert lora.targeted(params, "self_attn.q_proj").keys() == lora.targeted(params, "*.q_proj").keys()
    assert len(lora.targeted(params, ["model.layers.1.*", "lm_head"])) == 8
    assert lora.targeted(params, lora.ALL_LINEAR).keys() == {name for name in known if "layers" in name}
    assert lora.targeted(params, "*").keys() == known.keys()


def test_dora_on_an_embedding_is_refused() -> None:
    with pytest.raises(UsageError, match="embed_tokens has none; leave it out"):
        lora.init(weights(SMALL, 0), "embed_tokens", 2, keys.key(0), dora=True)


def test_an_adapter_of_another_base_is_refused() -> None:
    params, wide = weights(SMALL, 0), weights(dataclasses.replace(SMALL, d_model=16), 0)
    adapter = lora.init(wide, "q_proj", 2, keys.key(0))
    with pytest.raises(DataError, match=r"lora_A is \[2, 16\]; this base needs \[2, 12\]"):
        lora.merge(params, adapter)
    deep = lora.init(weights(dataclasses.replace(SMALL, n_layers=3), 0), "q_proj", 2, keys.key(0))
    with pytest.raises(DataError, match=r"adapts 'model.layers.2.self_attn.q_proj', which this model lacks"):
        lora.stack(params, [deep])
