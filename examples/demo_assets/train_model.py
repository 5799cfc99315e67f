"""Train the embedded vision transformer from scratch on drawn pictures.

    python examples/demo_assets/train_model.py --out plugin/demo_assets/model
    python examples/demo_assets/train_model.py --out /tmp/model --pictures 500 --steps 20   # quick check

The architecture is Hugging Face's `Dinov2ForImageClassification`, small; nothing is pretrained. Supervision is
cross-entropy on the leaf classes alone, read from the class token: genera, families and realms are not
used in training. Training pictures are numbers 0, 1, 2, ... of each class in the "train" split (the first
ones are those that are shipped), each changed a little more at every visit; validation pictures are another
split of random numbers and only measured on. Needs torch, transformers, numpy and pillow.

Training starts with pictures on a white background; without this stage the pictures are too hard at first. The
shipped model took two CPU cores 22 minutes, of them 5 to draw; its numbers are in plugin/demo_assets/model/metrics.json.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from draw_pictures import PER_CLASS, shipped_pixels
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification
from world import CLASS_NAMES, LEVELS, SIZE, level_labels

MEAN = STD = 0.5
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
}


def _shipped(job: tuple[int, int, str]) -> np.ndarray:
    return shipped_pixels(*job)


def draw_sets(per_class: dict[str, int], workers: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(n, 3, 64, 64) uint8 pictures and (n,) int64 labels of each split, drawn by `workers` processes."""
    jobs = [
        (label, i, split)
        for split, count in per_class.items()
        for i in range(count)
        for label in range(len(CLASS_NAMES))
    ]
    pixels = np.empty((len(jobs), 3, SIZE, SIZE), dtype=np.uint8)
    # forked before torch has any thread: workers that start anew would each import torch first
    method = "fork" if sys.platform == "linux" else None
    with multiprocessing.get_context(method).Pool(workers) as pool:
        for n, picture in enumerate(pool.imap(_shipped, jobs, chunksize=64)):
            pixels[n] = picture.transpose(2, 0, 1)
    sizes = [count * len(CLASS_NAMES) for count in per_class.values()]
    labels = torch.tensor([label for label, _, _ in jobs])
    parts = zip(torch.from_numpy(pixels).split(sizes), labels.split(sizes))
    return dict(zip(per_class, parts))


def normalise(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def vary(pictures: Tensor) -> Tensor:
    """The batch with each picture shifted, turned, resized, mirrored and recoloured a little at random."""
    n, device = len(pictures), pictures.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape, device=device).uniform_(low, high)

    angle, size = uniform(-0.2, 0.2), uniform(0.85, 1.15)
    mirror = torch.randint(0, 2, (n,), device=device) * 2 - 1
    cos, sin = size * angle.cos(), size * angle.sin()
    frame = torch.stack(
        [
            torch.stack([cos * mirror, -sin, uniform(-0.12, 0.12)], dim=1),
            torch.stack([sin * mirror, cos, uniform(-0.12, 0.12)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(frame, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    channels = torch.rand(n, 3, device=device).argsort(dim=1)
    pictures = pictures.gather(1, channels[:, :, None, None].expand_as(pictures))
    return pictures * uniform(0.8, 1.2, 3, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)


class Pupil(torch.nn.Module):
    """The model in training: a head on the class token, and a head on the mean patch that is removed
    afterwards. From scratch, patches become informative long before the class token attends to the
    right ones; with both heads on the same labels, both learn from the start."""

    def __init__(self, model: Dinov2ForImageClassification) -> None:
        super().__init__()
        self.model = model
        self.patch_head = torch.nn.Linear(model.config.hidden_size, len(CLASS_NAMES))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits from the class token, as the whole model gives them while the half of its head
        that reads the mean patch stays zero; and from the mean patch."""
        tokens = self.model.dinov2(pixel_values).last_hidden_state
        head = self.model.classifier
        by_class_token = F.linear(tokens[:, 0], head.weight[:, : tokens.shape[2]], head.bias)
        return by_class_token, self.patch_head(tokens[:, 1:].mean(dim=1))


def build_model(args: argparse.Namespace) -> Dinov2ForImageClassification:
    config = Dinov2Config(
        image_size=SIZE,
        patch_size=8,
        hidden_size=args.hidden,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        mlp_ratio=4,
        initializer_range=0.05,  # 0.02 suits widths of many hundreds; 96 wants about 1 / (2 sqrt(96))
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: i for i, name in enumerate(CLASS_NAMES)},
    )
    model = Dinov2ForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight[:, args.hidden :] = 0
    return model


def train(
    model: Dinov2ForImageClassification,
    pixels: Tensor,
    labels: Tensor,
    plain: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    deadline: float,
) -> int:
    """AdamW with warm-up and cosine decay; returns the number of steps made. A run short of time decays sooner."""
    device = pixels.device
    pupil = Pupil(model).to(device)
    decayed = [p for p in pupil.parameters() if p.ndim > 1]
    others = [p for p in pupil.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    model.train()
    start, step, order = time.monotonic(), 0, torch.empty(0, dtype=torch.long, device=device)
    progress = 0.0
    while progress < 1.0:
        if len(order) < args.batch:
            order = torch.cat([order, torch.randperm(len(labels), device=device)])
        index, order = order[: args.batch], order[args.batch :]
        # First lessons: the subject alone on white paper, then ever fewer of these.
        n_plain = round(len(index) * min(1.0, max(0.0, (0.4 - progress) / 0.25)))
        lesson = torch.randint(len(plain[1]), (n_plain,), device=device)
        seen = torch.cat([plain[0][lesson], pixels[index[n_plain:]]])
        wanted = torch.cat([plain[1][lesson], labels[index[n_plain:]]])
        rate = (
            args.lr
            * min(1.0, (step + 1) / args.warmup)
            * (0.5 + 0.5 * math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures = vary(normalise(seen))
        if progress < args.small_until:  # a quarter of the patches, a quarter of the time
            pictures = F.interpolate(pictures, SIZE // 2, mode="area")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            both = pupil(pictures)
        losses = [F.cross_entropy(logits.float(), wanted) for logits in both]
        loss = losses[0] + losses[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / max(1.0, deadline - start))
        if step % 100 == 0 or step == 1:
            seen = f"step {step:6d}  loss {loss.item():.3f}"
            print(f"{seen}  {elapsed:.0f} s  {progress:.0%}", flush=True)
    return step


def save(model: Dinov2ForImageClassification, out: Path) -> None:
    """float16 on disk, and a config that says float32, so that it loads as float32."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().half().cpu().contiguous() for name, w in model.state_dict().items()}
    path = out / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner's eyes only; this file is packaged
    config = {
        **model.config.to_diff_dict(),
        "architectures": ["Dinov2ForImageClassification"],
        "dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")


@torch.no_grad()
def class_tokens(model: Dinov2ForImageClassification, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Class token after every block (blocks, n, d), and the logits (n, classes)."""
    tokens, logits = [], []
    for batch in pixels.split(256):
        x = normalise(batch)
        hidden = model.dinov2(x, output_hidden_states=True).hidden_states[1:]
        tokens.append(torch.stack([h[:, 0] for h in hidden]).float())
        logits.append(model(x).logits.float())
    return torch.cat(tokens, dim=1), torch.cat(logits)


def measure(
    model: Dinov2ForImageClassification,
    known: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
) -> dict[str, object]:
    """Held-out accuracy at every level, and of the nearest known picture's label for each block's class token."""
    levels = torch.from_numpy(level_labels()).to(held_out[1].device)
    known_tokens, _ = class_tokens(model, known[0])
    tokens, logits = class_tokens(model, held_out[0])

    def by_level(predicted: Tensor) -> dict[str, float]:
        right = (levels[predicted] == levels[held_out[1]]).float().mean(dim=0)
        return {level: round(float(share), 4) for level, share in zip(LEVELS, right)}

    neighbours = []
    for reference, query in zip(known_tokens, tokens):
        reference = reference - reference.mean(dim=0)
        query = query - query.mean(dim=0)
        nearest = (F.normalize(query, dim=1) @ F.normalize(reference, dim=1).T).argmax(dim=1)
        neighbours.append(by_level(known[1][nearest]))
    return {
        "validation_pictures": len(held_out[1]),
        "validation_accuracy": by_level(logits.argmax(dim=1)),
        "nearest_neighbour_accuracy_per_block": neighbours,
        "chance": {level: round(_chance(levels[:, i]), 4) for i, level in enumerate(LEVELS)},
    }


def _chance(groups: Tensor) -> float:
    """Accuracy of the best constant prediction."""
    return float(groups.bincount().max() / len(groups))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, configs and metrics.json"
    )
    parser.add_argument(
        "--pictures", type=int, default=24_000, help="training pictures drawn beforehand"
    )
    parser.add_argument("--steps", type=int, default=2_650)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument(
        "--small-until",
        type=float,
        default=0.72,
        help="share of the run in which pictures are halved in size first, which is much faster",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that draw"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=math.inf,
        help="decay and stop by then, drawing included",
    )
    args = parser.parse_args()

    start = time.monotonic()
    torch.manual_seed(args.seed)
    per_class = {
        "train": max(1, args.pictures // len(CLASS_NAMES)),
        "validation": PER_CLASS["validation"],
        "plain": 100,
    }
    drawn = draw_sets(per_class, args.workers)
    pixels, labels = (t.to(args.device) for t in drawn["train"])
    plain_pixels, plain_labels = (t.to(args.device) for t in drawn["plain"])
    held_out_pixels, held_out_labels = (t.to(args.device) for t in drawn["validation"])
    drawing = time.monotonic() - start
    print(f"{len(labels)} pictures drawn in {drawing:.0f} s", flush=True)

    model = build_model(args).to(args.device)
    steps = train(
        model, pixels, labels, (plain_pixels, plain_labels), args, deadline=start + args.max_seconds
    )
    save(model, args.out)

    # measured as it is shipped: read back from the rounded file
    model = Dinov2ForImageClassification.from_pretrained(args.out).float().eval().to(args.device)
    shipped = PER_CLASS["train"] * len(CLASS_NAMES)
    metrics = {
        **measure(model, (pixels[:shipped], labels[:shipped]), (held_out_pixels, held_out_labels)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_pictures": len(labels),
        "steps": steps,
        "batch": args.batch,
        "seed": args.seed,
        "drawing_seconds": round(drawing, 1),
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
