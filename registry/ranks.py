"""The processes of one job that torchrun has started: their number, and objects exchanged among them.

torchrun sets `RANK`, `WORLD_SIZE` and `LOCAL_RANK`. Without them a process is a job of one rank, and
nothing here imports torch.distributed. Exchange goes over gloo on the CPU, whatever the device of the
tensors that are computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer than this for another one fails: longer than any step that one rank does alone."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the processes of its job.

    Args:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine, which chooses the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """Those that torchrun has set for this process.

        Raises:
            ConfigError: the variables of the environment contradict each other.
        """
        size = _variable("WORLD_SIZE", 1)
        rank = _variable("RANK", 0)
        if not 0 <= rank < size:
            raise ConfigError("RANK", "no rank of this job", given=rank, allowed=f"0 to {size - 1}")
        return cls(rank, size, _variable("LOCAL_RANK", 0))

    @property
    def is_first(self) -> bool:
        """Whether this process logs, and writes what the job writes once."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connect the processes meanwhile; nothing where there is one, or where they are connected.

        On an error the connection is given up at once, so that the others, which wait for this
        process, fail too.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        if dist.is_initialized():
            yield
            return
        dist.init_process_group("gloo", timeout=TIMEOUT)
        try:
            yield
            dist.barrier()
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank. They are pickled: of this job alone."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def deal(self, costs: Mapping[str, float]) -> list[list[str]]:
        """Names by rank, so that the largest sum of costs is small: the dearest first, each to the rank with least.

        The same on every rank. Within a rank names keep the order of `costs`.
        """
        order = list(costs)
        loads = [0.0] * self.size
        dealt: list[list[str]] = [[] for _ in loads]
        for name in sorted(order, key=lambda name: (-costs[name], order.index(name))):
            rank = min(range(self.size), key=lambda r: (loads[r], r))
            loads[rank] += costs[name]
            dealt[rank].append(name)
        return [sorted(names, key=order.index) for names in dealt]


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise ConfigError(name, "not a number", given=text, allowed="what torchrun sets")
    return int(text)
