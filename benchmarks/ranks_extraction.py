"""Speed of several processes of one thread each over one process of one thread.

    python benchmarks/ranks_extraction.py [--ranks 2] [--images 256] [--rounds 3]

Extraction: the class tokens and mean patches at every block of a DINOv2 ViT-S/14 with random weights, of drawn
pictures of 224 px, into an activation cache, by `ActivationCache.build`. In every round one process does it,
then torchrun's processes; printed is the median over the rounds of the ratio of their times, imports and the
making of the model not counted. The two caches are compared to the bit. It needs a core for each rank, and
nothing else that runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BAR = 1.9
BLOCKS = [f"blocks.{i}.hook_resid_post" for i in range(12)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="images in one forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        extract(Path(args.worker), args)
        return
    seconds: dict[int, list[float]] = {1: [], args.ranks: []}
    for _ in range(args.rounds):
        digests = set()
        for size, took in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                text = run(size, folder)
            took.append(float(text[0]))
            digests.add(text[1])
        if len(digests) > 1:
            raise SystemExit("the caches differ")
    ratios = [one / many for one, many in zip(seconds[1], seconds[args.ranks], strict=True)]
    one, many = (statistics.median(took) for took in seconds.values())
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, {args.images} images of 224 px, "
        f"ViT-S/14, batch {args.batch}; one process {one:.1f} s, {args.ranks} ranks {many:.1f} s; equal to the bit"
    )
    verdict = ""
    if args.ranks == 2:
        verdict = (
            f"  {'within' if statistics.median(ratios) >= BAR else 'BELOW'} the bar of {BAR:.2f}x"
        )
    print(
        f"extraction, {args.ranks} ranks against one process    {statistics.median(ratios):.3f}x  "
        f"({min(ratios):.3f} to {max(ratios):.3f}){verdict}"
    )


def run(size: int, folder: str) -> list[str]:
    """The seconds of an extraction by that many processes, and the digest of its cache."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [sys.executable, *torchrun, *sys.argv, "--worker", folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.stdout.split()


def extract(folder: Path, args: argparse.Namespace) -> None:
    """The work of one process; rank 0 prints the seconds and the digest."""
    import datasets
    import numpy as np
    import taxolens  # noqa: F401  (registers the families)
    import torch
    from PIL import Image
    from taxolens.hooks.activations.cache import ActivationCache
    from taxolens.hooks.images.dataset import load_images
    from taxolens.hooks.models.load import from_module
    from taxolens.registry.ranks import Ranks
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    plain = Dinov2Model._from_config(config, attn_implementation="sdpa").eval()
    processor = BitImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    model = from_module(plain, processor=processor, family="dinov2")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8))
        for _ in range(args.images)
    ]
    features = datasets.Features({"image": datasets.Image()})
    images = load_images(datasets.Dataset.from_dict({"image": pictures}, features=features))
    ranks = Ranks.here()
    with ranks.joined():
        ranks.wait()
        started = time.perf_counter()
        cache = ActivationCache.build(
            model,
            images,
            BLOCKS,
            path=folder,
            batch_size=args.batch,
            mean_patch=True,
            progress=False,
        )
        took = time.perf_counter() - started
    if ranks.is_first:
        digest = hashlib.sha256()
        for name in BLOCKS:
            for rows in (cache.activations(name), cache.mean_patch(name)):
                digest.update(np.asarray(rows).tobytes())
        print(took, digest.hexdigest())


if __name__ == "__main__":
    main()
