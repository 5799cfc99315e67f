"""Little pictures in every form that tests need."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(red: int, size: tuple[int, int] = (6, 5)) -> Image.Image:
    return Image.new("RGB", size, (red, 0, 0))


def noise(seed: int, size: tuple[int, int] = (10, 12)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def hf_dataset(
    n: int = 6,
    names: Sequence[str] = ("ant", "bee", "cat"),
    corrupt: Iterable[int] = (),
    draw: Any = lambda i: plain(i * 10 % 256),
) -> datasets.Dataset:
    """n images called 0.png, 1.png, ... of classes 0, 1, 2, 0, ...; those in `corrupt` are."""
    corrupt = set(corrupt)
    cells = [
        {"bytes": b"no picture" if i in corrupt else encoded(draw(i)), "path": f"{i}.png"}
        for i in range(n)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    labels = [i % len(names) for i in range(n)]
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def class_folders(root: Path, tree: dict[str, list[int]]) -> Path:
    """A folder of plain red pictures: folder -> reds."""
    for folder, reds in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for red in reds:
            plain(red).save(root / folder / f"{red:03}.png")
    return root
