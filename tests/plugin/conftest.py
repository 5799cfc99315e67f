"""A tiny vision transformer and a few pictures, and runs of them that take a second."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.models.load import load_vision_model
from tiny_runs import WIDTH, WORLD_CLASSES, make_training


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 with random weights: two blocks of width 16, a class token and four patches."""
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.BitImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of noise in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(10):
        path = folder / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of eight classes under four, 2 a class to train on and 4 held out."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for split, n in (("train", 2), ("validation", 4)):
        for c, name in enumerate(WORLD_CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 90, (20, 20, 3)) + np.array(
                    [50 * c, 0, 150 - 50 * c]
                )
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def vit(vit_folder: Path) -> Any:
    return load_vision_model(vit_folder)


@pytest.fixture(scope="session")
def images(photos: Path) -> ImageDataset:
    return load_images(photos)


@pytest.fixture
def training(
    vit: Any,
    vit_folder: Path,
    photos: Path,
    images: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    """Makers of configs and runners of a run of ten steps, with outputs in `tmp_path`."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # most of the time of such a run
    return make_training(vit, vit_folder, photos, images, tmp_path)
