"""Hold-outs: a stratified, seeded division of one split into training and held-out images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """One of the two parts into which a hold-out divides a split.

    Attributes:
        share: share of every class that is held out, above 0 and below 1.
        seed: of the choice of images.
        held_out: whether this is the held-out part, else the training images.
    """

    share: float
    seed: int
    held_out: bool

    @property
    def other(self) -> Part:
        """The other part."""
        return self._replace(held_out=not self.held_out)

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """(n,) positions of the images of this part, rising.

        Of a class of N images, round(share * N) are held out, at least one and never all; the only
        image of a class is trained on. Images without a label (-1) count as one class.

        Args:
            labels: (N,) class of each image of the split.
        """
        generator = np.random.default_rng(self.seed)
        held_out = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            n = min(max(round(self.share * len(members)), 1), len(members) - 1)
            held_out[members[:n]] = True
        return np.flatnonzero(held_out == self.held_out)

    def __str__(self) -> str:
        share = f"{self.share:g} held out by seed {self.seed}"
        return share if self.held_out else f"without the {share}"
