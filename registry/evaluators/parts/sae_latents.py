"""The latents of an SAE, as evaluators read them."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

logger = logging.getLogger(__name__)

NORMALISING = ("layer_norm", "constant_norm_rescale")
"""Settings of `normalize_activations` by which an SAE normalises each input, and its reconstruction back."""
ROUNDING = 1e-5
"""Relative difference of two sums over latents that is rounding in single precision."""


class SAELatents:
    """The latents of an SAE. One in training needs SAELens's `activation_scaler` too.

    The reconstruction is z·`W_dec` + `b_dec`. Where the SAE normalises each input, that is on the scale of `as_decoded(x)`:
    x̂ − x = u·(z·W_dec + b_dec − as_decoded(x)), with u the spread of x over that of as_decoded(x).
    """

    source = "sae"

    def __init__(self, sae: Any, activation_scaler: Any = None) -> None:
        self.sae = sae
        self.scaler = ActivationScaler() if activation_scaler is None else activation_scaler
        self.d_sae: int = sae.cfg.d_sae

    @property
    def W_dec(self) -> Tensor | None:
        """(m, d) what one unit of each latent adds to the reconstruction."""
        return self._decoder[0]

    @property
    def b_dec(self) -> Tensor | None:
        """(d,) the reconstruction without latents."""
        return self._decoder[1]

    @cached_property
    @torch.no_grad()
    def _decoder(self) -> tuple[Tensor | None, Tensor | None]:
        rows, offset = decoder_of(self.sae)
        if self._is_scaled:
            if rows is not None:
                rows = self.scaler.unscale(rows) - self.scaler.unscale(torch.zeros_like(rows[:1]))
            offset = None if offset is None else self.scaler.unscale(offset)
        return rows, offset

    @property
    def _is_scaled(self) -> bool:
        return self.scaler.scaling_factor is not None or self.scaler.whitening is not None

    @torch.no_grad()
    def as_decoded(self, x: Tensor) -> Tensor:
        """(n, d) x on the scale of `W_dec` and `b_dec`; x itself where the SAE does not normalise each input."""
        sae = self.sae
        if sae.cfg.normalize_activations not in NORMALISING:
            return x
        centred = sae.process_sae_in(as_input(sae, x.to(sae.device, sae.dtype)))
        return (centred + sae.b_dec * sae.cfg.apply_b_dec_to_input).to(x)

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


def decoder_of(sae: Any) -> tuple[Tensor | None, Tensor | None]:
    """(m, d) rows and (d,) offset by which `sae.decode(z)` is z·rows + offset, where it normalises no input.

    They are `W_dec` and `b_dec` of most SAEs. Others divide `W_dec` by the norms of its rows or by a number, or leave
    `b_dec` out: `decode` of a few random latents shows it, and what is none of these is read row by row. No rows where
    the SAE has no `W_dec`, or where `decode` is not linear, with a warning.
    """
    weight, bias = getattr(sae, "W_dec", None), getattr(sae, "b_dec", None)
    if weight is None or bias is None or not len(weight):
        return weight, bias
    neutral = _neutral_input(sae)

    def decoded(z: Tensor) -> Tensor:
        sae.encode(neutral.expand(len(z), *neutral.shape[1:]))
        return sae.decode(z).flatten(1).float()

    generator = torch.Generator().manual_seed(0)
    z = torch.rand(4, len(weight), generator=generator).to(weight)
    offset = decoded(torch.zeros_like(z[:1]))
    added = decoded(z) - offset
    close = 1e-3 if weight.dtype == torch.float32 else 3e-2
    if torch.allclose(offset[0], bias.float(), rtol=close, atol=close * float(bias.abs().max())):
        offset = bias[None]
    fits = []
    for is_divided in (False, True):
        rows = weight / sae.get_W_dec_norm()[:, None] if is_divided else weight
        expected = (z @ rows).float()
        factor = float((expected * added).sum() / expected.square().sum().clamp(min=1e-30))
        error = float((added - factor * expected).norm() / added.norm().clamp(min=1e-30))
        fits.append((error, factor, rows))
        if error <= ROUNDING:
            break
    error, factor, rows = min(fits, key=lambda fit: fit[0])
    if error <= close:
        return (rows if abs(factor - 1) <= close else rows * factor), offset[0].to(bias)
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    rows = torch.cat([decoded(part) - offset.float() for part in one.split(1024)])
    if (added - z.float() @ rows).norm() > close * added.norm():
        logger.warning(
            "%s: its reconstruction is not linear in the latents; numbers of decoder rows are undefined.",
            sae.cfg.architecture(),
        )
        return None, offset[0].to(bias)
    return rows.to(weight), offset[0].to(bias)


def _neutral_input(sae: Any) -> Tensor:
    """(1, d) an input that an SAE which normalises its inputs leaves as it is, in the shape that it takes."""
    d = sae.cfg.d_in
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x - x.mean()
    # SAELens's standard deviation is the unbiased one.
    size = d - 1 if sae.cfg.normalize_activations == "layer_norm" else d
    return as_input(sae, (x * (size**0.5 / x.norm())).to(sae.device, sae.dtype))


def as_input(sae: Any, x: Tensor) -> Tensor:
    """(n, d) activations in the shape that the SAE takes: with one head of width d for `hook_z`.

    Activations have their heads side by side here, as SAELens gives them to an SAE in training.
    """
    return x.unsqueeze(-2) if sae.hook_z_reshaping_mode else x
