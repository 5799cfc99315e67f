"""Null controls: latents of untrained sources, and shuffled labels.

`LatentSource` is the interface of both sources of null latents and of the planted detectors.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError


class LatentSource(Protocol):
    """A function from activations to latents."""

    source: str
    d_sae: int

    def encode(self, x: Tensor, *, labels: Tensor, index: Tensor) -> Tensor:
        """(n, d) activations, (n,) classes, (n,) positions in the evaluation set -> (n, m) z."""
        ...


def shuffle_labels(labels: np.ndarray, seed: int = 0) -> np.ndarray:
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
        centred = x.float() - self.mean
        return torch.cat([centred, -centred], dim=-1).relu_()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) z and (n, d) z W_dec + mean, which is x."""
        z = self.encode(x)
        return z, z @ self.W_dec + self.mean


class RandomLatents:
    """An untrained SAE: random unit directions, b_dec = mean of x, one threshold that gives `l0`.

    z = p where p = (x − b_dec) W_enc exceeds the threshold, else 0: a JumpReLU SAE with W_dec =
    W_encᵀ (own definition). Reconstruction: x̂ = b_dec + scale·z W_dec with the scale of least
    squared error, since the unscaled sum of firing latents is far too long.

    Args:
        mean: (d,) mean of x.
        threshold: the value that p must exceed.
        d_sae: number of latents m.
        seed: seed of the directions.
    """

    source = "random"
    scale = 1.0

    def __init__(self, mean: Tensor, threshold: float, d_sae: int, seed: int = 0) -> None:
        self.b_dec = mean.detach().float()
        self.threshold = max(float(threshold), 0.0)
        self.d_sae = d_sae
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(d_sae, len(mean), generator=generator)
        self.W_dec = (directions / directions.norm(dim=1, keepdim=True)).to(mean.device)

    @classmethod
    def fit(cls, x: Tensor, d_sae: int, l0: float, seed: int = 0) -> RandomLatents:
        """Compute mean and threshold from a sample x (n, d), for `l0` firing latents on average.

        Raises:
            ConfigError: `l0` is outside 0 … d_sae.
        """
        if not 0 <= l0 <= d_sae:
            raise ConfigError(
                "l0", "out of range", given=l0, allowed=f"a number between 0 and d_sae={d_sae}"
            )
        latents = cls(x.float().mean(0), 0.0, d_sae, seed)
        # At least 0, so that no negative activation fires: L0 is at most about half of d_sae.
        n_kept = min(round(l0 * len(x)), x.shape[0] * d_sae)
        pre = ((x.float() - latents.b_dec) @ latents.W_dec.T).flatten()
        if n_kept < len(pre):
            latents.threshold = max(float(torch.topk(pre, n_kept + 1).values[-1]), 0.0)
        decoded = latents.encode(x) @ latents.W_dec
        square = float(decoded.square().sum())
        if square:
            latents.scale = float((decoded * (x.float() - latents.b_dec)).sum()) / square
        return latents

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        """(n, d) -> (n, m) z."""
        pre = (x.float() - self.b_dec) @ self.W_dec.T
        return torch.where(pre > self.threshold, pre, torch.zeros_like(pre))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) z and (n, d) x̂."""
        z = self.encode(x)
        return z, self.b_dec + self.scale * (z @ self.W_dec)
