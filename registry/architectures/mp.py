"""`mp`: matching pursuit with a fixed number of steps, unit rows and atom dropout.

Source: "From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit"
(Costa et al. 2025, arXiv 2506.03093), section 3 and algorithm 1.

Beside SAELens's own `matching_pursuit`, as which a trained SAE is saved:
- exactly `k` steps are the default, where SAELens stops once an atom is picked twice
  (`stop_on_duplicate_support`, off here: it is no part of the algorithm and changes supports);
- rows have norm 1 at every step of training, as propositions 3.1-3.3 of the paper need;
- the encoder is `pursuit.matching_pursuit`, and a training step takes its reconstruction from the
  residual, so no step multiplies by the whole dictionary but the first;
- `atom_dropout`, an *own definition*: at each training step a random share of the atoms cannot be
  chosen, the same ones for the whole batch, which gives rarely chosen atoms a turn.

Any k' <= k can be used afterwards: the first k' steps of a pursuit are the pursuit of k' steps.
Set `cfg.k` of the trained SAE, or `cfg.max_iterations` once saved and loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAEConfig
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .pursuit import MAX_GRAM_BYTES, Codes, GramCache, matching_pursuit
from .step_clock import StepClock
from .unit_dictionary import UnitDictionary, check_tied_config, full_precision


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
        compile_encoder: fuse the encoder's inner loop with torch.compile on the CPU.
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
        check_tied_config(self, self.k)
        if not 0 <= self.atom_dropout < 1:
            raise ConfigError(f"atom_dropout must be in [0, 1), got {self.atom_dropout}.")
        if self.residual_threshold < 0:
            raise ConfigError(
                f"residual_threshold must not be negative, got {self.residual_threshold}."
            )
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MatchingPursuitSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        # SAELens fills the inference config from fields of the same name; ours has k for it.
        names = MatchingPursuitSAEConfig.__dataclass_fields__
        return {
            **{name: getattr(self, name) for name in names if name != "max_iterations"},
            "max_iterations": self.k,
            "architecture": MatchingPursuitSAEConfig.architecture(),
            "metadata": self._metadata_with_training_info(),
        }


class MPTrainingSAE(UnitDictionary, TrainingSAE[MPTrainingSAEConfig]):
    """Trains `mp`. `hook_sae_acts_pre` sees the correlations with the input; editing them there
    has no effect, as a pursuit has no single pre-activation."""

    def __init__(self, cfg: MPTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.clock = StepClock(cfg.seed, self.device)
        self.gram_cache = GramCache()

    @torch.compiler.disable(recursive=True)
    def pursue(self, centred: Tensor, allowed: Tensor | None = None) -> tuple[Codes, Tensor]:
        """Codes of flattened inputs (n, d_in), and the first correlations (n, d_sae)."""
        with full_precision(centred.device):
            atoms = self.dictionary()
            x = centred.to(atoms.dtype)
            with torch.no_grad():
                correlations = x @ atoms.T
            codes = matching_pursuit(
                x,
                atoms,
                self.cfg.k,
                correlations=correlations,
                residual_threshold=self.cfg.residual_threshold,
                stop_on_duplicate=self.cfg.stop_on_duplicate_support,
                allowed=allowed,
                # While weights change at every step a kept Gram matrix would only cost memory.
                cache=None if self.training and torch.is_grad_enabled() else self.gram_cache,
                max_gram_bytes=self.cfg.max_gram_bytes,
                compiled=self.cfg.compile_encoder,
            )
        return codes, correlations

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = self.process_sae_in(x)
        codes, correlations = self.pursue(centred.reshape(-1, self.cfg.d_in))
        shape = (*centred.shape[:-1], self.cfg.d_sae)
        hidden_pre = correlations.to(self.dtype).reshape(shape)
        self.hook_sae_acts_pre(hidden_pre)
        acts = codes.dense(self.cfg.d_sae).to(self.dtype).reshape(shape)
        return self.hook_sae_acts_post(acts), hidden_pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = self.clock.tick()
        self.project_rows()
        centred = self.process_sae_in(step_input.sae_in)
        codes, correlations = self.pursue(centred, self._allowed_atoms(step))
        hidden_pre = correlations.to(self.dtype)
        self.hook_sae_acts_pre(hidden_pre)
        with torch.no_grad():  # the loss reaches the codes through the residual
            codes_dense = codes.dense(self.cfg.d_sae).to(self.dtype)
        acts = self.hook_sae_acts_post(codes_dense)
        if acts is codes_dense:
            sae_out = self.output(centred.to(codes.residual.dtype) - codes.residual)
        else:
            sae_out = self.decode(acts)  # a hook put other activations in their place
        mse = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=hidden_pre,
            loss=mse,
            losses={"mse_loss": mse},
        )
        if step_input.is_logging_step:
            output.metrics.update(self._metrics(output))
        return output

    def _allowed_atoms(self, step: int) -> Tensor | None:
        if self.cfg.atom_dropout == 0 or not self.training:
            return None
        draw = torch.rand(
            self.cfg.d_sae, generator=self.clock.generator(step, self.device), device=self.device
        )
        return draw >= self.cfg.atom_dropout

    @torch.no_grad()
    def _metrics(self, output: TrainStepOutput) -> dict[str, Tensor]:
        """The numbers SAELens logs for its own matching pursuit, under the same names."""
        l0 = (output.feature_acts != 0).float().sum(-1)
        residual_norm = (output.sae_in - output.sae_out).norm(dim=-1)
        below = residual_norm < self.cfg.residual_threshold
        return {
            "max_l0": l0.max(),
            "min_l0": l0.min(),
            "residual_norm": residual_norm.mean(),
            "residual_threshold_converged_portion": below.float().mean(),
        }

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return {}

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.cfg.residual_threshold /= scaling_factor

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["clock.count"]
        state_dict["W_dec"] = self.dictionary().to(self.dtype).detach()


MP = Architecture(
    name="mp",
    training_class=MPTrainingSAE,
    training_config_class=MPTrainingSAEConfig,
    description="Matching pursuit: k steps, unit rows, atom dropout, fast encoder.",
    source="Costa et al. 2025, arXiv 2506.03093",
)
