"""The model is a function: equal to a plain oracle, causal, additive over batches, and the same in every form.

Forms: `standard` and `flash`, vmapped and looped, fused and plain, compiled and eager, adapter attached and merged.

Axes: B batch, T time, D model width, P members of a population, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
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
from functional_lm.errors import DataError, UsageError
from functional_lm.model import attention as attentions
from functional_lm.model import transformer
from functional_lm.model.attention import LONG, flash, standard, use_flash, visible
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import (
    CHOICES,
    ModelConfig,
    from_json,
    preset,
    read,
)
from functional_lm.model.families import family_of, to_hugging_face
from functional_lm.model.linear import drop, linear
from functional_lm.model.norm import norm
from functional_lm.model.positions import restart, rotary_frequencies, rotate, rotation, sinusoids
from functional_lm.model.transformer import IGNORED, abstract, forward, init, loss
from functional_lm.tree import Tree

FEW = settings(max_examples=25)
TIMES = st.integers(1, LONGEST)


def batch_of(config: ModelConfig, rows: int, time: int, seed: int) -> dict[str, Tensor]:
    """A batch with targets, a quarter of them not predicted, and packed documents."""
    targets = token_rows(config, (rows, time), seed + 1)
    return {
        "tokens": token_rows(config, (rows, time), seed),
        "targets": targets.masked_fill(numbers((rows, time), seed + 2) > 0.7, IGNORED),
        "documents": document_rows(rows, time, seed + 3),
    }


def nll(params: Tree, batch: dict[str, Tensor], config: ModelConfig) -> Tensor:
    return loss(params, batch, config)[0]


def gradient(function: Any, params: Tree) -> tuple[Tree, Tensor]:
    """Through torch.autograd, which every form of attention supports."""
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    value = function(leaves)
    grads = torch.autograd.grad(value, tree.leaves(leaves), allow_unused=True, materialize_grads=True)
    names = tree.flatten(leaves)
    return tree.unflatten(dict(zip(names, grads))), value.detach()


# Configuration ----------------------------------------------------------------------------------------------------


@given(config=configs())
def test_a_config_survives_json_and_is_hashable(config: ModelConfig) -> None:
    back = from_json(json.loads(json.dumps(config.to_json())))
    assert back == config
    assert hash(back) == hash(config)
    assert dataclasses.replace(config) == config  # derived widths are fixed points


@given(config=configs())
def test_a_config_survives_its_file(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    written = to_hugging_face(config, {"bos_token_id": 1}, "float32")
    path.write_text(json.dumps(written))
    assert read(path) == config
    assert written["model_type"] == family_of(config)
    path.write_text(json.dumps(config.to_json()))
    assert read(path) == config


def test_widths_left_open_are_derived() -> None:
    config = ModelConfig(d_model=96, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (6, 16, 256)
    assert ModelConfig(d_model=96, n_heads=6, feed_forward="gelu").d_ff == 384
    assert ModelConfig(d_model=100, n_heads=10).d_ff == 288  # 8/3 of 100, rounded up to a multiple of 32
    assert preset("nano", vocab_size=65).vocab_size == 65


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_len")),
    *(({name: -1}, name) for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "n_layers", "sliding_window")),
    *(({name: 2.5}, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "max_len")),
    *(({name: "8"}, name) for name in ("d_model", "dropout", "tie_embeddings", "rope_theta")),
    *(({name: "other"}, name) for name in CHOICES),
    *(({name: True}, name) for name in ("n_layers", "dropout")),
    *(({name: math.nan}, name) for name in ("dropout", "norm_eps", "rotary_fraction", "logit_softcap")),
    *(({name: math.inf}, name) for name in ("norm_eps", "rope_theta", "initializer_range", "logit_softcap")),
    *(({name: 0.0}, name) for name in ("norm_eps", "rope_theta", "rotary_fraction")),
    ({"initializer_range": -0.1}, "initializer_range"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"rotary_fraction": 1.1}, "rotary_fraction"),
    ({"d_model": 30, "n_heads": 4}, "d_model 30 is not a multiple of n_heads 4"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ({"n_heads": 4, "n_kv_heads": 8}, "n_kv_heads 8"),
    ({"head_dim": 4, "rotary_fraction": 0.25}, "rotary_fraction"),
    ({"d_model": 15, "n_heads": 3, "positions": "sinusoidal"}, "d_model 15 is odd"),
    ({"parallel_residual": True, "norm_placement": "post"}, "parallel_residual"),
    ({"rope_scaling": (8, 1, 4)}, "rope_scaling"),
    *(({"rope_scaling": (8, 1, 4, last)}, "rope_scaling") for last in (0, -1, math.nan, math.inf)),
    ({"rope_scaling": (8, 4, 4, 64)}, "the second less than the third"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    for make in (lambda: ModelConfig(**values), lambda: from_json(values)):
        with pytest.raises(UsageError) as caught:
            make()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_key_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="the file has an unknown key 'n_layer'; did you mean 'n_layers'"):
        from_json({"n_layer": 3}, "the file")
    with pytest.raises(UsageError, match="there is no preset 'huge'"):
        preset("huge")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no configuration at"):
        read(tmp_path / "config.json")
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list"), ("\xff", "is not JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("latin1"))
        with pytest.raises(DataError, match=message):
            read(tmp_path / "config.json")


# Initialisation ---------------------------------------------------------------------------------------------------


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


# The whole function -----------------------------------------------------------------------------------------------


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


# Loss -------------------------------------------------------------------------------------------------------------


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


# Attention --------------------------------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query [*B, H, T, E], key and value [*B, K, C, E], mask: None is causal; in any other each query sees a key."""
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    kv_heads, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    time, seed, kind = draw(TIMES), draw(SEEDS), draw(st.sampled_from(["causal", "shared", "own"]))
    length = time if kind == "causal" else draw(TIMES)
    query = 2 * numbers((*batch, kv_heads * groups, time, width), seed)
    key, value = (numbers((*batch, kv_heads, length, width), seed + i) for i in (1, 2))
    if kind == "causal":
        return query, key, value, None
    mask = numbers((*(batch if kind == "own" else ()), time, length), seed + 3) > 0.3
    return query, key, value, mask.index_fill(-1, torch.tensor(seed % length), True)


@settings(max_examples=50)
@given(product=products(), seed=SEEDS)
def test_standard_attention_is_the_fused_kernel(
    product: tuple[Tensor, Tensor, Tensor, Tensor | None], seed: int
) -> None:
    query, key, value, mask = product
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    towards = numbers(tuple(query.shape), seed)
    found, expected = standard(*leaves, mask), flash(*leaves, mask)
    assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad((y * towards).sum(), leaves) for y in (found, expected))):
        assert_close(mine, theirs)


@FEW
@given(config=configs(), rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_the_kind_of_attention_changes_neither_loss_nor_gradient(
    config: ModelConfig, rows: int, time: int, seed: int
) -> None:
    params, batch = weights(config, seed), batch_of(config, rows, time, seed)
    if seed % 2:
        del batch["documents"]
    results = [
        gradient(partial(nll, batch=batch, config=dataclasses.replace(config, attention=kind)), params)
        for kind in ("standard", "flash", "auto")
    ]
    for grads, value in results[1:]:
        assert_close(value, results[0][1], 1e-4)
        assert_trees_close(grads, results[0][0], 3e-4)


@pytest.mark.parametrize("kind", CHOICES["attention"])
def test_auto_is_fused_for_long_rows(kind: str) -> None:
    config = ModelConfig(attention=kind)
    chosen = [use_flash(config, torch.empty(1, 2, time, 4)) for time in (LONG - 1, LONG)]
    assert chosen == {"auto": [False, True], "standard": [False, False], "flash": [True, True]}[kind]


@given(
    queries=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    keys_at=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    window=st.integers(0, 4),
    seed=SEEDS,
)
def test_a_query_sees_its_own_past(queries: list[int], keys_at: list[int], window: int, seed: int) -> None:
    one, two = (token_rows(ModelConfig(vocab_size=2), (len(x),), seed) for x in (queries, keys_at))
    mask = visible(torch.tensor(queries), torch.tensor(keys_at), window, one, two)
    expected = [
        [k <= q and (not window or q - k < window) and int(one[i]) == int(two[j]) for j, k in enumerate(keys_at)]
        for i, q in enumerate(queries)
    ]
    assert mask.tolist() == expected


# Parts ------------------------------------------------------------------------------------------------------------


@FEW
@given(width=st.integers(1, 9), eps=st.floats(1e-6, 1.0), seed=SEEDS, shift=st.booleans())
def test_norms_are_torchs(width: int, eps: float, seed: int, shift: bool) -> None:
    x, weight, bias = numbers((2, 3, width), seed) * 3, numbers((width,), seed + 1), numbers((width,), seed + 2)
    params = {"bias": bias, "weight": weight} if shift else {"weight": weight}
    assert_close(norm({"weight": weight}, x, "rmsnorm", eps), F.rms_norm(x, (width,), weight, eps))
    expected = F.layer_norm(x, (width,), weight, bias if shift else None, eps)
    assert_close(norm(params, x, "layernorm", eps), expected, 1e-4)
    coarse = norm(params, x.bfloat16(), "layernorm", eps)
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, norm(params, x.bfloat16().float(), "layernorm", eps).bfloat16())


@FEW
@given(config=configs(positions="rope"), seed=SEEDS, far=st.integers(0, 50))
def test_rotation_keeps_lengths_and_knows_only_distances(config: ModelConfig, seed: int, far: int) -> None:
    query, key = (numbers((1, 6, config.head_dim), seed + i, torch.float64) for i in (0, 1))
    here, there = (rotation(config, torch.arange(6) + shift, 64) for shift in (0, far))
    assert_close(rotate(query, here).norm(dim=-1), query.norm(dim=-1), 1e-6)
    products = [rotate(query, by) @ rotate(key, by).mT for by in (here, there)]
    assert_close(products[1], products[0], 1e-4)
    still = rotate(query, rotation(config, torch.zeros(6, dtype=torch.int64), 1))
    assert torch.equal(still, query)
    rest = slice(config.rotary_width, None)
    assert torch.equal(rotate(query, there)[..., rest], query[..., rest])
    stacked = rotation(config, torch.stack([torch.arange(6), torch.arange(6) + far]), 64)
    both = rotate(torch.stack([query, query]), stacked)
    assert torch.equal(both, torch.stack([rotate(query, here), rotate(query, there)]))


@given(config=configs(positions="rope", head_dim=8))
def test_frequencies_are_the_papers(config: ModelConfig) -> None:
    expected = [oracle.frequency(i, config) for i in range(config.rotary_width // 2)]
    torch.testing.assert_close(rotary_frequencies(config), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [2, 8, 30])
def test_sinusoids_of_a_distance_are_a_rotation(width: int) -> None:
    """The paper's reason for them: PE(t + k) is a fixed linear function of PE(t)."""
    table = sinusoids(width, 64).double().view(64, width // 2, 2)
    points = torch.complex(table[..., 1], table[..., 0])
    assert_close(torch.view_as_real(points[1:] / points[:-1]), torch.view_as_real(points[1:2].expand(63, -1)), 1e-5)
    assert points[1, 0].angle().item() == pytest.approx(1.0, abs=1e-6)


@given(rows=st.integers(1, 3), time=TIMES, seed=SEEDS)
def test_positions_restart_with_each_document(rows: int, time: int, seed: int) -> None:
    documents = document_rows(rows, time, seed)
    for numbering, found in zip(documents.tolist(), restart(documents).tolist()):
        assert found == [numbering[:t].count(number) for t, number in enumerate(numbering)]
    assert torch.equal(restart(documents)[0], restart(documents[0]))


# Adapters ---------------------------------------------------------------------------------------------------------


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


# The compute copy -------------------------------------------------------------------------------------------------


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


# Higher order functions -------------------------------------------------------------------------------------------


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


# Dropout ----------------------------------------------------------------------------------------------------------


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


# Compiled ---------------------------------------------------------------------------------------------------------

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
