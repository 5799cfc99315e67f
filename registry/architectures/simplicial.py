"""`simplicial`: latents in groups, with a softmax over each group.

Source: "Simplicial Embeddings in Self-Supervised Learning and Downstream Classification" (Lavoie et
al. 2022, arXiv 2204.00616), section 3: L groups of V latents, z = softmax(group / tau). The paper
uses it between an encoder and a self-supervised loss; here encoder and decoder are linear and the
loss is the squared error, without a sparsity penalty.

Every latent is positive, so L0 is d_sae. `group_entropy`, in nats, logs the concentration of groups
(log V for a uniform group). Saved as `simplicial`; needs taxolens to load.
"""

from dataclasses import dataclass

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


@dataclass
class SimplicialSAEConfig(SAEConfig):
    """Settings of a saved `simplicial`.

    Args:
        group_size: V, latents of a group; must divide d_sae.
        temperature: tau; small values make groups one-hot.
    """

    group_size: int = 8
    temperature: float = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "simplicial"


@dataclass
class SimplicialTrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `simplicial`.

    Args:
        group_size: V, latents of a group; must divide d_sae.
        temperature: tau; small values make groups one-hot.
    """

    group_size: int = 8
    temperature: float = 1.0
    decoder_init_norm: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "simplicial"

    @override
    def __post_init__(self) -> None:
        if self.group_size < 2 or self.d_sae % self.group_size:
            raise ConfigError(
                "group_size",
                "out of range",
                given=self.group_size,
                allowed=f"at least 2, and a divisor of d_sae={self.d_sae}",
            )
        if self.temperature <= 0:
            raise ConfigError(
                "temperature", "out of range", given=self.temperature, allowed="a number above 0"
            )
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return SimplicialSAEConfig


def grouped_softmax(scores: Tensor, group_size: int, temperature: float) -> Tensor:
    """Softmax over consecutive groups of the last dimension of scores (..., m), (..., m)."""
    groups = scores.unflatten(-1, (-1, group_size)) / temperature
    return groups.softmax(dim=-1).flatten(-2)


_NO_NORM_FOLDING = "simplicial has groups that sum to 1; decoder norms cannot be folded into them."


class SimplicialSAE(StandardSAE):
    """`simplicial` at inference."""

    cfg: SimplicialSAEConfig  # type: ignore[assignment]
    l0_rule = "counted"

    @override
    def encode(self, x: Tensor) -> Tensor:
        scores = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        acts = grouped_softmax(scores, self.cfg.group_size, self.cfg.temperature)
        return self.hook_sae_acts_post(acts)

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(_NO_NORM_FOLDING)


class SimplicialTrainingSAE(TrainingSAE[SimplicialTrainingSAEConfig]):
    """Trains `simplicial`."""

    b_enc: nn.Parameter
    l0_rule = "counted"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        acts = grouped_softmax(scores, self.cfg.group_size, self.cfg.temperature)
        return self.hook_sae_acts_post(acts), scores

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        if step_input.is_logging_step:
            groups = output.feature_acts.detach().unflatten(-1, (-1, self.cfg.group_size))
            output.metrics["group_entropy"] = torch.special.entr(groups).sum(dim=-1).mean()
        return output

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return {}

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(_NO_NORM_FOLDING)


SIMPLICIAL = Architecture(
    name="simplicial",
    training_class=SimplicialTrainingSAE,
    training_config_class=SimplicialTrainingSAEConfig,
    sae_class=SimplicialSAE,
    sae_config_class=SimplicialSAEConfig,
    description="Latents in groups, a softmax over each group.",
    source="Lavoie et al. 2022, arXiv 2204.00616",
)
