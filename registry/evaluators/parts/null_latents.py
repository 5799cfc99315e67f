"""Null controls: latents of untrained twins and of neurons, and shuffled labels.

`LatentSource` is the interface of all sources of latents, the planted detectors among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .sae_latents import SAELatents
from .twin import mean_l0, untrained_twin


class LatentSource(Protocol):
    """A function from activations to latents."""

    source: str
    d_sae: int

    def encode(self, x: Tensor, *, labels: Tensor, index: Tensor) -> Tensor:
        """(n, d) activations, (n,) classes, (n,) positions in the evaluation set -> (n, m) z."""
        ...


def shuffle_labels(labels: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
    """(n,) the labels (n,) permuted over the images: the `shuffled` null."""
    return np.random.default_rng(seed).permutation(labels)


class NeuronLatents:
    """The neurons as 2·d latents: x⁺ and (−x)⁺ after centring (own definition).

    Args:
        mean: (d,) mean of x.
    """

    source = "neurons"

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean.detach().float()
        self.d_sae = 2 * len(mean)

    @classmethod
    def fit(cls, x: Tensor) -> NeuronLatents:
        """Centre on the mean of a sample x (n, d)."""
        return cls(x.float().mean(0))

    @property
    def b_dec(self) -> Tensor:
        """(d,) mean of x."""
        return self.mean

    @property
    def W_dec(self) -> Tensor:
        """(2d, d): the coordinate directions and their negatives."""
        eye = torch.eye(len(self.mean), device=self.mean.device)
        return torch.cat([eye, -eye])

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        """(n, d) -> (n, m) z."""
        centred = x.to(self.mean) - self.mean
        return torch.cat([centred, -centred], dim=-1).relu_()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) z and (n, d) z W_dec + mean, which is x."""
        z = self.encode(x)
        return z, z @ self.W_dec + self.mean


class TwinLatents(SAELatents):
    """The latents of an untrained twin of an SAE (see `twin.py`).

    Reconstruction: the twin's own, of scale·z with the scale of least squared error on the sample
    (own definition), since latents that were not trained to reconstruct have no scale.

    Args:
        twin: the untrained SAE.
        activation_scaler: that of the SAE, where it is in training.
        sample: (n, d) activations for the scale.
    """

    source = "random"

    def __init__(self, twin: Any, activation_scaler: Any, sample: Tensor) -> None:
        super().__init__(twin, activation_scaler)
        self._sample = sample

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        latents: SAELatents,
        x: Tensor,
        seed: int = 0,
        draw: int = 0,
        l0: float | None = None,
    ) -> TwinLatents:
        """The twin of an SAE, with mean of x, mean L0 and scale from a sample x (n, d).

        Args:
            latents: the SAE.
            x: the sample.
            seed: with `draw`, the seed of the twin's weights.
            draw: number of the twin.
            l0: the SAE's mean L0 on the sample, where it is known (see `mean_l0`).

        Raises:
            ConfigError: see `untrained_twin`.
        """
        l0 = mean_l0(latents, x) if l0 is None else l0
        scaled = latents.scaler.scale(x.to(latents.sae.device, latents.sae.dtype))
        weights_seed = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
        return cls(untrained_twin(latents.sae, scaled, l0, weights_seed), latents.scaler, x)

    @cached_property
    @torch.no_grad()
    def scale(self) -> float:
        """The factor of the latents in a reconstruction.

        Least squares of x on the two parts of a reconstruction: from b_dec, and from z.
        """
        x = self._sample
        constant = self._decode(self._encode(x)[0] * 0)
        from_z = self._decode(self._encode(x)[0]) - constant
        square = float(from_z.square().sum())
        return float((from_z * (x.to(constant) - constant)).sum()) / square if square else 1.0

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) z and (n, d) x̂."""
        scale = self.scale  # which encodes: an SAE keeps norms between encoding and decoding
        encoded, z = self._encode(x)
        return z, self._decode(encoded * scale)
