"""Images a second from 500-pixel JPEGs to 224 pixels: ours, plain Pillow, and datasets + transformers.

    python benchmarks/feeding.py [--images 200] [--rounds 5] [--num-workers 0] [--store]
    python benchmarks/feeding.py --write

All resize to 256 on the shorter edge, crop 224 and normalise. "plain Pillow": open, convert, resize,
crop, and normalise with NumPy, in one loop; it is the floor. Without workers, CPU seconds of one thread
are counted, with workers wall time. "datasets + transformers": the dataset
decodes, the image processor of transformers does the rest, in a DataLoader with as many workers. Ratios
are of images a second to plain Pillow's in the same round. `ours, jpeg_edge` decodes JPEGs at a reduced size, which
changes pixel values.
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
import timing
import torch
from PIL import Image
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.loader import ImageLoader
from taxolens.hooks.images.preprocess import PilPreprocess
from torch.utils.data import DataLoader
from transformers import BitImageProcessorPil

BATCH = 32
SQUARE = {"height": 224, "width": 224}
PROCESSOR = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=SQUARE)
MEAN, STD = (np.float32(PROCESSOR.image_mean), np.float32(PROCESSOR.image_std))
EDGE = 160  # of `jpeg_edge`: 500 x 375 pixels are decoded at 250 x 188


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        timing.show("feeding", shown(timing.stored("feeding")))
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures = timing.draw(args.images, Path(folder))
        paths = sorted(pictures.rglob("*.jpg"))
        n_bytes = sum(path.stat().st_size for path in paths) / len(paths)
        ways = ways_of(pictures, paths, args.num_workers)
        equal = torch.equal(ways["plain Pillow"](), ways["ours"]())
        clock = time.perf_counter if args.num_workers else time.process_time
        seconds = timing.alternate(ways, args.rounds, clock)
    found = {
        "machine": timing.machine(),
        "images": args.images,
        "bytes_an_image": round(n_bytes),
        "num_workers": args.num_workers,
        "equal_to_plain_pillow": equal,
        "images_per_second": {
            name: timing.rounded(args.images / sorted(times)[len(times) // 2])
            for name, times in seconds.items()
        },
        "ratios": {name: timing.ratios(seconds, "plain Pillow", name) for name in seconds},
    }
    print(shown(found))
    if args.store:
        timing.store("feeding", found)
        timing.show("feeding", shown(found))


def ways_of(
    pictures: Path, paths: list[Path], num_workers: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each way: all images once; the last batch comes back."""
    import datasets

    def one(path: Path) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), 3)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)))
        pixels = (pixels * (1 / 255)).astype(np.float32)
        return np.moveaxis((pixels - MEAN) / STD, -1, 0)

    def pillow() -> torch.Tensor:
        last = torch.empty(0)
        for start in range(0, len(paths), BATCH):
            last = torch.from_numpy(np.stack([*map(one, paths[start : start + BATCH])]))
        return last

    preprocess = PilPreprocess.from_config(PROCESSOR.to_dict())

    def ours(**options: Any) -> Callable[[], torch.Tensor]:
        images = load_images(pictures, **options)
        found = [images.reader(i).path or "" for i in range(len(images))]
        order = np.argsort(found, kind="stable").tolist()

        def run() -> torch.Tensor:
            loader = ImageLoader(images, preprocess, batch_size=BATCH, num_workers=num_workers)
            last = torch.empty(0)
            for batch in loader.batches(order):
                last = batch.pixel_values
            return last

        return run

    table = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")

    def processed(rows: list[dict[str, Any]]) -> torch.Tensor:
        images = [row["image"].convert("RGB") for row in rows]
        return PROCESSOR(images, return_tensors="pt")["pixel_values"]

    def usual() -> torch.Tensor:
        loader = DataLoader(
            table, batch_size=BATCH, num_workers=num_workers, collate_fn=processed  # type: ignore[arg-type]
        )  # fmt: skip
        return list(loader)[-1]

    return {
        "plain Pillow": pillow,
        "datasets + transformers": usual,
        "ours": ours(),
        f"ours, jpeg_edge={EDGE}": ours(jpeg_edge=EDGE),
    }


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = []
    for name, rate in found["images_per_second"].items():
        ratio = found["ratios"][name]
        spread = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
        rows.append((name, f"{rate:,.0f}", spread))
    workers = found["num_workers"]
    clock = "wall time" if workers else "CPU time of one thread"
    equal = "equal to the bit" if found["equal_to_plain_pillow"] else "not equal"
    setting = (
        f"{found['images']} drawn JPEGs of 500 x 375 pixels ({found['bytes_an_image'] / 1000:.0f} kB each), "
        f"{workers or 'no'} worker process(es), {clock}; pixels of ours and of plain Pillow are {equal}"
    )
    head = ("way", "images/s", "speed over plain Pillow")
    return f"{timing.table(head, rows)}\n\n{setting}; {timing.on_what(found)}."


if __name__ == "__main__":
    main()
