"""Base class of training by pursuit; `mp` and `omp` differ in the computation of codes."""

from abc import abstractmethod
from typing import Any

import torch
from sae_lens.saes.sae import (
    T_TRAINING_SAE_CONFIG,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor
from typing_extensions import override

from .pursuit import Codes
from .step_clock import StepClock
from .unit_dictionary import UnitDictionary, full_precision


class PursuitTrainingSAE(UnitDictionary, TrainingSAE[T_TRAINING_SAE_CONFIG]):
    """Training with the reconstruction computed from the residual of the pursuit, so that codes are
    not multiplied by the complete dictionary.

    `hook_sae_acts_pre` receives the correlations with the input; editing them has no effect, as a
    pursuit has no single pre-activation.
    """

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.clock = StepClock(cfg.seed, self.device)

    @abstractmethod
    def pursue(self, x: Tensor, atoms: Tensor, correlations: Tensor, step: int | None) -> Codes:
        """Codes of centred inputs (n, d_in), in full precision; `step` is None outside training."""

    def dense_codes(self, x: Tensor, atoms: Tensor, correlations: Tensor) -> Tensor:
        """Codes (n, d_sae) of centred inputs outside training."""
        return self.pursue(x, atoms, correlations, None).dense(self.cfg.d_sae)

    def _prepare(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (n, d_in), unit rows and their products, in full precision."""
        atoms = self.dictionary()
        x = centred.reshape(-1, self.cfg.d_in).to(atoms.dtype)
        return x, atoms, (x.detach() @ atoms.detach().T)

    @override
    @torch.compiler.disable(recursive=True)
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = self.process_sae_in(x)
        with full_precision(centred.device):
            flat, atoms, correlations = self._prepare(centred)
            codes = self.dense_codes(flat, atoms, correlations)
        shape = (*centred.shape[:-1], self.cfg.d_sae)
        hidden_pre = correlations.to(self.dtype).reshape(shape)
        self.hook_sae_acts_pre(hidden_pre)
        acts = codes.to(self.dtype).reshape(shape)
        return self.hook_sae_acts_post(acts), hidden_pre

    @override
    @torch.compiler.disable(recursive=True)
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = self.clock.tick()
        self.project_rows()
        centred = self.process_sae_in(step_input.sae_in)
        with full_precision(centred.device):
            x, atoms, correlations = self._prepare(centred)
            codes = self.pursue(x, atoms, correlations, step)
        hidden_pre = correlations.to(self.dtype)
        self.hook_sae_acts_pre(hidden_pre)
        with torch.no_grad():  # the loss reaches the codes through the residual
            codes_dense = codes.dense(self.cfg.d_sae).to(self.dtype)
        acts = self.hook_sae_acts_post(codes_dense)
        if acts is codes_dense:
            sae_out = self.output(centred.to(codes.residual.dtype) - codes.residual)
        else:
            sae_out = self.decode(acts)  # a hook replaced the activations
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

    @torch.no_grad()
    def _metrics(self, output: TrainStepOutput) -> dict[str, Tensor]:
        """The numbers SAELens logs for its own matching pursuit, under the same names."""
        l0 = (output.feature_acts != 0).float().sum(-1)
        residual_norm = (output.sae_in - output.sae_out).norm(dim=-1)
        below = residual_norm < self.cfg.residual_threshold  # type: ignore[attr-defined]
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
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["clock.count"]
        state_dict["W_dec"] = self.dictionary().to(self.dtype).detach()
