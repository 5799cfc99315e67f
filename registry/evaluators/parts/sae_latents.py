"""The latents of an SAE, as evaluators read them."""

from __future__ import annotations

from typing import Any

from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor


class SAELatents:
    """The latents of an SAE. One in training needs SAELens's `activation_scaler` too."""

    source = "sae"

    def __init__(self, sae: Any, activation_scaler: Any = None) -> None:
        self.sae = sae
        self.scaler = ActivationScaler() if activation_scaler is None else activation_scaler
        self.d_sae: int = sae.cfg.d_sae
        self.W_dec: Tensor | None = getattr(sae, "W_dec", None)
        self.b_dec: Tensor | None = getattr(sae, "b_dec", None)

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        """(n, d) activations -> (n, m) latents."""
        return self._encode(x)[1]

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) latents and (n, d) reconstruction, on the scale of x.

        One call does both: an SAE that normalises at run time keeps the norms in between.
        """
        encoded, z = self._encode(x)
        return z, self._decode(encoded)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, m) latents as the SAE returns them, and the same dense."""
        scaled = self.scaler.scale(x.to(self.sae.device, self.sae.dtype))
        z = self.sae.encode(as_input(self.sae, scaled))
        return z, (z.to_dense() if z.is_sparse else z).float()

    def _decode(self, encoded: Tensor) -> Tensor:
        """(n, m) latents as the SAE returns them -> (n, d) reconstruction, on the scale of x."""
        return self.scaler.unscale(self.sae.decode(encoded).flatten(1)).float()


def as_input(sae: Any, x: Tensor) -> Tensor:
    """(n, d) activations in the shape that the SAE takes: with one head of width d for `hook_z`.

    Activations have their heads side by side here, as SAELens gives them to an SAE in training.
    """
    return x.unsqueeze(-2) if sae.hook_z_reshaping_mode else x
