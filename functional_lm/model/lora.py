"""Low-rank adapters as trees (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353).

    adapter = init(params, ("q_proj", "v_proj"), rank=16, key=key)     leaves beside the weights that they adapt
    model   = attach(params, adapter)                                  overlay: nothing is copied, `linear` adds them
    plain   = merge(params, adapter)                                   the same model without the leaves
    bank    = stack(params, [first, second]);  attach(params, select(bank, index))      an adapter for each row

Undoing a merge is keeping the base. Many adapters of one shape over one base are a vmap axis of the adapter alone.

Axes: R rank, N entries of a bank, B rows, D model width, V vocabulary.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from functional_lm import keys, tree
from functional_lm.errors import DataError, UsageError
from functional_lm.model import packed
from functional_lm.model.linear import product, row_norm
from functional_lm.tree import Tree

LEAVES = ("lora_A", "lora_B", "lora_scale", "lora_magnitude")
TRAINED = ("*.lora_A", "*.lora_B", "*.lora_magnitude")
EMBEDDING = "embed_tokens"
ALL_LINEAR = "all-linear"


def places(params: Tree) -> dict[str, Tensor]:
    """The weights that an adapter can stand beside, by the path of their projection: matrices, without positions.

    A quantised one is there as its shape alone, on the meta device.
    """
    return {
        path: packed.described({part: leaf}) if part == "qweight" else leaf
        for name, leaf in tree.flatten(params).items()
        for path, _, part in [name.rpartition(".")]
        if part in ("weight", "qweight") and leaf.dim() == 2 and not path.endswith("embed_positions")
    }


def targeted(params: Tree, targets: str | Iterable[str]) -> dict[str, Tensor]:
    """The weights that the targets name, by path.

    A target is the last part or parts of a path (`q_proj`, `mlp.up_proj`), a glob over whole paths
    (`model.layers.[01].*`), or `all-linear`: every projection inside the layers. Raises UsageError for one that
    matches nothing.
    """
    known = places(params)
    found: dict[str, Tensor] = {}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise UsageError(f"an adapter needs targets; give some of {', '.join(_short(known))}, or {ALL_LINEAR}")
    for target in wanted:
        matches = {path: leaf for path, leaf in known.items() if _matches(path, target)}
        if not matches:
            raise UsageError(f"the target {target!r} matches nothing; there are {', '.join(_short(known))}")
        found |= matches
    return {path: leaf for path, leaf in known.items() if path in found}


def _matches(path: str, target: str) -> bool:
    if target == ALL_LINEAR:
        return ".layers." in f".{path}"
    whole = target.removesuffix(".weight")
    return f".{path}".endswith(f".{whole}") or fnmatch.fnmatchcase(path, whole)


def _short(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """alpha / R, or alpha / √R (arXiv 2312.03732, theorem 3.2). Raises UsageError for a rank below 1."""
    if rank < 1:
        raise UsageError(f"the rank is {rank}; an adapter needs at least 1")
    return alpha / (math.sqrt(rank) if rslora else rank)


def init(
    params: Tree,
    targets: str | Iterable[str],
    rank: int,
    key: Tensor,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tree:
    """A fresh adapter, which changes nothing yet: A uniform in ±1/√in by the key of its path, B zero.

    `alpha` is the rank if not given. Raises UsageError for a rank below 1, a target that matches nothing, and DoRA on
    an embedding, whose rows are inputs.
    """
    scale = scaling(rank, rank if alpha is None else alpha, rslora)
    flat: dict[str, Tensor] = {}
    for path, weight in targeted(params, targets).items():
        embedding = path.endswith(EMBEDDING)
        if embedding and dora:
            raise UsageError(f"DoRA scales the outputs of a projection, and {path} has none; leave it out")
        if dora and weight.is_meta:
            raise UsageError(f"DoRA measures the rows of a weight, and {path} is quantised; leave out dora")
        inputs, outputs = weight.shape if embedding else reversed(weight.shape)
        bound, own = inputs**-0.5, keys.fold_in_name(key, f"{path}.lora_A")
        flat[f"{path}.lora_A"] = keys.uniform(own, (rank, inputs), low=-bound, high=bound).to(dtype)
        flat[f"{path}.lora_B"] = torch.zeros(outputs, rank, dtype=dtype, device=key.device)
        flat[f"{path}.lora_scale"] = torch.tensor(scale, device=key.device)
        if dora:
            flat[f"{path}.lora_magnitude"] = weight.detach().float().norm(dim=-1).to(dtype)
    return tree.unflatten(flat)


def attach(params: Tree, *adapters: Tree) -> Tree:
    """`params` with adapter leaves in their places; no copy. Of two adapters of one place the last one stands."""
    return tree.overlay(params, *adapters)


def merge(params: Tree, adapter: Tree) -> Tree:
    """The model that `attach` computes, as plain weights in the dtypes of `params`.

    Raises DataError for an adapter that does not fit.
    """
    check(params, adapter)
    merged = {}
    for path, leaves in projections(adapter).items():
        weight = tree.flatten(params).get(f"{path}.weight")
        if weight is None:
            raise DataError(f"{path} is quantised, and nothing can be merged into it; attach the adapter")
        change = product(leaves)
        new = weight.float() + (change.mT if path.endswith(EMBEDDING) else change)
        if "lora_magnitude" in leaves:
            gain = leaves["lora_magnitude"].float() / row_norm({**leaves, "weight": weight})
            new = gain[:, None] * new
        merged[f"{path}.weight"] = new.to(weight.dtype)
    return tree.overlay(params, tree.unflatten(merged))


def projections(adapter: Tree) -> dict[str, Tree]:
    """The adapter's leaves by the path of the projection that they belong to."""
    found: dict[str, Tree] = {}
    for name, leaf in tree.flatten(adapter).items():
        path, _, kind = name.rpartition(".")
        found.setdefault(path, {})[kind] = leaf
    return found


def check(params: Tree, adapter: Tree, what: str = "the adapter") -> None:
    """Raise DataError naming the first place where an adapter does not fit a model."""
    known = places(params)
    for path, leaves in projections(adapter).items():
        if path not in known:
            raise DataError(f"{what} adapts {path!r}, which this model lacks; it belongs to another base")
        missing = {"lora_A", "lora_B", "lora_scale"} - leaves.keys()
        extra = leaves.keys() - set(LEAVES)
        if missing or extra:
            raise DataError(f"{what}: {path!r} {'lacks' if missing else 'has an unknown'} {min(missing or extra)!r}")
        inputs, outputs = known[path].shape if path.endswith(EMBEDDING) else reversed(known[path].shape)
        rank = leaves["lora_A"].shape[0]
        wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude": (outputs,)}
        for name, shape in wanted.items():
            if name in leaves and leaves[name].shape != shape:
                raise DataError(f"{what}: {path}.{name} is {list(leaves[name].shape)}; this base needs {list(shape)}")


# What a training needs ------------------------------------------------------------------------------------------------


def split(adapter: Tree) -> tuple[Tree, Tree]:
    """`trained, constant`: the leaves that are differentiated, and the rest (scales, rates of dropout)."""
    matches = tree.matcher(TRAINED)
    return tree.select(adapter, matches), tree.select(adapter, lambda name: not matches(name))


def with_dropout(adapter: Tree, probability: float) -> Tree:
    """A `lora_dropout` leaf beside every scale of a projection; it acts where `keyed` has added a key.

    An embedding has none: its input is a token.
    """
    flat = tree.flatten(adapter)
    places = [name.removesuffix("lora_scale") for name in flat if name.endswith("lora_scale")]
    leaves = {
        f"{place}lora_dropout": torch.tensor(float(probability), device=flat[f"{place}lora_scale"].device)
        for place in places
        if not place.endswith(f"{EMBEDDING}.")
    }
    return tree.unflatten({**flat, **leaves})


def keyed(params: Tree, key: Tensor, prefix: str = "") -> Tree:
    """`params` with a `lora_key` beside every `lora_dropout`: `key` folded with the path, so that places differ."""
    made: Tree = {}
    for name, child in params.items():
        path = f"{prefix}.{name}" if prefix else name
        made[name] = keyed(child, key, path) if isinstance(child, dict) else child
    if "lora_dropout" in params:
        made["lora_key"] = keys.fold_in_name(key, prefix)
    return made


def drops(params: Tree) -> bool:
    """Whether an adapter in this tree has dropout."""
    return any(name.endswith("lora_dropout") for name in tree.flatten(params))


# Banks: an adapter for each row ---------------------------------------------------------------------------------------


def stack(params: Tree, adapters: Sequence[Tree]) -> Tree:
    """A bank `[N, ...]` of adapters of one base, N one more than given: entry 0 changes nothing.

    Ranks and targets may differ: an adapter has zeros where another has leaves. Magnitudes become `lora_gain`
    [N, out]. Raises DataError for an adapter that does not fit.
    """
    for number, adapter in enumerate(adapters, 1):
        check(params, adapter, f"adapter {number}")
    weights = places(params)
    parts = [{}, *map(projections, adapters)]
    flat: dict[str, Tensor] = {}
    for path in {path: None for part in parts for path in part}:
        entries = [part.get(path, {}) for part in parts]
        first = next(entry for entry in entries if entry)
        rank = max(entry["lora_A"].shape[0] for entry in entries if entry)
        flat[f"{path}.lora_A"] = torch.stack(
            [_padded(entry.get("lora_A"), first["lora_A"], 0, rank) for entry in entries]
        )
        flat[f"{path}.lora_B"] = torch.stack(
            [_padded(entry.get("lora_B"), first["lora_B"], 1, rank) for entry in entries]
        )
        zero = torch.zeros_like(first["lora_scale"])
        flat[f"{path}.lora_scale"] = torch.stack([entry.get("lora_scale", zero) for entry in entries])
        if any("lora_magnitude" in entry for entry in entries):
            flat[f"{path}.lora_gain"] = torch.stack([_gain(entry, weights[path]) for entry in entries])
    return tree.unflatten(flat)


def room(params: Tree, adapters: Sequence[Tree], size: int, rank: int, dtype: torch.dtype = torch.float32) -> Tree:
    """`stack` with entries for `size` adapters of up to `rank` on every projection inside the layers; `put` fills them.

    Raises UsageError where what is given needs more.
    """
    if len(adapters) > size:
        raise UsageError(f"{len(adapters)} adapters are more than the {size} that there is room for")
    ranks = [leaves["lora_A"].shape[0] for adapter in adapters for leaves in projections(adapter).values()]
    if max(ranks, default=0) > rank:
        raise UsageError(f"an adapter has rank {max(ranks)}; the largest that there is room for is {rank}")
    device = tree.leaves(params)[0].device
    blank = tree.map(torch.zeros_like, init(params, ALL_LINEAR, rank, keys.key(0, device), dtype=dtype))
    return stack(params, [*adapters, *[blank] * (size - len(adapters))])


def put(bank: Tree, row: int, adapter: Tree) -> None:
    """Write an adapter over entry `row` of a bank, in place, zeros where it has none.

    Raises DataError, before anything is written, for what the bank has no place for.
    """
    there, parts = tree.flatten(bank), {path: tree.flatten(leaves) for path, leaves in projections(adapter).items()}
    for path, leaves in parts.items():
        held, rank = there.get(f"{path}.lora_A"), leaves["lora_A"].shape[0]
        if held is None:
            raise DataError(f"the adapter adapts {path!r}, for which there is no room here; load it at the start")
        if rank > held.shape[1]:
            raise DataError(f"the adapter has rank {rank} at {path!r}; there is room for {held.shape[1]}")
        if "lora_magnitude" in leaves:
            raise DataError(f"the adapter is DoRA's at {path!r}, which has no room here; load it at the start")
    for name, rows in there.items():
        path, _, kind = name.rpartition(".")
        leaf = parts.get(path, {}).get(kind)
        rows[row] = 1.0 if kind == "lora_gain" else 0.0
        if leaf is not None:
            rows[row][tuple(slice(size) for size in leaf.shape)] = leaf


def entries(bank: Tree) -> int:
    """How many adapters a bank holds beside the entry that changes nothing."""
    return next(leaf.shape[0] for name, leaf in tree.flatten(bank).items() if name.endswith("lora_scale")) - 1


def select(bank: Tree, index: Int[Tensor, "B"]) -> Tree:
    """The bank with an entry for each row of a batch; `attach` it."""
    flat = tree.flatten(bank)
    places = {name.rpartition(".")[0] for name in flat}
    return tree.unflatten({**flat, **{f"{place}.lora_index": index for place in places}})


def _padded(leaf: Tensor | None, like: Tensor, axis: int, rank: int) -> Tensor:
    """`leaf`, or zeros, with `rank` entries along `axis`."""
    shape = list(like.shape)
    shape[axis] = rank
    made = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if leaf is not None:
        made.narrow(axis, 0, leaf.shape[axis]).copy_(leaf)
    return made


def _gain(leaves: Tree, weight: Tensor) -> Tensor:
    if "lora_magnitude" not in leaves:
        return torch.ones(weight.shape[0], device=weight.device)
    return leaves["lora_magnitude"].float() / row_norm({**leaves, "weight": weight})
