"""Compiled functions that outlive their process: the same bits, found by what they depend on and by nothing else."""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from functional_lm import compile as compiling
from functional_lm import compile_store, tree
from functional_lm.compile import compiled
from functional_lm.evaluation import likelihood
from functional_lm.model.config import ModelConfig
from functional_lm.training import optimizer, schedule, step

CONFIG = ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_len=8)


def functions(config: ModelConfig = CONFIG, name: str = "sgd", **rest: object) -> step.Training:
    return step.training(config, optimizer.optimizer(name), schedule.cosine(10, 0.1), **rest)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_store, "folder", lambda: tmp_path / "store")
    return tmp_path / "store"


def double(state, factor):
    return tree.map(lambda leaf: leaf * factor, state), {"sum": tree.dot(state, state)}


# Functions of tests have no digest, as their source is not the package's: this one passes for a function of it.
double.__module__ = "functional_lm.test"
double.__globals__.setdefault("tree", tree)


def again(store, *args, **options):
    """A fresh `compiled`, as a second process would make it."""
    torch._dynamo.reset()
    return compiled(double, **options)


def test_a_second_process_reads_what_the_first_one_wrote(store):
    state = {"a": torch.arange(3.0), "b": {"c": torch.ones(2, 2)}}
    first = again(store)(state, torch.tensor(2.0))
    written = list(store.iterdir())
    assert len(written) == 1
    before = compile_store.loaded()
    second = again(store)(state, torch.tensor(2.0))
    assert compile_store.loaded() == before + 1
    assert list(store.iterdir()) == written
    for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True):
        assert torch.equal(a, b)


def test_another_shape_type_or_structure_is_another_variant(store):
    call = again(store)
    two = torch.tensor(2.0)
    for state in ({"a": torch.ones(3)}, {"a": torch.ones(4)}, {"a": torch.ones(3).double()}, {"b": torch.ones(3)}):
        for _ in range(2):
            assert torch.equal(tree.leaves(call(state, two)[0])[0], 2 * tree.leaves(state)[0])
    assert len(list(store.iterdir())) == 4
    assert call({"a": torch.ones(3)}, 3.0)[0]["a"].tolist() == [3.0] * 3  # a constant is compiled in
    assert call({"a": torch.ones(3)}, 4.0)[0]["a"].tolist() == [4.0] * 3
    assert call(state={"a": torch.ones(3)}, factor=two)[0]["a"].tolist() == [2.0] * 3
    extra = {"a": torch.ones(3), "b": torch.zeros(1)}
    assert set(call(extra, two)[0]) == {"a", "b"}


def test_donation_writes_into_the_tensors_it_was_handed_from_the_store_too(store):
    for _ in range(2):
        leaf = torch.ones(3)
        state, report = again(store, donate=True)({"a": leaf}, torch.tensor(2.0))
        assert state["a"] is leaf
        assert leaf.tolist() == [2.0] * 3
        assert report["sum"] == 3


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" + data])
def test_a_damaged_file_is_made_anew(store, damage):
    state, two = {"a": torch.arange(3.0)}, torch.tensor(2.0)
    again(store)(state, two)
    (path,) = store.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert again(store)(state, two)[0]["a"].tolist() == [0, 2, 4]
    before = compile_store.loaded()
    again(store)(state, two)
    assert compile_store.loaded() == before + 1


def test_the_digest_of_a_step_is_that_of_everything_it_depends_on():
    other = [
        functions(dataclasses.replace(CONFIG, d_ff=24)),
        functions(name="lion"),
        functions(dtype=torch.bfloat16),
        functions(z_loss=1e-4),
        functions(name="adamw"),
        functions(fuse=False),
    ]
    own = compile_store.digest(functions().train_step)
    assert own == compile_store.digest(functions().train_step)
    digests = {own, *(compile_store.digest(made.train_step) for made in other)}
    assert len(digests) == 1 + len(other)
    assert compile_store.digest(likelihood.score(CONFIG)) != compile_store.digest(
        likelihood.score(CONFIG, torch.bfloat16)
    )


def test_the_name_changes_with_torchs_modes(monkeypatch):
    args = ({"a": torch.ones(3)}, torch.tensor(2.0))
    own = compile_store.name(double, args)
    assert own == compile_store.name(double, args)
    with torch.no_grad():
        assert compile_store.name(double, args) != own
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert compile_store.name(double, args) != own
    finally:
        torch.set_default_dtype(before)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert compile_store.name(double, args) != own


def test_two_functions_of_one_line_are_two():
    pair = [lambda x: x + 1, lambda x: x - 1]
    other = [lambda x: x + 2, lambda x: x + 3]
    for function in (*pair, *other):
        function.__module__ = "functional_lm.test"
    assert len({compile_store.digest(function) for function in (*pair, *other)}) == 4


def test_what_closes_over_a_tensor_or_is_not_of_the_package_is_compiled_in_the_ordinary_way(store):
    weight = torch.ones(3)
    closing = partial(double, {"a": weight})
    outside = lambda state, factor: (state, {"sum": factor})  # noqa: E731
    for function in (closing, outside):
        with pytest.raises(compile_store.NoDigestError):
            compile_store.digest(function)
    adapted = functions(frozen={"a": weight})
    with pytest.raises(compile_store.NoDigestError):
        compile_store.digest(adapted.train_step)
    assert compiled(lambda x: x + weight)(torch.ones(3)).tolist() == [2.0] * 3
    assert not store.exists()


def test_a_store_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compile_store, "folder", lambda: tmp_path / "file")
    assert again(None)({"a": torch.ones(3)}, torch.tensor(2.0))[0]["a"].tolist() == [2.0] * 3


def test_a_store_that_everybody_may_write_to_is_neither_read_nor_written(store, monkeypatch):
    state = {"a": torch.ones(3)}
    again(store)(state, torch.tensor(2.0))
    before = compile_store.loaded()
    store.chmod(0o777)
    assert again(store)(state, torch.tensor(3.0))[0]["a"].tolist() == [3.0] * 3
    assert again(store)({"b": torch.ones(2)}, torch.tensor(3.0))[0]["b"].tolist() == [3.0] * 2
    assert compile_store.loaded() == before
    (made,) = store.iterdir()
    store.chmod(0o755)
    monkeypatch.setattr(compile_store, "name", lambda function, args: made.stem)
    monkeypatch.setattr(compile_store, "_read", lambda path: SimpleNamespace(guard_check=lambda *args: True))
    for mode, read in ((0o644, True), (0o646, False)):
        made.chmod(mode)
        assert (compile_store._variant(None, double, (), {}) is not None) == read


@pytest.mark.parametrize(
    ("owner", "group", "mode", "ours"),
    [
        (7, 7, 0o100664, True),  # a group of the user's own
        (7, 8, 0o100644, True),
        (7, 8, 0o100664, False),
        (7, 7, 0o100646, False),
        (8, 7, 0o100644, False),
    ],
)
def test_a_program_is_ours_where_nobody_else_can_have_put_it(monkeypatch, owner, group, mode, ours):
    monkeypatch.setattr("os.getuid", lambda: 7)
    status = SimpleNamespace(st_uid=owner, st_gid=group, st_mode=mode)
    assert compile_store.ours(SimpleNamespace(exists=lambda: True, stat=lambda: status)) == ours


def test_switching_the_compilers_cache_off_switches_this_one_off(store):
    with torch._inductor.config.patch(force_disable_caches=True):
        assert again(store)({"a": torch.ones(3)}, torch.tensor(2.0))[0]["a"].tolist() == [2.0] * 3
    assert not store.exists()


STEP = """
import sys, torch
torch.set_num_threads(1)
from functional_lm import compile as compiling, compile_store, keys, tree
from functional_lm.model import transformer
from functional_lm.model.config import ModelConfig
from functional_lm.training import optimizer, schedule, step
config = ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_len=8, dropout=0.1)
made = step.training(config, optimizer.optimizer("sgd"), schedule.cosine(10, 0.1))
state = made.init(transformer.init(config, keys.key(0)), keys.key(1))
tokens = keys.randint(keys.key(2), (2, 9), 0, 11, torch.int64)
take = compiling.compiled(made.train_step, donate=True)
for _ in range(3):
    state, report = take(state, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
graphs = compiling.graphs()
take(state, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
assert compiling.graphs() == graphs, "steady state compiles nothing"
print(compile_store.loaded(), tree.digest(state.params))
"""


@pytest.mark.long
def test_a_training_step_of_the_store_takes_the_same_bits(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(STEP)
    root = str(Path(compiling.__file__).parents[1])
    environment = {"PYTHONPATH": root, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    lines = [
        subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    (first, digest), (second, same) = (line.split() for line in lines)
    assert (first, second) == ("0", "1")
    assert digest == same
