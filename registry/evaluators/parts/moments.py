"""Between-group variance of a feature, from sums per class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import require_same
from . import summary


class ClassMoments:
    """Per-class sums of a feature about a fixed offset, and the total sum of squares.

    Args:
        n_classes: C.
        n_labellings: how many labellings there are.
        feature: (n, d) a sample, which decides the offset.
    """

    def __init__(self, n_classes: int, n_labellings: int, feature: Tensor) -> None:
        # Sparse latents keep their zeros; dense features are centred on their mean in this sample,
        # since a large offset would cancel the precision of the variance.
        self.offset = None if float((feature == 0).float().mean()) > 0.5 else feature.mean(0)
        shape = (n_labellings, n_classes, feature.shape[1])
        self.sums = torch.zeros(shape, dtype=torch.float32, device=feature.device)
        self.counts = np.zeros((n_labellings, n_classes))
        self.squares = 0.0
        self._gram: dict[int, np.ndarray] = {}

    def update(self, feature: Tensor, labellings: list[Tensor]) -> None:
        """Add a batch of the feature (n, d) with its labels (n,) under each labelling."""
        if self.offset is not None:
            feature = feature - self.offset
        for sums, counts, labels in zip(self.sums, self.counts, labellings):
            sums.index_add_(0, labels.to(feature.device), feature)
            counts += torch.bincount(labels, minlength=len(counts)).numpy()
        self.squares += float(feature.square().sum(1).cpu().double().sum())
        self._gram.clear()

    def merge(self, other: ClassMoments) -> None:
        """Add the sums of another part of the images, about the same offset."""
        require_same("mean of a feature", self.offset, other.offset)
        self.sums += other.sums
        self.counts += other.counts
        self.squares += other.squares
        self._gram.clear()

    def variance_share(self, groups: np.ndarray, labelling: int) -> np.ndarray:
        """(L,) between-group over total variance, for groups (L, C).

        Σ_g ‖s_g‖²/n_g − ‖s‖²/n with s the sums; ‖s_g‖² is a sum over the Gram matrix of the
        classes' sums, computed once for all cuts and permutations.
        """
        if labelling not in self._gram:
            sums = self.sums[labelling]
            self._gram[labelling] = (sums @ sums.T).double().cpu().numpy()
        gram, counts = self._gram[labelling], self.counts[labelling]
        n = counts.sum()
        whole = gram.sum() / n if n else np.nan
        share = np.full(len(groups), np.nan)
        for i, group in enumerate(groups):
            _, code = np.unique(group, return_inverse=True)
            size = np.bincount(code, counts)
            own = (gram * (code[:, None] == code)).sum(1)  # ⟨s_c, s of c's group⟩
            squares = np.bincount(code, own)
            between = np.divide(squares, size, out=np.zeros_like(size), where=size > 0).sum()
            share[i] = summary.ratio(between - whole, self.squares - whole)
        return share
