"""Compiled functions kept between processes, so that a second start neither traces nor compiles.

Inductor's own cache keeps the machine code, but Dynamo still traces every function again, which for a whole training
step is some seconds and tens of MiB of Python objects. torch can write a compiled function down (`aot_compile`); what
is added here is the name it is found by. A pure function *is* its code and what it closes over, so that

    name = digest(this package's source, torch, the processor, the function's closure, the arguments' structure)

says all that a compiled form depends on (module constants of the package are taken for what its source says). A
function that closes over a tensor, or over anything that has no such digest, is compiled in the ordinary way. The files
lie in Inductor's cache folder and are trusted as far as it is: they are programs, and torch unpickles them. A folder
that others may write to is neither read nor written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import stat
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from functional_lm import files

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class NoDigestError(Exception):
    """A value that a compiled function may depend on and that has no digest."""


def stored(
    portable: Callable[..., Any], compiled: Callable[..., Any], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` compiled: read from the store where it is and written to it where not.

    `compiled` is what torch.compile makes of it, and `portable` the same with the guards `of_tensors`. One variant for
    each structure of the arguments. Where the store cannot serve (another device than the CPU, no digest, a torch that
    lacks the means) `compiled` is called.
    """
    variants: dict[Any, list[Any]] = {}
    plain = not enabled()

    def call(*args: Any, **named: Any) -> Any:
        nonlocal plain
        if not plain:
            made = variants.setdefault((modes(), structure((args, named))), [])
            for variant in made:
                if variant.guard_check(*args, **named):
                    return variant.fn(*args, **named)
            variant = _variant(portable, function, args, named)
            if variant is not None:
                made.append(variant)
                return variant.fn(*args, **named)
            plain = True
        return compiled(*args, **named)

    return call


def modes() -> tuple[Any, ...]:
    """What of torch's global state a traced function depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def structure(value: Any) -> Any:
    """A pytree with its tensors left out, hashable: what of the arguments the guards on tensors do not see."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, dict):
        return (tuple(value), *[structure(child) for child in value.values()])
    if isinstance(value, list | tuple):
        return (type(value), *[structure(child) for child in value])
    return (type(value), value)


def enabled() -> bool:
    """Where Inductor's cache is switched off, so is this one."""
    from torch._inductor import config

    return (
        config.fx_graph_cache and not config.force_disable_caches and hasattr(torch.compiler, "load_compiled_function")
    )


def loaded() -> int:
    """How many functions this process has read from the store; kept where Dynamo counts its graphs."""
    return int(torch._dynamo.utils.counters["functional_lm"]["loaded"])


def _variant(
    portable: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """The compiled form for these arguments, of the store or new; None if it cannot be had this way."""
    try:
        path = folder() / f"{name(function, (args, named))}.bin"
    except NoDigestError:
        return None
    if not ours(path.parent):
        return None
    if path.is_file() and ours(path):
        with contextlib.suppress(Exception):  # damaged, or of a torch that reads it differently: it is made anew
            variant: Any = _read(path)
            if variant.guard_check(*args, **named):
                torch._dynamo.utils.counters["functional_lm"]["loaded"] += 1
                return variant
    try:
        variant = portable.aot_compile((args, named))  # type: ignore[attr-defined]
        data = type(variant).serialize(variant).serialized_data
    except Exception:  # what cannot be written down is compiled in the ordinary way, which reports what is wrong
        return None
    _write(path, data)
    return variant


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        return torch.compiler.load_compiled_function(file)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; a store that cannot be written is no store."""
    with contextlib.suppress(OSError), files.writing(path, "wb") as file:
        file.write(data)


def folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "functional_lm"


def ours(path: Path) -> bool:
    """Whether nobody else can have put a program there: a folder, or a file, of this user's that he alone writes to.

    A group of the user's own number has nobody else in it.
    """
    if not path.exists() or not hasattr(os, "getuid"):
        return True
    status = path.stat()
    others = stat.S_IWOTH | (stat.S_IWGRP if status.st_gid != status.st_uid else 0)
    return status.st_uid == os.getuid() and not status.st_mode & others


def of_tensors(guards: Any) -> list[bool]:
    """A `guard_filter_fn` for torch.compile that keeps the guards on the arguments' tensors.

    The others cannot all be written down: `structure` looks at the rest of the arguments, and the digest covers
    modules, globals and closures.
    """
    return [guard.guard_type == "TENSOR_MATCH" and not guard.is_global for guard in guards]


# The name -------------------------------------------------------------------------------------------------------


def name(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """A digest of everything that the compiled form depends on. Raises NoDigestError."""
    leaves, structure = pytree.tree_flatten(args)
    return digest((surroundings(), modes(), function, str(structure), [_shape(leaf) for leaf in leaves]))


def _shape(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.device.type != "cpu" or type(leaf) is not torch.Tensor or leaf.is_inference():
        raise NoDigestError(f"a {type(leaf).__name__} on {leaf.device}")
    return (leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.requires_grad)


def digest(value: Any) -> str:
    """sha256 of a value by its contents: of functions, their place in the source and what they close over."""
    hashed = hashlib.sha256()
    for part in _parts(value, {}):
        hashed.update(part.encode() + b"\0")
    return hashed.hexdigest()


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    """Strings that together say what `value` is; `seen` numbers compound values (and keeps them: ids are reused)."""
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if value is None or value is ... or isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, types.ModuleType):
        yield value.__name__
    elif isinstance(value, type | types.BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        yield str(value)
    elif isinstance(value, re.Pattern):
        yield f"{value.pattern} {value.flags}"
    elif id(value) in seen:
        yield f"seen {seen[id(value)][0]}"
    else:
        seen[id(value)] = len(seen), value
        for part in _inside(value):
            yield from _parts(part, seen)


def _inside(value: Any) -> list[Any]:
    """What a compound value is made of, in an order of its own."""
    if isinstance(value, types.FunctionType):
        if not value.__module__.startswith("functional_lm"):
            raise NoDigestError(f"{value.__qualname__} of {value.__module__}, whose source is not known to stay")
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__module__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.CodeType):  # a line of the source may hold several functions
        return [value.co_name, value.co_firstlineno, value.co_code, value.co_names, value.co_consts]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [len(value), *value]
    if isinstance(value, Mapping):
        return [len(value), *value.items()]
    if isinstance(value, Set):
        return sorted(digest(member) for member in value)
    raise NoDigestError(f"a {type(value).__name__}")


@functools.cache
def _fixed() -> str:
    """This package's source, torch and the processor."""
    hashed = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        hashed.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    hashed.update(f"{torch.__version__} {torch.version.git_version} {sys.version} {platform.platform()}".encode())
    hashed.update(processor().encode())
    return hashed.hexdigest()


def surroundings() -> str:
    """What machine code is made for: `_fixed`, the environment's flags, Inductor's settings."""
    from torch._inductor import config

    flags = {key: value for key, value in os.environ.items() if key.startswith(("TORCH", "CXX", "OMP", "KMP"))}
    return f"{_fixed()} {sorted(flags.items())} {hash_of(config.save_config_portable())}"


def hash_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted((key, repr(value)) for key, value in settings.items())).encode()).hexdigest()


def processor() -> str:
    """Inductor compiles for the processor at hand: its model and features."""
    facts = Path("/proc/cpuinfo")
    if not facts.is_file():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in facts.read_text().splitlines() if line.startswith(wanted)}))
