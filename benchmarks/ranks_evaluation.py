"""Speed of evaluation by two processes of one thread over one, in jobs that torchrun starts.

    python benchmarks/ranks_evaluation.py [--images 2000] [--d_sae 3072] [--rounds 3]

12 SAEs of random weights at the 12 blocks of a ViT with random weights, width 192, on pictures of
noise in 20 classes, by the evaluators of `taxolens evaluate` and all of their nulls. The activations
are there before. In every round one process measures the SAEs anew, then two; printed is the median
over rounds of the ratio of their `seconds` in results.json, which leave imports out, and whether all
numbers are equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.plugin.reporting.results import Results
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

BAR = 1.8
WIDTH, BLOCKS, PARENTS, CHILDREN = 192, 12, 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--d_sae", type=int, default=3072)
    parser.add_argument("--evaluators", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        evaluation(Path(folder), args)


def evaluation(folder: Path, args: argparse.Namespace) -> None:
    """Evaluation of 12 SAEs."""
    pictures, saes = folder / "pictures", folder / "saes"
    draw(args.images, pictures)
    random_model(folder / "model")
    for block in range(BLOCKS):
        random_sae(saes / f"block_{block}", block, args.d_sae, folder)
    outputs = {1: folder / "one", 2: folder / "two"}
    command = ["evaluate", str(saes), "--device", "cpu", "--keep_activations", "--static"]
    evaluators = ["--evaluators", *args.evaluators] if args.evaluators else []
    for output in outputs.values():  # makes the activations
        few = ["--n_permutations", "1", "--n_groups", "0", "--nulls", "permuted_classes"]
        taxolens(1, *command, *few, "--evaluators", "pair_depth", "--output_path", str(output))
    ratios, seconds = [], {1: [], 2: []}
    for _ in range(args.rounds):
        for n, output in outputs.items():
            taxolens(n, *command, *evaluators, "--replace", "--output_path", str(output))
            seconds[n].append(Results.load(output).provenance["seconds"])
        ratios.append(seconds[1][-1] / seconds[2][-1])
    one, two = (numbers(output) for output in outputs.values())
    ratio = statistics.median(ratios)
    print(
        f"{platform.machine()}, cpu, torch {torch.__version__}, 1 thread a process, {args.images} images, d_sae "
        f"{args.d_sae}; one process {statistics.median(seconds[1]):.1f} s, two "
        f"{statistics.median(seconds[2]):.1f} s; numbers {'equal' if one == two else 'DIFFERENT'}"
    )
    print(
        f"evaluation of {BLOCKS} SAEs, two processes over one    {ratio:.2f}x  ({min(ratios):.2f} to "
        f"{max(ratios):.2f})  {'within' if ratio >= BAR else 'BELOW'} the bar of {BAR}x"
    )


def taxolens(n_processes: int, *args: str) -> None:
    """Run a command on some processes of one thread each."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes), "-m"]
    subprocess.run(
        [sys.executable, "-m", *(torchrun if n_processes > 1 else []), "taxolens", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def numbers(folder: Path) -> list[tuple[str, str, str, str]]:
    """Every number of the results with its nulls, as text."""
    rows = Results.load(folder).rows()
    return [(sae.id, evaluator, metric, repr(number)) for sae, evaluator, metric, number in rows]


def draw(n: int, folder: Path) -> None:
    """Pictures of noise, each class of another brightness, in folders of two levels."""
    rng = np.random.default_rng(0)
    for i in range(n):
        parent, child = i % PARENTS, i // PARENTS % CHILDREN
        place = folder / "validation" / f"p{parent}" / f"p{parent}_{child}"
        place.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 100, (32, 32, 3)) + np.array([20 * parent, 30 * child, 50])
        Image.fromarray(noise.astype(np.uint8)).save(place / f"{i}.png")


def random_model(folder: Path) -> None:
    """A DINOv2 of 12 blocks for pictures of 32 px."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)


def random_sae(folder: Path, block: int, d_sae: int, place: Path) -> None:
    """A top-k SAE for the class token of one block."""
    torch.manual_seed(block)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=d_sae, k=32))
    torch.nn.init.normal_(sae.W_enc)
    for name, value in {
        "hook_name": f"blocks.{block}.hook_resid_post",
        "model_name": str(place / "model"),
        "dataset_path": str(place / "pictures"),
        "split": "train",
        "tokens": "class",
        "taxonomy": str(place / "pictures" / "validation"),
    }.items():
        sae.cfg.metadata[name] = value
    folder.mkdir(parents=True)
    sae.save_inference_model(folder)


if __name__ == "__main__":
    main()
