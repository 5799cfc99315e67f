"""`random_matryoshka`: reconstruction from prefixes of the dictionary, random at each step.

Source: "Matryoshka Sparse Autoencoders" (Nabeshima 2024, LessWrong), whose prefix lengths follow a
truncated Pareto law, P(length >= l) proportional to l^-alpha, sampled without replacement, the
complete dictionary always among them; the loss is the mean over prefixes. SAELens's
`matryoshka_batchtopk` (Bussmann et al. 2025, arXiv 2503.17547) has fixed prefixes instead.

Deviations: sparsity is BatchTopK as in SAELens, not ReLU with an L1 penalty; latents are not
re-sorted by their energy during training.

Saved as `jumprelu`, as SAELens does for BatchTopK.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.plugin_config import check_k, refuse_input_normalisation
from .parts.sparse_step import SparseBatchTopK
from .parts.step_clock import StepClock


@dataclass
class RandomMatryoshkaTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Settings of `random_matryoshka`, beside those of SAELens's `batchtopk`.

    Args:
        n_prefixes: reconstructions per step, including that of the complete dictionary.
        pareto_alpha: exponent of the Pareto law; larger means shorter prefixes.
        min_prefix: the shortest prefix.
        seed: seed of the prefix lengths.
    """

    n_prefixes: int = 10
    pareto_alpha: float = 0.5
    min_prefix: int = 1
    seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "random_matryoshka"

    @override
    def __post_init__(self) -> None:
        refuse_input_normalisation(self)
        check_k(self)
        if not 1 <= self.min_prefix <= self.d_sae:
            raise ConfigError(
                "min_prefix",
                "out of range",
                given=self.min_prefix,
                allowed=f"an integer in 1..d_sae={self.d_sae}",
            )
        if self.n_prefixes < 1:
            raise ConfigError(
                "n_prefixes", "out of range", given=self.n_prefixes, allowed="at least 1"
            )
        if self.pareto_alpha <= 0:
            raise ConfigError(
                "pareto_alpha", "out of range", given=self.pareto_alpha, allowed="a number above 0"
            )
        super().__post_init__()


class RandomMatryoshkaTrainingSAE(SparseBatchTopK):
    """Trains `random_matryoshka`."""

    cfg: RandomMatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    def __init__(
        self, cfg: RandomMatryoshkaTrainingSAEConfig, use_error_term: bool = False
    ) -> None:
        super().__init__(cfg, use_error_term)
        self.clock = StepClock(cfg.seed, self.device)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        prefixes = self.draw_prefixes(self.clock.tick())
        with self.stepping(step_input):
            output = super().training_forward_pass(step_input)
            partials = self.partial_outputs(output.feature_acts, prefixes[:-1])
        errors = [
            self.mse_loss_fn(self.reshape_fn_out(partial, self.d_head), step_input.sae_in)
            .sum(dim=-1)
            .mean()
            for partial in partials
        ]
        whole = output.losses["mse_loss"]
        prefix_loss = torch.stack([*errors, whole]).mean()
        output.losses["prefix_loss"] = prefix_loss
        output.loss = output.loss - whole + prefix_loss
        return output

    def draw_prefixes(self, step: int) -> list[int]:
        """Increasing prefix lengths of one step; the last is d_sae."""
        cfg = self.cfg
        generator = self.clock.generator(step, torch.device("cpu"))
        weights = pareto_weights(cfg.min_prefix, cfg.d_sae, cfg.pareto_alpha)
        n = min(cfg.n_prefixes - 1, weights.numel())
        if n == 0:
            return [cfg.d_sae]
        drawn = torch.multinomial(weights, n, generator=generator) + cfg.min_prefix
        return [*sorted(drawn.tolist()), cfg.d_sae]

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["clock.count"]


def pareto_weights(shortest: int, width: int, alpha: float) -> Tensor:
    """P(length = l) for l = shortest .. width-1, up to a factor, (width - shortest,)."""
    edges = torch.arange(shortest, width + 1, dtype=torch.float64).pow(-alpha)
    return edges[:-1] - edges[1:]


RANDOM_MATRYOSHKA = Architecture(
    name="random_matryoshka",
    training_class=RandomMatryoshkaTrainingSAE,
    training_config_class=RandomMatryoshkaTrainingSAEConfig,
    description="Matryoshka over prefixes of Pareto-distributed length, BatchTopK.",
    source="Nabeshima 2024; Bussmann et al. 2025, arXiv 2503.17547",
)
