"""`top_afa`: as many latents per input as match the norm of the code to that of the input.

Source: "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality"
(Lee et al. 2025, arXiv 2503.24277), section 5, and the authors' training code. With
acts = relu((x - b_dec) W_enc) and s = (acts * ||D||)^2 in descending order, the k with sqrt(sum of
the k largest s) nearest to ||x - b_dec|| is kept. The loss adds lambda * mean (||code|| - ||x||)^2,
and the usual auxiliary loss for dead latents (weight 1/32).

Deviations: the authors average the squared error over the d_in coordinates and SAELens sums it, so
lambda is multiplied by d_in here and has the paper's meaning. Decoder rows are not
renormalised; codes are measured by the norm of their contribution (`rescale_acts_by_decoder_norm`),
which is the same function with the same gradient directions. Whitening is refused: the rule
compares norms in the space of the input, and folding would change that space.

Limits: the published gains are at L0 of about 2,000, above d_in = 768. With inputs of norm 1 the
target is the same for all inputs, so k does not adapt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor, nn
from typing_extensions import override

from ..table import Architecture
from .parts.plugin_config import (
    PluginTrainingSAEConfig,
    refuse_input_normalisation,
    refuse_whitening,
)
from .parts.precision import at_least_float32

_WHY_NO_WHITENING = "it compares norms in the space of the input"


@dataclass
class TopAFASAEConfig(SAEConfig):
    """Settings of a saved `top_afa`; there is no k."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"


@dataclass
class TopAFATrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `top_afa`.

    Args:
        afa_coefficient: lambda in the paper's units, there 1/128 to 1/16.
        afa_warm_up_steps: steps over which lambda rises from 0.
        aux_loss_coefficient: weight of the auxiliary loss for dead latents.
        rescale_acts_by_decoder_norm: measure codes by the norm of their contribution.
    """

    afa_coefficient: float = 1 / 32
    afa_warm_up_steps: int = 0
    aux_loss_coefficient: float = 1 / 32
    rescale_acts_by_decoder_norm: bool = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"

    @override
    def __post_init__(self) -> None:
        refuse_input_normalisation(self)
        refuse_whitening(self, _WHY_NO_WHITENING)
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopAFASAEConfig


def select_by_norm(contributions: Tensor, target: Tensor) -> Tensor:
    """(n, m) bool, the latents that `top_afa` keeps.

    Args:
        contributions: norm of each latent's contribution to the reconstruction, (n, m).
        target: the norm to match, (n,).
    """
    contributions, target = _exact(contributions), _exact(target)
    ordered, order = contributions.sort(dim=-1, descending=True, stable=True)
    reached = ordered.square().cumsum(dim=-1).sqrt()
    k = (reached - target[..., None]).abs().argmin(dim=-1, keepdim=True)
    ranks = torch.arange(contributions.shape[-1], device=contributions.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, ranks <= k)


def _exact(tensor: Tensor) -> Tensor:
    """At least in float32: in half precision running sums of squares stop growing, or are infinite."""
    return tensor.to(at_least_float32(tensor.dtype))


def _refuse_folding() -> None:
    raise NotImplementedError(f"top_afa cannot fold whitening: {_WHY_NO_WHITENING}.")


class TopAFASAE(StandardSAE):
    """`top_afa` at inference."""

    cfg: TopAFASAEConfig  # type: ignore[assignment]
    l0_rule = "scaled"

    @override
    def encode(self, x: Tensor) -> Tensor:
        centred = self.process_sae_in(x)
        acts = self.hook_sae_acts_pre(centred @ self.W_enc + self.b_enc).relu()
        contributions = _exact(acts) * _exact(self.W_dec).norm(dim=-1)
        kept = select_by_norm(contributions, _exact(centred).norm(dim=-1))
        return self.hook_sae_acts_post(acts * kept)

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        _refuse_folding()


class TopAFATrainingSAE(TopKTrainingSAE):
    """`top_afa` in training. The encoder has no bias: `b_enc` stays 0."""

    cfg: TopAFATrainingSAEConfig  # type: ignore[assignment]
    l0_rule = "scaled"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(False)

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return nn.ReLU()

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(centred @ self.W_enc + self.b_enc)
        norms = self.W_dec.norm(dim=-1)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * norms
        acts = hidden_pre.relu()
        with torch.no_grad():
            contributions = _exact(acts)
            if not self.cfg.rescale_acts_by_decoder_norm:
                contributions = contributions * _exact(self.W_dec).norm(dim=-1)
            kept = select_by_norm(contributions, _exact(centred).norm(dim=-1))
        return self.hook_sae_acts_post(acts * kept), hidden_pre

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {"afa": TrainCoefficientConfig(self.cfg.afa_coefficient, self.cfg.afa_warm_up_steps)}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        # the gradient of a norm is not defined at 0, where an input has no active latent
        code_norm = (_exact(feature_acts).square().sum(dim=-1) + 1e-12).sqrt()
        mismatch = (code_norm - _exact(step_input.sae_in).norm(dim=-1)).square().mean()
        aux = super().calculate_aux_loss(step_input, feature_acts, hidden_pre.relu(), sae_out)
        return {"afa_loss": step_input.coefficients["afa"] * self.cfg.d_in * mismatch, **aux}

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        _refuse_folding()

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        # Selection is by contributions in either case, so folding is exact.
        self.fold_and_get_W_dec_norm()


TOP_AFA = Architecture(
    name="top_afa",
    training_class=TopAFATrainingSAE,
    training_config_class=TopAFATrainingSAEConfig,
    sae_class=TopAFASAE,
    sae_config_class=TopAFASAEConfig,
    description="k per input, by matching the norm of the code to that of the input.",
    source="Lee et al. 2025, arXiv 2503.24277",
)
