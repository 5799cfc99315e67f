"""Settings of every architecture in the comparisons, and the function that trains them."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import taxolens  # noqa: F401  (registers its architectures)
import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The settings that all architectures of one comparison share.

    Args:
        d_in, d_sae: widths.
        l0: target number of active latents; rounded up where an architecture takes an integer.
        variance: mean squared norm of the centred activations.
        levels: latents of each level, for architectures that have levels; they sum to d_sae.
        residual_threshold: norm of the residual at which a pursuit stops; 0: never.
    """

    d_in: int
    d_sae: int
    l0: float
    variance: float
    levels: tuple[int, ...]
    residual_threshold: float = 0.0

    @property
    def k(self) -> int:
        return math.ceil(self.l0)


def options(budget: Budget) -> dict[str, dict[str, Any]]:
    """architecture -> its settings; the others are the defaults of its config.

    Coefficients of sparsity penalties are the initial values of `TargetL0Trainer`.
    """
    k, l0, n_levels = budget.k, budget.l0, len(budget.levels)
    prefixes = [sum(budget.levels[: i + 1]) for i in range(n_levels)]
    halvings = sorted({math.ceil(k / 2**i) for i in range(4)})
    level_k = [max(1, round(k / n_levels))] * n_levels
    stop = budget.residual_threshold
    # SAELens's defaults are for activations of one scale: here half of the latents would die, or L0
    # stay far above the target. So they are in units of what an active latent has to reach, which
    # for an archetypal one is its share of an atom that is as long as an input.
    magnitude, share = math.sqrt(budget.variance / l0), 1 / math.sqrt(l0)
    jumprelu = {
        "l0_coefficient": 0.03 * magnitude**2,  # to start with
        "jumprelu_init_threshold": 0.3 * magnitude,
        "jumprelu_bandwidth": 0.3 * magnitude,
        "pre_act_loss_coefficient": 3e-3,
    }
    of_share = {"jumprelu_init_threshold": 0.3 * share, "jumprelu_bandwidth": share}
    return {
        # SAELens's
        "standard": {"l1_coefficient": 0.3},
        "gated": {"l1_coefficient": 0.3},
        "jumprelu": {**jumprelu, "decoder_init_norm": 0.5},
        "topk": {"k": k},
        "abstopk": {"k": k},
        "batchtopk": {"k": l0},
        "matryoshka_batchtopk": {"k": l0, "matryoshka_widths": prefixes},
        "matching_pursuit": {
            "max_iterations": k,
            "residual_threshold": stop,
            "decoder_init_norm": 1.0,
        },
        # taxolens's
        "mp": {"k": k, "residual_threshold": stop},
        "omp": {"k": k, "residual_threshold": stop},
        "top_afa": {},
        "archetypal_topk": {"k": k},
        "archetypal_jumprelu": {**jumprelu, **of_share},
        "nested_topk": {"k": k, "ks": halvings},
        "random_matryoshka": {"k": l0, "n_prefixes": min(10, budget.d_sae)},
        "tree": {"level_widths": list(budget.levels), "level_k": level_k},
        "hsae": {"k": max(1, round(k / n_levels)), "level_widths": sorted(budget.levels)},
        "codebook": {"k": k},
        "qlae": {},
        "simplicial": {"group_size": min(g for g in range(4, 9) if budget.d_sae % g == 0)},
    }


NAMES = list(SAE_TRAINING_CLASS_REGISTRY)
"""SAELens's architectures and ours."""


@dataclass(frozen=True)
class Schedule:
    """Training schedule: Adam, warm-up, a constant rate, linear cool-down to 0."""

    steps: int
    batch: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: int = 100
    cool_down: float = 0.2

    @property
    def dead_window(self) -> int:
        """Steps without firing after which a latent is dead: SAELens's, in short runs fewer."""
        return min(1000, self.steps // 5)


class TargetL0Trainer(SAETrainer[Any, Any]):
    """Adjusts the coefficient of an L1 or L0 penalty until the target number of latents fires.

    After each step the coefficient grows or shrinks by a small factor (Nabeshima 2024, the toy
    model of "Matryoshka Sparse Autoencoders"); the factor lets it move 90-fold over training.
    """

    target_l0: float

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        output = super()._train_step(sae, sae_in)
        for name in {"l1", "l0"} & self.coefficient_schedulers.keys():
            fired = float((output.feature_acts != 0).sum(dim=-1).float().mean())
            factor = math.exp(4.5 / self.cfg.total_training_steps)
            self.coefficient_schedulers[name].final_value *= (
                factor if fired > self.target_l0 else 1 / factor
            )
        return output


def train(
    name: str,
    budget: Budget,
    schedule: Schedule,
    batches: Iterator[Tensor],
    seed: int,
    own: dict[str, Any] | None = None,
) -> tuple[SAE[Any], float]:
    """The trained SAE, saved and loaded again, and the CPU seconds of its training.

    Args:
        batches: of (schedule.batch, d_in) activations.
        seed: of the initial weights.
        own: settings beside those of `options`.
    """
    training_class, config_class = get_sae_training_class(name)
    torch.manual_seed(seed)
    settings = options(budget)[name] | (own or {})
    if "seed" in config_class.__dataclass_fields__:
        settings = {"seed": seed, **settings}
    sae = training_class(config_class(d_in=budget.d_in, d_sae=budget.d_sae, **settings))
    cfg = SAETrainerConfig(
        total_training_samples=schedule.steps * schedule.batch,
        train_batch_size_samples=schedule.batch,
        lr=schedule.lr,
        lr_end=schedule.lr,
        lr_warm_up_steps=min(schedule.warm_up, schedule.steps // 10),
        lr_decay_steps=int(schedule.cool_down * schedule.steps),
        adam_beta1=schedule.betas[0],
        adam_beta2=schedule.betas[1],
        dead_feature_window=schedule.dead_window,
        feature_sampling_window=schedule.steps + 1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = TargetL0Trainer(cfg, sae, batches)
    trainer.target_l0 = budget.l0
    trainer.optimizer.param_groups[0]["fused"] = True  # the same Adam, in one call
    start = time.process_time()
    trainer.fit()
    seconds = time.process_time() - start
    return as_saved(sae), seconds


def as_saved(sae: Any) -> SAE[Any]:
    """The SAE in its saved form, for example BatchTopK with its threshold."""
    with tempfile.TemporaryDirectory() as folder:
        sae.eval().save_inference_model(folder)
        return SAE.load_from_disk(folder).eval()
