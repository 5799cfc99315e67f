"""Resident memory while `taxolens train` runs: over 100,000 steps from a cache, and over 10 epochs from images.

    python benchmarks/resident.py [--small] [--store]
    python benchmarks/resident.py --write

The command runs as a process of its own, with a small model and small SAEs, so that what grows with steps
is not hidden by what is large. Its resident memory, with that of its decoding workers, is read twice a
second. Growth is the median of the last tenth of the readings less that of the third tenth, when everything
has been imported and the first window of the logs is over.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing

SECONDS = 0.5  # between two readings
STEPS, EPOCHS, IMAGES, BATCH = 100_000, 10, 2000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a twentieth of the steps and images")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("resident", shown(timing.stored("resident")), timing.ROOT / "docs" / "scale.md")
        return
    shrink = 20 if args.small else 1
    found: dict[str, Any] = {"machine": timing.machine(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = timing.draw(IMAGES // shrink, folder / "pictures")
        model = timing.save_vit("tiny", folder / "model")
        few = timing.draw(BATCH, folder / "few")
        common = {
            "model_name": model, "hook_name": "blocks.1.hook_resid_post", "architecture": "topk",
            "k": 4, "d_sae": 64, "device": "cpu", "n_checkpoints": 0, "log_to_wandb": "false",
            "train_batch_size_tokens": BATCH, "num_workers": 0,
        }  # fmt: skip
        jobs = {
            f"{STEPS // shrink:,} steps from a cache": {
                "dataset_path": few, "tokens": "class", "training_tokens": STEPS // shrink * BATCH,
                "use_cached_activations": "true", "cached_activations_path": folder / "cache",
            },
            f"{EPOCHS} epochs from {IMAGES // shrink:,} images": {
                "dataset_path": pictures, "tokens": "patch", "epochs": EPOCHS, "num_workers": 1,
            },
        }  # fmt: skip
        for name, job in jobs.items():
            readings = watched({**common, **job, "output_path": folder / "out" / name})
            tenth = max(1, len(readings) // 10)
            early = statistics.median(readings[2 * tenth : 3 * tenth])
            late = statistics.median(readings[-tenth:])
            row = {"job": name, "seconds": round(len(readings) * SECONDS)}
            found["rows"].append({**row, "early": round(early), "late": round(late)})
            print(found["rows"][-1], flush=True)
    print(shown(found))
    if args.store:
        timing.store("resident", found)
        timing.show("resident", shown(found), timing.ROOT / "docs" / "scale.md")


def watched(settings: dict[str, Any]) -> list[float]:
    """MiB of the process and its children, twice a second from its start to its end."""
    readings: list[float] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "taxolens", "train", *timing.flags(settings), "--no_evaluate"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            readings.append(resident(process.pid))
            time.sleep(SECONDS)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read()[-2000:])
    return readings


def resident(pid: int) -> float:
    """MiB of a process and of those that it started, on Linux."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    own = int(lines.get("VmRSS", "0 kB").split()[0]) / 1024
    return own + sum(resident(int(child)) for child in children)


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = [
        (row["job"], f"{row['seconds']:,} s", f"{row['early']:,} MiB", f"{row['late']:,} MiB",
         f"{row['late'] - row['early']:+,} MiB")
        for row in found["rows"]
    ]  # fmt: skip
    head = ("job", "time", "after a fifth", "at the end", "growth")
    return f"{timing.table(head, rows)}\n\n{timing.on_what(found)}."


if __name__ == "__main__":
    main()
