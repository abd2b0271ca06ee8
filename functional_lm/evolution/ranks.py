"""Processes that measure one population together: the one place that talks to torch.distributed.

    with joined(device, seconds) as group:        alone, unless torchrun started this process
        values = group.together(measured)         what each rank measured [p], end to end [P], equal everywhere

`torchrun --nproc_per_node N -m functional_lm.evolve ...` starts N ranks. Each draws the same candidates from the same
keys, measures its part of them and tells all of the fitness, so that every rank has the same state; numbers are all
that they exchange. Rank 0 alone writes and speaks. A lost rank is noticed by gloo, through which the ranks agree on
what comes next; on GPUs the fitness itself goes through NCCL.

Axes: P members, p members of one rank.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from functional_lm.errors import DataError, FunctionalLMError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
WEEK = timedelta(days=7)  # for what takes as long as it takes: torchrun ends who waits for a rank that is lost
PATIENCE = 20.0  # seconds that a generation may take once a signal has come; torchrun kills what is left after 30
GOES_ON = (
    "the journal has all generations before, from which the same command goes on, with any number of ranks up to that "
    "of the chunks"
)
STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says to its processes


class Lost(FunctionalLMError):
    """Another rank has ended or does not answer."""


@dataclass(frozen=True)
class Group:
    """The ranks of a run, seen from one of them. Alone it is rank 0 of 1, and nothing is exchanged."""

    rank: int = 0
    count: int = 1
    seconds: float = 0.0  # that a rank may be waited for
    store: Any = None
    ending: threading.Event = field(default_factory=threading.Event)  # set when the end of the run is on its way

    @property
    def first(self) -> bool:
        return self.rank == 0

    def together(self, values: Tensor) -> Tensor:
        """The values [p, ...] of all ranks end to end [P, ...], in the order of ranks. Raises Lost."""
        if self.store is None:
            return values
        import torch
        from torch import distributed

        sizes = [size for (size,) in self.exchanged([len(values)])]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in sizes]
        with self._listening():
            distributed.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes)])

    def exchanged(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers (equally many, 64 bits) of each rank. Raises Lost."""
        if self.store is None:
            return [list(numbers)]
        import torch
        from torch import distributed

        own = torch.tensor(list(numbers), dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with self._listening():
            distributed.all_gather(found, own)
        return [part.tolist() for part in found]

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """`work()` by rank 0, then by the others, who find what it wrote. Raises Lost."""
        if self.store is None:
            return work()
        if not self.first:
            with self._listening():
                self.store.wait([f"done: {name}"], WEEK)
        made = work()
        if self.first:
            self.store.set(f"done: {name}", "1")
        return made

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raise DataError where a rank has another fact than rank 0."""
        digests = [hashlib.sha256(fact.encode()).digest()[:8] for fact in facts.values()]
        found = self.exchanged([int.from_bytes(digest, "big", signed=True) for digest in digests])
        for rank, numbers in enumerate(found):
            for name, first, other in zip(facts, found[0], numbers):
                if first != other:
                    raise DataError(f"rank {rank} has another {name} than rank 0; all of them need the same")

    def speaks(self) -> bool:
        """Whether this rank is the first to have something to say about how the run ends."""
        with suppress(RuntimeError):
            return self.store is None or self.store.add("spoken", 1) == 1
        return True

    def hurry(self) -> None:
        """Once a signal has come: end this process where the generation takes longer than torchrun waits for it.

        Without unwinding, which waits for what is being computed: the journal is whole at every instant.
        """
        if self.store is None:
            return

        def wait() -> None:
            if self.ending.wait(PATIENCE):
                return
            if self.speaks():
                line = f"error: told to stop, and the generation took more than {PATIENCE:g} s longer; {GOES_ON}"
                print(line, file=sys.__stderr__, flush=True)
            os._exit(130)

        threading.Thread(target=wait, daemon=True).start()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of every kind of connection
            self.ending.set()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to those that are left: they are about to end
            raise Lost(
                f"a rank was lost: its process ended, or did not answer for {self.seconds:g} s; {GOES_ON}"
            ) from error


@contextmanager
def joined(device: str, seconds: float) -> Iterator[Group]:
    """The group of ranks that torchrun started this process in. Raises UsageError where a rank has no GPU of its own.

    Ranks but the first are quiet. Of an error that ends the run, the rank that met it first speaks; the others leave
    with the same exit code.
    """
    if any(name not in os.environ for name in STARTED):
        yield Group()
        return
    from torch import distributed

    rank, count = _place()
    try:
        store = next(distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
    except (RuntimeError, ValueError) as error:  # of every kind of connection
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Lost(
            f"rank {rank} of {count} found no other at {where} (MASTER_ADDR:MASTER_PORT) within {seconds:g} s; start "
            f"all of them with torchrun, or take {', '.join(STARTED)} out of the environment to be alone"
        ) from error
    group = Group(rank, count, seconds, distributed.PrefixStore("functional_lm", store))
    try:
        backend = "cpu:gloo,cuda:nccl" if _on_gpus(device) else "gloo"
        distributed.init_process_group(
            backend, store=group.store, rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
        )
        with _quiet(not group.first):
            yield group
    except (FunctionalLMError, OSError, KeyboardInterrupt) as error:
        group.ending.set()
        if group.speaks():
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        raise SystemExit(code) from error
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _place() -> tuple[int, int]:
    """The number of this rank and how many there are, as the environment has them. Raises UsageError."""
    for name, limit in (("RANK", 2**31), ("WORLD_SIZE", 2**31), ("MASTER_PORT", 2**16)):
        value = os.environ[name]
        if not (value.isdecimal() and int(value) < limit):
            raise UsageError(
                f"the environment has {name}={value}, which is no whole number below {limit}; start ranks with "
                f"torchrun, or take {', '.join(STARTED)} out of it to be alone"
            )
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= count:
        raise UsageError(f"the environment has RANK={rank} of WORLD_SIZE={count}; ranks are numbered from 0")
    return rank, count


def _on_gpus(device: str) -> bool:
    """Whether the ranks compute on GPUs; this one takes that of its number on this machine."""
    import torch

    from functional_lm import compile as compiling

    chosen = compiling.resolve_device(device)
    if chosen.type != "cuda":
        return False
    if chosen.index is not None:
        raise UsageError(f"--device {device} names one GPU; --device cuda gives each rank its own")
    place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= there:
        raise UsageError(f"this machine has {there} GPUs and more ranks; start as many as there are, or --device cpu")
    torch.cuda.set_device(place)
    return True


@contextmanager
def _quiet(whether: bool) -> Iterator[None]:
    if not whether:
        yield
        return
    with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
        yield


class _Nowhere(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)
