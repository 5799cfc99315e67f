"""The ranks of a job: from the environment, dealing, and exchange among real processes."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from taxolens.registry import ranks as module
from taxolens.registry.errors import ConfigError, TaxolensError
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


def test_a_script_that_goes_on_after_an_error_meets_it_no_more(tmp_path):
    """As a search over learning rates does that leaves out what diverges."""

    def work(name, fails):
        ranks = Ranks.here()
        with ranks.joined():
            if fails and ranks.is_first:
                raise ConfigError("lr", "too large")
            ranks.add(name)
            list(ranks.waiting(name))
            return ranks.gather(ranks.rank)

    def act():
        found = []
        for name, fails in (("a", True), ("b", False), ("c", True), ("d", False)):
            try:
                found.append(work(name, fails))
            except TaxolensError as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    own, lost = "ConfigError: lr: too large.", "LostRankError: rank 0: failed: lr: too large."
    first, second = run_ranks(2, act, tmp_path / "ranks")
    assert first == [own, [0, 1], own, [0, 1]]
    assert second == [lost, [0, 1], lost, [0, 1]]


def refuses_to_connect(*_):
    raise RuntimeError("no route to the other GPU\nwith a stack")


@pytest.mark.parametrize(
    ("gpus", "backend", "connected", "message"),
    [
        (["a", "b"], "gloo", True, ""),  # gloo stands in for NCCL, which needs the GPUs
        (["a", "a"], "gloo", False, ""),
        (["a", "b"], "no_route", False, "which is slow: no route to the other GPU\n"),
    ],
)
def test_gpus_are_connected_where_each_rank_has_its_own(
    monkeypatch, tmp_path, caplog, gpus, backend, connected, message
):
    monkeypatch.setattr(module, "_lies_on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(module, "_gpu_of", lambda device: gpus[Ranks.here().rank])
    monkeypatch.setattr(module, "GPU_BACKEND", backend)
    groups = []
    all_reduce = dist.all_reduce

    def recorded(tensor, *args, group=None, **kwargs):
        groups.append(group)
        return all_reduce(tensor, *args, group=group, **kwargs)

    def act():
        dist.Backend.register_backend("no_route", refuses_to_connect, devices=["cpu"])
        dist.all_reduce = recorded
        ranks, found = Ranks.here(), []
        for _ in range(2):  # connected anew, GPUs are too
            with ranks.joined():
                given = torch.tensor([1.0, 2.0]) * (ranks.rank + 1)
                found += [ranks.reduce(given, "sum").tolist(), ranks.reduce(given, "min").tolist()]
                assert given.tolist() == [ranks.rank + 1, 2 * (ranks.rank + 1)]
        return found, [group is not None for group in groups], caplog.text

    ended = run_ranks(2, act, tmp_path / "ranks")
    for found, over_gpus, _ in ended:
        assert found == [[3.0, 6.0], [1.0, 2.0]] * 2
        tried = [True] if connected else []  # the sum that tries the connection
        assert over_gpus == [*tried, connected, connected] * 2
    first, second = (text for *_, text in ended)
    assert (message in first) if message else (first == "")
    assert second == ""  # the first rank alone logs


def test_without_nccl_gpus_are_not_connected(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_gpu_of", lambda device: f"of rank {Ranks.here().rank}")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)

    def act():
        ranks = Ranks.here()
        with ranks.joined():
            return module._group_of_gpus(ranks, torch.device("cpu"))

    assert run_ranks(2, act, tmp_path / "ranks") == [None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("own", [True, False])
def test_tensors_of_gpus_are_reduced_on_their_device(tmp_path, own):
    """Over NCCL where there are two GPUs; where both ranks share one, over the CPU."""
    if own and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    script = tmp_path / "script.py"
    script.write_text(GPU_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(int(own))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    place = "cuda:{}" if own else "cuda:0"
    expected = [f"{[3.0, 6.0]} {place.format(rank)} {own}" for rank in (0, 1)]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nccl_serves_beside_gloo_in_a_group_of_its_own(tmp_path):
    """What `Ranks.reduce` asks of torch, in a job of one rank, which a single GPU allows."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert module._gpu_of(torch.device("cuda:0"))
        module._group_of_gpus.cache_clear()
        group = module._group_of_gpus(Ranks(), torch.device("cuda:0"))
        assert group is not None and dist.get_backend(group) == "nccl"
        tensor = torch.tensor([1.0, 2.0], device="cuda:0")
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=group)
        assert tensor.tolist() == [1.0, 2.0]
        dist.barrier()
    finally:
        module._group_of_gpus.cache_clear()
        dist.destroy_process_group()


GPU_SCRIPT = """
import sys
import torch
from taxolens.registry import ranks as module
from taxolens.registry.ranks import Ranks
ranks = Ranks.here()
with ranks.joined():
    device = ranks.device("cuda") if sys.argv[1] == "1" else "cuda:0"
    given = torch.tensor([1.0, 2.0], device=device) * (ranks.rank + 1)
    found = ranks.reduce(given, "sum")
    connected = module._group_of_gpus(ranks, given.device) is not None
    sys.stdout.write(f"{found.tolist()} {found.device} {connected}\\n")
"""
