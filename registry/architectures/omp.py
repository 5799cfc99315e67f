"""`omp`: orthogonal matching pursuit; all coefficients are refitted at each step.

Source: orthogonal matching pursuit (Pati et al. 1993) in place of plain matching pursuit in
the MP-SAE of Costa et al. 2025 (arXiv 2506.03093), with the coefficients kept non-negative as an
SAE's are: after each choice, non-negative least squares over the atoms chosen so far. The residual
is then orthogonal to every active atom, so no atom is chosen twice and k steps explain at least as
much as k steps of `mp` on the same support.

Own definitions: an atom whose coefficient becomes 0 remains chosen and may become active again, and
an input stops early once no atom correlates positively with its residual. Rows have norm 1
throughout, as in `mp`.

SAELens has no such inference, so it is saved as `omp` and needs taxolens to load.
"""

from dataclasses import dataclass

import torch
from sae_lens.saes.sae import SAEConfig
from torch import Tensor
from typing_extensions import override

from ..table import Architecture
from .parts.orthogonal_pursuit import orthogonal_pursuit
from .parts.plugin_config import PluginTrainingSAEConfig, check_k
from .parts.pursuit import Codes
from .parts.pursuit_training import PursuitTrainingSAE
from .parts.unit_dictionary import UnitDictionary, check_pursuit_config, full_precision


@dataclass
class OMPSAEConfig(SAEConfig):
    """Settings of a saved `omp`.

    Args:
        k: steps of the pursuit; may be lowered without retraining.
        residual_threshold: an input stops early once the norm of its residual is below; 0: never.
    """

    k: int = 32
    residual_threshold: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "omp"


@dataclass
class OMPTrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `omp`.

    Args:
        k: steps of the pursuit, and so the largest number of active latents.
        residual_threshold: an input stops early once the norm of its residual is below; 0: never.
    """

    k: int = 32
    residual_threshold: float = 0.0
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "omp"

    @override
    def __post_init__(self) -> None:
        check_pursuit_config(self)
        check_k(self)
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return OMPSAEConfig

    @property
    def seed(self) -> int:
        """Seed of the step clock; training draws nothing."""
        return 0


class OMPSAE(UnitDictionary):
    """`omp` at inference."""

    cfg: OMPSAEConfig

    @override
    def encode(self, x: Tensor) -> Tensor:
        centred = self.process_sae_in(x)
        shape = (*centred.shape[:-1], self.cfg.d_sae)
        with full_precision(centred.device):
            atoms = self.dictionary()
            flat = centred.reshape(-1, self.cfg.d_in).to(atoms.dtype)
            correlations = (flat @ atoms.T).detach()
            codes = orthogonal_pursuit(
                flat,
                atoms,
                self.cfg.k,
                correlations=correlations,
                residual_threshold=self.cfg.residual_threshold,
            )
        self.hook_sae_acts_pre(correlations.to(self.dtype).reshape(shape))
        return self.hook_sae_acts_post(codes.dense(self.cfg.d_sae).to(self.dtype).reshape(shape))

    @override
    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.project_rows()


class OMPTrainingSAE(PursuitTrainingSAE[OMPTrainingSAEConfig]):
    """Trains `omp`."""

    @override
    def pursue(self, x: Tensor, atoms: Tensor, correlations: Tensor, step: int | None) -> Codes:
        return orthogonal_pursuit(
            x,
            atoms,
            self.cfg.k,
            correlations=correlations,
            residual_threshold=self.cfg.residual_threshold,
        )


OMP = Architecture(
    name="omp",
    training_class=OMPTrainingSAE,
    training_config_class=OMPTrainingSAEConfig,
    sae_class=OMPSAE,
    sae_config_class=OMPSAEConfig,
    description="Orthogonal matching pursuit with non-negative coefficients.",
    source="Pati et al. 1993; Costa et al. 2025, arXiv 2506.03093",
)
