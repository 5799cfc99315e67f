"""What bfloat16 costs and saves: `autocast` of the SAEs, and `autocast_lm` of the model.

    python benchmarks/autocast.py --model FOLDER --dataset FOLDER [--device cuda] [--ways autocast] [--store]
    python benchmarks/autocast.py --small
    python benchmarks/autocast.py --write

The dataset has a training and a validation split. Every architecture is trained on class tokens from the same
start in float32, with `autocast`, and in float32 on activations of `autocast_lm`; each with two seeds. R² is
measured in float32, on validation activations in float32, as `taxolens evaluate` computes them. Beside the change by
bfloat16 is that by another seed. Times are those of the training alone. On a CPU without instructions for
bfloat16 the forward passes of `autocast_lm` take minutes: `--ways autocast --model_images 50` leaves most of them out.
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
import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training.config import VisionSAERunnerConfig
from taxolens.plugin.training.runner import VisionSAETrainingRunner

K = 16
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K},
    "jumprelu": {"l0_coefficient": 1.0},
    "mp": {"k": K},
}
WAYS: dict[str, dict[str, bool]] = {
    "float32": {},
    "autocast": {"autocast": True},
    "autocast_lm": {"autocast_lm": True},
}
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hook_name", help="by default after two thirds of the blocks")
    parser.add_argument(
        "--images", type=int, nargs=2, default=(8000, 2000), help="of training, of validation"
    )
    parser.add_argument(
        "--model_images", type=int, default=2000, help="passed through the model in bfloat16"
    )
    parser.add_argument(
        "--ways", nargs="+", default=["autocast", "autocast_lm"], choices=[*WAYS][1:]
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--d_sae", type=int, default=1536)
    parser.add_argument(
        "--small", action="store_true", help="drawn pictures and a tiny model, a minute"
    )
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("autocast", shown(timing.stored("autocast")))
        return
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(args, Path(folder))
    finally:
        logging.disable(logging.NOTSET)
    print(shown(found))
    if args.store:
        timing.store("autocast", found)
        timing.show("autocast", shown(found))


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is stored."""
    if args.small:
        args.model = str(timing.save_vit("tiny", folder / "model"))
        args.dataset = str(timing.draw(64, folder / "pictures"))
        args.images, args.steps, args.batch, args.d_sae = (64, 64), 20, 32, 256
        args.model_images = 16
    model = load_vision_model(args.model, device=args.device)
    hook_name = args.hook_name = (
        args.hook_name or f"blocks.{model.cfg.n_layers * 2 // 3}.hook_resid_post"
    )
    splits = ("train", "train") if args.small else ("train", "validation")
    train, validation, few = (
        load_images(args.dataset, split=split, max_images=count)
        for split, count in zip(
            (*splits, splits[1]), (*args.images, args.model_images), strict=True
        )
    )
    x = (
        activations(model, validation, folder / "validation")
        .tensor(hook_name)
        .flatten(0, 1)
        .float()
    )
    rows = []
    for architecture in ARCHITECTURES:
        row: dict[str, Any] = {"architecture": architecture}
        for way in ("float32", *args.ways):
            row[way] = [
                trained(args, architecture, way, seed, model, train, x, folder) for seed in SEEDS
            ]
            print(architecture, way, row[way], flush=True)
        rows.append(row)
    return {
        "machine": timing.machine(),
        "settings": {
            "hook_name": hook_name, "images": list(args.images), "steps": args.steps, "batch": args.batch,
            "d_in": x.shape[1], "d_sae": args.d_sae, "k": K, "device": args.device,
        },
        "saes": rows,
        "model": in_bfloat16(model, few, folder),
    }  # fmt: skip


def activations(
    model: Any, images: ImageDataset, place: Path, *, autocast: bool = False
) -> ActivationCache:
    """Class tokens of every block."""
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    return ActivationCache.build(
        model, images, hooks, tokens="class", autocast=autocast, path=place, progress=False
    )


def in_bfloat16(model: Any, images: ImageDataset, folder: Path) -> dict[str, Any]:
    """Seconds in float32 and in bfloat16, and how far the class token of each block changes.

    That is the root of its mean squared change, over that of its distance to the mean.
    """
    found, seconds = [], []
    for autocast in (False, True):
        start = time.perf_counter()
        found.append(activations(model, images, folder / f"model-{autocast}", autocast=autocast))
        seconds.append(timing.rounded(time.perf_counter() - start))
    error = {}
    for name in found[0].hook_names:
        x, y = (cache.tensor(name).flatten(0, 1).double() for cache in found)
        error[name] = timing.rounded(float((y - x).norm() / (x - x.mean(0)).norm()))
    return {"images": len(images), "seconds": seconds, "error": error}


def trained(
    args: argparse.Namespace,
    architecture: str,
    way: str,
    seed: int,
    model: Any,
    images: ImageDataset,
    x: torch.Tensor,
    folder: Path,
) -> dict[str, float]:
    """R², L0 and dead latents on activations x (n, d_in), and seconds a step, of an SAE that is trained for it."""
    change, m = WAYS[way], args.d_sae
    sae = {
        "architecture": architecture,
        "d_in": x.shape[1],
        "d_sae": m,
        **ARCHITECTURES[architecture],
    }
    if architecture.startswith("matryoshka"):
        sae["matryoshka_widths"] = [m // 8, m // 2, m]
    output = folder / "output"
    cfg = VisionSAERunnerConfig(
        sae=TrainingSAEConfig.from_dict({**sae, "normalize_activations": "expected_average_only_in"}),
        model_name=args.model, dataset_path=args.dataset, hook_name=args.hook_name, tokens="class",
        training_tokens=args.steps * args.batch, train_batch_size_tokens=args.batch, lr=1e-3,
        seed=seed, device=args.device, output_path=str(output), overwrite_output=True,
        checkpoint_path=None, logger=LoggingConfig(log_to_wandb=False), verbose=False,
        use_cached_activations=True,
        cached_activations_path=str(folder / f"train-{change.get('autocast_lm', False)}"), **change,
    )  # fmt: skip
    runner = VisionSAETrainingRunner(cfg, override_model=model, override_dataset=images)
    runner._cache()  # before the clock starts
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    loaded = SAE.load_from_disk(output)
    with torch.no_grad():
        z = loaded.encode(x)
        z = z.to_dense() if z.is_sparse else z
        r2 = 1 - (loaded.decode(z) - x).square().sum() / (x - x.mean(0)).square().sum()
    fired = z != 0
    return {
        "r2": round(float(r2), 4),
        "l0": timing.rounded(float(fired.sum(1).float().mean())),
        "dead": timing.rounded(float(1 - fired.any(0).float().mean())),
        "step": timing.rounded(seconds / args.steps),
    }


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    ways = [way for way in WAYS if way in found["saes"][0]]
    rows = []
    for row in found["saes"]:
        r2 = {way: [one["r2"] for one in row[way]] for way in ways}
        exact, *others = r2.values()
        step = {way: statistics.mean(one["step"] for one in row[way]) for way in ways}
        changes = [
            statistics.mean(abs(a - b) for a, b in zip(exact, other, strict=True))
            for other in others
        ]
        rows.append(
            (
                row["architecture"],
                *(" and ".join(f"{value:.3f}" for value in values) for values in r2.values()),
                *(f"{change:.4f}" for change in changes),
                f"{abs(exact[0] - exact[1]):.4f}",
                f"{step['autocast'] / step['float32']:.1f}" if "autocast" in step else "",
            )
        )
    head = ("architecture", "R², float32", *(f"`{way}`" for way in ways[1:]), *(f"change by `{way}`" for way in ways[1:]),
            "change by another seed", "time of `autocast` over float32")  # fmt: skip
    of, model = found["settings"], found["model"]
    exact, rounded = model["seconds"]
    blocks = ", ".join(
        f"{name.split('.')[1]}: {value:.2%}" for name, value in model["error"].items()
    )
    return (
        f"{timing.table(head, rows)}\n\nClass tokens at {of['hook_name']} of {of['images'][0]:,} images, d {of['d_in']}, "
        f"m {of['d_sae']:,}, k {of['k']}, {of['steps']:,} steps of {of['batch']}, two seeds; R² on {of['images'][1]:,} others. "
        f"`autocast_lm` changes the class tokens of {model['images']:,} images by these shares of their distance from the mean, "
        f"by block: {blocks}; decoding and forward passes took {rounded / exact:.1f} times as long as in float32. "
        f"On {of['device']}: {timing.on_what(found)}."
    )


if __name__ == "__main__":
    main()
