"""Capped sample of the positions of images on which a model is run again."""

from __future__ import annotations

import numpy as np

from ... import hashing
from ..base import Accumulator, EvaluationBatch, EvaluationContext

SALT = 103


class ImagePositions(Accumulator):
    """Positions, labels and halves of up to `max_images` images of each half.

    They are those of smallest hash, so the sample depends neither on batches nor on labels.
    """

    def __init__(self, context: EvaluationContext, max_images: int = 256) -> None:
        super().__init__(context)
        self.max_images = max_images
        # index, true and shuffled label
        self._columns = [np.zeros((0, 3), dtype=np.int64) for _ in ("score half", "fit half")]

    def update(self, batch: EvaluationBatch) -> None:
        columns = np.stack(
            [batch.index.cpu().numpy(), *(batch.labels_of(s).numpy() for s in (False, True))],
            axis=1,
        )
        is_fit = batch.is_fit.cpu().numpy()
        for half in (False, True):
            self._add(half, columns[is_fit == half])

    def merge(self, other: ImagePositions) -> None:
        for half in (False, True):
            self._add(half, other._columns[half])

    def _add(self, half: bool, images: np.ndarray) -> None:
        found = np.concatenate([self._columns[half], images])
        order = np.argsort(hashing.uniform(found[:, 0], SALT), kind="stable")
        self._columns[half] = found[order[: self.max_images]]

    def index(self, fit: bool) -> np.ndarray:
        """(n,) positions in the evaluation set, of the fit half or of the score half."""
        return self._columns[fit][:, 0]

    def labels(self, fit: bool, shuffled: bool = False) -> np.ndarray:
        """(n,) the classes of these images."""
        return self._columns[fit][:, 1 + shuffled]
