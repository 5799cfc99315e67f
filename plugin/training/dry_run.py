"""Dry run of each SAE on random data, to fail before training rather than after.

SAELens refuses some combinations of settings only when they are used: matching pursuit cannot fold
whitening when training ends, top-k architectures cannot revive dead latents under layer norm. A dry
run finds these in any architecture, in less than a second.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import (
    SAE,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
)

from ...registry.errors import ConfigError
from .rng import set_apart

N_SAMPLES = 4
# Above this many weights the dry run reduces d_in, so that its cost stays small.
MAX_WEIGHTS = 1 << 26
NARROW = 64


T = TypeVar("T")


def of_each_kind(
    saes: Mapping[str, TrainingSAEConfig], act: Callable[[str, TrainingSAEConfig], T]
) -> dict[str, T]:
    """What `act` returns for each SAE by name; SAEs that differ only in their hook point share one call."""
    made: list[tuple[dict[str, Any], T]] = []
    found: dict[str, T] = {}
    for name, sae in saes.items():
        settings = {key: value for key, value in sae.to_dict().items() if key != "metadata"}
        shared = [result for of, result in made if of == settings]
        if not shared:
            shared = [act(name, sae)]
            made.append((settings, shared[0]))
        found[name] = shared[0]
    return found


def rehearse(
    name: str,
    sae_cfg: TrainingSAEConfig,
    device: str,
    prepared: Callable[[TrainingSAE[Any]], TrainingSAE[Any]] = lambda sae: sae,
) -> None:
    """Build, train one step with every latent dead, fold, save, load, encode.

    Args:
        name: name of the SAE in messages.
        sae_cfg: its config, which is not changed.
        device: where it is trained.
        prepared: gives a new SAE the step that the run trains it by.

    Raises:
        ConfigError: a stage fails; the message names the stage and the reason.
    """
    cfg = copy.deepcopy(sae_cfg)
    width = cfg.d_in if cfg.d_in * cfg.d_sae <= MAX_WEIGHTS else min(cfg.d_in, NARROW)
    cfg = dataclasses.replace(cfg, d_in=width, device=device, metadata=SAEMetadata())
    stage = "be built"
    try:
        with set_apart():
            sae = prepared(TrainingSAE.from_dict(cfg.to_dict())).to(device)
            stage = "be trained"
            _train_one_step(sae)
            stage = f"fold normalize_activations={cfg.normalize_activations!r} into its weights"
            finite = _finite(sae)
            _fold(sae)
            if lost := sorted(finite - _finite(sae)):
                raise ValueError(f"{', '.join(lost)}: not finite afterwards")
            stage = "be saved and loaded"
            with tempfile.TemporaryDirectory() as folder:
                sae.save_inference_model(folder)
                loaded = SAE.load_from_disk(folder).to(device)
            stage = "encode once saved"
            _encode(loaded)
    except Exception as error:
        raise ConfigError(
            name, f"architecture {cfg.architecture()!r} with these settings cannot {stage}: {error}"
        ) from error


def _train_one_step(sae: TrainingSAE[Any]) -> None:
    sae.train()
    coefficients = {
        name: c.value if isinstance(c, TrainCoefficientConfig) else c
        for name, c in sae.get_coefficients().items()
    }
    step = TrainStepInput(
        sae_in=torch.randn(N_SAMPLES, sae.cfg.d_in, dtype=sae.dtype, device=sae.device),
        coefficients=coefficients,
        dead_neuron_mask=torch.ones(sae.cfg.d_sae, dtype=torch.bool, device=sae.device),
        n_training_steps=0,
        is_logging_step=True,
    )
    sae.training_forward_pass(step).loss.backward()


@torch.no_grad()
def _encode(sae: SAE[Any]) -> None:
    sae.turn_off_forward_pass_hook_z_reshaping()  # inputs are flat here
    sae.eval().encode(torch.randn(N_SAMPLES, sae.cfg.d_in, dtype=sae.dtype, device=sae.device))


def _finite(sae: TrainingSAE[Any]) -> set[str]:
    """Names of the weights and buffers that are finite: others would be refused when they are saved."""
    return {name for name, tensor in sae.state_dict().items() if bool(tensor.isfinite().all())}


def _fold(sae: TrainingSAE[Any]) -> None:
    if sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(1.0)
    elif sae.cfg.normalize_activations == "covariance_whitening":
        identity = torch.eye(sae.cfg.d_in, dtype=torch.float64, device=sae.device)
        sae.fold_activation_whitening(torch.zeros_like(identity[0]), identity, identity)
