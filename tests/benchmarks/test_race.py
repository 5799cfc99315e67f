"""`benchmarks/peers.py`: interpreters that are given, a limit of time, what is stored between rounds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import peers
import pytest


def test_a_given_interpreter_is_used_and_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(peers.subprocess, "run", offline)
    given = dict([peers.interpreter(f"saev={sys.executable}")])
    pythons, left_out = peers.environments(["ours", "overcomplete", "saev"], tmp_path, given)
    assert pythons == {"ours": sys.executable, "saev": sys.executable}
    assert left_out == {"overcomplete": "cannot be installed here: no network"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["saev", "saev=", "saev=/no/such/python", f"ours={sys.executable}"]
)
def test_what_is_no_way_or_no_interpreter_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^given {text}; allowed: WAY=PATH"):
        peers.interpreter(text)


def test_a_process_that_exceeds_the_limit_has_no_time(tmp_path: Path) -> None:
    slow, job = tmp_path / "python", {"num_workers": None}
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    assert peers.run("by_hand", str(slow), job, 0.2) == (0.2, "not finished after 0.2 s")


def test_a_process_that_fails_has_the_last_line_of_its_error(tmp_path: Path) -> None:
    broken, job = tmp_path / "python", {"num_workers": None}
    broken.write_text("#!/bin/sh\necho one >&2\necho two >&2\nexit 3\n")
    broken.chmod(0o755)
    assert peers.run("by_hand", str(broken), job)[1] == "failed: two"


def test_between_rounds_the_finished_ones_are_stored() -> None:
    job = {"steps": 1, "batch": 2, "d_sae": 3, "k": 4, "blocks": [0]}
    first = peers.summary(job, {"ours": [2.0], "by_hand": [3.0], "saev": []})
    assert first["seconds"] == {"ours": [2.0], "by_hand": [3.0]}
    assert first["ratios"]["by_hand"] == {"median": 1.5, "lowest": 1.5, "highest": 1.5}
    second = peers.summary(job, {"ours": [2.0], "by_hand": [3.0, 9.0], "saev": [4.0]})
    assert second["seconds"] == {"ours": [2.0], "by_hand": [3.0], "saev": [4.0]}
    without = peers.summary(job, {"by_hand": [3.0]})
    assert (without["seconds"], without["ratios"]) == ({"by_hand": [3.0]}, {})


def test_jobs_are_selected_by_their_tokens() -> None:
    assert list(jobs_of("patch")) == ["patch tokens, one block"]


def test_processes_of_ours_are_started_by_torchrun(tmp_path: Path) -> None:
    told, (job,) = tmp_path / "python", jobs_of("class").values()
    told.write_text('#!/bin/sh\necho "$@" >&2\nexit 3\n')
    told.chmod(0o755)
    job["output"] = str(tmp_path)
    alone, shared = (peers.run(way, str(told), job)[1] for way in ("ours", "ours_by_ranks"))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 4"
    assert shared == alone.replace("-m taxolens train", f"{torchrun} -m taxolens train")
    assert shared != alone
    settings = {"model": "Ti", "images": 512, "device": "cpu", "num_workers": None, "ranks": 4}
    done = {"class tokens": peers.summary(job, {"ours": [2.0], "ours_by_ranks": [1.0]})}
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "gpu": None, "torch": "2"}
    found = {"machine": machine, "settings": settings, "left_out": {}, "jobs": done}
    assert "| class tokens | taxolens, 4 processes | 1.0 s | 0.50 (0.50 to 0.50) |" in peers.shown(
        found
    )


def jobs_of(tokens: str) -> dict[str, dict[str, Any]]:
    """Jobs of a small race."""
    settings = {"batch": 256, "model": "Ti", "device": "cpu", "images": 512, "epochs": 3}
    args = argparse.Namespace(**settings, num_workers=None, ranks=4, jobs=[tokens])
    return peers.jobs(args, "pictures", "model")
