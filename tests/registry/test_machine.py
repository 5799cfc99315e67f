"""Cores by affinity, by the quotas of both versions of cgroups, and shared by the ranks of a machine."""

import os
from pathlib import Path

import pytest
from taxolens.registry import machine
from taxolens.registry.machine import quotas, usable_cores


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
