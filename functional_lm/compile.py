"""The one place that calls torch.compile and touches torch's global settings.

A pure function stays the reference; `compiled` gives its fast form. Donation (the new values are written into the
buffers that held the old ones) happens here and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from functional_lm import compile_store, tree
from functional_lm.errors import UsageError

# torch counts compiled variants per code object (default 8, the ninth raises under fullgraph): closures made by one
# factory share the count, so that a process that trains several configurations needs room.
VARIANTS = 256

# Checks of strides in front of every kernel, from Python: the shapes are static, and the kernels check theirs.
INDUCTOR: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}

# Inductor adds up an embedding's gradient with atomic additions, whose order, and so whose last bits, are another at
# every call on two threads. torch's own kernel gives each thread rows of its own. The tag keeps apart what was cached.
ATOMIC = (torch.ops.aten.embedding_dense_backward.default,)
TAG = "functional_lm: no atomic additions at all"


def compiled(
    function: Callable[..., Any], donate: bool = False, enabled: bool = True, backend: str = "inductor"
) -> Callable[..., Any]:
    """`function` as one compiled graph per set of shapes; not `enabled`: the function itself.

    With `donate`, `function(state, ...) -> (new_state, report)` becomes a function that writes the new state into the
    tensors of the old one and returns them: the caller's `state` is used up. A new leaf is a new value, or the old
    leaf in its own place; leaves that change places would be overwritten before they are read. Shapes are static;
    nothing is ever split into several graphs (an error is raised instead).
    """
    if not enabled:
        return function
    torch._dynamo.config.trace_autograd_ops = True  # activation checkpointing asks for it
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * VARIANTS
    if not donate:
        return _compile(function, backend)

    def into_place(state: Any, *rest: Any) -> Any:
        new, report = function(state, *rest)
        tree.map(lambda old, value: old if old is value else old.copy_(value), state, new)
        return report

    inner = _compile(into_place, backend)

    @functools.wraps(function)
    def donated(state: Any, *rest: Any) -> tuple[Any, Any]:
        return state, inner(state, *rest)

    return donated


def _compile(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    if backend != "inductor":
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    _add_up_in_order()
    options = {**INDUCTOR, "guard_filter_fn": compile_store.of_tensors}
    again = torch.compile(function, fullgraph=True, dynamic=False, options=INDUCTOR)
    first = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compile_store.stored(first, again, function)


def _add_up_in_order() -> None:
    """Take what adds atomically out of the rules by which Inductor rewrites operations, for this process.

    Inductor reads its rules once: what was compiled here before, by anybody, has left a copy that still holds them.
    """
    from torch._inductor import decomposition, lowering

    for operation in ATOMIC:
        decomposition.decompositions.pop(operation, None)
    if not decomposition.select_decomp_table().keys().isdisjoint(ATOMIC):
        decomposition.fast_random_decomps.cache_clear()
    for operation in ATOMIC:
        if operation not in lowering.lowerings:  # left to itself Inductor refuses where the environment says CI
            lowering.make_fallback(operation, warn=False)
    torch.compiler.config.cache_key_tag = TAG


def graphs() -> int:
    """How many graphs this process has compiled or read from the store: constant in steady state."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) + compile_store.loaded()


def forget() -> None:
    """Let go of all that was compiled in this process; what is called again is compiled, or read from the store."""
    torch._dynamo.reset()


def obstacle(device: torch.device | str) -> str | None:
    """Why code for `device` cannot be compiled here, and the remedy; None if it can.

    Inductor writes C++ for the CPU and needs a compiler and Python's headers.
    """
    kind = torch.device(device).type
    if kind == "mps":
        return "on Apple's GPU the step runs eagerly; --device cpu compiles"
    if kind != "cpu":
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found; install one (Debian: apt-get install g++) or set CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python's headers were not found; install them (Debian: apt-get install python{version}-dev)"
    return None


def resolve_device(name: str) -> torch.device:
    """`auto`: the accelerator that there is, else the CPU."""
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available()))
    if not there.get(name.partition(":")[0], lambda: True)():
        raise UsageError(f"torch sees no {name} device here; --device auto takes what there is")
    return torch.device(name)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device multiplies in it, float16 on a CUDA device that does not, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def use_threads(count: int | None) -> int:
    """How many threads products on the CPU are shared out to, from now on; None leaves torch's choice. Sums in another
    number of parts differ in their last bits."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def release_threads() -> None:
    """End the idle threads with which the calling thread shares its products; its next product makes new ones.

    For a thread that hands its work to another. OpenMP's idle threads spin for a moment, so that the next product finds
    them awake, but sleep at once where there are more of them than processors (libgomp's throttled spin count): beside
    a second team a decoding step of hundreds of short products takes nearly twice as long.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        pause = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if pause is not None:
            pause(1)  # omp_pause_soft: what has been set stays


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to; for timing only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
