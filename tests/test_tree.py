"""Trees are a plain algebra of names and tensors, and a file gives back what it was given, bit for bit."""

from __future__ import annotations

import fnmatch
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from strategies import SEEDS, numbers
from torch import Tensor

from functional_lm import tree
from functional_lm.errors import DataError
from functional_lm.tree import Tree

EXAMPLES = settings(max_examples=50)

PARTS = st.sampled_from(["a", "b", "B", "weight", "0", "1", "2", "9", "10", "01", "²", "٣", "q_proj", "ü"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8]
DTYPES += [torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Scalars, empty ones, views with strides, every dtype; NaN, infinity and -0 among the floats."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    values = numbers(shape, draw(SEEDS)) * 30
    if draw(st.booleans()):
        values = values.masked_fill(values > 40, math.inf).masked_fill(values.abs() < 5, -0.0)
        values = values.masked_fill(values < -40, math.nan)
    dtype = draw(st.sampled_from(DTYPES))
    leaf = (values if dtype.is_floating_point else values.nan_to_num(posinf=1).abs()).to(dtype)
    return leaf.mT if leaf.dim() > 1 and draw(st.booleans()) else leaf


def flat_trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Dotted names, none of which runs through another one."""

    def apart(flat: dict[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in flat.items() if not any(other.startswith(f"{name}.") for other in flat)}

    names = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
    return st.dictionaries(names, leaves, min_size=1, max_size=6).map(apart)


def shuffled(node: Tree, seed: int) -> Tree:
    """The same names in another order."""
    parts = list(node.items())
    random.Random(seed).shuffle(parts)
    return {part: shuffled(child, seed + 1) if isinstance(child, dict) else child for part, child in parts}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def assert_same(actual: Tree, expected: Tree) -> None:
    found, wanted = tree.flatten(actual), tree.flatten(expected)
    assert list(found) == list(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)


FLAT = flat_trees(tensors())


# Names and order --------------------------------------------------------------------------------------------------


@EXAMPLES
@given(flat=FLAT, seed=SEEDS)
def test_unflatten_inverts_flatten_in_one_order(flat: dict[str, Tensor], seed: int) -> None:
    whole = tree.unflatten(flat)
    back = tree.flatten(whole)
    assert back.keys() == flat.keys()
    assert all(back[name] is flat[name] for name in flat)
    assert list(tree.flatten(tree.unflatten(tree.flatten(shuffled(whole, seed))))) == list(back)
    assert [id(leaf) for leaf in tree.leaves(whole)] == [id(leaf) for leaf in back.values()]  # torch's order is ours


def test_numbers_are_ordered_by_value_and_before_words() -> None:
    flat = {f"layers.{i}.{part}": torch.zeros(()) for i in (10, 9, 100, 0) for part in ("up", "down", "2")}
    assert list(tree.flatten(tree.unflatten(flat))) == [
        f"layers.{i}.{part}" for i in (0, 9, 10, 100) for part in ("2", "down", "up")
    ]


@given(flat=FLAT, data=st.data())
def test_a_name_through_a_leaf_is_refused(flat: dict[str, Tensor], data: DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(flat)))
    with pytest.raises(DataError, match="through a leaf"):
        tree.unflatten({f"{name}.weight": torch.zeros(()), **flat})


@pytest.mark.parametrize("foreign", [{"a": 1}, {"a": {"b": None}}, {"a": "text"}, 3.0])
def test_only_tensors_are_leaves(foreign: Any) -> None:
    with pytest.raises(TypeError, match="tensors"):
        tree.flatten(foreign)


@EXAMPLES
@given(base=FLAT, others=st.lists(FLAT, max_size=2), seed=SEEDS)
def test_overlay_is_a_union_of_names_in_which_the_last_wins(
    base: dict[str, Tensor], others: list[dict[str, Tensor]], seed: int
) -> None:
    union = dict(base)
    for other in others:
        union.update(other)
    assume(not any(name.startswith(f"{shorter}.") for name in union for shorter in union))
    trees = [tree.unflatten(flat) for flat in (base, *others)]
    before = tree.digest(trees[0])
    found = tree.flatten(tree.overlay(*trees))
    assert list(found) == list(tree.flatten(tree.unflatten(union)))
    assert all(found[name] is union[name] for name in union)  # nothing is copied
    assert tree.digest(trees[0]) == before
    if len(trees) == 3:
        assert_same(tree.overlay(tree.overlay(*trees[:2]), trees[2]), tree.overlay(*trees))
        assert_same(tree.overlay(trees[0], tree.overlay(*trees[1:])), tree.overlay(*trees))


def test_overlay_replaces_a_leaf_by_a_subtree_and_back() -> None:
    leaf, deep = {"a": torch.zeros(1)}, {"a": {"b": torch.ones(1)}}
    assert_same(tree.overlay(leaf, deep), deep)
    assert_same(tree.overlay(deep, leaf), leaf)


@EXAMPLES
@given(flat=FLAT, patterns=st.lists(st.sampled_from(["*", "a*", "*.weight", "[0-9]*", "b", "?.0*", "nothing"])))
def test_select_and_its_complement_make_the_whole(flat: dict[str, Tensor], patterns: list[str]) -> None:
    whole = tree.unflatten(flat)
    chosen = tree.select(whole, patterns)
    wanted = [name for name in flat if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    assert sorted(tree.flatten(chosen)) == sorted(wanted)
    rest = tree.select(whole, lambda name: name not in wanted)
    assert_same(tree.overlay(rest, chosen), whole)
    if len(patterns) == 1:
        assert_same(tree.select(whole, patterns[0]), chosen)


# Leaf by leaf -----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """As a training state nests: trees inside tuples inside a tuple."""

    step: Tensor
    params: Tree
    moments: tuple[Tree, Tree]


@EXAMPLES
@given(flat=FLAT, members=st.integers(1, 3))
def test_stack_and_index_are_inverse(flat: dict[str, Tensor], members: int) -> None:
    def member(i: int) -> State:
        params = tree.map(lambda leaf: leaf.roll(i), tree.unflatten(flat))
        return State(torch.tensor(i), params, (params, params))

    population = tree.stack([member(i) for i in range(members)])
    for i, back in enumerate(tree.unstack(population)):
        assert isinstance(back, State)
        assert_same(back, member(i))
        assert_same(tree.index(population, i), member(i))
    assert all(leaf.shape[0] == members for leaf in tree.leaves(population))


@EXAMPLES
@given(flat=flat_trees(st.integers(0, 3)), seed=SEEDS)
def test_trees_are_vectors(flat: dict[str, int], seed: int) -> None:
    """Two trees meet leaf by leaf, by name and not by order; the result is that of the concatenated numbers."""
    shapes = {name: (size,) for name, size in flat.items()}
    a, b = (
        tree.unflatten({name: numbers(shape, seed + i + j) for j, (name, shape) in enumerate(sorted(shapes.items()))})
        for i in (0, 100)
    )

    def vector(x: Tree) -> Tensor:
        return torch.cat([leaf for _, leaf in sorted(tree.flatten(x).items())])

    va, vb, b = vector(a), vector(b), shuffled(b, seed)
    assert torch.equal(vector(tree.add(a, b)), va + vb)
    assert torch.equal(vector(tree.subtract(a, b)), va - vb)
    assert torch.equal(vector(tree.scale(a, 0.3)), va * 0.3)
    torch.testing.assert_close(vector(tree.lerp(a, b, 0.25)), 0.75 * va + 0.25 * vb)
    torch.testing.assert_close(tree.norm(a), va.norm())
    torch.testing.assert_close(tree.dot(a, tree.unflatten(tree.flatten(b))), va @ vb)
    assert not tree.norm(tree.zeros_like(a))
    assert tree.size(a) == va.numel()
    assert tree.nbytes(a) == 4 * va.numel()


@EXAMPLES
@given(flat=FLAT)
def test_names_reach_the_function_of_map_named(flat: dict[str, Tensor]) -> None:
    whole = tree.unflatten(flat)
    named = tree.map_named(lambda name, leaf, other: (name, leaf is other), whole, whole)
    expected = tree.unflatten({name: (name, True) for name in flat})
    assert named == expected


@EXAMPLES
@given(flat=FLAT)
def test_cast_changes_floats_alone_and_copy_shares_nothing(flat: dict[str, Tensor]) -> None:
    whole = tree.unflatten(flat)
    cast, own = tree.flatten(tree.cast(whole, torch.bfloat16)), tree.flatten(tree.copy(whole))
    for name, leaf in flat.items():
        assert same(cast[name], leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf)
        assert same(own[name], leaf)
        assert not leaf.numel() or own[name].data_ptr() != leaf.data_ptr()
        assert own[name].is_contiguous()


# Facts ------------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(flat=FLAT, seed=SEEDS, data=st.data())
@example({"01": torch.zeros(1), "1": torch.ones(1)}, 1, None)
def test_digest_is_of_the_contents_alone(flat: dict[str, Tensor], seed: int, data: DataObject | None) -> None:
    whole = tree.unflatten(flat)
    digest = tree.digest(whole)
    assert digest == tree.digest(shuffled(whole, seed)) == tree.digest(tree.copy(whole))
    assert digest == tree.digest(tree.unflatten(dict(reversed(flat.items()))))
    if data is None:
        return
    name = data.draw(st.sampled_from(sorted(flat)))
    leaf = flat[name]
    changes = [{**flat, name: leaf[None]}, {**flat, f"{name}x": leaf}]
    if leaf.dtype == torch.float32:
        changes.append({**flat, name: leaf.contiguous().view(torch.int32)})
    if leaf.numel():
        flipped = leaf.contiguous().clone()
        bits = flipped.flatten().view(torch.uint8)
        bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1
        changes.append({**flat, name: bits.view(leaf.dtype).view(leaf.shape)})
    for change in changes:
        assert tree.digest(tree.unflatten(change)) != digest


# Files ------------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(flat=FLAT, notes=st.none() | st.dictionaries(st.text(max_size=5), st.integers() | st.text(), max_size=4))
def test_a_file_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, flat: dict[str, Tensor], notes: dict[str, Any] | None
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    whole = tree.unflatten(flat)
    tree.save(whole, folder / "a", notes)
    tree.save(tree.unflatten(dict(reversed(flat.items()))), folder / "b", notes)
    assert_same(tree.load(folder / "a"), whole)
    assert tree.metadata(folder / "a") == (notes or {})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    others = safetensors.torch.load_file(folder / "a")  # what anyone else reads: the same names
    assert others.keys() == flat.keys()


def test_leaves_that_share_storage_are_saved_apart(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(4, 3)
    shared = {
        "again": rows,
        "all": rows,
        "columns": rows.mT,
        "first": rows[:2],
        "middle": rows[1:3],
        "none": rows[:0],
        "one": rows[0, 0],
        "wide": rows[0].expand(5, 3),
    }
    tree.save(shared, tmp_path / "a")
    assert_same(tree.load(tmp_path / "a"), shared)
    assert (tmp_path / "a").stat().st_size < 4000


@given(cut=st.integers(0, 400))
def test_a_broken_file_is_named(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("tree") / "model.safetensors"
    tree.save({"a": torch.zeros(50), "b": torch.ones(20)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(DataError, match=r"model\.safetensors is not a whole safetensors file"):
        tree.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="not a whole"):
        tree.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*nothing"):
        tree.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="no file"):
        tree.load(tmp_path)


# Restoring --------------------------------------------------------------------------------------------------------


def state(flat: dict[str, Tensor]) -> State:
    params = tree.unflatten(flat)
    return State(torch.tensor(3), params, (params, tree.map(lambda leaf: leaf.clone(), params)))


@EXAMPLES
@given(flat=FLAT, seed=SEEDS)
def test_restore_inverts_flatten(flat: dict[str, Tensor], seed: int) -> None:
    whole = state(flat)
    named = list(tree.flatten(whole).items())
    random.Random(seed).shuffle(named)
    back = tree.restore(tree.zeros_like(whole), dict(named))
    assert isinstance(back, State)
    assert isinstance(back.moments, tuple)
    assert_same(back, whole)
    found, wanted = tree.leaves(back), tree.leaves(whole)
    assert all(a is b for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params.a": None}, r"the checkpoint lacks tensor 'params\.a' \(1 in all\)"),
        ({"params.z": torch.zeros(1)}, r"the checkpoint has an unknown tensor 'params\.z' \(1 in all\)"),
        ({"params.a": torch.zeros(2, 3)}, r"'params\.a' as \[2, 3\] torch\.float32; \[3, 2\] torch\.float32 is needed"),
        ({"params.a": torch.zeros(3, 2).half()}, r"'params\.a' as \[3, 2\] torch\.float16; \[3, 2\] torch\.float32"),
    ],
)
def test_restore_refuses_what_does_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    template = state({"a": torch.zeros(3, 2), "b": torch.zeros(1)})
    flat = {**tree.flatten(template), **change}
    with pytest.raises(DataError, match=message):
        tree.restore(template, {name: leaf for name, leaf in flat.items() if leaf is not None}, what="the checkpoint")
