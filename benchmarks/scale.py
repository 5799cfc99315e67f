"""The table of docs/scale.md: what three datasets take with ViT-g, from stored measurements and arithmetic.

    python benchmarks/scale.py [--store]

FLOPs of a forward pass are counted by torch on the model without weights (meta device). The rate of
decoding is that of docs/results/feeding.json; those of a GPU are two rows of docs/results/gpu.json. Several
GPUs are taken to do as many times as much, which is no measurement.
"""

from __future__ import annotations

import argparse
from typing import Any

import timing
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

DATASETS = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122, "a billion images": 10**9}
MODEL, PATCHES, D_SAE, EPOCHS, THRESHOLDS = "g", 256, 12_288, 30, 14
FORWARD = "to the class tokens of all blocks, ViT-g"
STEP = "topk, d 1,536, m 12,288, batch 4,096: ours"
GPUS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true", help="write the table of docs/scale.md")
    args = parser.parse_args()
    text = shown(forward_flops(MODEL), timing.stored("feeding"), timing.stored("gpu"))
    print(text)
    if args.store:
        timing.show("scale", text, timing.ROOT / "docs" / "scale.md")


def forward_flops(size: str) -> float:
    """FLOPs of the forward pass of one image at 224 pixels."""
    width, blocks, heads, swiglu = timing.MODELS[size]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        use_swiglu_ffn=swiglu, image_size=224, patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        model = Dinov2Model._from_config(config, attn_implementation="eager").eval()
        pixels = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return float(counter.get_total_flops())


def shown(flops: float, feeding: dict[str, Any], gpu: dict[str, Any]) -> str:
    """The table."""
    width, blocks, *_ = timing.MODELS[MODEL]
    rate = feeding["images_per_second"]["ours"]
    head = ["", *DATASETS]
    of = list(DATASETS.values())
    images, tokens = measured(gpu, FORWARD), measured(gpu, STEP)
    rows = [
        ["images", *(f"{n:,}" for n in of)],
        [
            f"decoding, at {rate:,.0f} images/s a core",
            *(f"{hours(n / rate)} of a core" for n in of),
        ],
        [f"forward, {flops / 1e12:.2f} TFLOP an image", *(f"{n * flops:.1e} FLOP" for n in of)],
        [f"the same on {GPUS} GPUs", *(hours(n / images / GPUS) for n in of)],
        [f"class tokens of {blocks} blocks, fp16", *(size(2 * n * blocks * width) for n in of)],
        ["patch tokens of one block, fp16", *(size(2 * n * PATCHES * width) for n in of)],
        [
            f"{blocks} SAEs of {D_SAE:,} latents, {EPOCHS} epochs of class tokens, {GPUS} GPUs",
            *(hours(n * blocks * EPOCHS / tokens / GPUS) for n in of),
        ],
        [
            f"{blocks} SAEs, 1 epoch of patch tokens, {GPUS} GPUs",
            *(hours(n * blocks * PATCHES / tokens / GPUS) for n in of),
        ],
    ]
    text = (
        f"ViT-{MODEL} at 224 pixels, width {width:,}. The rate of decoding is measured (docs/results/feeding.json; "
        f"{timing.on_what(feeding)}). FLOPs are counted, bytes computed. "
        f"{images / rate:.1f} such cores decode as fast as one GPU computes. Times of GPUs are {GPUS} times the rates of one H100 "
        f"(docs/results/gpu.json: {images:,.0f} images/s from JPEGs in bf16 autocast, {tokens:,.0f} tokens/s of TopK in bf16 "
        f"autocast; torch {gpu['machine']['torch']}); {GPUS} GPUs together were **not measured**."
    )
    return f"{timing.table(head, rows)}\n\n{text}"


def measured(gpu: dict[str, Any], row: str) -> float:
    """The rate of a row of `gpu.py`."""
    (value,) = (value for name, value in gpu["rows"] if name.endswith(row))
    return float(value.split()[0].replace(",", ""))


def hours(seconds: float) -> str:
    for unit, length in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e12:,.3g} TB" if n_bytes >= 1e12 else f"{n_bytes / 1e9:,.3g} GB"


if __name__ == "__main__":
    main()
