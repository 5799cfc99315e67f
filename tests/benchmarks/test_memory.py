"""The measurement of memory in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memory
import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is measured there"
)
SMALL = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import memory
    sys.exit(memory.main(["--scale", "0.0005", "--files", *sys.argv[2:]]))
"""
ALLOCATING = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import memory
    print(memory.measure(memory.Hostile("a", lambda scale: ["x"], lambda path: bytearray(300 << 20)), 1))
"""


def test_every_file_is_read_or_refused(forks: Any) -> None:
    names = [name for name in memory.hostile() if not name.startswith("png")]
    done = forks.run(SMALL, Path(memory.__file__).parent, *names)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [line.split("|") for line in lines[2:]]
    assert [row[1].strip() for row in rows] == names
    outcomes = [row[4].strip() for row in rows]
    assert all(o.startswith(("read", "ConfigError", "DataError")) for o in outcomes), outcomes


def test_what_is_allocated_counts(forks: Any) -> None:
    done = forks.run(ALLOCATING, Path(memory.__file__).parent)
    peak, _, outcome = done.stdout.strip("()\n").split(", ")
    assert outcome == "'read'" and 290 < float(peak) < 400
