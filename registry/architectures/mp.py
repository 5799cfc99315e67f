"""`mp`: matching pursuit with a fixed number of steps, unit rows and atom dropout.

Source: "From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit"
(Costa et al. 2025, arXiv 2506.03093), section 3 and algorithm 1.

Differences from SAELens's `matching_pursuit`, as which a trained SAE is saved:
- exactly `k` steps are the default, where SAELens stops once an atom is picked twice
  (`stop_on_duplicate_support`, off here: not in the algorithm, and it changes supports);
- rows have norm 1 at every step of training, as propositions 3.1-3.3 of the paper require (its
  public code, github.com/mpsae/MP-SAE, normalises at the start only). The learning rate alone
  determines the rotation of such rows, so it should be higher: see docs/architectures.md;
- the encoder is `pursuit.matching_pursuit`, and a training step computes its reconstruction from
  the residual, so only the first step multiplies by the complete dictionary;
- `atom_dropout`, an *own definition*: at each training step a random share of the atoms cannot be
  chosen, the same for the complete batch, so that rarely chosen atoms are chosen more often.

Any k' <= k can be used afterwards: the first k' steps of a pursuit are the pursuit of k' steps.
Set `cfg.k` of the trained SAE, or `cfg.max_iterations` once saved and loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.pursuit import MAX_GRAM_BYTES, Codes, GramCache, matching_pursuit, pursuit_path
from .parts.pursuit_training import PursuitTrainingSAE
from .parts.unit_dictionary import check_pursuit_config


@dataclass
class MPTrainingSAEConfig(TrainingSAEConfig):
    """Settings of `mp`.

    Args:
        k: steps of the pursuit, and so the largest number of active latents.
        residual_threshold: an input stops early once the norm of its residual is below; 0: never.
        stop_on_duplicate_support: an input stops when a step leaves its support unchanged.
        atom_dropout: share of the atoms left out at each training step, in [0, 1).
        seed: of the atom dropout.
        max_gram_bytes: largest Gram matrix (d_sae^2 numbers) the fast encoder may hold.
        compile_encoder: fuse the encoder's inner loop with torch.compile on the CPU; takes some
            seconds once. Without a C++ compiler it is not used, which is logged.
    """

    k: int = 32
    residual_threshold: float = 0.0
    stop_on_duplicate_support: bool = False
    atom_dropout: float = 0.0
    seed: int = 0
    max_gram_bytes: int = MAX_GRAM_BYTES
    compile_encoder: bool = False
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "mp"

    @override
    def __post_init__(self) -> None:
        check_pursuit_config(self)
        if not 0 <= self.atom_dropout < 1:
            raise ConfigError(
                "atom_dropout",
                "out of range",
                given=self.atom_dropout,
                allowed="a number in [0, 1)",
            )
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MatchingPursuitSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        # SAELens copies fields of the same name to the inference config; here it is k.
        names = MatchingPursuitSAEConfig.__dataclass_fields__
        return {
            **{name: getattr(self, name) for name in names if name != "max_iterations"},
            "max_iterations": self.k,
            "architecture": MatchingPursuitSAEConfig.architecture(),
            "metadata": self._metadata_with_training_info(),
        }


class MPTrainingSAE(PursuitTrainingSAE[MPTrainingSAEConfig]):
    """Trains `mp`."""

    def __init__(self, cfg: MPTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.gram_cache = GramCache()

    @override
    def pursue(self, x: Tensor, atoms: Tensor, correlations: Tensor, step: int | None) -> Codes:
        return matching_pursuit(x, atoms, self.cfg.k, **self._how(correlations, step))

    @override
    def dense_codes(self, x: Tensor, atoms: Tensor, correlations: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or atoms.requires_grad):
            return super().dense_codes(x, atoms, correlations)
        path = pursuit_path(x, atoms, self.cfg.k, **self._how(correlations, None))
        return path.dense(self.cfg.d_sae)

    def _how(self, correlations: Tensor, step: int | None) -> dict[str, Any]:
        return {
            "correlations": correlations,
            "residual_threshold": self.cfg.residual_threshold,
            "stop_on_duplicate": self.cfg.stop_on_duplicate_support,
            "allowed": self._allowed_atoms(step),
            # While weights change at every step, caching the Gram matrix has no use.
            "cache": self.gram_cache if step is None else None,
            "max_gram_bytes": self.cfg.max_gram_bytes,
            "compiled": self.cfg.compile_encoder,
        }

    def _allowed_atoms(self, step: int | None) -> Tensor | None:
        if step is None or self.cfg.atom_dropout == 0:
            return None
        generator = self.clock.generator(step, self.device)
        draw = torch.rand(self.cfg.d_sae, generator=generator, device=self.device)
        return draw >= self.cfg.atom_dropout


MP = Architecture(
    name="mp",
    training_class=MPTrainingSAE,
    training_config_class=MPTrainingSAEConfig,
    description="Matching pursuit: k steps, unit rows, atom dropout, fast encoder.",
    source="Costa et al. 2025, arXiv 2506.03093",
)
