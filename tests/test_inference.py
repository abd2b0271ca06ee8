"""Generation is a pure function: a cache changes nothing, a neighbour changes nothing, and a draw follows its key.

Axes: S slots, T time, V vocabulary, C cache length.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from strategies import LONGEST, SEEDS, assert_close, assert_trees_close, configs, numbers, token_rows, weights
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from functional_lm import keys, tree
from functional_lm.compile import compiled, graphs
from functional_lm.inference import cache as kv
from functional_lm.inference import text as texts
from functional_lm.inference.generate import (
    CHUNKS,
    Decoder,
    GenerateOptions,
    Slots,
    decode_step,
    decoder,
    generate,
    prefill,
)
from functional_lm.inference.sampling import Sampling, sample, truncate
from functional_lm.model.compute import compute_copy
from functional_lm.model.config import ModelConfig
from functional_lm.model.transformer import forward, forward_cached
from functional_lm.text import tokenizer as tokenizers
from functional_lm.tree import Tree

FEW = settings(max_examples=25)


def used_cache(config: ModelConfig, slots: int, length: int, seed: int, size: float = 30.0) -> Tree:
    """A cache full of what earlier sequences left behind; where that is read, let `size` be that of real ones."""
    empty = kv.init(config, slots, length, torch.float32)
    return tree.map(lambda leaf: size * numbers(tuple(leaf.shape), seed), empty)


# Cache ------------------------------------------------------------------------------------------------------------


def test_an_empty_cache_has_the_shape_of_the_keys() -> None:
    config = ModelConfig(vocab_size=9, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=5)
    cache = kv.init(config, 3, 7, torch.bfloat16)
    assert list(tree.flatten(cache)) == ["0.k", "0.v", "1.k", "1.v"]
    assert {(tuple(leaf.shape), leaf.dtype) for leaf in tree.leaves(cache)} == {((3, 2, 7, 5), torch.bfloat16)}
    assert not any(leaf.any() for leaf in tree.leaves(cache))
    assert kv.length(cache) == 7


@settings(max_examples=40)
@given(config=configs(), slots=st.integers(1, 3), seed=SEEDS, fuse=st.booleans(), data=st.data())
def test_any_chunks_at_any_positions_are_the_full_forward(
    config: ModelConfig, slots: int, seed: int, fuse: bool, data: DataObject
) -> None:
    """Slots begin with prompts of their own lengths, padded to one; then all go on by chunks of any length."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=slots, max_size=slots), label="prompts")
    chunks = data.draw(st.lists(st.integers(1, 4), max_size=4).filter(lambda c: sum(c) <= LONGEST - 5), label="chunks")
    params, tokens = weights(config, seed), token_rows(config, (slots, LONGEST), seed)
    full = forward(params, tokens, config)
    run = compute_copy(params, torch.float32) if fuse else params
    cache, at = used_cache(config, slots, data.draw(st.integers(LONGEST, 20)), seed), torch.tensor(lengths)
    padded = token_rows(config, (slots, max(lengths)), seed + 1)
    for row, length in enumerate(lengths):
        padded[row, :length] = tokens[row, :length]
    cache, logits = forward_cached(run, cache, padded, torch.zeros(slots, dtype=torch.int64), config)
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], full[row, :length], 1e-4, "prompt")
    for chunk in chunks:
        columns = at[:, None] + torch.arange(chunk)
        before = tree.digest(cache)
        old, (cache, logits) = cache, forward_cached(run, cache, tokens.gather(1, columns), at, config)
        assert tree.digest(old) == before  # the pure form writes nowhere
        expected = full[torch.arange(slots)[:, None], columns]
        assert_close(logits, expected, 1e-4, "chunk")
        at = at + chunk


@FEW
@given(config=configs(), seed=SEEDS, data=st.data())
def test_a_call_writes_its_own_rows_only(config: ModelConfig, seed: int, data: DataObject) -> None:
    slots, length, time = 2, 12, data.draw(st.integers(1, 4))
    at = torch.tensor([data.draw(st.integers(0, length - time)) for _ in range(slots)])
    cache = used_cache(config, slots, length, seed)
    written, _ = forward_cached(weights(config, seed), cache, token_rows(config, (slots, time), seed), at, config)
    assert written.keys() == cache.keys()
    for before, after in zip(tree.leaves(cache), tree.leaves(written), strict=True):
        for slot in range(slots):
            rows = torch.arange(length)
            mine = (rows >= at[slot]) & (rows < at[slot] + time)
            assert torch.equal(before[slot][:, ~mine], after[slot][:, ~mine])
            assert not torch.equal(before[slot][:, mine], after[slot][:, mine])


@FEW
@given(config=configs(), seed=SEEDS, data=st.data())
def test_prefill_reads_the_logits_behind_each_prompt(config: ModelConfig, seed: int, data: DataObject) -> None:
    slots, time = 3, 6
    params, tokens = weights(config, seed), token_rows(config, (slots, time), seed)
    last = torch.tensor(data.draw(st.lists(st.integers(0, time - 1), min_size=slots, max_size=slots)))
    start = torch.zeros(slots, dtype=torch.int64)
    written, logits = prefill(params, kv.init(config, slots, time, torch.float32), tokens, start, last, config)
    assert_close(logits, forward(params, tokens, config)[torch.arange(slots), last], 1e-4)
    assert kv.length(written) == time


@FEW
@given(config=configs(attention="standard"), seed=SEEDS)
def test_members_with_caches_of_their_own_are_a_vmap_axis(config: ModelConfig, seed: int) -> None:
    members, tokens = [weights(config, seed + i) for i in range(3)], token_rows(config, (2, 3), seed)
    caches, at = [used_cache(config, 2, 8, seed + i, 1.0) for i in range(3)], torch.tensor([0, 4])
    written, logits = torch.vmap(lambda p, c: forward_cached(p, c, tokens, at, config))(
        tree.stack(members), tree.stack(caches)
    )
    for i in range(3):
        alone, expected = forward_cached(members[i], caches[i], tokens, at, config)
        assert_close(logits[i], expected, 1e-4)
        assert_trees_close(tree.index(written, i), alone, 1e-4)


# Sampling ---------------------------------------------------------------------------------------------------------

# Quarters, so that ties are frequent, and -inf as a mask would put it; one number at least is finite. Every other row
# is drawn at once: hypothesis likes to repeat itself within a list.
LISTS = st.lists(st.integers(-20, 20).map(lambda n: n / 4) | st.just(-math.inf), min_size=1, max_size=12)
DRAWN = st.builds(lambda size, seed: (numbers((size,), seed) * 8).round() / 4, st.integers(1, 12), SEEDS)
ROWS = LISTS.filter(lambda row: max(row) > -math.inf) | DRAWN.map(Tensor.tolist)


def one(logits: list[float]) -> Tensor:
    return torch.tensor([logits])


@settings(max_examples=100)
@given(row=ROWS, top_k=st.integers(0, 14), top_p=st.floats(0.01, 1.0))
@example(row=[0.0, 0.25, 0.5, 0.75, 1.0], top_k=2, top_p=0.5)  # top_p is a share of what top_k leaves
def test_truncation_keeps_the_smallest_sufficient_set(row: list[float], top_k: int, top_p: float) -> None:
    """Against the words of the paper in numpy, float64; a tie with the last one kept stays."""
    found = truncate(one(row), torch.tensor([top_k]), torch.tensor([top_p]))[0].tolist()
    kept = [i for i, value in enumerate(found) if value > -math.inf]
    assert [found[i] for i in kept] == [row[i] for i in kept]
    order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
    mass = np.exp(np.array([row[i] for i in order], dtype=np.float64) - max(row))
    mass /= mass.sum()
    reached = mass.cumsum()
    # The mass as float32 sees it may lie on either side of top_p when they are this close.
    sizes = {1 + int((reached < limit).sum()) for limit in (top_p - 1e-6, top_p + 1e-6)}
    accepted = []
    for size in sizes:
        threshold = row[order[min(size, len(order)) - 1]]
        accepted.append([i for i, value in enumerate(row) if value >= threshold and value > -math.inf])
    assert kept in accepted


@given(row=ROWS, seed=SEEDS, size=st.integers(1, 3))
def test_settings_that_are_off_change_nothing(row: list[float], seed: int, size: int) -> None:
    logits = one([*row, *(value - 20 for value in row)]).expand(size, -1)  # with a tail beyond float32's resolution
    off = Sampling.uniform(size, 1.0)
    assert torch.equal(truncate(logits, off.top_k, off.top_p), logits)
    row_keys = keys.split(keys.key(seed), size)
    assert torch.equal(sample(logits, row_keys, off, True), sample(logits, row_keys, off, False))


@given(row=ROWS, seed=SEEDS, top_k=st.integers(0, 3), top_p=st.floats(0.01, 1.0))
def test_temperature_zero_and_a_set_of_one_are_greedy(row: list[float], seed: int, top_k: int, top_p: float) -> None:
    key, best = keys.key(seed)[None], one(row).argmax(-1)
    cold = Sampling.uniform(1, 0.0, top_k, top_p)
    assert torch.equal(sample(one(row), key, cold), best)
    assert torch.equal(sample(one(row), key, cold, truncating=False), best)
    distinct = one([value + i / 1000 for i, value in enumerate(row)])
    for alone in (Sampling.uniform(1, 5.0, 1), Sampling.uniform(1, 0.7, 0, 1e-6)):
        assert torch.equal(sample(distinct, key, alone), distinct.argmax(-1))


@given(row=ROWS, seed=SEEDS, temperature=st.floats(-37.9, -2.4).map(lambda n: 10.0**n), truncating=st.booleans())
@example(row=[7.0, 8.0], seed=0, temperature=2e-38, truncating=True)  # by which 7 and 8 alike would be infinite
def test_near_zero_is_greedy_too(row: list[float], seed: int, temperature: float, truncating: bool) -> None:
    """Two numbers are apart by 1/4 at least, and the noise of two tokens by less than 25."""
    best = [i for i, value in enumerate(row) if value == max(row)]
    token = int(sample(one(row), keys.key(seed)[None], Sampling.uniform(1, temperature), truncating))
    assert token in best


@given(row=ROWS, seed=SEEDS, temperature=st.floats(0.05, 5), top_k=st.integers(0, 6), top_p=st.floats(0.05, 1.0))
def test_a_draw_is_one_of_the_kept(row: list[float], seed: int, temperature: float, top_k: int, top_p: float) -> None:
    how = Sampling.uniform(1, temperature, top_k, top_p)
    kept = truncate((one(row) - max(row)) / how.temperature, how.top_k, how.top_p)[0]
    token = int(sample(one(row), keys.key(seed)[None], how))
    assert kept[token] > -math.inf


@FEW
@given(seed=SEEDS, slots=st.integers(2, 5), width=st.integers(2, 30), data=st.data())
def test_slots_with_their_own_settings_do_not_meet(seed: int, slots: int, width: int, data: DataObject) -> None:
    def column(values: st.SearchStrategy[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(data.draw(st.lists(values, min_size=slots, max_size=slots)), dtype=dtype)

    how = Sampling(
        column(st.sampled_from([0.0, 0.5, 1.0, 3.0])), column(st.integers(0, 5), torch.int64), column(st.floats(0.1, 1))
    )
    logits, row_keys = 3 * numbers((slots, width), seed), keys.split(keys.key(seed), slots)
    together = sample(logits, row_keys, how)
    for i in range(slots):
        mine = Sampling(*(setting[i : i + 1] for setting in how))
        assert sample(logits[i : i + 1], row_keys[i : i + 1], mine) == together[i]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8)]
)
def test_tokens_come_as_often_as_softmax_says(temperature: float, top_k: int, top_p: float) -> None:
    draws, row = 20_000, torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -3.0, 0.25])
    how = Sampling.uniform(draws, temperature, top_k, top_p)
    tokens = sample(row.expand(draws, -1), keys.split(keys.key(5), draws), how)
    p = np.exp(row.double().numpy() / temperature)
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    if top_p < 1:
        kept = order[: 1 + int((p[order].cumsum() / p.sum() < top_p).sum())]
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
    p /= p.sum()
    counts = np.bincount(tokens.numpy(), minlength=len(p))
    assert not counts[p == 0].any()
    expected = draws * p[p > 0]
    chi = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    assert chi < 30  # of at most 7 degrees of freedom: a correct sampler exceeds 30 once in 10,000 keys


# One step of many slots -------------------------------------------------------------------------------------------


def some_slots(config: ModelConfig, slots: int, seed: int) -> Slots:
    """Sequences at different places, with different settings."""
    choose = torch.Generator().manual_seed(seed)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (slots,), generator=choose)

    sampling = Sampling(integers(3) * 0.6, integers(4), 0.4 + 0.2 * integers(4))
    return Slots(
        integers(config.vocab_size), integers(LONGEST), integers(50), keys.split(keys.key(seed), slots), sampling
    )


@FEW
@given(config=configs(), seed=SEEDS)
def test_a_step_draws_each_slots_own_token_from_the_full_forward(config: ModelConfig, seed: int) -> None:
    slots = some_slots(config, 3, seed)
    params, history = weights(config, seed), token_rows(config, (3, LONGEST), seed)
    cache, _ = forward_cached(
        params, used_cache(config, 3, LONGEST, seed), history, torch.zeros(3, dtype=torch.int64), config
    )
    (written, after), tokens = decode_step((cache, slots), params, config)
    assert torch.equal(after.tokens, tokens)
    assert torch.equal(after.positions, slots.positions + 1)
    assert torch.equal(after.drawn, slots.drawn + 1)
    assert torch.equal(after.keys, slots.keys)
    history[torch.arange(3), slots.positions] = slots.tokens
    for i in range(3):
        text = history[i : i + 1, : int(slots.positions[i]) + 1]
        logits = forward(params, text, config)[:, -1]
        key = keys.fold_in(slots.keys[i], int(slots.drawn[i]))[None]
        how = Sampling(*(setting[i : i + 1] for setting in slots.sampling))
        choices = {int(sample(logits + 1e-4 * numbers(tuple(logits.shape), j), key, how)) for j in range(4)}
        assert int(tokens[i]) in choices  # as close as float32 lets two orders of summation come
    alone, _ = decode_step((tree.map(lambda x: x[1:2], cache), tree.map(lambda x: x[1:2], slots)), params, config)
    assert_trees_close(alone[0], tree.map(lambda x: x[1:2], written), 1e-4)


# Whole texts ------------------------------------------------------------------------------------------------------


def by_full_forward(
    params: Tree, text: list[int], made: list[int], config: ModelConfig
) -> Iterator[tuple[int, Tensor]]:
    """Each made token with the logits of a forward over all that the model may see at that point, without any cache.

    When the longest context is full, the newer half of it (and the token that did not fit) is what is seen.
    """
    text = text[-config.max_len :]
    for token in made:
        yield token, forward(params, torch.tensor([text]), config)[0, -1]
        text = [*text, token]
        if len(text) > config.max_len:
            text = text[-(config.max_len // 2 + 1) :]


LENGTHS = st.sampled_from([1, 2, 3, 7, 16])


@settings(max_examples=30)
@given(config=configs(), seed=SEEDS, max_len=LENGTHS, length=st.integers(1, 20), count=st.integers(0, 24))
def test_greedy_text_is_that_of_the_full_forward(
    config: ModelConfig, seed: int, max_len: int, length: int, count: int
) -> None:
    config = dataclasses.replace(config, max_len=max_len)
    params, prompt = weights(config, seed), token_rows(config, (length,), seed).tolist()
    made = list(generate(params, prompt, decoder(config, False), GenerateOptions(count, temperature=0.0)))
    assert len(made) == count
    for token, logits in by_full_forward(params, prompt, made, config):
        assert logits[token] >= logits.max() - 1e-3  # or it is a tie that rounding decides


def test_a_context_of_several_chunks_reads_like_one() -> None:
    """A length that is no multiple of the chunk, so that the last one is partly padding, also beyond a table's end."""
    few, chunk = CHUNKS
    for positions in ("rope", "learned", "sinusoidal"):
        config = ModelConfig(
            vocab_size=30, d_model=16, n_layers=2, n_heads=2, d_ff=16, max_len=2 * chunk + 9, positions=positions
        )
        params = weights(config, 0)
        for length in (few, chunk - 1, chunk, chunk + few, chunk + few + 1, 2 * chunk, config.max_len + 5):
            prompt = token_rows(config, (length,), length).tolist()
            made = list(generate(params, prompt, decoder(config, False), GenerateOptions(5, temperature=0.0)))
            for token, logits in by_full_forward(params, prompt, made, config):
                assert logits[token] >= logits.max() - 1e-3


@settings(max_examples=12)
@given(config=configs(max_len=6), seed=SEEDS, data=st.data())
def test_generation_is_a_pure_function(config: ModelConfig, seed: int, data: DataObject) -> None:
    options = GenerateOptions(
        max_tokens=9,
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=data.draw(st.integers(0, 5)),
        top_p=data.draw(st.sampled_from([0.5, 1.0])),
        seed=seed,
    )
    params, prompt = weights(config, seed), token_rows(config, (5,), seed).tolist()
    before, given_prompt = tree.digest(params), list(prompt)
    run = decoder(config, False, truncating=options.truncates)
    text = list(generate(params, prompt, run, options))
    # Twice at once, by turns with another text, is as good as once; and the other settings of one decoder are its own.
    one, two = (generate(params, prompt, run, options) for _ in range(2))
    other = generate(params, prompt[::-1], run, dataclasses.replace(options, seed=seed + 1))
    turns = list(zip(one, two, other))
    assert [turn[0] for turn in turns] == [turn[1] for turn in turns] == text
    assert text == list(generate(params, prompt, decoder(config, False), options))  # sorting or not
    assert tree.digest(params) == before
    assert prompt == given_prompt
    for count in (1, 7):
        assert list(generate(params, prompt, run, dataclasses.replace(options, max_tokens=count))) == text[:count]
    stop = text[data.draw(st.integers(0, 8))]
    stopped = list(generate(params, prompt, run, dataclasses.replace(options, stop_ids=(stop,))))
    assert stopped == text[: text.index(stop) + 1]


def test_another_seed_is_another_text_and_greedy_has_none() -> None:
    config = ModelConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=2, d_ff=16, max_len=LONGEST)
    params, run = weights(config, 0), decoder(config, False)
    texts = [tuple(generate(params, [1], run, GenerateOptions(12, temperature=2.0, seed=seed))) for seed in range(5)]
    assert len(set(texts)) == 5
    assert all(len(set(text)) > 3 for text in texts)  # a draw does not repeat the one before
    cold = [tuple(generate(params, [1], run, GenerateOptions(12, temperature=0.0, seed=seed))) for seed in range(2)]
    assert len(set(cold)) == 1


def test_what_cannot_be_generated_is_refused() -> None:
    config = ModelConfig(vocab_size=5, d_model=4, n_layers=1, n_heads=1)
    params = weights(config, 0)
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(params, [], decoder(config, False), GenerateOptions()))
    for options in (GenerateOptions(top_k=2), GenerateOptions(top_p=0.5)):
        with pytest.raises(ValueError, match="truncating=True"):
            next(generate(params, [1], decoder(config, False, truncating=False), options))


@FEW
@given(config=configs(max_len=8), seed=SEEDS)
def test_the_parameters_decide_the_precision(config: ModelConfig, seed: int) -> None:
    coarse = compute_copy(weights(config, seed), torch.bfloat16)
    prompt = token_rows(config, (3,), seed).tolist()
    made = list(generate(coarse, prompt, decoder(config, False), GenerateOptions(12, temperature=0.0)))
    for token, logits in by_full_forward(coarse, prompt, made, config):
        assert logits.dtype == torch.bfloat16
        assert logits[token] >= logits.max() - 0.1 * (1 + logits.abs().max())


def test_text_goes_in_and_comes_out() -> None:
    tokenizer = tokenizers.train(["Text goes in, and text comes out.\n" * 20], vocab_size=290)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=LONGEST)
    params, run = weights(config, 0), decoder(config, False)
    for prompt, ids in (("Text", tokenizer.encode("Text")), ("", [tokenizer.bos_id])):
        options = GenerateOptions(30, temperature=1.5, seed=1)
        made = list(generate(params, ids, run, options))
        assert "".join(texts.stream(params, run, tokenizer, prompt, options)) == tokenizer.decode(made)
        whole = texts.generate(params, config, tokenizer, prompt, max_tokens=30, temperature=1.5, seed=1, stop_ids=())
        assert whole == prompt + tokenizer.decode(made)
        stopped = dataclasses.replace(options, stop_ids=(made[9],))
        before = tokenizer.decode(made[: made.index(made[9])])
        assert "".join(texts.stream(params, run, tokenizer, prompt, stopped)) == before


def test_dropout_and_recomputation_are_for_training() -> None:
    config = ModelConfig(
        vocab_size=5, d_model=4, n_layers=1, n_heads=1, max_len=8, dropout=0.9, checkpoint_activations=True
    )
    plain = dataclasses.replace(config, dropout=0.0, checkpoint_activations=False)
    params = weights(config, 0)
    texts = [list(generate(params, [1, 2], decoder(c, False), GenerateOptions(12))) for c in (config, plain)]
    assert texts[0] == texts[1]


# Compiled ---------------------------------------------------------------------------------------------------------

COMPILED = ModelConfig(
    vocab_size=37,
    d_model=24,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    d_ff=20,
    max_len=12,
    sliding_window=7,
)


@pytest.fixture(scope="module")
def inductor() -> tuple[Decoder, str]:
    """Both functions of a generation with Inductor, one graph each, made once; and the code of the decode step."""
    run, params = decoder(COMPILED), weights(COMPILED, 0)
    state = (used_cache(COMPILED, 1, COMPILED.max_len, 0), one_slot(3))
    _, code = run_and_get_code(run.decode, state, params)  # which forgets all earlier graphs
    list(generate(params, [1, 2], run, GenerateOptions(3)))
    return run, "".join(code)


def one_slot(seed: int) -> Slots:
    slots = some_slots(COMPILED, 1, seed)
    return slots._replace(positions=slots.positions % 6)


def test_compiled_text_is_eager_text_and_compiles_nothing_more(inductor: tuple[Decoder, str]) -> None:
    before, eager, (run, _) = graphs(), decoder(COMPILED, False), inductor
    for seed in range(4):
        params, prompt = weights(COMPILED, seed), token_rows(COMPILED, (1 + 4 * seed,), seed).tolist()
        options = GenerateOptions(20, temperature=0.6 * seed, top_k=seed, top_p=1 - 0.2 * seed, seed=seed)
        assert list(generate(params, prompt, run, options)) == list(generate(params, prompt, eager, options))
    assert graphs() == before


def test_a_donated_cache_stays_where_it_is(inductor: tuple[Decoder, str]) -> None:
    params, before, (run, code) = weights(COMPILED, 1), graphs(), inductor
    state = (used_cache(COMPILED, 1, COMPILED.max_len, 0, 1.0), one_slot(4))
    pure = tree.copy(state)
    places = [leaf.data_ptr() for leaf in tree.leaves(state)]
    for _ in range(3):
        pure, expected = decode_step(pure, params, COMPILED)
        state, tokens = run.decode(state, params)
        assert [leaf.data_ptr() for leaf in tree.leaves(state)] == places
        assert torch.equal(tokens, expected)
        assert tokens.data_ptr() not in places  # what is reported outlives the next step
        assert_trees_close(state[0], pure[0], 1e-4)
        assert torch.equal(state[1].positions, pure[1].positions)
        assert torch.equal(state[1].drawn, pure[1].drawn)
    assert graphs() == before
    # Nor is any of it copied on the way (pytorch #184542): the step allocates nothing as large as one leaf.
    sizes = [
        math.prod(map(int, re.findall(r"\d+", shape)))
        for shape in re.findall(r"= empty_strided_\w+\(\(([^)]*)\)", code)
    ]
    assert sizes
    assert max(sizes) < min(leaf.numel() for leaf in tree.leaves(state[0]))


@settings(max_examples=3)
@given(config=configs(), seed=SEEDS)
def test_a_traced_step_is_the_eager_one(config: ModelConfig, seed: int) -> None:
    torch._dynamo.reset()
    params, step = weights(config, seed), partial(decode_step, config=config)
    state = (used_cache(config, 2, LONGEST, seed, 1.0), some_slots(config, 2, seed))
    (cache, slots), tokens = step(state, params)
    given_up = tree.copy(state)
    places = [leaf.data_ptr() for leaf in tree.leaves(given_up)]
    (traced, after), drawn = compiled(step, donate=True, backend="aot_eager")(given_up, params)
    assert [leaf.data_ptr() for leaf in tree.leaves((traced, after))] == places
    assert_trees_close(traced, cache, 1e-4)
    assert torch.equal(tokens, drawn)
    assert torch.equal(after.positions, slots.positions)
