"""How long the imports of a run take, with Python's garbage collection and without, in turns of processes.

    python benchmarks/start.py [--rounds 7] [--store]
    python benchmarks/start.py --write

Imports make objects that stay. Python's collector searches them again and again meanwhile, so that taxolens
has it wait until the import of SAELens and of TransformerLens has ended.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import timing

COLLECTING = """
from contextlib import nullcontext
from taxolens.plugin import registration
from taxolens.plugin.commands import shell
registration.without_collection = shell.without_collection = nullcontext
"""
COMMAND = """
from taxolens.plugin.commands import shell
with shell.importing():
    import taxolens.plugin.study.job, taxolens.plugin.commands.train_flags
"""
# work -> (the program, the same with Python's default); SAELens alone is as it is
WORKS: dict[str, tuple[str, str | None]] = {
    "SAELens, without taxolens": ("import sae_lens", None),
    "SAELens and taxolens": ("import taxolens, sae_lens", COLLECTING + "import taxolens, sae_lens"),
    "what `taxolens train` imports": (COMMAND, COLLECTING + COMMAND),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("start", shown(timing.stored("start")))
        return
    rounds = [
        {
            work: [None if program is None else seconds_of(program) for program in programs]
            for work, programs in WORKS.items()
        }
        for _ in range(args.rounds + 1)
    ]
    found: dict[str, Any] = {
        "machine": timing.machine(),
        "rounds": rounds[1:],
    }  # the first reads files
    print(shown(found))
    if args.store:
        timing.store("start", found)
        timing.show("start", shown(found))


def seconds_of(program: str) -> float:
    """What a new process takes for it, whole."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return timing.rounded(time.perf_counter() - start)


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = []
    for work in found["rounds"][0]:
        ours, default = zip(*(one[work] for one in found["rounds"]), strict=True)
        if default[0] is None:
            rows.append((work, "", f"{statistics.median(ours):.1f} s", ""))
            continue
        ratios = [a / b for a, b in zip(default, ours, strict=True)]
        rows.append(
            (
                work,
                f"{statistics.median(default):.1f} s",
                f"{statistics.median(ours):.1f} s",
                f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        )
    head = ("imported", "collecting garbage, Python's default", "as it is", "faster by")
    return f"{timing.table(head, rows)}\n\nMedians over {len(found['rounds'])} round(s) (lowest and highest ratio); {timing.on_what(found)}."


if __name__ == "__main__":
    main()
