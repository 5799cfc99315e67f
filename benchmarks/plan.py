"""Error of the time that `--dry_run` predicts: the calibrated plan of a run against the run.

    python benchmarks/plan.py [--model Ti] [--images 1000] [--rounds 3] [--store]
    python benchmarks/plan.py --write

Each round makes, in turns, the plan of a run and the run itself: class-token SAEs at every block from
a cache, and one SAE on all patch tokens without one. Printed is predicted over measured time. `--store`
writes docs/results/plan.json and the table of docs/performance.md, `--write` the table alone.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timing
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather

CASES: dict[str, dict[str, Any]] = {
    "class tokens, one SAE a block, cache, 5 epochs": {
        "hook_names": ["blocks.*.hook_resid_post"], "tokens": "class", "epochs": 5.0,
        "train_batch_size_tokens": 256, "use_cached_activations": True,
    },
    "patch tokens, one SAE, no cache": {
        "hook_names": ["blocks.1.hook_resid_post"], "tokens": "patch", "epochs": 1.0,
        "train_batch_size_tokens": 2048,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Ti", choices=timing.MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--factor", type=float, default=16, help="d_sae over d_in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("plan", shown(timing.stored("plan")))
        return
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {
        "machine": timing.machine(),
        "settings": settings_of(args),
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        pictures = timing.draw(args.images, Path(folder) / "pictures")
        model = timing.save_vit(args.model, Path(folder) / "model")
        for name, own in CASES.items():
            rows = [
                one(own, model, pictures, Path(folder) / f"{name[:5]}{number}", args)
                for number in range(args.rounds)
            ]
            found["cases"][name] = rows
            print(name, *(f"{row['predicted'] / row['measured']:.2f}" for row in rows))
    print(shown(found))
    if args.store:
        timing.store("plan", found)
        timing.show("plan", shown(found))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in ("store", "write")}


def one(
    own: dict[str, Any], model: Path, pictures: Path, output: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """The predicted and the measured seconds of one run."""
    flags = {
        "model_name": str(model),
        "dataset_path": str(pictures),
        "architecture": "topk",
        "k": 32,
        "expansion_factor": args.factor,
        "device": args.device,
        "num_workers": args.num_workers,
        "output_path": str(output / "saes"),
        "cached_activations_path": str(output / "cache"),
        "n_checkpoints": 0,
        "log_to_wandb": False,
        **own,
    }
    job = Job(gather(flags=flags), evaluate=False)
    cost = job.cost()
    start = time.perf_counter()
    job.train()
    measured = time.perf_counter() - start
    keep = ("seconds", "rates", "bottleneck", "calibration_seconds", "flops")
    return {
        "predicted": cost["seconds"]["training"],
        "measured": measured,
        **{key: cost[key] for key in keep},
    }


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = []
    for name, cases in found["cases"].items():
        ratios = [case["predicted"] / case["measured"] for case in cases]
        middle = statistics.median(ratios)
        rows.append(
            (
                name,
                f"{statistics.median(case['measured'] for case in cases):.1f} s",
                f"{statistics.median(case['predicted'] for case in cases):.1f} s",
                f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                cases[-1]["bottleneck"],
                f"{statistics.median(case['calibration_seconds'] for case in cases):.1f} s",
            )
        )
    head = ("run", "measured", "predicted", "predicted / measured", "bottleneck", "calibration")
    of = found["settings"]
    setting = f"ViT-{of['model']} at 224 pixels, {of['images']:,} JPEGs, topk, d_sae {of['factor']:g} d_in"
    return f"{timing.table(head, rows)}\n\n{setting}; {timing.on_what(found)}."


if __name__ == "__main__":
    main()
