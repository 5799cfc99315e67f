"""What `benchmarks/gpu.sh` uses: failures printed as they come, rows kept, pictures that depend on their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import timing

BENCHMARKS = Path(timing.__file__).parent


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_failure_is_printed_before_the_tests_end(processes: str, tmp_path: Path) -> None:
    """The other test waits until this one has read the failure."""
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    (tmp_path / "test_two.py").write_text(
        "import pathlib, time\n"
        "def test_that_fails():\n    assert 1 + 1 == 3, 'not three'\n"
        f"def test_that_waits():\n    while not pathlib.Path({str(tmp_path / 'end')!r}).exists():\n"
        "        time.sleep(0.05)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "failures_as_they_come", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-n", processes, "--rootdir", str(tmp_path)]
    command += ["--no-summary", "--continue-on-collection-errors"]
    paths = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    running = subprocess.Popen(
        [*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert running.stdout is not None
    before = ""
    try:
        for line in running.stdout:
            before += line
            if "not three" in line:
                break
        assert "not three" in before and running.poll() is None
        assert "No module named 'no_such_module'" in before
    finally:
        (tmp_path / "end").touch()
        rest = running.communicate(timeout=60)[0]
    assert "1 failed, 1 passed, 1 error" in rest
    assert running.returncode == 1


def test_a_picture_depends_on_its_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing.draw(3, tmp_path / "few")
    monkeypatch.setattr(timing, "usable_cores", lambda: 4)
    timing.draw(10, tmp_path / "more")
    few, more = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.jpg")}
        for folder in (tmp_path / "few", tmp_path / "more")
    )
    assert len(few) == 3 and len(set(more.values())) == 10
    assert few == {file: more[file] for file in few}


@pytest.mark.parametrize(("parts", "gpu_before", "rows"), [
    (["pursuit"], "A", [["steps", "1"], ["mp", "3"]]),
    (["pursuit"], "B", [["mp", "3"]]),
    (list(gpu.PARTS), "A", [["mp", "3"]]),
])  # fmt: skip
def test_rows_of_other_parts_stay_where_the_machine_is_the_same(
    parts: list[str], gpu_before: str, rows: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {**timing.machine(), "gpu": "A"}
    before = {"machine": {**machine, "gpu": gpu_before}, "rows": [["steps", "1"], ["mp", "2"]]}
    stored = {}
    monkeypatch.setattr(gpu.logging, "disable", lambda level: None)  # it would last
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--store", "--parts", *parts])
    monkeypatch.setattr(gpu, "PARTS", {p: lambda *_: iter(()) for p in gpu.PARTS})
    monkeypatch.setitem(gpu.PARTS, "pursuit", lambda *_: iter([("mp", "3")]))
    monkeypatch.setattr(timing, "machine", lambda: machine)
    monkeypatch.setattr(timing, "stored", lambda name: before)
    monkeypatch.setattr(timing, "store", lambda name, found: stored.update(found))
    monkeypatch.setattr(timing, "show", lambda name, text: None)
    gpu.main()
    assert [list(row) for row in stored["rows"]] == rows
