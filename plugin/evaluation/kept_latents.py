"""The latents of an SAE that is measured in several passes: those of the images are computed once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...registry.evaluators.base import nonzero
from ...registry.evaluators.parts.sae_latents import SAELatents

KEPT = 2**27
"""Most entries that are kept; each has 8 bytes."""


class KeptLatents(SAELatents):
    """The latents of an SAE, with those of the images of an evaluation set, kept where they are not 0.

    Batches are added, then read in any order.

    Args:
        latents: the SAE.
        n_images: images of the evaluation set.
    """

    def __init__(self, latents: SAELatents, n_images: int) -> None:
        super().__init__(latents.sae, latents.scaler)
        self._place = torch.full((n_images,), -1)  # of an image among those that were added
        self._n = 0
        self._device = torch.device("cpu")  # of the latents
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, positions: np.ndarray, z: Tensor) -> None:
        """Keep the latents z (b, m) of the images at `positions` (b,)."""
        self._device = z.device
        z = z.cpu() if z.device.type == "mps" else z  # as for evaluation batches
        flat = nonzero(z)
        rows = flat // z.shape[1]
        counts = torch.bincount(rows, minlength=len(z))
        self._parts.append((counts, (flat - rows * z.shape[1]).int(), z.flatten()[flat]))
        self._place[torch.from_numpy(positions)] = torch.arange(self._n, self._n + len(z))
        self._n += len(z)

    @property
    def fits(self) -> bool:
        """Whether all images have at most `KEPT` entries, if they are as those that were added."""
        entries = sum(len(values) for *_, values in self._parts)
        return entries * len(self._place) <= KEPT * max(self._n, 1)

    def of_images(self, index: Tensor) -> Tensor:
        """(b, m) the latents of the images at `index` (b,)."""
        starts, latents, values = self._all
        place = self._place[index.cpu()].to(starts.device)
        first = starts[place]
        counts = starts[place + 1] - first
        rows = torch.arange(len(place), device=starts.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        at = torch.arange(len(rows), device=starts.device) + (first - before)[rows]
        z = values.new_zeros(len(place), self.d_sae)
        z[rows, latents[at].long()] = values[at]
        return z.to(self._device)

    @property
    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the entries of each image start, and their end (n + 1,); their latents and values (e,)."""
        if self._joined is None:
            counts, latents, values = (torch.cat(column) for column in zip(*self._parts))
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            self._parts, self._joined = [], (starts, latents, values)
        return self._joined
