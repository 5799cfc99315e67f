"""Configs and runners of training runs that take a second, and the classes of small pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.plugin.training.rng import seeded
from taxolens.plugin.training.runner import VisionMultiSAETrainingRunner, VisionSAETrainingRunner
from taxolens.registry.architectures.parts.sparse_step import SparseTopK

WIDTH = 16
HOOK = "blocks.0.hook_resid_post"
LAST_HOOK = "blocks.1.hook_resid_post"
BATCH = 8
WORLD_CLASSES = tuple(
    f"{parent}/{parent}_{i}" for parent in ("animal", "plant", "stone", "tool") for i in (0, 1)
)

SMALL_TOPK = {
    "architecture": "topk",
    "d_sae": 32,
    "k": 4,
    "checkpoint_path": None,
    "log_to_wandb": False,
    "verbose": False,
}
"""Settings of a run with a small SAE, without checkpoints and logging."""


def run_settings(vit_folder: Path, world: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run on pictures of `world`, as in its runner_cfg.json."""
    return {
        "model_name": str(vit_folder),
        "dataset_path": str(world),
        "split": "train",
        "tokens": "class",
        "taxonomy": str(world / "validation"),
        **changes,
    }


def save_sae(
    folder: Path, hook: str, settings: dict[str, Any], seed: int = 0, d_in: int = 16
) -> None:
    """An SAE with random weights, as a run of these settings saves it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=24, k=4))
        torch.nn.init.normal_(sae.W_enc)
    for name, value in {"hook_name": hook, "tokens": "class", **settings}.items():
        sae.cfg.metadata[name] = value
    folder.mkdir(parents=True)
    sae.save_inference_model(folder)


class MeddlingSAE(SparseTopK):
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


def make_training(
    vit: Any, vit_folder: Path, photos: Path, images: ImageDataset, folder: Path
) -> SimpleNamespace:
    """Makers of configs and runners of a run of ten steps, with outputs in `folder`."""
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
