"""The table of `gpu.sh`: forward, SAE steps, matching pursuit, evaluation and extraction on one GPU.

    python benchmarks/gpu.py [--small] [--store]
    python benchmarks/gpu.py --write

Parts run one after the other and are stored as they finish. The share of the peak counts 10 d m FLOPs a
token (encoding and decoding, and three products backwards) over the card's dense bf16 peak (`PEAKS`, from
NVIDIA's data sheets). Without a GPU, or with `--small`, sizes are small and the numbers are no result.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timing
import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from taxolens import evaluate_run
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step

HERE = Path(__file__).parent
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, SXM
Row = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("gpu", shown(timing.stored("gpu")))
        return
    logging.disable(logging.WARNING)
    small = args.small or not torch.cuda.is_available()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"machine": timing.machine(), "small": small, "rows": []}
    for part in (forward, sae_steps, pursuit, extraction, evaluation):
        start = time.perf_counter()
        for row in part(device, small):
            found["rows"].append(row)
            print(f"{row[0]:<70} {row[1]}", flush=True)
        print(f"    {part.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
        if args.store:
            timing.store("gpu", found)
            timing.show("gpu", shown(found))


def forward(device: str, small: bool) -> Iterator[Row]:
    """Time of hook points over a plain forward (`forward.py`)."""
    for dtype in ("float32", "bfloat16"):
        sizes = ["--images", "2" if small else "64", "--rounds", "1" if small else "9"]
        for name, row in script("forward.py", device, "--dtype", dtype, *sizes).items():
            yield f"forward of ViT-S, {dtype}: {name}, over Hugging Face's", f"{row['median']:.3f}×"


def sae_steps(device: str, small: bool) -> Iterator[Row]:
    """Tokens a second of SAELens's trainer with its step and ours, in bf16 autocast, topk."""
    d_in, batch = (64, 128) if small else (1536, 4096)
    for d_sae in (d_in * 8, d_in * 16):
        for name, is_sparse in (("SAELens's step", False), ("ours", True)):
            cfg = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=32, device=device)
            sae = with_sparse_step(TopKTrainingSAE(cfg), is_sparse).to(device)
            settings = SAETrainerConfig(
                n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
                total_training_samples=1 << 40, device=device, autocast=True, lr=1e-4, lr_end=1e-4,
                lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
                lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=batch,
                dead_feature_window=1000, feature_sampling_window=2000,
                logger=LoggingConfig(log_to_wandb=False),
            )  # fmt: skip
            trainer = SAETrainer(settings, sae, iter(()))
            tokens = torch.randn(batch, d_in, device=device)
            rate = batch / per_call(lambda t=trainer, x=tokens: t.step(x), device, small)
            share = next(
                (p for card, p in PEAKS.items() if card in str(timing.machine()["gpu"])), None
            )
            of_peak = f", {10 * d_in * d_sae * rate / share:.1%} of the bf16 peak" if share else ""
            yield f"topk, d {d_in:,}, m {d_sae:,}, batch {batch:,}: {name}", f"{rate:,.0f} tokens/s{of_peak}"  # fmt: skip
            del trainer, sae


def pursuit(device: str, small: bool) -> Iterator[Row]:
    """Speed of `mp` over SAELens's matching pursuit (`matching_pursuit.py`)."""
    sizes = ["--scale", "0.02" if small else "1", "--rounds", "1" if small else "3"]
    for name, row in script("matching_pursuit.py", device, *sizes)["ratios"].items():
        yield f"mp over SAELens's matching_pursuit: {name}", f"{row['median']:.1f}×"


def extraction(device: str, small: bool) -> Iterator[Row]:
    """Images a second from JPEGs to a cache of all blocks' class tokens, in bf16 autocast."""
    n_images = 24 if small else 3200
    with tempfile.TemporaryDirectory() as folder:
        pictures = timing.draw(n_images, Path(folder) / "pictures")
        for size in ("tiny", "tiny") if small else ("B", "g"):
            if size == "g":
                pictures = timing.draw(n_images // 2, Path(folder) / "fewer")
            model = load_vision_model(
                str(timing.save_vit(size, Path(folder) / f"model-{size}")), device=device
            )
            images = load_images(pictures)
            hooks = [f"blocks.{i}.hook_resid_post" for i in range(timing.MODELS[size][1])]
            settings = {"batch_size": 64, "autocast": True, "progress": False}
            for number in range(2):  # the first starts the workers' server and the GPU
                start = time.perf_counter()
                ActivationCache.build(model, images, hooks, **settings)
                took = time.perf_counter() - start
                if number or small:
                    yield f"{len(images):,} JPEGs to the class tokens of all blocks, ViT-{size}", f"{len(images) / took:,.0f} images/s"  # fmt: skip
                    break


def evaluation(device: str, small: bool) -> Iterator[Row]:
    """Default evaluators, by SAE, beside the encoding of the same images."""
    n_images, size = (32, "tiny") if small else (3200, "S")
    width, blocks, *_ = timing.MODELS[size]
    with tempfile.TemporaryDirectory() as folder:
        pictures = timing.draw(n_images, Path(folder) / "pictures")
        tree = Path(folder) / "tree.csv"
        names = [f"class_{i}" for i in range(timing.CLASSES)]
        edges = [
            f"{parent},{child}" for i, child in enumerate(names) for parent in [f"half_{i % 2}"]
        ]
        tree.write_text("\n".join(["parent,child", "root,half_0", "root,half_1", *edges]))
        flags = {
            "model_name": str(timing.save_vit(size, Path(folder) / "model")),
            "dataset_path": str(pictures), "holdout": 0.5, "taxonomy": str(tree), "device": device,
            "hook_names": [f"blocks.{i}.hook_resid_post" for i in range(blocks)[-2:]],
            "architecture": "topk", "k": 32, "d_sae": 128 if small else 12_288, "epochs": 1.0,
            "train_batch_size_tokens": 8, "output_path": f"{folder}/run", "log_to_wandb": False,
            "n_checkpoints": 0,
        }  # fmt: skip
        job = Job(gather(flags=flags), evaluate=False)
        job.train()
        start = time.perf_counter()
        evaluate_run(f"{folder}/run", device=device, progress=False)
        took = (time.perf_counter() - start) / 2
        sae = next(iter(job.runner.session.saes.values()))
        tokens = torch.randn(n_images // 2, width, device=device)
        with torch.no_grad():
            encoding = per_call(lambda: sae.encode(tokens), device, small)
        yield f"evaluation of {n_images // 2:,} images, m {flags['d_sae']:,}, all of it, an SAE", f"{took:.2f} s"  # fmt: skip
        yield "encoding of the same images, an SAE", f"{encoding * 1000:.1f} ms"


def per_call(run: Callable[[], object], device: str, small: bool) -> float:
    """Median seconds of a call, after two that are not counted."""
    seconds = []
    for number in range(4 if small else 22):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def script(name: str, device: str, *args: str) -> dict[str, Any]:
    """What another script prints with --json."""
    command = [sys.executable, str(HERE / name), "--device", device, "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    note = " Small sizes, no result." if found["small"] else ""
    return f"{timing.table(('what', 'measured'), found['rows'])}\n\n{timing.on_what(found)}.{note}"


if __name__ == "__main__":
    main()
