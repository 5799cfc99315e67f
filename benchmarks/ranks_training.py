"""Speed of a job of several processes over one process, of one thread each, and whether the bits are the same.

    python benchmarks/ranks_training.py [--ranks 2] [--images 512] [--steps 20] [--rounds 3]

Training: twelve topk SAEs, one at every block of a ViT-S with random weights, from a cache of class tokens that
is there already. Timed is the training alone, without imports, model and cache, from the moment when all
processes are ready until all have written their SAEs. One and several processes take turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BAR = {"training": 1.8}
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="set by the script itself for the processes that it starts"
    )
    args = parser.parse_args()
    if args.folder:
        work(args)
        return
    from training import draw

    with tempfile.TemporaryDirectory() as folder:
        draw(args.images, folder)
        seconds: dict[int, list[float]] = {1: [], args.ranks: []}
        digests = set()
        for _ in range(-1, args.rounds):
            for n, found in seconds.items():
                took, digest = job(n, folder)
                digests.add(digest)
                found.append(took)
        ratios = [one / many for one, many in zip(seconds[1][1:], seconds[args.ranks][1:])]
    verdict = "within" if statistics.median(ratios) >= BAR["training"] else "BELOW"
    print(
        f"training of 12 SAEs, {args.steps} steps of {args.batch}, d_sae {args.d_sae}: "
        f"1 process {statistics.median(seconds[1][1:]):.1f} s, "
        f"{args.ranks} processes {statistics.median(seconds[args.ranks][1:]):.1f} s; "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{verdict} the bar of {BAR['training']}x of two; "
        f"{'the same bits' if len(digests) == 1 else 'OTHER BITS'}"
    )


def job(n: int, folder: str) -> tuple[float, str]:
    """Seconds of a training by `n` processes, and a digest of its SAEs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(n), *sys.argv, "--folder", folder]
    done = subprocess.run(
        command, env=os.environ | THREADS, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    took, digest = json.loads(done.stdout.splitlines()[-1])
    return took, digest


def work(args: argparse.Namespace) -> None:
    """What each process does: the first prints seconds and digest."""
    import taxolens
    import torch
    from sae_lens import LoggingConfig, TopKTrainingSAEConfig
    from taxolens.hooks.images.dataset import load_images
    from taxolens.hooks.models.load import from_module
    from taxolens.registry.files import file_digest
    from taxolens.registry.hashing import fingerprint
    from taxolens.registry.ranks import Ranks
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    logging.disable(logging.INFO)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=56, patch_size=14
    )
    plain = Dinov2Model._from_config(config, attn_implementation="sdpa").eval()
    size = {"height": 56, "width": 56}
    processor = BitImageProcessorPil(size=size, crop_size=size)
    model = from_module(plain, processor=processor, family="dinov2")
    blocks = [f"blocks.{i}.hook_resid_post" for i in range(12)]
    ranks, folder = Ranks.here(), Path(args.folder)
    output = folder / f"output_{ranks.size}"
    settings: dict[str, Any] = {
        "saes": {name: TopKTrainingSAEConfig(d_in=384, d_sae=args.d_sae, k=32) for name in blocks},
        "hook_names": {name: name for name in blocks},
        "model_name": "ViT-S, random weights",
        "dataset_path": str(folder / "pictures"),
        "training_tokens": args.steps * args.batch,
        "train_batch_size_tokens": args.batch,
        "use_cached_activations": True,
        "cached_activations_path": str(folder / "activations"),
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": str(output),
        "verbose": False,
    }
    runner = taxolens.VisionMultiSAETrainingRunner(
        taxolens.VisionMultiSAERunnerConfig(**settings),
        override_dataset=load_images(settings["dataset_path"]),
        override_model=model,
    )
    with ranks.joined():
        ranks.wait()
        start = time.perf_counter()
        runner.run()
        ranks.wait()
        took = time.perf_counter() - start
    if ranks.is_first:
        files = sorted(path for path in output.rglob("*") if path.parent != output)
        digest = fingerprint([f"{path.relative_to(output)} {file_digest(path)}" for path in files])
        print(json.dumps([took, digest]))


if __name__ == "__main__":
    main()
