"""The processes of a job as threads of one: what `Ranks` does over gloo, over a list in memory."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from taxolens.registry.errors import LostRankError
from taxolens.registry.ranks import Ranks

PATIENCE = 60


class Table:
    """Where the ranks of one job lay what they exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.values: list[Any] = [None] * size

    def exchanged(self, rank: int, value: Any) -> list[Any]:
        try:
            self.values[rank] = value
            self.barrier.wait(PATIENCE)
            found = list(self.values)
            self.barrier.wait(PATIENCE)
        except threading.BrokenBarrierError:
            raise LostRankError("ranks", "another process of the job has ended") from None
        return found


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    table: Any = field(default=None, compare=False)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        yield
        self.wait()

    def wait(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        return self.table.exchanged(self.rank, copy.deepcopy(value))  # as it is now

    def add(self, counter: str, n: int = 1) -> int:
        with self.table.lock:
            self.table.counters[counter] += n
            return self.table.counters[counter]

    def waiting(self, counter: str) -> Iterator[int]:
        self.wait()
        yield from ()

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def reduce(self, tensor: Any, how: str) -> Any:
        every = torch.stack(self.gather(tensor.detach()))
        return every.sum(0) if how == "sum" else every.amin(0)

    def deliver(self, parts: Any, shapes: Any, takers: Any, dtype: Any) -> Any:
        every = self.table.exchanged(self.rank, parts)
        assert [{name: (*p.shape,) for name, p in part.items()} for part in every] == shapes
        return {
            name: [part[name].clone() for part in every if name in part]
            for name, ranks in takers.items()
            if self.rank in ranks
        }


def run_job(size: int, make_runner: Callable[[], Any]) -> list[Any]:
    """Make a runner for each rank, then run all at once.

    Returns:
        for each rank what `run` has returned, or the error that it has raised.
    """
    table = Table(size)
    runners = []
    for rank in range(size):
        ranks = ThreadRanks(rank, size, rank, table)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ranks, "here", classmethod(lambda cls, ranks=ranks: ranks))
            runners.append(make_runner())
    ended: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            ended[rank] = runners[rank].run()
        except BaseException as error:
            ended[rank] = error
            time.sleep(0.3)  # what was sent before comes to the others
            table.barrier.abort()  # as a lost connection does

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended
