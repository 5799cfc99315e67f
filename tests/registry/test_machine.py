"""Cores by affinity, by the quotas of both versions of cgroups, and shared by the ranks of a machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from taxolens.registry import machine
from taxolens.registry.machine import quotas, share_cores, usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_quotas_of_version_2(tmp_path: Path) -> None:
    write(tmp_path / "proc", "0::/job/step")
    write(tmp_path / "fs" / "job" / "cpu.max", "250000 100000")
    write(tmp_path / "fs" / "job" / "step" / "cpu.max", "max 100000")
    assert list(quotas(tmp_path / "fs", tmp_path / "proc")) == [2.5]


def test_quotas_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc", "4:memory:/job\n3:cpu,cpuacct:/job")
    write(tmp_path / "fs" / "cpu" / "cpu.cfs_quota_us", "-1")
    write(tmp_path / "fs" / "cpu" / "cpu.cfs_period_us", "100000")
    write(tmp_path / "fs" / "cpu" / "job" / "cpu.cfs_quota_us", "150000")
    write(tmp_path / "fs" / "cpu" / "job" / "cpu.cfs_period_us", "50000")
    assert list(quotas(tmp_path / "fs", tmp_path / "proc")) == [3.0]


def test_a_container_has_its_quota_at_the_top(tmp_path: Path) -> None:
    write(tmp_path / "proc", "0::/not/mounted/here")
    write(tmp_path / "fs" / "cpu.max", "50000 100000")
    assert list(quotas(tmp_path / "fs", tmp_path / "proc")) == [0.5]


def test_no_cgroups_no_quota(tmp_path: Path) -> None:
    assert list(quotas(tmp_path, tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("bound", "quota", "ranks", "cores"),
    [
        (8, [], "1", 8),
        (8, [2.9], "1", 2),
        (8, [0.4], "1", 1),
        (2, [6.0], "1", 2),
        (8, [], "4", 2),  # the ranks share the machine
        (8, [], "16", 1),
        (2, [], "4", 2),  # each rank is bound to its own
        (8, [], "", 8),
    ],
)
def test_usable_cores(monkeypatch, bound, quota, ranks, cores) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    monkeypatch.setattr(machine, "quotas", lambda: iter(quota))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert usable_cores() == cores


OF_OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """The environment without the variables of OpenMP, of a program that has not imported torch."""
    found = {name: value for name, value in os.environ.items() if name not in OF_OPENMP}
    monkeypatch.setattr(os, "environ", found)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(machine, "quotas", lambda: iter(()))
    return found


def set_in(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name in OF_OPENMP}


def test_threads_that_wait_give_up_their_core(environment) -> None:
    share_cores()
    assert set_in(environment) == {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


def test_what_the_user_has_set_stays(environment) -> None:
    environment |= {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3"}
    share_cores()
    kept = {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3"}
    assert set_in(environment) == {**kept, "KMP_BLOCKTIME": "1"}
    environment["OMP_WAIT_POLICY"] = "active"
    del environment["KMP_BLOCKTIME"]
    share_cores()
    assert "KMP_BLOCKTIME" not in environment


def test_threads_follow_a_quota(environment, monkeypatch) -> None:
    monkeypatch.setattr(machine, "quotas", lambda: iter([1.5]))
    share_cores()
    assert environment["OMP_NUM_THREADS"] == "1"


def test_nothing_is_set_once_torch_is_there(environment, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    share_cores()
    assert set_in(environment) == {}


def test_the_command_line_sets_it_before_torch() -> None:
    program = (
        "import os, sys; from taxolens.plugin.cli import main; main(['--help']); "
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OF_OPENMP}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "10000 False"


FAULTS = """
import os, resource, sys
from taxolens.plugin.cli import main
main(["--version"])
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(os.urandom(1)) * (64 << 20)
    del block
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(counts[2:]) * resource.getpagesize() / (64 << 20))
"""


def share_of_pages_cleared_again(**variables: str) -> float:
    """Of a block of 64 MiB that is made and freed over and over, once the command line has begun."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_the_command_line_keeps_freed_memory() -> None:
    assert share_of_pages_cleared_again() < 0.01


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_how_the_user_lets_memory_be_allocated_stays(variables: dict[str, str]) -> None:
    assert share_of_pages_cleared_again(**variables) > 0.001  # by pages of 4 KiB, or of 2 MiB


def test_another_c_library_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: object())
    machine.keep_freed_memory()
