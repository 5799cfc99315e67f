"""Two runs on the same cores: time alone and beside another, with OpenMP's default waiting and ours.

    python benchmarks/sharing.py [--steps 60] [--rounds 3] [--store]
    python benchmarks/sharing.py --write

The work is the forward pass of a transformer block and the products of an SAE step, on two threads.
Each process is started anew, since OpenMP reads its variables once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import Any

import timing
from taxolens.registry.machine import WAITING

WORK = """
import sys, time, torch
torch.set_num_threads(2)
block = torch.nn.TransformerEncoderLayer(192, 3, 768, batch_first=True).eval()
images, weights = torch.randn(8, 257, 192), torch.randn(192, 3072)
def step():
    with torch.no_grad():
        tokens = block(images).reshape(-1, 192)[:512]
        (tokens @ weights).relu() @ weights.T
step()
print("ready", flush=True)
sys.stdin.readline()
start, busy = time.perf_counter(), time.process_time()
for _ in range(int(sys.argv[1])):
    step()
print(time.perf_counter() - start, time.process_time() - busy)
"""
WAYS = {"OpenMP's default": {}, "as the command line sets it": WAITING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("sharing", shown(timing.stored("sharing")))
        return
    rounds = [
        {f"{name}, {n}": run(n, variables, args.steps) for name, variables in WAYS.items() for n in (1, 2)}
        for _ in range(args.rounds)
    ]  # fmt: skip
    found = {"machine": timing.machine(), "steps": args.steps, "rounds": rounds}
    print(shown(found))
    if args.store:
        timing.store("sharing", found)
        timing.show("sharing", shown(found))


def run(n: int, variables: dict[str, str], steps: int) -> dict[str, float]:
    """Seconds and CPU seconds of `n` processes that begin together, of the slowest and of all."""
    environment = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_WAIT_POLICY")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(steps)], env=environment | variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(n)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [process.communicate()[0].split() for process in started]
    return {
        "seconds": max(float(line[0]) for line in lines),
        "cpu_seconds": sum(float(line[1]) for line in lines),
    }


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = []
    for name in WAYS:
        alone, beside = (
            [[each[f"{name}, {n}"][key] for each in found["rounds"]] for key in ("seconds", "cpu_seconds")]
            for n in (1, 2)
        )  # fmt: skip
        ratio = [two / one for one, two in zip(alone[0], beside[0], strict=True)]
        rows.append(
            (
                name,
                f"{statistics.median(alone[0]):.1f} s ({statistics.median(alone[1]):.1f} s of CPU)",
                f"{statistics.median(beside[0]):.1f} s ({statistics.median(beside[1]):.1f} s of CPU)",
                f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
            )
        )
    head = ("waiting", "alone", "two at once", "two over one (fair: 2)")
    setting = f"{found['steps']} steps of two threads each"
    return f"{timing.table(head, rows)}\n\n{setting}; {timing.on_what(found)}."


if __name__ == "__main__":
    main()
