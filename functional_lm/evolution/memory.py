"""How many members are computed at once: what one takes, and what there is.

Axes: P members.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from functional_lm.model import account
from functional_lm.model.config import ModelConfig

# Tokens of a chunk: more is slower on a CPU, whose cache holds less of them, and takes memory. Of members that answer
# only the prompts are read in one pass, and each token of an answer wants many rows.
TOKENS_AT_ONCE = {"read": 4096, "written": 16384}
SHARE = 0.5  # of the free memory that a chunk may take
UNKNOWN = 2 << 30  # bytes, where the system does not tell
# Limit, use, and in `memory.stat` the part of the use that is given back when somebody needs it.
CGROUPS = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


# How often a strategy holds the numbers of all members at once, at least: in its state, as it asks and as it tells.
# In float32; two strategies compute in float64.
COPIES = {
    "eggroll": 1, "openai-es": 1, "mezo": 0, "snes": 2, "sep-cma-es": 2, "xnes": 4, "cma-es": 4, "genetic": 2,
    "differential-evolution": 3, "pso": 6, "nsga2": 5, "map-elites": 1,
}  # fmt: skip


def held(strategy: str, population: int, numbers: int, regenerated: bool = False, cells: int = 0) -> int:
    """Bytes of the members of a population that have so many numbers each, and of what a strategy keeps in cells."""
    copies = 0 if regenerated else COPIES[strategy]
    return 4 * numbers * (copies * population + 3 * cells)


def member_bytes(config: ModelConfig, tokens: int, own: int, dtype: torch.dtype, writes: bool = False) -> int:
    """Bytes that one more member takes while it is computed: its own leaves, widest activations, logits.

    One that `writes` answers has a cache of the keys and values of its tokens besides.
    """
    width = dtype.itemsize
    activations = tokens * (8 * config.d_model + 3 * config.d_ff) * width
    scores = 2 * tokens * config.n_heads * min(tokens, config.max_len) * 4
    logits = tokens * config.vocab_size * (width + 4)
    cache = account.decoding_memory(config, 1, tokens, width).cache if writes else 0
    return own + cache + max(activations + scores, activations // 2 + logits)


def automatic_chunk(
    population: int, each: int, tokens: int, free: int, device: str = "cpu", writes: bool = False
) -> int:
    """Members of a chunk: what memory holds, on a CPU no more tokens than pay, and chunks as equal as they can be.

    `each` are the bytes of a member, `tokens` those that it reads or `writes`, `free` the bytes there are.
    """
    room = int(SHARE * free) // max(1, each)
    if device == "cpu":
        room = min(room, TOKENS_AT_ONCE["written" if writes else "read"] // max(1, tokens))
    count = -(-population // min(max(1, room), population))
    return -(-population // count)


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that are free on the device; of the CPU what the machine has, and what the process's cgroups leave it.

    In a container with a limit that is less than the machine's. 2 GiB where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        free = UNKNOWN
    return max(0, min([free, *_left(root)]))


def _left(root: Path) -> Iterator[int]:
    """Bytes under the limit of each cgroup that the process is in, where there is one.

    A container sees its own as the topmost one, whatever /proc/self/cgroup calls it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, kinds, path = (*line.split(":", 2), "", "")[:3]
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        own = Path(path.lstrip("/"))
        for folder in (top / own, *(top / above for above in own.parents)):
            yield from _left_in(folder, *CGROUPS[1 if kinds else 2])


def _left_in(folder: Path, limit: str, use: str, given_back: str) -> Iterator[int]:
    try:
        most, used = int((folder / limit).read_text()), int((folder / use).read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(stat.get(given_back, 0))
    yield most - max(0, used)
