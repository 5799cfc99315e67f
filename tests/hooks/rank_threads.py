"""The ranks of a job as threads of one process, for tests that need no torchrun."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from taxolens.registry.errors import LostRankError
from taxolens.registry.ranks import Ranks

T = TypeVar("T")


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size
        self.counters: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.errors: dict[int, BaseException] = {}


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    shared: Any = field(default=None, compare=False)

    @contextmanager
    def joined(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.shared.errors.setdefault(self.rank, error)
            self.shared.barrier.abort()
            raise

    def wait(self) -> None:
        try:
            self.shared.barrier.wait(timeout=300)
        except threading.BrokenBarrierError:
            raise self._failure() from None

    def gather(self, value: T) -> list[T]:
        self.shared.values[self.rank] = value
        self.wait()
        found = list(self.shared.values)
        self.wait()
        return found

    def from_first(self, value: T) -> T:
        return self.gather(value)[0]

    def add(self, counter: str, n: int = 1) -> int:
        with self.shared.lock:
            self.shared.counters[counter] += n
            return self.shared.counters[counter]

    def waiting(self, counter: str) -> Iterator[int]:
        yield self.add(counter, 0)
        self.wait()

    def _failure(self) -> LostRankError:
        for rank, error in self.shared.errors.items():
            if not isinstance(error, LostRankError):
                return LostRankError(f"rank {rank}", f"failed: {error}")
        return LostRankError("ranks", "one did not come in time")


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T | BaseException]:
    """What `work` returns or raises on each rank."""
    shared = _Shared(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadRanks(rank, size, rank, shared))
        except BaseException as error:
            found[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
