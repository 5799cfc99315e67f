"""The CPU cores that the process may use: by affinity, by cgroup quota, and shared by the ranks of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores of the process's affinity, at most its cgroup's quota, rounded down, at least 1.

    The processes that torchrun has started on one machine (`LOCAL_WORLD_SIZE`) share its cores evenly,
    unless they are bound to some of them.
    """
    present = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    cores = min([float(bound), *quotas()])
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if sharing.isdecimal() and int(sharing) > 1 and bound == present:
        cores /= int(sharing)
    return max(1, int(cores))


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
