"""Cost of training one SAE at every block relative to one SAE, both without cached activations.

    python benchmarks/training.py [--device cuda] [--images 256] [--rounds 3]

A DINOv2 ViT-S/14 with random weights at 224 px, class tokens, ReLU SAEs eight times as wide as the
model, drawn pictures; SAELens's trainer in both runs, through our runners, with nothing cached. In
every round one SAE at the last block is trained, then twelve, one at every block, from one forward;
printed is the median over rounds of the ratio of their times.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time

import datasets
import numpy as np
import taxolens
import torch
from PIL import Image
from sae_lens import LoggingConfig, StandardTrainingSAEConfig
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import from_module
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

BAR = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="images in one forward and one step")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.INFO)

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    plain = Dinov2Model._from_config(config, attn_implementation="sdpa").eval().to(args.device)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    model = from_module(plain, processor=processor, family="dinov2")
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(args.images, folder)
        blocks = [f"blocks.{i}.hook_resid_post" for i in range(12)]
        seconds = {1: [], 12: []}
        for round_number in range(-1, args.rounds):
            for hook_names in (blocks[-1:], blocks):
                took = train(model, pictures, hook_names, args)
                if round_number >= 0:
                    seconds[len(hook_names)].append(took)
    ratios = [twelve / one for one, twelve in zip(seconds[1], seconds[12])]
    print(
        f"{platform.machine()}, {args.device}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {args.images * args.epochs} images at 224 px, ViT-S/14, d_sae 3072; "
        f"one SAE {statistics.median(seconds[1]):.1f} s, twelve {statistics.median(seconds[12]):.1f} s"
    )
    verdict = "within" if statistics.median(ratios) <= BAR else "ABOVE"
    print(
        f"twelve SAEs against one    {statistics.median(ratios):.3f}x  "
        f"({min(ratios):.3f} to {max(ratios):.3f})  {verdict} the bar of {BAR:.2f}x"
    )


def draw(n: int, folder: str) -> str:
    """A saved dataset of `n` pictures of noise, 256 px."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)) for _ in range(n)
    ]
    table = datasets.Dataset.from_dict(
        {"image": pictures, "label": [i % 2 for i in range(n)]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
        ),
    )
    table.save_to_disk(f"{folder}/pictures")
    return f"{folder}/pictures"


def train(model: object, pictures: str, hook_names: list[str], args: argparse.Namespace) -> float:
    config = taxolens.VisionMultiSAERunnerConfig(
        saes={
            name: StandardTrainingSAEConfig(d_in=384, d_sae=3072, device=args.device)
            for name in hook_names
        },
        hook_names={name: name for name in hook_names},
        model_name="dinov2-small, random weights",
        dataset_path=pictures,
        training_tokens=args.images * args.epochs,
        train_batch_size_tokens=args.batch,
        store_batch_size_prompts=args.batch,
        n_batches_in_buffer=1,
        num_workers=args.num_workers,
        device=args.device,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = taxolens.VisionMultiSAETrainingRunner(
        config, override_dataset=load_images(pictures), override_model=model
    )
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
