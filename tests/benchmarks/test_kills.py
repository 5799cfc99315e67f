"""The campaign of kills in small, and that it finds what is not as it would be."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import kills
import pytest

CAMPAIGN = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import kills
    sys.exit(kills.main(["--kills", "2", "--processes", "1", "--jobs", "train", "--output_path", sys.argv[2]]))
"""


def test_two_kills_of_a_training(forks: Any, tmp_path: Path) -> None:
    done = forks.run(CAMPAIGN, Path(kills.__file__).parent, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = [line for line in done.stdout.splitlines() if line.startswith("| all |")]
    n_kills, n_faults = (int(cell) for cell in total.split("|")[3:5])
    assert n_kills >= 2 and n_faults == 0
    for line in (tmp_path / kills.CASES).read_text().splitlines():
        assert all(run["job"] == "train" for run in json.loads(line)["runs"])


@pytest.mark.parametrize(
    ("how", "code", "seconds", "said", "problem"),
    [
        ("SIGKILL", -signal.SIGKILL, 0.1, "", None),
        ("SIGKILL", 1, 0.1, "", "exit code 1"),
        ("SIGTERM", 1, 0.1, "error: SIGTERM: training stopped", None),
        ("SIGTERM", -signal.SIGTERM, 0.1, "", None),
        ("SIGTERM", 1, 60.0, "error: SIGTERM", "it took 60.0 seconds to end"),
        ("SIGTERM", 2, 0.1, "error: SIGTERM", "exit code 2"),
        ("SIGTERM", 1, 0.1, "error: it failed", "not named"),
        ("SIGINT", 1, 0.1, "error: interrupted", None),
        ("SIGINT", 1, 0.1, "Traceback ...\nerror: interrupted", "a traceback"),
        ("SIGHUP", None, 0.1, "", "it did not end"),
        (kills.FULL_DISK, 1, 0.1, "error: checkpoint checkpoints/run/8: full", None),
        (kills.FULL_DISK, 1, 0.1, "error: a file: No space left on device.", "no path in"),
    ],
)
def test_how_a_command_has_to_end(
    how: str, code: int | None, seconds: float, said: str, problem: str | None, tmp_path: Path
) -> None:
    found = kills.judge(how, code, seconds, said, tmp_path)
    assert found is None if problem is None else problem in str(found)


def test_what_two_runs_have_to_have_in_common(tmp_path: Path) -> None:
    for run, (weights, when) in {"a": (b"1", 1), "b": (b"1", 2), "c": (b"2", 1)}.items():
        folder = tmp_path / run / "output"
        folder.mkdir(parents=True)
        (folder / "w.safetensors").write_bytes(weights)
        content = {"created": when, "saes": [{"l0": 2, "seconds": when, "at": str(tmp_path / run)}]}
        (folder / "results.json").write_text(json.dumps(content))
        (folder / "report.html").write_text(str(when))
    a, b, c = (kills.content(tmp_path / run, "evaluate") for run in "abc")
    assert set(a) == {"output/w.safetensors", "output/results.json"}
    assert kills.differences(a, b) == []
    assert kills.differences(a, c) == ["output/w.safetensors"]
    assert kills.differences(a, {}) == ["output/results.json", "output/w.safetensors"]
    reports = (kills.content(tmp_path / run, "report") for run in "ab")
    assert kills.differences(*reports) == ["output/report.html"]


def test_the_table_counts_kills_and_faults() -> None:
    runs = [
        kills.Run("train", "SIGTERM", 1.0, True, 1, 2.0, None),
        kills.Run("train", "SIGTERM", 1.0, True, 1, 4.0, "a traceback"),
        kills.Run("train", "SIGTERM", 9.0, False, 0, 0.0, None),  # it was over before
        kills.Run("report", kills.FULL_DISK, 1.0, True, 1, 0.5, None),
    ]
    found = {"seed": 3, "seconds": 60, "processes": 2, "faults": 1, "groups": kills.summary(runs)}
    machine = {"cpu": "x", "cores": 2, "threads": 1, "gpu": None, "torch": "2"}
    lines = kills.shown(found | {"machine": machine}).splitlines()
    assert lines[2:5] == [
        "| report | full disk | 1 | 0 | 0.5, 0.5 |",
        "| train | SIGTERM | 2 | 1 | 3.0, 4.0 |",
        "| all |  | 3 | 1 |  |",
    ]
    assert "no disk" not in lines[-1]
