"""The ranks of a job: from the environment, dealing, and exchange among real processes."""

import itertools
import subprocess
import sys

import pytest
import torch
from taxolens.registry.errors import ConfigError
from taxolens.registry.ranks import Ranks


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.here()
    assert ranks == Ranks(0, 1, 0)
    with ranks.joined():
        ranks.wait()
        assert ranks.gather("a") == ["a"]
        assert ranks.from_first("a") == "a"
        assert [ranks.add("a"), ranks.add("a", 3), ranks.add("b")] == [1, 4, 1]
        assert list(ranks.waiting("a")) == []
    assert ranks.device("cuda") == "cuda"


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = Ranks(5, 8, 1)
    assert [ranks.device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


@pytest.mark.parametrize(
    ("n_gpus", "found"), [(1, "00000"), (2, "01010"), (5, "01234"), (0, "00000")]
)
def test_more_ranks_than_gpus_share_them(monkeypatch, n_gpus, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert [Ranks(i, 5, i).device("cuda") for i in range(5)] == [f"cuda:{i}" for i in found]


def test_ranks_come_from_the_environment(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.here() == Ranks(3, 4, 1)
    assert not Ranks.here().is_first


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("4", "4", "RANK: no rank of this job; given 4; allowed: 0 to 3"),
        ("x", "4", "RANK: not a number; given 'x'; allowed: what torchrun sets"),
    ],
)
def test_contradicting_variables_are_refused(monkeypatch, rank, size, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError) as error:
        Ranks.here()
    assert message in str(error.value)


def test_dealing_is_near_the_best_of_all_ways():
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0, "f": 1.0}
    dealt = Ranks(0, 2).deal(costs)
    assert sorted(itertools.chain(*dealt)) == sorted(costs)
    loads = [sum(costs[name] for name in names) for names in dealt]
    best = min(
        max(
            sum(cost for cost, r in zip(costs.values(), way, strict=True) if r == rank)
            for rank in (0, 1)
        )
        for way in itertools.product((0, 1), repeat=len(costs))
    )
    assert max(loads) <= 4 / 3 * best
    assert Ranks(1, 2).deal(costs) == dealt


def test_dealing_leaves_ranks_without_work():
    assert Ranks(0, 3).deal({"a": 1.0, "b": 1.0}) == [["a"], ["b"], []]


SCRIPT = """
import sys
import time
from taxolens.registry.ranks import Ranks
ranks = Ranks.here()
with ranks.joined():
    ranks.wait()
with ranks.joined():
    sys.stdout.write(f"{ranks.gather(ranks.rank * 10)} {ranks.from_first(f'of {ranks.rank}')}\\n")
    for _ in range(3 * ranks.rank):
        ranks.add("done")
        time.sleep(0.5)
    seen = list(ranks.waiting("done"))
    assert ranks.rank or (seen == sorted(seen) and len(set(seen)) > 1), seen
    if ranks.rank:
        raise ValueError("no such image")
    ranks.wait()
"""


def test_processes_exchange_what_they_have_and_the_error_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == ["[0, 10] of 0"] * 2
    assert done.returncode == 1
    assert "ValueError: no such image" in done.stderr
    assert "LostRankError: rank 1: failed: no such image" in done.stderr
