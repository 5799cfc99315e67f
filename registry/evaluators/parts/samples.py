"""Capped samples of images, for pairs of latents, probes and geometry, which need more than sums.

A hash of its position decides whether an image is kept, so samples do not depend on the batches.
The cap holds on average: a sample of 1,000 may contain 1,030.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ... import hashing
from ..base import Accumulator, EvaluationBatch, EvaluationContext, require_same

SALT = 101
DENSE = 0.02
"""Share of nonzeros above which joint sums are made by dense products."""
ROWS = 2048
"""Images of such a product at a time."""


class _Kept(Accumulator):
    """What is stored of the images that are kept: their latents, labels, halves and positions."""

    def __init__(self, context: EvaluationContext, max_images: int) -> None:
        super().__init__(context)
        self.max_images = max_images
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # values, latents; entries a row
        self._z = sparse.csr_array((0, context.d_sae), dtype=np.float32)

    def odds(self, labels: np.ndarray) -> np.ndarray | float:
        """(n,) or scalar: the probability that images of these classes (n,) are kept."""
        return self.max_images / max(self.context.n_images, 1)

    def _draw(self, index: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the images at these positions, of these classes, are drawn."""
        return hashing.uniform(index, SALT) < self.odds(labels)

    def update(self, batch: EvaluationBatch) -> None:
        index = batch.index.cpu().numpy()
        labellings = [batch.labels_of(shuffled).numpy() for shuffled in (False, True)]
        kept = self._draw(index, labellings[0])
        if self.context.shuffled:
            kept = kept | self._draw(index, labellings[1])
        self._keep(batch, kept)
        columns = (*labellings, batch.is_fit.cpu().numpy(), index)
        self._columns.append(tuple(column[kept] for column in columns))

    def merge(self, other: _Kept) -> None:
        require_same("max_images", self.max_images, other.max_images)
        both = sparse.csr_array(sparse.vstack([self._latents(), other._latents()], format="csr"))
        self._columns += other._columns
        order = np.argsort(~self._column(2), kind="stable")  # the fit half first, as in one pass
        self._z = sparse.csr_array(both[order])
        self._columns = [tuple(self._column(i)[order] for i in range(4))]

    def _keep(self, batch: EvaluationBatch, kept: np.ndarray) -> None:
        rows, latents, values = batch.active
        chosen = torch.from_numpy(kept).to(rows.device)
        of_kept = chosen[rows]
        sizes = torch.bincount(rows, minlength=len(kept))[chosen]
        self._parts.append((values[of_kept], latents[of_kept].int(), sizes))

    def _latents(self) -> sparse.csr_array:
        if self._parts:
            values, latents, sizes = (torch.cat(c).cpu().numpy() for c in zip(*self._parts))
            self._parts = []
            pointers = np.append(0, np.cumsum(sizes)).astype(np.int32)
            size = (len(sizes), self.context.d_sae)
            new = sparse.csr_array((values, latents, pointers), shape=size)
            self._z = sparse.csr_array(sparse.vstack([self._z, new], format="csr"))
        return self._z

    def _column(self, i: int) -> np.ndarray:
        """True labels, shuffled labels, halves, positions."""
        empty = np.zeros(0, dtype=bool if i == 2 else np.int64)
        return np.concatenate([empty, *(columns[i] for columns in self._columns)])


class FiringSample(_Kept):
    """The latents of about `max_images` images, sampled uniformly.

    Memory O(max_images · L0).
    """

    def __init__(self, context: EvaluationContext, max_images: int = 16384) -> None:
        super().__init__(context, max_images)

    @property
    def z(self) -> sparse.csr_array:
        """(n, m) the latents of the images kept."""
        return self._latents()

    def labels(self, shuffled: bool = False) -> np.ndarray:
        """(n,) classes."""
        return self._column(int(shuffled))

    @property
    def is_fit(self) -> np.ndarray:
        """(n,) bool."""
        return self._column(2)

    @property
    def index(self) -> np.ndarray:
        """(n,) positions in the evaluation set."""
        return self._column(3)


class FiringStore(FiringSample):
    """As `FiringSample`, with fewer images where many latents fire on an image: the calibration
    sample decides.

    Memory O(max_firings).
    """

    def __init__(
        self, context: EvaluationContext, max_images: int = 65536, max_firings: int = 2**24
    ) -> None:
        super().__init__(context, max_images)
        self.max_firings = max_firings

    def calibrate(self, batch: EvaluationBatch) -> None:
        l0 = len(batch.firings.rows) / max(len(batch), 1)
        if l0 * self.max_images > self.max_firings:
            self.max_images = max(1, int(self.max_firings / l0))


class Drawn(NamedTuple):
    """Images of a sample: activations x (n, d), latents z (n, m), and (n,) labels, halves, positions."""

    x: Tensor
    z: sparse.csr_array
    labels: np.ndarray
    is_fit: np.ndarray
    index: np.ndarray


class ImageSample(_Kept):
    """Activations and latents of about `max_images` images, in equal shares of the classes.

    A class with fewer images than its share is kept entirely. The shuffled labels have a sample of
    their own, in equal shares of the shuffled classes: of the true ones, the shuffled labels would be
    as frequent as among all images. Both are the same images where classes have equally many.
    Memory O(max_images·(d + L0)).
    """

    def __init__(self, context: EvaluationContext, max_images: int = 4096) -> None:
        super().__init__(context, max_images)
        self._x: list[Tensor] = []
        self._drawn: dict[bool, Drawn] = {}

    def odds(self, labels: np.ndarray) -> np.ndarray | float:
        counts = self.context.class_counts
        if counts is None:
            return super().odds(labels)
        return self.max_images / np.count_nonzero(counts) / np.maximum(counts, 1)[labels]

    def _keep(self, batch: EvaluationBatch, kept: np.ndarray) -> None:
        super()._keep(batch, kept)
        self._x.append(batch.x[torch.from_numpy(kept).to(batch.x.device)].float())
        self._drawn.clear()

    def merge(self, other: ImageSample) -> None:
        order = np.argsort(~np.concatenate([self._column(2), other._column(2)]), kind="stable")
        self._x = [torch.cat([self._activations(), other._activations()])[torch.from_numpy(order)]]
        super().merge(other)
        self._drawn.clear()

    def _activations(self) -> Tensor:
        if len(self._x) != 1:
            empty = torch.zeros(0, self.context.d_in)
            self._x = [torch.cat([*(x.cpu() for x in self._x), empty])]
        return self._x[0].cpu()

    def draws_differ(self) -> bool:
        """Whether the sample for the shuffled labels has other images."""
        index = self._column(3)
        own, other = (self._draw(index, self._column(labelling)) for labelling in (0, 1))
        return self.context.shuffled and not np.array_equal(own, other)

    def drawn(self, shuffled: bool = False) -> Drawn:
        """The sample for the true or for the shuffled labels."""
        if shuffled not in self._drawn:
            labels, is_fit, index = (self._column(i) for i in (int(shuffled), 2, 3))
            x, z = self._activations(), self._latents()
            rows = self._draw(index, labels)
            if not rows.all():
                labels, is_fit, index = labels[rows], is_fit[rows], index[rows]
                x, z = x[torch.from_numpy(rows)], sparse.csr_array(z[rows])
            self._drawn[shuffled] = Drawn(x, z, labels, is_fit, index)
        return self._drawn[shuffled]


class Together(NamedTuple):
    """P pairs of latents that fire on some common image, each (P,); by the first, then the second."""

    first: np.ndarray
    second: np.ndarray
    images: np.ndarray  # number of common images


def together(firings: sparse.csr_array, latents: np.ndarray) -> Together:
    """Pairs of each of `latents` (b,), by position, with every latent that fires on a common image.

    Args:
        firings: (n, m) of zeros and ones.
    """
    first, second, (images,) = joint_sums([(firings[:, latents], firings)])
    return Together(first, second, images.round().astype(np.int64))


def joint_sums(
    products: Sequence[tuple[sparse.csr_array, sparse.csr_array]],
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Σ over images of a_i·b_j, for the pairs (i, j) of columns that are above 0 on a common image.

    Args:
        products: matrices a (n, b) and b (n, m) of each sum, none below 0; all a have the same
            nonzeros, and all b.

    Returns:
        i and j, (P,) each, by i and then j; for each of `products` the sums (P,).
    """
    n, m = shape(products[0][1])
    if products[0][1].nnz > DENSE * n * m:  # dense products are faster here
        sums = [np.zeros((shape(a)[1], m), dtype=a.dtype) for a, _ in products]
        for start in range(0, n, ROWS):
            for total, (a, b) in zip(sums, products):
                total += a[start : start + ROWS].toarray().T @ b[start : start + ROWS].toarray()
        first, second = np.nonzero(sums[0])
        return first, second, [total[first, second] for total in sums]
    found = [sparse.csr_array(sparse.csr_array(a.T) @ b) for a, b in products]
    for product in found:
        product.sort_indices()
    first = np.repeat(np.arange(shape(found[0])[0]), np.diff(found[0].indptr))
    return first, found[0].indices, [product.data for product in found]


def shape(matrix: sparse.csr_array) -> tuple[int, int]:
    """Rows and columns (scipy annotates `shape` as optional)."""
    n, m = matrix.shape or (0, 0)
    return n, m


def fires(z: sparse.csr_array) -> sparse.csr_array:
    """(n, m) ones where z is above 0."""
    above = z.data > 0
    if above.all():
        return sparse.csr_array((np.ones_like(z.data), z.indices, z.indptr), shape=shape(z))
    pointers = np.append(0, np.cumsum(above))[z.indptr].astype(z.indptr.dtype)
    ones = np.ones(pointers[-1], dtype=z.dtype)
    return sparse.csr_array((ones, z.indices[above], pointers), shape=shape(z))
