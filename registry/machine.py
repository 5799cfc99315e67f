"""What the process takes of the machine: its CPU cores, shared with other programs, and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")
# How long a thread of OpenMP that waits for others keeps its core busy: turns of libgomp (torch's own on
# Linux; 300,000 by default), milliseconds of LLVM's and Intel's (200 by default). A short wait between two
# operations is within it; a thread that waits for one whose core another program has gives up its own.
WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}

# Parameters of mallopt (https://man7.org/linux/man-pages/man3/mallopt.3.html) and bytes: blocks up to this
# size are kept when they are freed, and as much at the end of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_WHEN_FREED = 2**30


def processes_here() -> int:
    """How many processes torchrun has started on this machine (`LOCAL_WORLD_SIZE`); 1 without it."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def usable_cores() -> int:
    """The cores of the process's affinity, at most its cgroup's quota, rounded down, at least 1.

    The processes that torchrun has started on one machine share its cores evenly, unless they are bound to
    some of them.
    """
    present = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    cores = min([float(bound), *quotas()])
    if bound == present:
        cores /= processes_here()
    return max(1, int(cores))


def share_cores() -> None:
    """Set, where the user has not, the variables by which OpenMP shares cores with other programs.

    They are read when torch is imported: afterwards this does nothing. The number of threads is set only
    where a quota leaves fewer cores than the affinity, which OpenMP follows by itself.
    """
    if "torch" in sys.modules:
        return
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    if any(quotas()):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, unless the user has set how it allocates.

    By default it gives blocks of more than 32 MiB back to the kernel, which clears each page of the next
    block anew. Elsewhere than on glibc this does nothing.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, KEPT_WHEN_FREED)


@contextmanager
def without_collection() -> Iterator[None]:
    """Meanwhile no garbage is collected, for imports: what they make stays, and is searched again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quotas(root: Path = CGROUPS, of_process: Path = OF_THIS_PROCESS) -> Iterator[float]:
    """The quotas, in cores, of the process's cgroup and of those above it; none outside Linux.

    `cpu.max` (version 2): https://docs.kernel.org/admin-guide/cgroup-v2.html; `cpu.cfs_quota_us`
    (version 1): https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    with suppress(OSError):
        for line in of_process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "cpu" if controllers else root
            folder = top / path.lstrip("/")
            for place in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    yield _quota(place)
                if place == top:
                    break


def _quota(folder: Path) -> float:
    """The quota of one cgroup in cores.

    Raises:
        OSError: it has none.
        ValueError: it is not limited.
    """
    if (folder / "cpu.max").exists():
        allowed, period = (folder / "cpu.max").read_text().split()  # "max 100000": not limited
    else:
        allowed = (folder / "cpu.cfs_quota_us").read_text()  # -1: not limited
        period = (folder / "cpu.cfs_period_us").read_text()
    cores = float(allowed) / float(period)
    if cores <= 0:
        raise ValueError(f"not limited: {allowed}")
    return cores
