"""How costs grow: time per image, per class and per latent at four sizes each, and the exponents.

    python benchmarks/growth.py [--small] [--store]
    python benchmarks/growth.py --write

The exponent is the slope of log time over log size by least squares: 1 is linear. Extraction: JPEGs to
cached class tokens of a small model. Evaluation: the count-based evaluators (`evaluators.py`), with permuted classes, on
drawn firings, over images, classes (a tree of four children a node) and latents. Training: steps of
SAELens's trainer with topk, over latents. Each time is the smallest of the rounds, in CPU seconds of one
thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import taxolens
import timing
import torch
from evaluators import COUNT_BASED
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext

D_IN, L0, CHILDREN = 64, 32, 4
SMALLEST = {"images": 4096, "classes": 128, "latents": 2048}
FIXED = {"images": 4096, "classes": 256, "latents": 2048}
FACTORS = (1, 2, 4, 8)
EXTRACTED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a quarter of all sizes, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("growth", shown(timing.stored("growth")), timing.ROOT / "docs" / "scale.md")
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shrink, rounds = (4, 1) if args.small else (1, args.rounds)
    found: dict[str, Any] = {"machine": timing.machine(), "small": args.small, "rows": []}
    fixed = {name: size // shrink for name, size in FIXED.items()}
    for what, axis, run in (
        ("extraction", "images", extraction),
        ("evaluation", "images", evaluation),
        ("evaluation", "classes", evaluation),
        ("evaluation", "latents", evaluation),
        ("training step", "latents", training),
    ):
        smallest = EXTRACTED if what == "extraction" else SMALLEST[axis]
        sizes = [smallest // shrink * factor for factor in FACTORS]
        seconds = []
        for size in sizes:
            work = run({**fixed, axis: size})
            if not seconds:
                work()  # a warm-up
            seconds.append(min(timed(work) for _ in range(rounds)))
        slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        row = {"what": what, "axis": axis, "sizes": sizes, "exponent": round(slope, 2)}
        found["rows"].append({**row, "seconds": list(map(timing.rounded, seconds)), "fixed": fixed})
        print(f"{what} over {axis}: {seconds} s at {sizes}, exponent {slope:.2f}", flush=True)
    print(shown(found))
    if args.store:
        timing.store("growth", found)
        timing.show("growth", shown(found), timing.ROOT / "docs" / "scale.md")


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def extraction(sizes: dict[str, int]) -> Callable[[], object]:
    """Class tokens of both blocks of a small model."""
    folder = tempfile.TemporaryDirectory()  # deleted with `run`
    images = load_images(timing.draw(sizes["images"], Path(folder.name) / "pictures"))
    model = load_vision_model(str(timing.save_vit("tiny", Path(folder.name) / "model")))
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(timing.MODELS["tiny"][1])]

    def run(_: object = folder) -> object:
        return ActivationCache.build(model, images, hooks, progress=False, num_workers=0)

    return run


def evaluation(sizes: dict[str, int]) -> Callable[[], object]:
    """All of the count-based evaluators: updates, and their numbers with permuted classes."""
    n_images, n_classes, n_latents = (sizes[name] for name in ("images", "classes", "latents"))
    tree = tree_of(n_classes)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n_images) % n_classes
    shuffled = labels[torch.randperm(n_images, generator=generator)]
    batches = []
    for index in torch.arange(n_images).split(1024):
        z = torch.zeros(len(index), n_latents)
        fires = torch.randint(n_latents, (len(index), L0), generator=generator)
        z.scatter_(1, fires, torch.rand(fires.shape, generator=generator) + 0.1)
        x = torch.randn(len(index), D_IN, generator=generator)
        batches.append((x, z, labels[index], shuffled[index], index, index < n_images // 2))

    def run() -> None:
        context = EvaluationContext(
            tree, n_images, D_IN, n_latents, n_permutations=4,
            class_counts=np.bincount(labels, minlength=n_classes), b_dec=torch.zeros(D_IN),
        )  # fmt: skip
        made = [taxolens.EVALUATORS[name](context) for name in COUNT_BASED]
        for number, parts in enumerate(batches):
            batch = EvaluationBatch(*parts)
            for each in (context, *made):
                if number == 0:
                    each.calibrate(batch)
                each.update(batch)
        for each in made:
            each.compute()
            for permutation in context.permutations:
                each.compute(permutation=permutation)

    return run


def tree_of(n_classes: int) -> taxolens.Taxonomy:
    """A balanced tree of `n_classes` leaves, with four children a node."""
    edges, level, depth = [], [f"c{i}" for i in range(n_classes)], 0
    while len(level) > 1:
        depth += 1
        above = [f"n{depth}.{i}" for i in range(-(-len(level) // CHILDREN))]
        edges += [(above[i // CHILDREN], child) for i, child in enumerate(level)]
        level = above
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.csv"
        path.write_text("parent,child\n" + "\n".join(f"{p},{c}" for p, c in edges) + "\n")
        return taxolens.load_taxonomy(path, classes=[f"c{i}" for i in range(n_classes)])


def training(sizes: dict[str, int]) -> Callable[[], object]:
    """Some steps of SAELens's trainer with topk, with the sparse step."""
    cfg = TopKTrainingSAEConfig(d_in=D_IN, d_sae=sizes["latents"], k=L0)
    settings = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=1 << 40, device="cpu", autocast=False, lr=1e-4, lr_end=1e-4,
        lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
        lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=512,
        dead_feature_window=1000, feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(settings, with_sparse_step(TopKTrainingSAE(cfg)), iter(()))
    tokens = torch.randn(512, D_IN)

    def run() -> None:
        for _ in range(4):
            trainer.step(tokens)

    return run


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = [
        (
            row["what"],
            row["axis"],
            ", ".join(f"{size:,}" for size in row["sizes"]),
            ", ".join(f"{seconds:g}" for seconds in row["seconds"]),
            f"**{row['exponent']:.2f}**",
        )
        for row in found["rows"]
    ]
    head = ("cost of", "over", "sizes", "seconds", "exponent")
    fixed = ", ".join(f"{size:,} {name}" for name, size in found["rows"][0]["fixed"].items())
    return f"{timing.table(head, rows)}\n\nCPU seconds of one thread. Other sizes: {fixed}. {timing.on_what(found)}."


if __name__ == "__main__":
    main()
