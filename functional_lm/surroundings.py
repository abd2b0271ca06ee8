"""What runs of `evolve` and `improve` depend on beside flags, model and text: functions of others, the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from functional_lm import evolve_flags
from functional_lm.evolve_flags import EvolveFlags


def digests(names: Iterable[str]) -> dict[str, str]:
    """The sha256 of the file of each function among these names: the name does not say what it computes.

    What that file imports is not looked at. Raises UsageError for one that cannot be imported.
    """
    from functional_lm import seal
    from functional_lm.evolution import answers

    found: dict[str, str] = {}
    for name in filter(lambda name: ":" in name, names):
        answers.named(name)
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        found[name] = seal.sha256(Path(file)) if file else ""
    return found


def functions(options: EvolveFlags) -> dict[str, str]:
    """Those that the figures of an evolution name."""
    return digests(evolve_flags.figures(options))


def changed_functions(now: Mapping[str, str], record: Mapping[str, Any]) -> list[str]:
    """Those that were others when the run with this record began."""
    before = record.get("functions", {})
    return [f"{name} has changed" for name, digest in now.items() if before.get(name, digest) != digest]


def processor(options: EvolveFlags) -> str:
    """What rounds in its own way: the kind of device, and of the CPU the widest of its vectors that torch uses."""
    import torch

    device = torch.device(options.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def machine(options: EvolveFlags) -> dict[str, Any]:
    """What the last bits of floats depend on."""
    import torch

    return {
        "processor": processor(options),
        "threads": torch.get_num_threads(),
        "kernels": kernels_of(options),
        "torch": torch.__version__,
    }


def asks_for_kernels(options: EvolveFlags) -> bool:
    """Whether members have adapters or low-rank noise of their own, of a rank and where there is a kernel for them."""
    several = options.rank > 1 or options.adapter is not None
    low_rank = several and (options.space == "lora" or options.strategy == "eggroll")
    return low_rank and options.compile and options.device == "cpu" and options.dtype in ("float32", "bfloat16")


def kernels_of(options: EvolveFlags) -> str:
    return "own" if with_kernels(options) else "torch's"


def with_kernels(options: EvolveFlags) -> bool:
    from functional_lm import kernels

    return asks_for_kernels(options) and kernels.obstacle() is None


def differences(now: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """Of these facts and those in a journal's header: `threads 2, now 1`."""
    before = {**header, "torch": header["versions"]["torch"]}
    return [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
