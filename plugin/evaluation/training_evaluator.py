"""Evaluators during training, called by SAELens's trainers as their `evaluator`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...registry.errors import ConfigError
from ...registry.heads import key_of
from ...registry.ranks import ALONE, Ranks
from ...registry.table import EVALUATORS
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.wandb_log import metric_items
from .bench import Bench, Chosen, HeldOutActivations, SAELatents
from .forward import ModelSetting, activations_of
from .held_out import HeldOut, overlap
from .settings import EvaluationSettings
from .split import Split

TRAINING_PERMUTATIONS = 3
MAX_TRAINING_IMAGES = 2000
"""Images of an evaluation during training, as many of each class."""
LEAST_OF_A_CLASS = 5
"""So many of each class also where that makes more: `lch_height` needs them."""
NO_INTERVENTION = "the model is not run again in evaluations during training"

logger = logging.getLogger(__name__)


class TrainingEvaluator:
    """Measures an SAE during training, on held-out activations kept in memory.

    The model is not run again: metrics that need interventions are NaN and are not logged.

    Called as SAELens calls an evaluator of one SAE; `__call__` returns the flat metrics
    ``eval/<evaluator>/<metric>`` and ``eval/<evaluator>/<metric>/permuted_classes``. Only this null
    is computed, as it needs no further pass.

    The random state of torch and numpy is restored. A BatchTopK SAE is measured as it trains, with
    its k over batches of these images.

    Args:
        held_out: hook point, or `head_key` -> activations of the held-out images.
        taxonomy: the tree of their classes.
        evaluators: name -> (class, its options).
        n_permutations: see `EvaluationSettings`.
        aggregate: see `EvaluationSettings`.
        seed: see `EvaluationSettings`.
    """

    def __init__(
        self,
        held_out: Mapping[str, HeldOutActivations],
        taxonomy: Taxonomy,
        evaluators: Chosen,
        *,
        n_permutations: int = TRAINING_PERMUTATIONS,
        aggregate: str = "max",
        seed: int = 0,
    ) -> None:
        self.held_out = dict(held_out)
        settings = EvaluationSettings(
            nulls=("permuted_classes",),
            n_permutations=n_permutations,
            n_groups=0,
            seed=seed,
            aggregate=aggregate,
        )
        self.bench = Bench(taxonomy, evaluators, settings)

    def __call__(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, float]:
        """Metrics of one SAE, of the hook point in its metadata."""
        return self.measure(sae, key_of(sae), activation_scaler)

    def measure(self, sae: Any, hook_name: str, activation_scaler: Any = None) -> dict[str, float]:
        """Metrics of one SAE; `activation_scaler` scales its inputs in training."""
        numpy_state = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=_devices(sae)):
                latents = SAELatents(sae, activation_scaler)
                done = self.bench.run(latents, self.held_out[hook_name])
                metrics = self.bench.metrics(done)
                done.release()
        finally:
            np.random.set_state(numpy_state)
        flat: dict[str, float] = {}
        for evaluator, numbers in metrics.items():
            for metric, number in numbers.items():
                flat |= metric_items(f"eval/{evaluator}/{metric}", number)
        return flat


def make_training_evaluator(
    cfg: Any, model: Any, held_out: HeldOut | None = None
) -> TrainingEvaluator:
    """The training evaluator of a runner's config; its activations are computed in this call.

    Args:
        cfg: a vision runner config with `evaluators` and `taxonomy`; images come from
            `eval_dataset_path` (else dataset_path) and `eval_split` (else validation or test), at
            most `eval_max_images` of them (2,000, as many of each class, or 5 of each).
        model: the tapped vision model.
        held_out: images and tree, where they are loaded already.

    Raises:
        ConfigError: these are the training images.
    """
    held_out = held_out or HeldOut.load(cfg.held_out_source, cfg.taxonomy)
    if cfg.eval_max_images:
        held_out = held_out.limited(cfg.eval_max_images)
    else:
        of_a_class = MAX_TRAINING_IMAGES // held_out.n_present
        held_out = held_out.of_each_class(max(of_a_class, LEAST_OF_A_CLASS))
    if overlap(held_out.source, cfg.image_source):
        raise ConfigError(
            "eval_split",
            "trained on",
            given=held_out.source.split,
            allowed="a held-out split, or another eval_dataset_path",
        )
    chosen = {name: (EVALUATORS[name], None) for name in cfg.evaluators}
    for name, (evaluator, _) in chosen.items():
        if evaluator.wants_intervention:
            logger.warning("%s: %s; what needs it is left out.", name, NO_INTERVENTION)
    cache = activations_of(
        held_out,
        cfg.unique_hook_names,
        ModelSetting(cfg.model_name, cfg.tokens, cfg.image_size),
        folder=None,
        model=model,
        autocast=cfg.autocast_lm,
        progress=Ranks.here().is_first,
        ranks=ALONE,  # each rank measures its own SAEs
    )
    split = Split.halves(cache.labels, len(held_out.taxonomy.classes), cfg.seed)
    in_memory = {}
    for name in dict.fromkeys(cfg.sae_keys.values()):
        patch = cache.mean_patch(name)
        in_memory[name] = HeldOutActivations(
            np.array(cache.activations(name)),
            split,
            None if patch is None else np.array(patch),
            no_intervention=NO_INTERVENTION,
        )
    return TrainingEvaluator(in_memory, held_out.taxonomy, chosen, seed=cfg.seed)


def _devices(sae: Any) -> list[Any]:
    device = torch.device(sae.device)
    return [device] if device.type == "cuda" else []
