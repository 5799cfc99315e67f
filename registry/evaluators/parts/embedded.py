"""Embeddings of a capped sample of the score half, for similarities of images."""

from __future__ import annotations

import numpy as np
import torch

from ... import hashing
from ..base import Accumulator, EvaluationBatch, EvaluationContext
from .samples import SALT


class EmbeddedImages(Accumulator):
    """Embeddings of about `max_images` images of the score half, of length 1.

    The embedding of a batch, or x where it has none: `own_layer` is then true. A hash of an image's
    position decides whether it is kept, the one of `FiringSample`. Memory O(max_images·e).
    """

    def __init__(self, context: EvaluationContext, max_images: int = 8192) -> None:
        super().__init__(context)
        self.max_images = max_images
        self.own_layer = False
        self._index: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._unit: list[np.ndarray] = []

    def update(self, batch: EvaluationBatch) -> None:
        self.own_layer |= batch.embedding is None
        index = batch.index.cpu().numpy()
        odds = 2 * self.max_images / max(self.context.n_images, 1)  # one half counts
        kept = (hashing.uniform(index, SALT) < odds) & ~batch.is_fit.cpu().numpy()
        embedding = batch.x if batch.embedding is None else batch.embedding
        rows = embedding[torch.from_numpy(kept).to(embedding.device)].float()
        self._index.append(index[kept])
        self._unit.append(torch.nn.functional.normalize(rows, dim=1).cpu().numpy())

    def merge(self, other: EmbeddedImages) -> None:
        self.own_layer |= other.own_layer
        self._index += other._index
        self._unit += other._unit

    @property
    def index(self) -> np.ndarray:
        """(n,) positions in the evaluation set."""
        return np.concatenate(self._index)

    @property
    def unit(self) -> np.ndarray:
        """(n, e) float32; (0, 0) before any image."""
        return np.concatenate(self._unit) if self._unit else np.zeros((0, 0), dtype=np.float32)
