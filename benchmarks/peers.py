"""The race: images to saved SAEs with ours, by hand with SAELens's trainer, with overcomplete, with saev.

    python benchmarks/peers.py [--small] [--device cuda] [--rounds 3] [--venvs FOLDER] [--store]
                               [--jobs class] [--limit 60] [--python overcomplete=PATH saev=PATH]
    python benchmarks/peers.py --write [--device cuda]

"ours_by_ranks" is taxolens by torchrun, `--ranks` processes on the same cores and the same device. "A run a
block" is the loop by hand once for each block, each time from the images on, as runs of SAELens for
one hook point each.

Two jobs: SAEs on the class tokens of every block, several epochs (`--jobs class`); and one SAE on all patch
tokens of one block, one epoch (`--jobs patch`). Same JPEGs, model (a DINOv2 with random weights), widths,
steps, batch and threads; every way is a process of its own, timed whole, imports included, and the ways take
turns. With `--store`, each time is stored as it comes. Of a process that takes longer than `--limit` seconds
no time is kept. All compute in float32; saev turns TF32 on by itself. What is not ours is in `peer_loops.py`. overcomplete and saev come from the package index, each into a virtual environment that
this script makes (under `--venvs`, which keeps them), with a torch of its own, since both need torchvision;
where that fails, the way is left out with a word. `--python` names an interpreter that has the package
already, for a machine without a network; nothing is installed for that way, and the table names it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing

LOOPS = Path(__file__).with_name("peer_loops.py")
PACKAGES = {
    "overcomplete": ("overcomplete==0.3.0", "matplotlib<3.9"),  # it calls what 3.9 removed
    "saev": ("saev==0.1.0",),
}
NEEDED = ("torch", "torchvision", "transformers", "wandb")
WAYS = ("ours", "ours_by_ranks", "by_hand", "a_run_a_block", "overcomplete", "saev")
JOBS = ("class", "patch")
NAMES = {
    "ours": "taxolens",
    "ours_by_ranks": "taxolens, {ranks} processes",
    "by_hand": "by hand, SAELens's trainer",
    "a_run_a_block": "the same, a run a block",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a minute instead of half an hour")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="Ti", choices=timing.MODELS)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20, help="of the class tokens")
    parser.add_argument("--batch", type=int, default=256, help="class tokens of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="processes of ours_by_ranks")
    parser.add_argument("--num-workers", type=int, help="by default each its own best")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument(
        "--limit", type=float, help="seconds of one process; without limit by default"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--venvs", type=Path)
    parser.add_argument("--python", nargs="+", default=[], type=interpreter, metavar="WAY=PATH")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    table = "peers" if args.device == "cpu" else "peers_gpu"
    if args.write:
        timing.show(table, shown(timing.stored(table)))
        return
    if args.small:
        args.model, args.images, args.epochs, args.rounds = "tiny", 64, 4, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = timing.draw(args.images, folder / "pictures")
        model = timing.save_vit(args.model, folder / "model")
        ways = list(
            dict.fromkeys(("ours", *args.ways))
        )  # ours is what the others are compared with
        pythons, left_out = environments(ways, args.venvs or folder / "venvs", dict(args.python))
        found: dict[str, Any] = {
            "machine": timing.machine(),
            "settings": {key: getattr(args, key) for key in ("model", "images", "device", "num_workers", "ranks")},
            "given_python": [way for way, _ in args.python],
            "left_out": left_out,
            "jobs": {},
        }  # fmt: skip
        for name, job in jobs(args, str(pictures), str(model)).items():
            of_many = ("a_run_a_block", "ours_by_ranks")
            here = [way for way in pythons if way not in of_many or len(job["blocks"]) > 1]
            seconds: dict[str, list[float]] = {way: [] for way in here}
            for number in range(args.rounds):
                first = number % len(here)
                for way in here[first:] + here[:first]:
                    if way not in seconds:  # it failed before
                        continue
                    output = folder / "output"
                    took, error = run(way, pythons[way], {**job, "output": str(output)}, args.limit)
                    shutil.rmtree(output, ignore_errors=True)
                    print(f"{name}, {way}: {error or f'{took:.1f} s'}", flush=True)
                    if error:
                        left_out[way] = error
                        del seconds[way]
                    else:
                        seconds[way].append(took)
                    found["jobs"][name] = summary(job, seconds)
                    if args.store:
                        timing.store(table, found)
                        timing.show(table, shown(found))
    print(shown(found))
    if "ours" in left_out:
        sys.exit(f"taxolens {left_out['ours']}")


def summary(job: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What is stored of a job: the times of the rounds that every way which has begun has finished."""
    begun = {way: times for way, times in seconds.items() if times}
    rounds = min(map(len, begun.values()), default=0)
    done = {way: times[:rounds] for way, times in begun.items()}
    return {
        **{key: job[key] for key in ("steps", "batch", "d_sae", "k")},
        "saes": len(job["blocks"]),
        "seconds": {way: list(map(timing.rounded, times)) for way, times in done.items()},
        "ratios": {way: timing.ratios(done, way, "ours") for way in done if "ours" in done},
    }


def jobs(args: argparse.Namespace, pictures: str, model: str) -> dict[str, dict[str, Any]]:
    """Name -> what is to be done."""
    width, blocks, *_ = timing.MODELS[args.model]
    common = {
        "pictures": pictures, "model": model, "device": args.device, "images_per_batch": 32,
        "num_workers": args.num_workers, "k": 32, "d_sae": 16 * width, "ranks": args.ranks,
    }  # fmt: skip
    of_class, of_patches = (min(args.batch, args.images // 2), min(4096, args.images * 8))
    found = {
        "class tokens, every block": {
            **common, "tokens": "class", "blocks": list(range(blocks)), "batch": of_class,
            "steps": args.images * args.epochs // of_class,
        },
        "patch tokens, one block": {
            **common, "tokens": "patch", "blocks": [blocks * 3 // 4], "batch": of_patches,
            "steps": args.images * 256 // of_patches,
        },
    }  # fmt: skip
    return {name: job for name, job in found.items() if job["tokens"] in args.jobs}


def interpreter(text: str) -> tuple[str, str]:
    """A way of another package and the interpreter that has it, of WAY=PATH."""
    way, _, path = text.partition("=")
    if way not in PACKAGES or not shutil.which(path):
        raise argparse.ArgumentTypeError(
            f"given {text}; allowed: WAY=PATH, WAY one of {', '.join(PACKAGES)}, PATH an executable"
        )
    return way, path


def environments(
    ways: list[str], folder: Path, given: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Way -> its Python; way -> why it is left out."""
    pythons, left_out = {}, {}
    for way in ways:
        if way not in PACKAGES or way in given:
            pythons[way] = given.get(way, sys.executable)
            continue
        place = folder / way
        python = str(place / "bin" / "python")
        if not (place / "done").exists():
            print(f"{way}: making its environment in {place}")
            commands = [
                [sys.executable, "-m", "venv", "--clear", str(place)],
                [python, "-m", "pip", "install", "--quiet", *PACKAGES[way], *NEEDED],
            ]
            try:
                for command in commands:
                    subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                left_out[way] = f"cannot be installed here: {last_line(error)}"
                print(f"{way}: {left_out[way]}")
                continue
            (place / "done").touch()
        pythons[way] = python
    return pythons, left_out


def run(
    way: str, python: str, job: dict[str, Any], limit: float | None = None
) -> tuple[float, str | None]:
    """Seconds of a process from its start to its end, and why it failed."""
    if way == "a_run_a_block":
        each = [
            run("by_hand", python, {**job, "blocks": [block]}, limit) for block in job["blocks"]
        ]
        return sum(took for took, _ in each), next((error for _, error in each if error), None)
    others = {**job, "num_workers": job["num_workers"] or max(1, timing.usable_cores() - 2)}
    command = [python, str(LOOPS), way, json.dumps(others)]
    if way == "ours":
        command = [python, "-m", "taxolens", "train", *flags(job)]
    if way == "ours_by_ranks":
        torchrun = [
            python,
            *f"-m torch.distributed.run --standalone --nproc-per-node {job['ranks']}".split(),
        ]
        command = [*torchrun, "-m", "taxolens", "train", *flags(job)]
    start = time.perf_counter()
    try:
        subprocess.run(
            command, capture_output=True, text=True, env=os.environ, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        return limit or 0.0, f"not finished after {limit:g} s"
    except subprocess.CalledProcessError as error:
        return time.perf_counter() - start, f"failed: {(error.stderr.splitlines() or ['?'])[-1]}"
    return time.perf_counter() - start, None


def flags(job: dict[str, Any]) -> list[str]:
    """The job as flags of `taxolens train`."""
    tokens = job["steps"] * job["batch"]
    given = {
        "model_name": job["model"], "dataset_path": job["pictures"], "tokens": job["tokens"],
        "architecture": "topk", "k": job["k"], "d_sae": job["d_sae"], "lr": 1e-3,
        "training_tokens": tokens, "train_batch_size_tokens": job["batch"],
        "store_batch_size_prompts": job["images_per_batch"],
        "device": job["device"], "output_path": job["output"], "n_checkpoints": 0,
        "dead_feature_window": 1000,  # as by hand
        "log_to_wandb": "false",
    }  # fmt: skip
    if job["num_workers"] is not None:
        given["num_workers"] = job["num_workers"]
    if job["tokens"] == "class":
        given |= {
            "use_cached_activations": "true",
            "cached_activations_path": job["output"] + "/cache",
        }
    return [*timing.flags(given), "--no_evaluate", "--hook_names", *(f"blocks.{i}.hook_resid_post" for i in job["blocks"])]  # fmt: skip


def last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return text.strip().splitlines()[-1]


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    of, rows = found["settings"], []
    for name, job in found["jobs"].items():
        for way, times in job["seconds"].items():
            spread = "unknown"  # where ours failed
            if ratio := job["ratios"].get(way):
                spread = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            rows.append(
                (
                    name,
                    NAMES.get(way, way).format(**of),
                    f"{sorted(times)[len(times) // 2]:.1f} s",
                    spread,
                )
            )
    sizes = "; ".join(
        f"{name}: {job['saes']} SAE(s), d_sae {job['d_sae']:,}, k {job['k']}, {job['steps']:,} steps of {job['batch']:,}"
        for name, job in found["jobs"].items()
    )
    text = (
        f"ViT-{of['model']} at 224 pixels on {of['device']}, {of['images']:,} JPEGs, workers: {of['num_workers'] or 'by default'}. "
        f"{sizes}. {timing.on_what(found)}."
    )
    left_out = "".join(f" Left out: {way}, {why}." for way, why in found["left_out"].items())
    if given := found.get("given_python"):
        left_out += f" Installed before, beside the packages of the machine: {', '.join(given)}."
    head = ("job", "way", "whole process", "time over taxolens's")
    return f"{timing.table(head, rows)}\n\n{text}{left_out}"


if __name__ == "__main__":
    main()
