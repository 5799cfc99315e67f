"""`codebook`: each input is reconstructed as the mean of the k codes nearest in direction.

Source: "Codebook Features: Sparse and Discrete Interpretability for Neural Networks" (Tamkin et
al. 2023, arXiv 2310.17230), section 2: the k codes with the largest inner product between the input
and the normalised codes are active, the output is the mean of the raw codes, gradients pass
straight through to the input, and a codebook loss moves active codes to the input. For an SAE on
fixed activations, the squared error is that loss.

Deviations: a bias b_dec is subtracted and added as in SAELens's SAEs; `kmeans_init` starts the
codes by k-means steps on the first batch; `replace_dead`, off by default, replaces codes that are
dead by SAELens's count by random inputs of the batch. A code equal to an input displaces the codes
whose mean was that input, which is harmful with few distinct inputs.

The activation of a chosen code is 1/k, so decoding is linear. Saved as `codebook`; needs taxolens
to load.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.kmeans import seed_centroids, update_centroids
from .parts.plugin_config import PluginTrainingSAEConfig, refuse_whitening
from .parts.precision import at_least_float32
from .parts.step_clock import StepClock

_WHY_NO_WHITENING = "the same codes are compared with the input and decoded"


@dataclass
class CodebookSAEConfig(SAEConfig):
    """Settings of a saved `codebook`.

    Args:
        k: active codes per input.
    """

    k: int = 8

    @override
    @classmethod
    def architecture(cls) -> str:
        return "codebook"


@dataclass
class CodebookTrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `codebook`.

    Args:
        k: active codes per input.
        kmeans_init: k-means steps on the first batch before training; 0 for random codes.
        replace_dead: replace dead codes by random inputs.
        seed: seed of both.
    """

    k: int = 8
    kmeans_init: int = 10
    replace_dead: bool = False
    seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "codebook"

    @override
    def __post_init__(self) -> None:
        refuse_whitening(self, _WHY_NO_WHITENING)
        if not 1 <= self.k <= self.d_sae:
            raise ConfigError(
                "k", "out of range", given=self.k, allowed=f"an integer in 1..d_sae={self.d_sae}"
            )
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return CodebookSAEConfig


class Codebook(SAE[Any]):
    """Common part of training and inference; the codes are the rows of `W_dec`."""

    l0_rule = "counted"

    # As in SAELens's matching pursuit: the base class requires W_enc.
    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(d_in, d_sae) codes, normalised and transposed."""
        return F.normalize(self.W_dec, dim=1).T

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "W_enc":
            super().__setattr__(name, value)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations, 1/k at the chosen codes, and the inner products, both (..., d_sae)."""
        scores = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc)
        chosen = scores.topk(self.cfg.k, dim=-1).indices
        acts = torch.zeros_like(scores).scatter(-1, chosen, 1.0 / self.cfg.k)
        return self.hook_sae_acts_post(acts), scores

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self.choose(x)[0]

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        out = feature_acts @ self.W_dec
        if self.cfg.apply_b_dec_to_input:
            out = out + self.b_dec
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
        return self.reshape_fn_out(out, self.d_head)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        # straight-through: the choice of codes has no gradient
        return out + (x - x.detach()).to(out.dtype)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.W_dec.data /= scaling_factor
        self.b_dec.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            "codebook has activations of exactly 1/k; the norms of its codes cannot be folded."
        )

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(f"codebook cannot fold whitening: {_WHY_NO_WHITENING}.")


class CodebookSAE(Codebook):
    """`codebook` at inference."""

    cfg: CodebookSAEConfig


class CodebookTrainingSAE(Codebook, TrainingSAE[CodebookTrainingSAEConfig]):
    """Trains `codebook`."""

    def __init__(self, cfg: CodebookTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.clock = StepClock(cfg.seed, self.device)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(x)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = self.clock.tick()
        self._place_codes(step_input, step)
        return super().training_forward_pass(step_input)

    @torch.no_grad()
    def _place_codes(self, step_input: TrainStepInput, step: int) -> None:
        """k-means at the first step; afterwards replacement of dead codes."""
        codes, dead = self.W_dec.data, step_input.dead_neuron_mask
        first = step == 0 and self.cfg.kmeans_init > 0
        if not first and (not self.cfg.replace_dead or dead is None or not bool(dead.any())):
            return
        # not process_sae_in, which fires hooks
        x = self.run_time_activation_norm_fn_in(step_input.sae_in.to(self.dtype))
        x = x - self.b_dec * self.cfg.apply_b_dec_to_input
        generator = self.clock.generator(step, self.device)
        if first:
            codes.copy_(seed_centroids(x, self.cfg.d_sae, generator))
            dtype = at_least_float32(self.dtype)
            counts = torch.zeros(self.cfg.d_sae, device=self.device, dtype=dtype)
            for _ in range(self.cfg.kmeans_init):
                update_centroids(codes, counts, x)
        elif dead is not None:
            codes[dead] = seed_centroids(x, int(dead.sum()), generator)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return {}

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["clock.count"]


CODEBOOK = Architecture(
    name="codebook",
    training_class=CodebookTrainingSAE,
    training_config_class=CodebookTrainingSAEConfig,
    sae_class=CodebookSAE,
    sae_config_class=CodebookSAEConfig,
    description="Vector quantisation: the mean of the k codes nearest in direction.",
    source="Tamkin et al. 2023, arXiv 2310.17230",
)
