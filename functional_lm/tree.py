"""Trees of tensors: the one form in which parameters, gradients, optimizer states, adapters and caches exist.

A *tree* is a nested `dict[str, ...]` whose leaves are tensors. A leaf's *name* is its path with dots,
`model.layers.0.mlp.up_proj.weight`, and is also its name in a safetensors file: reading and writing translate nothing.
Trees built here keep one canonical order (names alphabetically, numbers by value), so that two trees with the same
names have the same pytree structure whatever order they were made in.

`map` and its relatives accept any torch pytree (named tuples such as a training state included).
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functional_lm import files, pickles
from functional_lm.errors import DataError, json_kind

Tree = dict[str, Any]
T = TypeVar("T")
Selector = str | Iterable[str] | Callable[[str], bool]


# Names and order ------------------------------------------------------------------------------------------------


def _order(part: str) -> tuple[int, int, str]:
    """A total order: "01" and "1" are different names, and other scripts' digits are words."""
    return (0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part)


def _children(node: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return node.items()
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return zip(node._fields, node)
    if isinstance(node, list | tuple):
        return ((str(i), child) for i, child in enumerate(node))
    raise TypeError(f"a tree holds dicts, tuples and tensors, not {type(node).__name__}")


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every leaf by its dotted name, in the tree's own order."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    flat: dict[str, Tensor] = {}
    for name, child in _children(tree):
        flat.update(flatten(child, f"{prefix}.{name}" if prefix else name))
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The tree of these dotted names, in canonical order; the inverse of `flatten`."""
    tree: Tree = {}
    for name in sorted(flat, key=lambda name: [_order(part) for part in name.split(".")]):
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise DataError(f"the name {name!r} runs through a leaf; no tree can hold both")
        node[last] = flat[name]
    return tree


def matcher(selector: Selector) -> Callable[[str], bool]:
    """A selector as a predicate on names; an empty list of globs selects nothing."""
    if callable(selector):
        return selector
    patterns = [selector] if isinstance(selector, str) else list(selector)
    expressions = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    return lambda name: any(expression.match(name) for expression in expressions)


def select(tree: Tree, selector: Selector) -> Tree:
    """The leaves whose names match a glob (`"*.mlp.*"`), one of several globs, or a predicate."""
    matches = matcher(selector)
    return unflatten({name: leaf for name, leaf in flatten(tree).items() if matches(name)})


def overlay(base: Tree, *others: Tree) -> Tree:
    """`base` with every leaf of the others added or put in its place; nothing is copied, the last one wins."""
    if not others:
        return base
    merged = dict(base)
    for other in others:
        for name, child in other.items():
            below = merged.get(name)
            merged[name] = overlay(below, child) if isinstance(below, dict) and isinstance(child, dict) else child
    return {name: merged[name] for name in sorted(merged, key=_order)}


# Leaf by leaf ---------------------------------------------------------------------------------------------------


def map(function: Callable[..., Any], tree: T, *others: Any) -> T:
    """`function(leaf, ...)` on each leaf of trees with equal structure."""
    return pytree.tree_map(function, tree, *others)


def map_named(function: Callable[..., Any], tree: Tree, *others: Tree, prefix: str = "") -> Tree:
    """`function(name, leaf, ...)` on each leaf of nested dicts with equal names."""
    result: Tree = {}
    for part, child in tree.items():
        name = f"{prefix}.{part}" if prefix else part
        rest = [other[part] for other in others]
        if isinstance(child, dict):
            result[part] = map_named(function, child, *rest, prefix=name)
        else:
            result[part] = function(name, child, *rest)
    return result


def leaves(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree)


def cast(tree: T, dtype: torch.dtype) -> T:
    """Floating-point leaves in another precision; integers (tokens, keys, packed weights) stay what they are."""
    return map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def to(tree: T, device: torch.device | str) -> T:
    return map(lambda leaf: leaf.to(device), tree)


def copy(tree: T) -> T:
    """Storage of its own for each leaf: what a donated tree needs if the caller keeps using the original."""
    return map(lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format), tree)


def stack(trees: Sequence[T]) -> T:
    """P trees with leaves `[...]` as one with leaves `[P, ...]`: a population."""
    return pytree.tree_map(lambda *members: torch.stack(members), *trees)


def index(tree: T, i: int) -> T:
    """Member i of a population; a view."""
    return map(lambda leaf: leaf[i], tree)


def unstack(tree: T) -> list[T]:
    return [index(tree, i) for i in range(leaves(tree)[0].shape[0])]


# Vector-space arithmetic ----------------------------------------------------------------------------------------


def add(a: T, b: Any) -> T:
    return map(torch.add, a, b)


def subtract(a: T, b: Any) -> T:
    return map(torch.sub, a, b)


def scale(tree: T, factor: float | Tensor) -> T:
    return map(lambda leaf: leaf * factor, tree)


def lerp(a: T, b: Any, weight: float | Tensor) -> T:
    """(1 - weight) a + weight b."""
    return map(lambda x, y: x + weight * (y - x), a, b)


def zeros_like(tree: T) -> T:
    return map(torch.zeros_like, tree)


def dot(a: Any, b: Any) -> Tensor:
    """The inner product over all leaves, float32, 0-d."""
    products = [(x.float() * y.float()).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]
    return functools.reduce(torch.add, products)


def norm(tree: Any) -> Tensor:
    """The Euclidean norm over all leaves, float32, 0-d."""
    return dot(tree, tree).sqrt()


# Facts ----------------------------------------------------------------------------------------------------------


def size(tree: Any) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.numel() for leaf in leaves(tree))


def nbytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


def digest(tree: Any) -> str:
    """sha256 over names, dtypes, shapes and bytes, in canonical order: equal trees, equal digests."""
    result = hashlib.sha256()
    for name, leaf in flatten(unflatten(flatten(tree))).items():
        result.update(f"{name} {leaf.dtype} {list(leaf.shape)}\n".encode())
        result.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


# Safetensors ----------------------------------------------------------------------------------------------------

SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SAFETENSORS |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
SAFETENSORS |= {torch.bool: "BOOL", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"}


def save(tree: Any, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file atomically.

    The metadata is one JSON value under one key in the place of Hugging Face's `format`: with several keys the same
    save gives different bytes from run to run.
    """
    flat = flatten(tree)
    save_each(path, flat, flat.__getitem__, metadata)


def save_each(
    path: str | Path,
    described: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time.

    `described` gives each tensor's shape and dtype (on the meta device, say), `read(name)` the tensor itself. Wide
    dtypes come first, so that every tensor is aligned.
    """
    names = sorted(described, key=lambda name: (-described[name].element_size(), [*map(_order, name.split("."))]))
    notes = {"format": "pt"} if metadata is None else {"functional_lm": json.dumps(metadata, sort_keys=True)}
    header: dict[str, Any] = {"__metadata__": notes}
    end = 0
    for name in names:
        leaf, begin = described[name], end
        end += leaf.numel() * leaf.element_size()
        header[name] = {"dtype": SAFETENSORS[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            leaf = read(name).detach().cpu().contiguous()
            assert (leaf.shape, leaf.dtype) == (described[name].shape, described[name].dtype), name
            file.write(leaf.flatten().view(torch.uint8).numpy().data)


def load(path: str | Path, device: torch.device | str = "cpu") -> Tree:
    """The tree of a safetensors file. Raises DataError for a missing, truncated or foreign file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        pickles.refuse(Path(path).parent)
        raise DataError(f"no file {path}")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise files.not_safetensors(path, error) from error
    try:
        return unflatten(flat)
    except DataError as error:
        raise DataError(f"{path}: {error}; write or copy it again") from error


def metadata(path: str | Path) -> dict[str, Any]:
    """What `save` was given as metadata; empty for a file that others wrote. Raises DataError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("functional_lm", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise files.not_safetensors(path, error) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} has notes of another kind ({json_kind(found)}); write or copy it again")
    return found


def restore(template: T, flat: Mapping[str, Tensor], what: str = "the file") -> T:
    """Put named leaves into the structure of `template`; every name, shape and dtype has to fit.

    Raises DataError naming the first leaf that is missing, left over or of another shape or dtype.
    """
    expected = flatten(template)
    for kind, names in (("lacks", expected.keys() - flat.keys()), ("has an unknown", flat.keys() - expected.keys())):
        if names:
            raise DataError(f"{what} {kind} tensor {min(names)!r} ({len(names)} in all)")
    for name, leaf in expected.items():
        found = flat[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise DataError(
                f"{what} holds {name!r} as {list(found.shape)} {found.dtype}; {list(leaf.shape)} {leaf.dtype} is needed"
            )
    specification = pytree.tree_structure(template)
    return pytree.tree_unflatten([flat[name] for name in expected], specification)
