"""Adapter folders as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`, out and in.

PEFT's names are the paths of `transformers`' modules with a prefix; for the architectures whose tree has the same names
(`llama`, `mistral`, `qwen2`, `qwen3`) such a folder is an adapter for both. What `adapter_config.json` says beyond what
is read here is known to change nothing, or refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_lm import byte_order, files, pickles, tree
from functional_lm.errors import DataError, UsageError
from functional_lm.model import lora
from functional_lm.model.config import read_object
from functional_lm.model.lora import EMBEDDING
from functional_lm.tree import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, OUTPUT = "base_model.model.", "lm_head"
# Leaf by its end in PEFT's name; an embedding's come without "weight".
ENDS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "lora_magnitude"}
ENDS |= {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
COPY = ".base_layer.weight"
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
READ |= {"base_model_name_or_path", "target_modules", "init_lora_weights", "ensure_weight_tying"}
# Says where the adapter came from, or which modules have one, which the tensors say too.
HARMLESS = {"task_type", "inference_mode", "revision", "peft_version", "auto_mapping", "exclude_modules"}
HARMLESS |= {"layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"}
# How it began: these left the base as it was. The others (pissa, olora, loftq, ...) changed it.
STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class Settings:
    """What an adapter was made with; `base` and `digest` name the model that it belongs to."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    base: str | None = None
    digest: str | None = None  # tree.digest of the base's parameters


def save(folder: str | Path, adapter: Tree, settings: Settings, base: Tree) -> None:
    """Write an adapter of `base` as a PEFT folder, each file whole or not at all; other files of the folder stay.

    An adapted embedding that is also the output goes out as PEFT ties adapters (`ensure_weight_tying`). Raises
    DataError for what does not fit.
    """
    lora.check(base, adapter)
    folder = Path(folder)
    files.make_folder(folder)
    tied = _tied(base, adapter)
    whole = tree.overlay(adapter, {} if tied is None else {OUTPUT: _as_output(tied)})
    flat = {_theirs(name): leaf for name, leaf in tree.flatten(whole).items() if not name.endswith("lora_scale")}
    record = dataclasses.asdict(settings)
    tree.save(tree.unflatten(flat), folder / WEIGHTS, record)
    files.write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": settings.base,
            "inference_mode": True,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "target_modules": _modules(adapter, base),
            "use_rslora": settings.rslora,
            "use_dora": settings.dora,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_lora_weights": True,
            **({} if tied is None else {"ensure_weight_tying": True}),
        },
    )


def _tied(base: Tree, adapter: Tree) -> Tree | None:
    """The adapter's leaves of an embedding that is the output too."""
    if OUTPUT in base:
        return None
    return next((leaves for path, leaves in lora.projections(adapter).items() if path.endswith(EMBEDDING)), None)


def _as_output(embedding: Tree) -> Tree:
    """The same change of the weight, seen from the other side: (B A)ᵀ = Aᵀ Bᵀ."""
    return {"lora_A": embedding["lora_B"].mT.contiguous(), "lora_B": embedding["lora_A"].mT.contiguous()}


def _theirs(name: str) -> str:
    path, _, kind = name.rpartition(".")
    if path.endswith(EMBEDDING):
        kind = kind.replace("lora_", "lora_embedding_")
    elif kind == "lora_magnitude":
        kind = "lora_magnitude_vector"
    else:
        kind += ".weight"
    return f"{PREFIX}{path}.{kind}"


def _modules(adapter: Tree, base: Tree) -> list[str]:
    """Last parts of paths where all modules that have them are adapted, else whole paths."""
    adapted, known = lora.projections(adapter).keys(), lora.places(base)
    short = {path.rpartition(".")[2] for path in adapted}
    if all(path in adapted for path in known if path.rpartition(".")[2] in short):
        return sorted(short)
    return list(adapted)


# In -------------------------------------------------------------------------------------------------------------------


def load(
    folder: str | Path, params: Tree, digest: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Tree, Settings]:
    """The adapter in a PEFT folder for the model `params`, float leaves as stored, and its settings.

    With `digest` (of the base as it was loaded) an adapter that recorded another one is refused. Raises DataError for
    a missing or damaged file, a setting that is not understood, and tensors that do not fit this model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no adapter folder at {folder}")
    values = read_object(folder / CONFIG)
    _check(values, folder / CONFIG)
    recorded = _record(folder / WEIGHTS)
    if digest is not None and recorded.get("digest") not in (None, digest):
        raise DataError(
            f"{folder} was trained on another base ({recorded['digest'][:12]}, not {digest[:12]}; "
            f"{recorded.get('base')}); give that --model, or --any_base to use it all the same"
        )
    stored = _without_copies(tree.flatten(tree.load(folder / WEIGHTS, device)), params, folder / WEIGHTS)
    flat = {_ours(name, folder / WEIGHTS): leaf for name, leaf in stored.items()}
    if not flat:
        raise DataError(f"{folder / WEIGHTS} holds no adapter: it has no tensors; write or copy it again")
    for name, leaf in flat.items():
        if not leaf.is_floating_point():
            raise DataError(f"{folder / WEIGHTS}: {name!r} is of {leaf.dtype}; an adapter holds floats")
        if not torch.isfinite(leaf).all():
            if byte_order.turned(leaf):
                raise DataError(f"{folder / WEIGHTS}: {name!r} {byte_order.SAID}")
            raise DataError(f"{folder / WEIGHTS}: {name!r} holds numbers that are not finite")
    for path, leaves in lora.projections(tree.unflatten(flat)).items():
        if ("lora_magnitude" in leaves) != bool(values.get("use_dora")) and not path.endswith(EMBEDDING):
            raise DataError(f"{folder}: use_dora is {values.get('use_dora')}, and {path!r} says otherwise")
        flat[f"{path}.lora_scale"] = torch.tensor(_scale(values, path, leaves, folder), device=device)
    adapter = _untied(tree.unflatten(flat), params, bool(values.get("ensure_weight_tying")), folder)
    lora.check(params, adapter, str(folder))
    targets = values.get("target_modules") or ()
    return adapter, Settings(
        int(values["r"]),
        float(values["lora_alpha"]),
        (targets,) if isinstance(targets, str) else tuple(targets),
        float(values.get("lora_dropout") or 0.0),
        bool(values.get("use_rslora")),
        bool(values.get("use_dora")),
        values.get("base_model_name_or_path"),
        recorded.get("digest"),
    )


def load_adapter(folder: str | Path, params: Tree, any_base: bool = False, device: torch.device | str = "cpu") -> Tree:
    """The adapter in a PEFT folder for the model `params`; `lora.attach` or `lora.merge` it.

    Raises DataError as `load` does, and for an adapter that recorded another base than `params` unless `any_base`.
    """
    digest = None if any_base or "digest" not in _record(Path(folder) / WEIGHTS) else tree.digest(params)
    return load(folder, params, digest, device)[0]


def opener(
    root: str | Path, params: Tree, digest: str | None = None, device: torch.device | str = "cpu"
) -> Callable[[str], Tree]:
    """A function from a path below `root` to the adapter there; of `params` the shapes alone are kept.

    It raises UsageError for a path that leads out of `root` (by links too), DataError as `load` does. Raises UsageError
    where `root` is no folder.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise UsageError(f"no folder of adapters at {root}")
    shapes = tree.map(lambda leaf: leaf.to("meta"), params)

    def opened(path: str) -> Tree:
        if "\0" in path or not (root / path).resolve().is_relative_to(root):
            raise UsageError("the path leads out of the folder of adapters")
        found = (root / path).resolve()
        try:
            return load(found, shapes, digest, device)[0]
        except DataError as error:  # where the folder lies is nothing to the client
            raise DataError(str(error).replace(f"{root}", ".")) from None

    return opened


def _record(path: Path) -> dict[str, Any]:
    """What `save` noted beside the tensors; empty for a folder that others wrote."""
    if not path.is_file():
        pickles.refuse(path.parent)
        raise DataError(f"no {path.name} in {path.parent}; an adapter folder has it beside {CONFIG}")
    files.safetensors_header(path)  # a damaged header is refused here, in one line
    found = {name: value for name, value in tree.metadata(path).items() if value is not None}
    if not isinstance(found.get("digest", ""), str):
        raise DataError(f"{path} has notes of another kind; write or copy it again")
    return found


def _check(values: Mapping[str, Any], path: Path) -> None:
    """Refuse by name what is not understood."""
    if values.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {values.get('peft_type')!r}; LORA is what is read here")
    for name in ("r", "lora_alpha"):
        if not isinstance(values.get(name), int | float) or isinstance(values[name], bool) or values[name] <= 0:
            raise DataError(f"{path}: {name} is {values.get(name)!r}; it has to be above 0")
    if not float(values["r"]).is_integer():
        raise DataError(f"{path}: r is {values['r']!r}; it has to be a whole number")
    rate, targets = values.get("lora_dropout") or 0.0, values.get("target_modules") or ()
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise DataError(f"{path}: lora_dropout is {rate!r}; it has to be between 0 and 1")
    if not isinstance(targets, str) and not all(isinstance(each, str) for each in _list_of(targets)):
        raise DataError(f"{path}: target_modules is {targets!r}; it has to be names of modules")
    for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(values.get(name), bool | None):
            raise DataError(f"{path}: {name} is {values[name]!r}; it has to be true or false")
    if not isinstance(values.get("base_model_name_or_path"), str | None):
        raise DataError(f"{path}: base_model_name_or_path is {values['base_model_name_or_path']!r}; it has to be text")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(values.get(name) or {}, f"{path}: {name}")
    if not isinstance(start := values.get("init_lora_weights"), Hashable) or start not in STARTS:
        raise DataError(
            f"{path}: init_lora_weights is {values['init_lora_weights']!r}, which changed the base; "
            "save it with PEFT's conversion to plain LoRA first"
        )
    for name, value in values.items():
        if name == "bias" and value in ("none", None):
            continue
        if name not in READ | HARMLESS and value not in (None, False, {}, []):
            raise DataError(f"{path}: {name} is {value!r}, which is not understood here")


def _list_of(value: Any) -> list[Any]:
    """A list as it is; of anything else, one thing that is no name."""
    return list(value) if isinstance(value, list | tuple) else [None]


def _check_patterns(patterns: Any, what: str) -> None:
    """Expressions, with a number above 0 for each."""
    if not isinstance(patterns, dict):
        raise DataError(f"{what} is {patterns!r}; it has to be numbers by pattern")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(f"{what} holds {pattern!r}, which is no expression ({error})") from error
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise DataError(f"{what}: {pattern!r} is {value!r}; it has to be above 0")


def _ours(name: str, path: Path) -> str:
    for end, kind in ENDS.items():
        if name.startswith(PREFIX) and name.endswith(f".{end}"):
            return f"{name[len(PREFIX) : -len(end) - 1]}.{kind}"
    raise DataError(f"{path} has an unknown tensor {name!r}")


def _without_copies(stored: Mapping[str, Tensor], params: Tree, path: Path) -> dict[str, Tensor]:
    """The tensors without the embeddings that PEFT writes beside their adapters, which have to be the base's own."""
    own, kept = tree.flatten(params), {}
    for name, leaf in stored.items():
        if not name.endswith(COPY):
            kept[name] = leaf
            continue
        place = name.removeprefix(PREFIX).removesuffix(COPY)
        weight = own.get(f"{place}.weight", own.get(f"model.{EMBEDDING}.weight") if place == OUTPUT else None)
        if weight is None or weight.is_meta or not torch.equal(weight, leaf.to(weight)):
            raise DataError(
                f"{path} brings weights of its own for {place!r}, which cannot be told to be this base's; "
                "save it with save_embedding_layers=False, if they are"
            )
    return kept


def _untied(adapter: Tree, params: Tree, tying: bool, folder: Path) -> Tree:
    """The adapter with the embedding's leaves alone, where the embedding is the output too."""
    tied = _tied(params, adapter)
    if tied is None:
        return adapter
    output, wanted = adapter.get(OUTPUT, {}), {**_as_output(tied), "lora_scale": tied["lora_scale"]}
    if not tying or any(name not in wanted or not torch.equal(leaf, wanted[name]) for name, leaf in output.items()):
        raise DataError(
            f"{folder} adapts this model's embedding and not its output, which is the same weight; "
            "train it with ensure_weight_tying=True, or untie them"
        )
    return {name: child for name, child in adapter.items() if name != OUTPUT}


def _scale(values: Mapping[str, Any], path: str, leaves: Mapping[str, Tensor], folder: Path) -> float:
    """alpha and rank of a module, by its path or by a pattern for its end."""
    rank = _by_pattern(values.get("rank_pattern"), path, values["r"])
    alpha = _by_pattern(values.get("alpha_pattern"), path, values["lora_alpha"])
    if "lora_A" in leaves and leaves["lora_A"].shape[0] != rank:
        raise DataError(f"{folder}: {path!r} has rank {leaves['lora_A'].shape[0]}; {CONFIG} says {rank}")
    return lora.scaling(int(rank), alpha, bool(values.get("use_rslora")))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return otherwise
