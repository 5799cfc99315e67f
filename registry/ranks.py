"""The processes of one job that torchrun has started: their number, and objects exchanged among them.

torchrun sets `RANK`, `WORLD_SIZE` and `LOCAL_RANK`. Without them a process is a job of one rank, and
nothing here imports torch.distributed. Exchange goes over gloo on the CPU, but what is reduced on GPUs of which
each rank has its own: that goes over NCCL. Counters and the error of a rank that fails go through torchrun's
key-value store.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

from .errors import ConfigError, LostRankError, TaxolensError

logger = logging.getLogger(__name__)

T = TypeVar("T")
GPU_BACKEND = "nccl"
TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer than this for another one fails: longer than any step that one rank does alone."""
POLL_SECONDS = 0.2
MAX_DIFFERING = 8  # differing facts that a message names
FAILED = "failed"  # key of the first error in the store of a connection
_counters: Counter[str] = Counter()  # of a job of one rank
_connections = count()
_connection: Any = (
    None  # the store of this one; a script may go on after an error, with the next connection
)


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

        Raises:
            LostRankError: another rank has failed, while this one waited for it or was stopped for it; the
                message has the rank and its error.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        global _connection
        if dist.is_initialized():
            yield
            return
        # With names of its own in the store: of those of an earlier connection the processes are gone.
        names = _prefixed(f"connection {next(_connections)}", _store())
        dist.init_process_group(
            "gloo", store=names, rank=self.rank, world_size=self.size, timeout=TIMEOUT
        )
        _connection = names
        try:
            yield
            self.wait()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | LostRankError):
                _tell(self.rank, error)
            elif failure := _failure():  # torchrun stops the others with a signal
                raise failure from error
            raise
        finally:
            _connection = None
            _group_of_gpus.cache_clear()
            dist.destroy_process_group()

    def device(self, name: str) -> str:
        """The device of this rank: `name`, and for "cuda" the GPU of its number on this machine.

        Where a machine has fewer GPUs than ranks, ranks share them.
        """
        if name != "cuda" or self.size == 1:
            return name
        import torch

        return f"{name}:{self.local_rank % max(1, torch.cuda.device_count())}"

    def add(self, counter: str, n: int = 1) -> int:
        """Add to a number that all ranks share, which begins at 0, and return the sum. Waits for no rank."""
        if self.size == 1:
            _counters[counter] += n
            return _counters[counter]
        with _lost_ranks_named():
            return _store().add(counter, n)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            import torch.distributed as dist

            with _lost_ranks_named():
                dist.barrier()

    def waiting(self, counter: str) -> Iterator[int]:
        """The values of a counter, several a second, until every rank has come here.

        For work that ends at different times: the time limit begins anew whenever the counter changes.
        A counter can be waited for once.
        """
        arrived = f"{counter} arrived"
        last, since = -1, time.monotonic()
        self.add(arrived)
        while self.add(arrived, 0) < self.size:
            if failure := _failure():
                raise failure
            if (now := self.add(counter, 0)) != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > TIMEOUT.total_seconds():
                problem = f"no other process of the job has got further for {TIMEOUT}"
                raise LostRankError("ranks", problem, allowed="the same command again")
            yield last
            time.sleep(POLL_SECONDS)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank. They are pickled: of this job alone."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _lost_ranks_named():
            dist.all_gather_object(found, value)
        return found

    def meet(self, point: str | None, value: T = None) -> tuple[str, list[T]]:
        """`gather` at a named point of the work: the name, and the values of all ranks.

        Args:
            point: the name; None for a rank that follows the others, to whatever point they come.
            value: of this rank.

        Raises:
            TaxolensError: the ranks have come to different points, whose values do not belong together.
        """
        came = self.gather((point, value))
        points = sorted({name for name, _ in came if name is not None})
        if len(points) != 1:
            problem = "the processes of the job have come to different points of it"
            raise TaxolensError("ranks", problem, given=points, allowed="start the job again")
        return points[0], [each for _, each in came]

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Check that every rank has the same facts; every rank calls this, and where they differ each raises.

        Args:
            facts: name -> value of this rank; of mappings each value counts by itself.

        Raises:
            ConfigError: some differ; the message names them, with the values of two ranks.
        """
        first, *others = (_flat(each) for each in self.gather(dict(facts)))
        for rank, there in enumerate(others, start=1):
            differing = [
                f"{name}: {first.get(name)!r} on rank 0, {there.get(name)!r} on rank {rank}"
                for name in dict.fromkeys([*first, *there])
                if first.get(name) != there.get(name)
            ]
            if differing:
                n_more = len(differing) - MAX_DIFFERING
                raise ConfigError(
                    "ranks",
                    "the processes of the job do not have the same work: "
                    + "; ".join(differing[:MAX_DIFFERING])
                    + (f"; and {n_more} more" if n_more > 0 else ""),
                    allowed="the same model, images and settings on every rank",
                )

    def reduce(self, tensor: Any, how: str) -> Any:
        """The "sum" or "min" of a tensor over all ranks, element by element, on its device; every rank calls this.

        Where ranks share a GPU, or NCCL cannot connect theirs, it goes through the memory of the CPU.
        """
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        op = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[how]
        with _lost_ranks_named():
            group = _group_of_gpus(self, tensor.device) if _lies_on_a_gpu(tensor) else None
            place = "cpu" if group is None else tensor.device
            reduced = tensor.detach().to(place, copy=True)
            dist.all_reduce(reduced, op, group=group)
        return reduced.to(tensor.device)

    def deliver(
        self,
        parts: Mapping[str, Any],
        shapes: Sequence[Mapping[str, Sequence[int]]],
        takers: Mapping[str, Collection[int]],
        dtype: Any,
    ) -> dict[str, list[Any]]:
        """Send each tensor to the ranks that take it; every rank calls this.

        Args:
            parts: name -> tensor of this rank, on the CPU.
            shapes: for each rank, name -> shape of its tensor; a rank may have none of that name.
            takers: name -> the ranks that get the tensors of that name.
            dtype: of all tensors.

        Returns:
            for each name that this rank takes, the tensors of the ranks that have one, by rank.
        """
        import torch
        import torch.distributed as dist

        received: dict[str, list[Any]] = {}
        requests: list[Any] = []
        with _lost_ranks_named():
            for tag, (name, ranks) in enumerate(takers.items()):
                if name in parts:
                    sent = parts[name].contiguous().view(torch.uint8)
                    to = [rank for rank in ranks if rank != self.rank]
                    requests += [dist.isend(sent, rank, tag=tag) for rank in to]
                if self.rank not in ranks:
                    continue
                received[name] = []
                for rank, shape in enumerate(shapes):
                    if name in shape and rank == self.rank:
                        received[name].append(parts[name])
                    elif name in shape:
                        tensor = torch.empty(tuple(shape[name]), dtype=dtype)
                        received[name].append(tensor)
                        requests.append(dist.irecv(tensor.view(torch.uint8), rank, tag=tag))
            for request in requests:
                request.wait()
        return received

    def from_first(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held: list[Any] = [value]
        with _lost_ranks_named():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def deal(self, costs: Mapping[str, float]) -> list[list[str]]:
        """Names by rank, so that the largest sum of costs is small: the dearest first, each to the rank with least.

        The same on every rank. Within a rank names keep the order of `costs`.
        """
        loads = [0.0] * self.size
        owner: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):  # equal ones in their order
            owner[name] = rank = loads.index(min(loads))
            loads[rank] += costs[name]
        return [[name for name in costs if owner[name] == rank] for rank in range(self.size)]


ALONE = Ranks()
"""A job of one process."""


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose names are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        nested = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _lies_on_a_gpu(tensor: Any) -> bool:
    return tensor.is_cuda


def _gpu_of(device: Any) -> str:
    """What names the GPU on all machines."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


@cache
def _group_of_gpus(ranks: Ranks, device: Any) -> Any:
    """The ranks connected over NCCL, each by its GPU `device`; None where they cannot be. Every rank calls this.

    NCCL takes one rank a GPU. Whether it works is tried with a sum, so that all ranks choose the same.
    """
    import torch
    import torch.distributed as dist

    able = GPU_BACKEND != "nccl" or dist.is_nccl_available()
    gpus = ranks.gather(_gpu_of(device) if able else None)
    if None in gpus or len(set(gpus)) < ranks.size:
        return None
    problem = group = None
    try:
        group = dist.new_group(backend=GPU_BACKEND, timeout=TIMEOUT)
        total = torch.ones(1, device=device)
        dist.all_reduce(total, group=group)
        if total.item() != ranks.size:
            problem = f"a sum over {ranks.size} ranks is {total.item()}"
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    problems = [found for found in ranks.gather(problem) if found]
    if not problems:
        return group
    if ranks.is_first:
        logger.warning(
            "NCCL does not connect the GPUs of the ranks, which is slow: %s", problems[0]
        )
    return None


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    """Raise gloo's errors, which know of a closed connection only, as what they mean."""
    try:
        yield
    except RuntimeError as error:
        if failure := _failure():
            raise failure from error
        problem = f"another process of the job has ended, or has not answered: {error}"
        allowed = "see its own error; then the same command again"
        raise LostRankError("ranks", problem, allowed=allowed) from error


def _tell(rank: int, error: BaseException) -> None:
    """Record the error of this rank, unless another one has failed before."""
    text = f"{rank} {str(error) or type(error).__name__}"
    with suppress(
        RuntimeError, ValueError
    ):  # without the store the others learn of a lost connection
        _connection.compare_set(FAILED, "", text)


def _failure() -> LostRankError | None:
    """The error of the rank that was the first to fail in this connection; None where none has."""
    with suppress(RuntimeError, ValueError):
        if _connection is not None and _connection.check([FAILED]):
            rank, _, text = _connection.get(FAILED).decode().partition(" ")
            return LostRankError(f"rank {rank}", f"failed: {text}")
    return None


@cache
def _store() -> Any:
    """The key-value store that the ranks share; under torchrun it outlives each of them."""
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun starts failed jobs again
    return _prefixed(f"taxolens {attempt}", store)


def _prefixed(prefix: str, store: Any) -> Any:
    """A store whose keys begin with `prefix` in another store."""
    import torch.distributed as dist

    return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]  # public


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise ConfigError(name, "not a number", given=text, allowed="what torchrun sets")
    return int(text)
