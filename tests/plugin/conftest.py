"""A tiny vision transformer and a few pictures, and runs of them that take a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.plugin.training.rng import seeded
from taxolens.plugin.training.runner import VisionMultiSAETrainingRunner, VisionSAETrainingRunner

WIDTH = 16
HOOK = "blocks.0.hook_resid_post"
LAST_HOOK = "blocks.1.hook_resid_post"
BATCH = 8
WORLD_CLASSES = tuple(
    f"{parent}/{parent}_{i}" for parent in ("animal", "plant", "stone", "tool") for i in (0, 1)
)


class MeddlingSAE(TopKTrainingSAE):
    """A top-k SAE that calls `action` in the middle of one training step, or of one save.

    Its weights and config are those of any other top-k SAE: a run of it can be resumed without.
    """

    def __init__(
        self,
        cfg: TopKTrainingSAEConfig,
        action: Callable[[], object],
        *,
        step: int | None = None,
        save: int | None = None,
        final_save: int | None = None,
        seed: int = 42,
    ) -> None:
        with seeded(seed):
            super().__init__(copy.deepcopy(cfg))
        self.action = action
        self.step, self.save, self.final_save = step, save, final_save
        self.saves = self.final_saves = 0

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if step_input.n_training_steps == self.step:
            self.action()
        return super().training_forward_pass(step_input)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        self.saves += 1
        if self.saves == self.save:
            self.action()
        return super().save_model(path)

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        self.final_saves += 1
        if self.final_saves == self.final_save:
            self.action()
        return super().save_inference_model(path)


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


def make_training(
    vit: Any, vit_folder: Path, photos: Path, images: ImageDataset, folder: Path
) -> SimpleNamespace:
    """What the fixture `training` is, with outputs in `folder`."""
    base = {
        "model_name": str(vit_folder),
        "dataset_path": str(photos),
        "training_tokens": 10 * BATCH,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 2,
        "n_batches_for_norm_estimate": 2,
        "lr": 0.01,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": str(folder / "checkpoints"),
        "checkpoint_id": "run",
        "output_path": str(folder / "output"),
        "verbose": False,
    }

    def sae(d_in: int = WIDTH) -> TopKTrainingSAEConfig:
        return TopKTrainingSAEConfig(d_in=d_in, d_sae=32, k=4)

    def single(**changes: Any) -> VisionSAERunnerConfig[Any]:
        logger = LoggingConfig(log_to_wandb=False)
        settings = {"sae": sae(), "hook_name": HOOK, **base, "logger": logger, **changes}
        return VisionSAERunnerConfig(**settings)

    def multi(**changes: Any) -> VisionMultiSAERunnerConfig:
        logger = LoggingConfig(log_to_wandb=False)
        settings = {
            "saes": {"first": sae(), "last": sae()},
            "hook_names": {"first": HOOK, "last": LAST_HOOK},
            **base,
            "logger": logger,
            **changes,
        }
        return VisionMultiSAERunnerConfig(**settings)

    def runner(cfg: Any, **overrides: Any) -> Any:
        is_multi = isinstance(cfg, VisionMultiSAERunnerConfig)
        kind: Any = VisionMultiSAETrainingRunner if is_multi else VisionSAETrainingRunner
        return kind(cfg, **{"override_model": vit, "override_dataset": images, **overrides})

    return SimpleNamespace(
        sae=sae,
        single=single,
        multi=multi,
        runner=runner,
        meddling=MeddlingSAE,
        checkpoints=folder / "checkpoints" / "run",
        output=folder / "output",
        folder=folder,
    )
