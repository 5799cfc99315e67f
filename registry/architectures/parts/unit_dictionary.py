"""Base class of tied architectures: a dictionary of unit rows, for encoding and decoding."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAE
from torch import Tensor
from typing_extensions import override

from ...errors import ConfigError
from .plugin_config import refuse_whitening
from .precision import at_least_float32


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast; no effect on devices without autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class UnitDictionary(SAE[Any]):
    """Mixin for an SAE whose encoder is the transposed decoder with rows of norm 1.

    The rows are normalised at every use, so the gradient with respect to a row of `W_dec` is
    orthogonal to it. `project_rows` normalises the stored rows too, since optimiser steps become
    relatively smaller as rows grow.
    """

    l0_rule = "stopped"

    # As in SAELens's matching pursuit: the base class requires W_enc.
    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(d_in, d_sae) transposed decoder."""
        return self.W_dec.T

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "W_enc":
            super().__setattr__(name, value)

    def dictionary(self) -> Tensor:
        """Unit rows (d_sae, d_in), at least float32: in bfloat16 a pursuit chooses other atoms."""
        return F.normalize(self.W_dec.to(at_least_float32(self.W_dec.dtype)), dim=-1)

    @torch.no_grad()
    def project_rows(self) -> None:
        """Set the rows of the decoder to norm 1."""
        self.W_dec.data.copy_(self.dictionary())

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        atoms = self.dictionary()
        return self.output(feature_acts.to(atoms.dtype) @ atoms)

    def output(self, reconstruction: Tensor) -> Tensor:
        """The SAE's output (n, d_in) from the reconstruction of the centred input, with hooks."""
        if self.cfg.apply_b_dec_to_input:  # added only if it was subtracted
            reconstruction = reconstruction + self.b_dec
        out = self.hook_sae_recons(reconstruction.to(self.dtype))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        # Pursuit is homogeneous: with unit rows, codes are in the units of the input.
        self.b_dec.data /= scaling_factor
        self.cfg.residual_threshold /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            f"{self.cfg.architecture()} has decoder rows of norm 1; there is no norm to fold."
        )

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(
            f"{self.cfg.architecture()} cannot fold whitening: its encoder is its decoder "
            "transposed, and whitening would need two different matrices."
        )


def check_pursuit_config(cfg: Any) -> None:
    """Check the settings that `mp` and `omp` share.

    Raises:
        ConfigError: a setting is invalid.
    """
    refuse_whitening(cfg, "whitening cannot be folded into a tied encoder")
    if cfg.k < 1:
        raise ConfigError("k", "out of range", given=cfg.k, allowed="at least 1")
    if cfg.residual_threshold < 0:
        raise ConfigError(
            "residual_threshold", "out of range", given=cfg.residual_threshold, allowed="0 or more"
        )
