"""Mean activation and mean latent of each class, computed once per pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import Accumulator, EvaluationBatch, EvaluationContext, require_same
from . import summary
from .accumulators import ClassCounts


class LatentSums(Accumulator):
    """`sums (labellings, m, C)`: each latent summed over the images of each class."""

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._classes = context.share(ClassCounts)
        labellings, n_classes = 2 if context.shuffled else 1, len(context.taxonomy.classes)
        self.sums = torch.zeros(labellings, context.d_sae, n_classes)

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.active
        self.sums = self.sums.to(rows.device)
        for shuffled, sums in zip((False, True), self.sums):
            cell = latents * sums.shape[1] + batch.labels_of(shuffled, rows.device)[rows]
            sums.view(-1).scatter_add_(0, cell, values)

    def merge(self, other: LatentSums) -> None:
        self.sums = self.sums + other.sums.to(self.sums.device)

    def means(self, shuffled: bool = False) -> np.ndarray:
        """(m, C), NaN for a class without images."""
        return summary.ratio(self.sums[int(shuffled)].cpu().numpy(), self._classes.all(shuffled))


class ActivationSums(Accumulator):
    """`sums (labellings, C, d)`: x − `offset`, summed over the images of each class.

    The offset is the mean of the calibration sample, for the precision of differences between classes.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._classes = context.share(ClassCounts)
        labellings, n_classes = 2 if context.shuffled else 1, len(context.taxonomy.classes)
        self.sums = torch.zeros(labellings, n_classes, context.d_in, dtype=torch.float64)
        self.offset: Tensor | None = None

    def calibrate(self, batch: EvaluationBatch) -> None:
        self.offset = batch.x.double().mean(0)

    def update(self, batch: EvaluationBatch) -> None:
        if self.offset is None:
            self.calibrate(batch)
        assert self.offset is not None
        x = (batch.x.double() - self.offset).cpu()
        for shuffled, sums in zip((False, True), self.sums):
            sums.index_add_(0, batch.labels_of(shuffled), x)

    def merge(self, other: ActivationSums) -> None:
        require_same("mean of x", self.offset, other.offset)
        self.sums += other.sums

    def means(self, shuffled: bool = False) -> np.ndarray:
        """(C, d) minus the offset, NaN for a class without images."""
        return summary.ratio(self.sums[int(shuffled)].numpy(), self._classes.all(shuffled)[:, None])
