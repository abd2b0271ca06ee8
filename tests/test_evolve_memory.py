"""Chunks that memory decides on: what a member is said to take is what it takes, and limits are those of the container.

Axes: P members, B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import token_rows, weights
from torch.utils._python_dispatch import TorchDispatchMode

from functional_lm import evolve_memory, evolve_search, evolve_trained, folder, keys, training_room, tree
from functional_lm.errors import UsageError
from functional_lm.evolution import eggroll, fitness, genetic, gradient, hyper, memory, openai, restarts, spaces
from functional_lm.evolve_flags import EvolveFlags
from functional_lm.evolve_strategies import own_numbers, strategy_of
from functional_lm.inference import cache as kv
from functional_lm.model.config import ModelConfig

SHAPE = {"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "max_len": 64}
CPU = torch.device("cpu")


def bytes_of(node: tree.Tree) -> int:
    return sum(leaf.numel() * leaf.dtype.itemsize for leaf in tree.leaves(node))


@given(
    members=st.integers(1, 5000),
    each=st.integers(1, 2**30),
    tokens=st.integers(1, 2**15),
    free=st.integers(0, 2**34),
    device=st.sampled_from(["cpu", "cuda"]),
    writes=st.booleans(),
)
def test_automatic_chunks_fit_and_are_even(
    members: int, each: int, tokens: int, free: int, device: str, writes: bool
) -> None:
    size = memory.automatic_chunk(members, each, tokens, free, device, writes)
    assert 1 <= size <= members
    if size > 1:
        assert size * each <= free * memory.SHARE
        assert size * tokens <= memory.TOKENS_AT_ONCE["written" if writes else "read"] or device == "cuda"
    count = -(-members // size)
    assert count * size - members < count  # nothing smaller does with as many chunks


def test_only_on_a_cpu_are_more_tokens_slower_and_fewer_of_those_that_are_read() -> None:
    how = itertools.product(("cpu", "cuda"), (False, True))
    chunks = [memory.automatic_chunk(4096, 1, 1024, 1 << 40, device, writes) for device, writes in how]
    assert chunks == [4, 16, 4096, 4096]


# What a member takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eggroll", "openai-es", "genetic"])
def test_a_members_own_are_the_bytes_of_its_leaves(name: str) -> None:
    """Scales of low-rank noise aside, one number for each matrix."""
    made = {
        "eggroll": eggroll.eggroll(gradient.Settings(4), 2),
        "openai-es": openai.openai_es(gradient.Settings(4)),
        "genetic": genetic.genetic(genetic.Settings(4)),
    }[name]
    params = weights(ModelConfig(**SHAPE), 0)
    flat = tree.flatten(tree.index(made.ask(made.init(keys.key(0), params)).own, 0))
    scales = sum(4 for leaf in flat if leaf.endswith("lora_scale"))
    assert 4 * own_numbers(EvolveFlags(strategy=name, rank=2), params) == bytes_of(tree.unflatten(flat)) - scales
    assert (scales > 0) == (name == "eggroll")


@pytest.mark.parametrize("name", memory.COPIES)
def test_what_a_strategy_holds_of_all_members_it_holds_at_least(name: str) -> None:
    """Between its state with what it asks, and all that there is at once: what memory holds is never refused."""
    start = {"a": torch.ones(9, 8), "b": torch.ones(7)}
    grid = {"bins": "2", "ranges": ("0:1",), "descriptor": ("loss",)} if name == "map-elites" else {}
    fitness = "loss,bits" if name == "nsga2" else "loss"

    def found(population: int) -> tuple[int, int]:
        strategy = strategy_of(EvolveFlags(strategy=name, population=population, fitness=fitness, **grid), start)
        shape = (population, strategy.figures) if strategy.figures > 1 else (population,)
        state = strategy.init(keys.key(0), start)
        kept = bytes_of(state) + bytes_of(strategy.ask(state).own)
        with Live() as live:
            after = strategy.tell(tree.copy(state), keys.uniform(keys.key(1), shape))
            strategy.ask(after)
        return kept, live.most

    few = 1200 if name in ("xnes", "cma-es") else 12  # so many that their draws are more than D² numbers
    many = few + 8
    (less, low), (more, high) = found(few), found(many)
    numbers = own_numbers(EvolveFlags(strategy=name), start)
    held = memory.held(name, many, numbers) - memory.held(name, few, numbers)
    assert held <= high - low
    if name not in ("mezo", "eggroll", "genetic"):  # keys; a scale for each matrix; what it asks is its state
        assert more - less <= held + (many - few) * 2 * 8  # fitness beside it


@pytest.mark.parametrize("name", ["cma-es", "sep-cma-es"])
def test_a_generation_in_parts_is_held_as_a_whole(name: str) -> None:
    """As its last part is told; of restarts that have doubled twice."""
    start, parts = {"a": torch.ones(9, 8), "b": torch.ones(7)}, 4

    def found(population: int) -> int:
        strategy = strategy_of(EvolveFlags(strategy=name, population=population, restarts="ipop"), start)
        state = strategy.init(keys.key(0), start)
        run = state.run._replace(parts=torch.tensor(parts), told=torch.tensor(parts - 1))
        with Live() as live:
            strategy.tell(state._replace(run=run), keys.uniform(keys.key(1), (population,)))
        return live.most

    less, more = found(12), found(20)
    assert memory.held(name, parts * 20, 79) - memory.held(name, parts * 12, 79) <= more - less


@given(st.integers(1, 200_000))
def test_restarts_become_as_large_as_a_run_has_time_for(parts: int) -> None:
    """Each run of ten generations, the last one of one."""
    times, doublings = restarts.most_parts(parts), restarts.DOUBLINGS
    assert times == 2 ** (times.bit_length() - 1) <= 2**doublings

    def asked(times: int) -> int:
        return restarts.SHORTEST * (times - 1) + times

    assert times == 1 or asked(times) <= parts
    assert times == 2**doublings or asked(2 * times) > parts


def test_members_that_train_on_hold_more_than_is_said() -> None:
    """What memory holds is never refused: eager steps of all of them at once, and the states of before."""
    config = ModelConfig(**{**SHAPE, "vocab_size": 300})
    options = EvolveFlags(strategy="pbt", space="hyper", dtype="float32", device="cpu", compile=False, batch_size=2)
    functions, params = evolve_trained.functions(options, config), weights(config, 0)
    tokens = token_rows(config, (2, config.max_len + 1), 0)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def most(members: int) -> int:
        strategy = hyper.pbt(hyper.Settings(members), functions, {"learning_rate": 1e-3})
        train = hyper.steps_of(functions, lambda step: step)
        with Live() as live:
            state = strategy.init(keys.key(0), params)
            train(state.states, lambda number: batch, 0, 2)
        return live.most

    measured = (most(6) - most(4)) / 2
    assert 0.4 < evolve_memory.pbt_bytes(training_room.step_memory(options, config)) / measured < 1


def test_trainings_that_memory_does_not_hold_are_refused_with_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder.Model(weights(ModelConfig(**SHAPE), 0), ModelConfig(**SHAPE), None)
    flags = EvolveFlags(space="hyper", strategy="pbt", dtype="float32", device="cpu", population=64)
    each = evolve_memory.pbt_bytes(training_room.step_memory(flags, model.config))
    monkeypatch.setattr(memory, "free_memory", lambda device: 7 * each)
    with pytest.raises(UsageError, match=r"--population 64: pbt trains 64 at once, .* free; --population 7 fits$"):
        evolve_memory.trainings_at_once(flags, model, 1)
    assert evolve_memory.trainings_at_once(dataclasses.replace(flags, population=7), model, 1) == 7
    monkeypatch.setattr(memory, "free_memory", lambda device: each // 9)
    for name in ("pbt", "pso"):
        with pytest.raises(UsageError, match=f"{name} trains .* a smaller --batch_size or --block_size needs less"):
            evolve_memory.trainings_at_once(dataclasses.replace(flags, strategy=name), model, 1)


def test_a_batch_of_which_memory_holds_no_member_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(ModelConfig(**SHAPE), 0)
    model = folder.Model(params, ModelConfig(**SHAPE), None)
    space = spaces.full(tree.select(params, "*norm*"))
    evolution = evolve_search.Evolution(model, space, None, "", None, "", "model")
    flags = EvolveFlags(space="full", strategy="openai-es", dtype="float32", device="cpu", batch_size=1000)
    each = memory.member_bytes(model.config, 64_000, own_numbers(flags, space.start) * 4, torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda device: each // 2)
    with pytest.raises(UsageError, match=r"--batch_size 1000: a member takes .* reads 64000 tokens, .* needs less"):
        evolve_memory.chunk_of(flags, evolution, 64_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_writes_has_a_cache_besides(dtype: torch.dtype) -> None:
    config, rows, length = ModelConfig(**SHAPE), 3, 20
    less, more = (memory.member_bytes(config, rows * length, 100, dtype, writes) for writes in (False, True))
    assert more - less == bytes_of(kv.init(config, rows, length, dtype))
    assert memory.member_bytes(config, rows * length, 1100, dtype) == less + 1000


class Live(TorchDispatchMode):
    """Bytes of the tensors that are there at once, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.seen.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.seen.values()))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"vocab_size": 4000}, {"n_heads": 8}, {"d_ff": 1024}, {"d_model": 512}])
def test_the_rest_is_what_one_more_member_adds_to_a_forward(changes: dict[str, int], dtype: torch.dtype) -> None:
    """Logits, scores, and the activations of a wide feed-forward or model: each decides once. Computed eagerly."""
    config = ModelConfig(**{**SHAPE, **changes})
    params = tree.map(lambda leaf: leaf.to(dtype), weights(config, 0))
    tokens, objective = token_rows(config, (2, config.max_len + 1), 0), fitness.loss(config)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def most(members: int) -> int:
        own = tree.map(lambda leaf: leaf.expand(members, *leaf.shape).clone(), tree.select(params, "*norm*"))
        with torch.no_grad(), Live() as live:
            torch.vmap(lambda leaves: objective(tree.overlay(params, leaves), batch))(own)
        return live.most

    measured = (most(16) - most(12)) / 4
    assert 0.6 < memory.member_bytes(config, 2 * config.max_len, 0, dtype) / measured < 2


# What there is --------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def machine(root: Path, files: dict[str, object], groups: str = "0::/\n") -> Path:
    for name, text in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8192 kB\n",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


V2 = {"memory.max": 5 * MIB, "memory.current": 3 * MIB, "memory.stat": f"anon 7\ninactive_file {MIB}\n"}
V1 = {
    "memory.limit_in_bytes": 5 * MIB,
    "memory.usage_in_bytes": 3 * MIB,
    "memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\n",
}


def under(folder: str, files: dict[str, Any], **others: object) -> dict[str, object]:
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in {**files, **others}.items()}


LIMITS: dict[str, tuple[str, dict[str, object], int]] = {
    "no cgroups": ("", {}, 8 * MIB),
    "a container": ("0::/\n", under("", V2), 3 * MIB),  # a file in the cache gives its place back
    "a container that names its parent's": ("0::/docker/12ab\n", under("", V2), 3 * MIB),
    "a service": ("0::/user.slice/one.service\n", under("user.slice/one.service/", V2), 3 * MIB),
    "the slice of a service": (
        "0::/user.slice/one.service\n",
        {**under("user.slice/", V2), **under("user.slice/one.service/", V2, **{"memory.max": "max"})},
        3 * MIB,
    ),
    "no limit": ("0::/\n", under("", V2, **{"memory.max": "max"}), 8 * MIB),
    "more than there is": ("0::/\n", under("", V2, **{"memory.max": 99 * MIB}), 8 * MIB),
    "all used": ("0::/\n", under("", V2, **{"memory.current": 7 * MIB}), 0),
    "version 1": ("4:cpu:/\n3:memory:/docker/12ab\n0::/\n", under("memory/", V1), 3 * MIB),
    "version 1, no limit": ("3:memory:/\n", under("memory/", V1, **{"memory.limit_in_bytes": 2**63 - 4096}), 8 * MIB),
}


@pytest.mark.parametrize("name", LIMITS)
def test_free_memory_is_what_the_container_leaves(name: str, tmp_path: Path) -> None:
    groups, files, wanted = LIMITS[name]
    assert memory.free_memory(CPU, machine(tmp_path, files, groups)) == wanted


def test_where_the_system_does_not_tell_two_gigabytes_are_free(tmp_path: Path) -> None:
    assert memory.free_memory(CPU, tmp_path) == 2 << 30
    assert memory.free_memory(CPU) > 0
