"""The statistics that the count-based evaluators read, each gathered once per pass.

All are built from the nonzeros of z, so a sparse z costs what its firings cost.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .base import Accumulator, EvaluationBatch, EvaluationContext

SURVIVAL = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.04, 0.025, 0.015, 0.008, 0.004)
"""The share of a latent's firings that lies at or above each threshold. Most of the grid is in the
tail: a dense latent (a raw neuron) can only single out a small node far above its median."""

DTYPES = ((255, torch.uint8), (2**15 - 1, torch.int16), (2**31 - 1, torch.int32))


class ClassCounts(Accumulator):
    """Images per class, fit and score halves apart, under the true and the shuffled labels."""

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        n_classes = len(context.taxonomy.classes)
        self.counts = np.zeros((2, 2, n_classes), dtype=np.int64)  # (shuffled, score half, C)

    def update(self, batch: EvaluationBatch) -> None:
        half = (~batch.is_fit).cpu().long()
        n_classes = self.counts.shape[-1]
        for shuffled in (False, True):
            flat = half * n_classes + batch.labels_of(shuffled)
            counts = torch.bincount(flat, minlength=2 * n_classes).numpy()
            self.counts[int(shuffled)] += counts.reshape(2, n_classes)

    def fit(self, shuffled: bool = False) -> np.ndarray:
        """(C,) images of the fit half."""
        return self.counts[int(shuffled), 0]

    def score(self, shuffled: bool = False) -> np.ndarray:
        """(C,) images of the score half."""
        return self.counts[int(shuffled), 1]

    def all(self, shuffled: bool = False) -> np.ndarray:
        """(C,) images."""
        return self.counts[int(shuffled)].sum(0)


class Thresholds(Accumulator):
    """Per latent, the activations that a given share of its firings reaches, from the calibration.

    `values (m, T)` rises along T. The first threshold is 0: the latent fires at all. A latent that
    never fired in the calibration sample takes the quantiles of all firings pooled.
    """

    def __init__(self, context: EvaluationContext, survival: tuple[float, ...] = SURVIVAL) -> None:
        super().__init__(context)
        if survival[0] != 1.0 or list(survival) != sorted(set(survival), reverse=True):
            raise ValueError(f"survival: must fall strictly from 1.0, got {survival}")
        self.survival = survival
        self.values: np.ndarray | None = None

    def calibrate(self, batch: EvaluationBatch) -> None:
        latents, values = batch.firings.latents.numpy(), batch.firings.values.numpy()
        order = np.lexsort((values, latents))
        counts = np.bincount(latents, minlength=self.context.d_sae)
        quantiles = self._quantiles(values[order], np.cumsum(counts) - counts, counts)
        if len(values):
            pooled = self._quantiles(np.sort(values), np.zeros(1, int), np.array([len(values)]))
            quantiles[counts == 0] = pooled
        self.values = quantiles

    def _quantiles(self, ordered: np.ndarray, start: np.ndarray, counts: np.ndarray) -> np.ndarray:
        out = np.zeros((len(counts), len(self.survival)), dtype=np.float32)
        for t, share in enumerate(self.survival[1:], 1):
            at = np.minimum(((1 - share) * counts).astype(int), counts - 1)
            out[counts > 0, t] = ordered[(start + at)[counts > 0]]
        return out

    def update(self, batch: EvaluationBatch) -> None:
        if self.values is None:
            self.calibrate(batch)

    def bins(self, latents: Tensor, values: Tensor) -> Tensor:
        """(nnz,) the last threshold that each firing reaches."""
        assert self.values is not None, "Thresholds.bins is asked for before any batch was seen"
        thresholds = torch.from_numpy(self.values)
        bins = torch.zeros(len(values), dtype=torch.int64)
        for t in range(1, len(self.survival)):
            bins += values >= thresholds[latents, t]
        return bins


class FiringHistogram(Accumulator):
    """How many images of each class put each latent into each bin between its thresholds.

    `counts (2, m, T, C)`: fit half, score half; bin t holds firings from threshold t up to the
    next. The memory is the narrowest integer that can count the largest class (bytes for 50 images
    a class): 2·m·T·C of them.

    Args:
        shuffled: count under the shuffled labels.
        survival: see `SURVIVAL`; `(1.0,)` counts firings alone.
    """

    def __init__(
        self,
        context: EvaluationContext,
        shuffled: bool = False,
        survival: tuple[float, ...] = SURVIVAL,
    ) -> None:
        super().__init__(context)
        self.shuffled = shuffled
        self.thresholds = context.share(Thresholds, survival=survival)
        dtype = next(dtype for most, dtype in DTYPES if context.largest_class <= most)
        n_classes = len(context.taxonomy.classes)
        self.counts = torch.zeros(2, context.d_sae, len(survival), n_classes, dtype=dtype)
        self._rows: list[sparse.csr_array] | None = None

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.firings
        _, m, n_bins, n_classes = self.counts.shape
        half = (~batch.is_fit).cpu().long()[rows]
        bins = self.thresholds.bins(latents, values)
        labels = batch.labels_of(self.shuffled)[rows]
        flat = ((half * m + latents) * n_bins + bins) * n_classes + labels
        ones = torch.ones(1, dtype=self.counts.dtype).expand(len(flat))
        self.counts.view(-1).scatter_add_(0, flat, ones)
        self._rows = None

    @property
    def n_bins(self) -> int:
        return self.counts.shape[2]

    def fired(self) -> np.ndarray:
        """(m, C) images of both halves on which the latent fires at all."""
        fired = torch.zeros(self.counts.shape[1], self.counts.shape[3], dtype=torch.int32)
        for half in self.counts:
            for t in range(self.n_bins):  # a sum() over both would widen all the counts at once
                fired += half[:, t]
        return fired.numpy()

    def fit(self) -> sparse.csr_array:
        """(m·T, C) counts of the fit half; row j·T + t is bin t of latent j."""
        return self._rows_of(0)

    def score(self) -> sparse.csr_array:
        """(m·T, C) counts of the score half."""
        return self._rows_of(1)

    def _rows_of(self, half: int) -> sparse.csr_array:
        if self._rows is None:
            self._rows = [_csr(counts.flatten(0, 1)) for counts in self.counts]
        return self._rows[half]


def _csr(counts: Tensor, block: int = 8192) -> sparse.csr_array:
    blocks = []
    for rows in counts.split(block):  # nonzero() gives int64 pairs: wide where counts are dense
        at, columns = torch.nonzero(rows, as_tuple=True)
        ends = torch.bincount(at, minlength=len(rows)).cumsum(0).numpy()
        pointers = np.concatenate([[0], ends])
        values = rows[at, columns].float().numpy()
        shape = (len(rows), counts.shape[1])
        blocks.append(sparse.csr_array((values, columns.int().numpy(), pointers), shape=shape))
    return sparse.csr_array(sparse.vstack(blocks))


class TopImages(Accumulator):
    """The k most activating images of each latent, best first; equal activations in random order.

    `values (m, k)` is 0 and `index (m, k)` is −1 where the latent fires on fewer than k images.
    """

    def __init__(self, context: EvaluationContext, k: int = 16) -> None:
        super().__init__(context)
        m = context.d_sae
        self.k = k
        self.values = np.zeros((m, k), dtype=np.float32)
        self.index = np.full((m, k), -1, dtype=np.int64)
        self._labels = np.full((2, m, k), -1, dtype=np.int32)
        self._priority = np.full((m, k), np.inf)

    def labels(self, shuffled: bool = False) -> np.ndarray:
        """(m, k) classes of the images, −1 where there is none."""
        return self._labels[int(shuffled)]

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = (t.numpy() for t in batch.firings)
        last = self.values[latents, -1]
        near = np.flatnonzero(values >= last)
        rows, latents, values, last = rows[near], latents[near], values[near], last[near]
        priority = batch.priority[rows]
        enters = (values > last) | (priority < self._priority[latents, -1])
        rows, latents, values = rows[enters], latents[enters], values[enters]

        old = np.unique(latents)
        kept = self.index[old] >= 0
        latents = np.concatenate([np.repeat(old, kept.sum(1)), latents])
        columns = [
            (self.values, values),
            (self.index, batch.index.cpu().numpy()[rows]),
            (self._labels[0], batch.labels_of(False).numpy()[rows]),
            (self._labels[1], batch.labels_of(True).numpy()[rows]),
            (self._priority, priority[enters]),
        ]
        joined = [np.concatenate([store[old][kept], new]) for store, new in columns]
        order = np.lexsort((joined[-1], -joined[0], latents))
        latents = latents[order]
        rank = np.arange(len(order)) - np.searchsorted(latents, latents)
        best = rank < self.k
        for (store, _), column in zip(columns, joined):
            store[latents[best], rank[best]] = column[order][best]


class FiringRate(Accumulator):
    """How often and how strongly each latent fires.

    `fired (m,)` images, `total (m,)` sum and `largest (m,)` activation; `n` images seen.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self.n = 0
        self.fired = np.zeros(context.d_sae, dtype=np.int64)
        self.total = np.zeros(context.d_sae)
        self.largest = np.zeros(context.d_sae, dtype=np.float32)

    def update(self, batch: EvaluationBatch) -> None:
        _, latents, values = batch.firings
        m = len(self.fired)
        self.n += len(batch)
        self.fired += torch.bincount(latents, minlength=m).numpy()
        self.total += torch.bincount(latents, weights=values.double(), minlength=m).numpy()
        torch.from_numpy(self.largest).scatter_reduce_(0, latents, values, "amax")

    @property
    def rate(self) -> np.ndarray:
        """(m,) share of images on which each latent fires; NaN before any image."""
        return self.fired / self.n if self.n else np.full(len(self.fired), np.nan)

    @property
    def mean_l0(self) -> float:
        """Mean number of latents that fire on an image."""
        return float(self.fired.sum() / self.n) if self.n else float("nan")
