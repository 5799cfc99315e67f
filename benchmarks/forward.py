"""Cost of hook points: our forward relative to a plain Hugging Face forward of the same images.

    python benchmarks/forward.py [--device cuda] [--images 32] [--rounds 9]

The model is a DINOv2 ViT-S/14 with random weights at 224 px; time does not depend on the weights.
Every round runs each variant once, in turns, so that a change of the machine's speed affects all of
them. The output is the median over rounds of the ratio to the plain forward of the same round, with the
lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import taxolens  # noqa: F401
import torch
from taxolens.hooks.models.load import from_module, run_to_hooks
from taxolens.hooks.models.tokens import select_tokens
from transformers import Dinov2Config, Dinov2Model

BARS = {"one hook": 1.05, "all blocks' class tokens": 1.10, "stop at block 8 of 12": 0.80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=32, help="images in one forward")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    rows, reference = measured(args.device, args.dtype, args.images, args.rounds)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{platform.machine()}, {args.device} {device_name(args.device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {args.dtype}, {args.images} images at 224 px, ViT-S/14, "
        f"{args.rounds} rounds; plain forward {reference * 1e3:.0f} ms"
    )
    for name, row in rows.items():
        verdict = "within" if row["median"] <= row["bar"] else "ABOVE"
        print(
            f"{name:26} {row['median']:.3f}x  ({row['lowest']:.3f} to {row['highest']:.3f})  "
            f"{verdict} the bar of {row['bar']:.2f}x"
        )


def measured(
    device: str, dtype_name: str, n_images: int, rounds: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Variant -> its ratio to the plain forward, and its bar; and the median seconds of the plain forward."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    plain = Dinov2Model._from_config(config, attn_implementation="sdpa")
    bridged = Dinov2Model._from_config(config, attn_implementation="sdpa")
    bridged.load_state_dict(plain.state_dict())
    dtype = getattr(torch, dtype_name)
    plain = plain.eval().to(device, dtype)
    model = from_module(bridged.eval().to(device, dtype), family="dinov2")
    images = torch.randn(n_images, 3, 224, 224, device=device, dtype=dtype)

    blocks = [f"blocks.{i}.hook_resid_post" for i in range(12)]

    def class_token(activations: torch.Tensor) -> torch.Tensor:
        return select_tokens(activations, "class", has_class_token=True, n_register_tokens=0)

    ways: dict[str, Callable[[], object]] = {
        "plain Hugging Face": lambda: plain(images),
        # The last block's output, so that nothing is saved by stopping early.
        "one hook": lambda: run_to_hooks(model, images, blocks[-1:]),
        "all blocks' class tokens": lambda: run_to_hooks(model, images, blocks, reduce=class_token),
        "stop at block 8 of 12": lambda: run_to_hooks(model, images, blocks[7:8]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for round_number in range(-2, rounds):
            for name, run in ways.items():
                synchronise(device)
                start = time.perf_counter()
                run()
                synchronise(device)
                if round_number >= 0:
                    seconds[name].append(time.perf_counter() - start)

    reference = seconds.pop("plain Hugging Face")
    rows = {}
    for name, times in seconds.items():
        ratios = [ours / plain for ours, plain in zip(times, reference)]
        rows[name] = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "bar": BARS[name],
        }
    return rows, statistics.median(reference)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else ""


if __name__ == "__main__":
    main()
