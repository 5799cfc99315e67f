"""`qlae`: quantised latents, each with a few learned values.

Source: "Disentanglement via Latent Quantization" (Hsu et al. 2023, arXiv 2305.18378), section 3:
latent i is quantised to the nearest of its n_levels scalars, initially evenly spaced in [-0.5,
0.5]; the gradient passes straight through; the loss adds .01 ||sg(z_c) - z_q||^2 (quantisation,
which moves the levels) and .01 ||z_c - sg(z_q)||^2 (commitment, which moves the encoder); weight
decay .1 on encoder and decoder.

Deviations: encoder and decoder are linear, as an SAE's are. SAELens's optimiser is Adam without
decay, so the decoupled decay is applied here, as W <- (1 - decay_per_step) W before each step; the
paper's is .1 at a learning rate of 1e-3, hence 1e-4; in half precision once for many steps. Errors are summed over coordinates and
latents, as SAELens sums them.

Latents are dense: all of them are active unless a level is exactly 0. Saved as `qlae`; needs
taxolens to load.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.standard_sae import StandardSAE
from torch import Tensor, nn
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.plugin_config import PluginTrainingSAEConfig
from .parts.straight_through import straight_through


@dataclass
class QLAESAEConfig(SAEConfig):
    """Settings of a saved `qlae`.

    Args:
        n_levels: values each latent can take.
    """

    n_levels: int = 10

    @override
    @classmethod
    def architecture(cls) -> str:
        return "qlae"


@dataclass
class QLAETrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `qlae`.

    Args:
        n_levels: values each latent can take.
        quantization_coefficient: weight of the loss that moves levels to the encoder's output.
        commitment_coefficient: weight of the loss that moves the encoder's output to levels.
        decay_per_step: decoupled weight decay of encoder and decoder per training step; in float16 and bfloat16 that of many
            steps at once (`QLAETrainingSAE.steps_a_decay`).
    """

    n_levels: int = 10
    quantization_coefficient: float = 0.01
    commitment_coefficient: float = 0.01
    decay_per_step: float = 1e-4

    @override
    @classmethod
    def architecture(cls) -> str:
        return "qlae"

    @override
    def __post_init__(self) -> None:
        if self.n_levels < 2:
            raise ConfigError("n_levels", "out of range", given=self.n_levels, allowed="at least 2")
        if not 0 <= self.decay_per_step < 1:
            raise ConfigError(
                "decay_per_step",
                "out of range",
                given=self.decay_per_step,
                allowed="a number in [0, 1)",
            )
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return QLAESAEConfig


def snap(continuous: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to each latent, (..., m); ties go to the lower index.

    Args:
        continuous: (..., m).
        levels: (m, n_levels).
    """
    # One level at a time, since (..., m, n_levels) distances need n_levels times the memory.
    nearest, distance = levels[:, 0].expand_as(continuous), (continuous - levels[:, 0]).abs()
    for column in levels.T[1:]:
        other = (continuous - column).abs()
        nearest = torch.where(other < distance, column, nearest)
        distance = torch.minimum(distance, other)
    return nearest


def even_levels(m: int, n_levels: int, **options: Any) -> Tensor:
    """n_levels values from -0.5 to 0.5 for each of m latents, (m, n_levels)."""
    return torch.linspace(-0.5, 0.5, n_levels, **options).expand(m, n_levels).clone()


class QLAESAE(StandardSAE):
    """`qlae` at inference."""

    cfg: QLAESAEConfig  # type: ignore[assignment]
    levels: nn.Parameter
    l0_rule = "counted"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        options = {"dtype": self.dtype, "device": self.device}
        self.levels = nn.Parameter(even_levels(self.cfg.d_sae, self.cfg.n_levels, **options))

    @override
    def encode(self, x: Tensor) -> Tensor:
        continuous = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        snapped = snap(continuous.detach(), self.levels)
        return self.hook_sae_acts_post(straight_through(snapped, continuous))

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        self.levels.data.mul_(self.fold_and_get_W_dec_norm()[:, None])


class QLAETrainingSAE(TrainingSAE[QLAETrainingSAEConfig]):
    """Trains `qlae`."""

    b_enc: nn.Parameter
    levels: nn.Parameter
    l0_rule = "counted"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        options = {"dtype": self.dtype, "device": self.device}
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **options))
        self.levels = nn.Parameter(even_levels(self.cfg.d_sae, self.cfg.n_levels, **options))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        continuous = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        snapped = snap(continuous.detach(), self.levels)
        return self.hook_sae_acts_post(straight_through(snapped, continuous)), continuous

    @property
    def steps_a_decay(self) -> int:
        """Training steps whose decay is applied at once: 1, or so many that it is four times the spacing of the dtype's numbers.

        Rounding would undo the decay of a single step in half precision. Our own choice.
        """
        decay = self.cfg.decay_per_step
        spacing = torch.finfo(self.W_dec.dtype).eps
        return max(1, math.ceil(4 * spacing / decay)) if decay else 1

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        steps = self.steps_a_decay
        if step_input.n_training_steps % steps == 0:
            with torch.no_grad():
                for weight in (self.W_enc, self.W_dec):
                    weight.mul_((1 - self.cfg.decay_per_step) ** steps)
        return super().training_forward_pass(step_input)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        snapped = snap(hidden_pre.detach(), self.levels)
        quantization = (hidden_pre.detach() - snapped).square().sum(dim=-1).mean()
        commitment = (hidden_pre - snapped.detach()).square().sum(dim=-1).mean()
        return {
            "quantization_loss": self.cfg.quantization_coefficient * quantization,
            "commitment_loss": self.cfg.commitment_coefficient * commitment,
        }

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        self.levels.data.mul_(self.fold_and_get_W_dec_norm()[:, None])


QLAE = Architecture(
    name="qlae",
    training_class=QLAETrainingSAE,
    training_config_class=QLAETrainingSAEConfig,
    sae_class=QLAESAE,
    sae_config_class=QLAESAEConfig,
    description="Latent quantisation: each latent takes one of a few learned values.",
    source="Hsu et al. 2023, arXiv 2305.18378",
)
