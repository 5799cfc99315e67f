"""Shared statistics of the count-based evaluators, each computed once per pass.

All are computed from the nonzeros of z, so the cost is that of the firings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...errors import ConfigError
from ..base import Accumulator, EvaluationBatch, EvaluationContext

SURVIVAL = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.04, 0.025, 0.015, 0.008, 0.004)
"""Share of a latent's firings at or above each threshold. Most of the grid is in the tail: a dense
latent (a neuron) can detect a small node only far above its median."""

DTYPES = ((255, torch.uint8), (2**15 - 1, torch.int16), (2**31 - 1, torch.int32))


class ClassCounts(Accumulator):
    """Images per class of fit and score half, under the true and the shuffled labels."""

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


def check_survival(survival: Sequence[float]) -> None:
    """Check a grid of thresholds.

    Raises:
        ConfigError: it does not decrease strictly from 1.
    """
    if not survival or survival[0] != 1 or list(survival) != sorted(set(survival), reverse=True):
        raise ConfigError(
            "survival",
            "not possible",
            given=survival,
            allowed="numbers that fall strictly from 1.0",
        )


class Thresholds(Accumulator):
    """Quantiles of each latent's firings in the calibration sample.

    `values (m, T)` increases along T. The first threshold is 0: every firing. The others are
    midpoints between two firings, so that rounding of z has no effect. A latent silent
    in the calibration sample has the quantiles of all firings pooled.
    """

    def __init__(self, context: EvaluationContext, survival: tuple[float, ...] = SURVIVAL) -> None:
        super().__init__(context)
        check_survival(survival)
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
            at = np.minimum(((1 - share) * counts).astype(int), counts - 1)[counts > 0]
            here = start[counts > 0] + at
            below = np.where(at > 0, ordered[here - 1], 0)
            out[counts > 0, t] = (ordered[here] + below) / 2
        return out

    def update(self, batch: EvaluationBatch) -> None:
        if self.values is None:
            self.calibrate(batch)

    def bins(self, latents: Tensor, values: Tensor) -> Tensor:
        """(nnz,) the last threshold that each firing reaches."""
        assert self.values is not None, "Thresholds.bins is called before the first batch"
        thresholds = torch.from_numpy(self.values)
        parts = zip(latents.split(2**20), values.split(2**20))
        above = [torch.searchsorted(thresholds[j], v[:, None], right=True) for j, v in parts]
        return torch.cat([*above, torch.zeros(0, 1, dtype=torch.int64)]).squeeze(1).sub_(1)


class FiringHistogram(Accumulator):
    """Number of images of each class in each bin between the thresholds of each latent.

    `counts (labellings, 2, m, T, C)`: true and shuffled labels; fit and score half; bin t holds the
    firings from threshold t up to the next. The integer type is the narrowest for the largest
    class: bytes where no class has more than 255 images.

    Args:
        survival: see `SURVIVAL`; `(1.0,)` counts firings only.
    """

    def __init__(self, context: EvaluationContext, survival: tuple[float, ...] = SURVIVAL) -> None:
        super().__init__(context)
        self.thresholds = context.share(Thresholds, survival=survival)
        labellings, n_classes = 2 if context.shuffled else 1, len(context.taxonomy.classes)
        shape = (labellings, 2, context.d_sae, len(survival), n_classes)
        self.counts = torch.zeros(shape, dtype=_narrowest(context))
        self._sparse: dict[bool, sparse.csr_array] = {}

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.firings
        _, _, m, n_bins, n_classes = self.counts.shape
        half = (~batch.is_fit).cpu().long()[rows]
        cell = ((half * m + latents) * n_bins + self.thresholds.bins(latents, values)) * n_classes
        ones = torch.ones(len(cell), dtype=self.counts.dtype)
        for shuffled, counts in zip((False, True), self.counts):
            labels = batch.labels_of(shuffled)[rows]
            counts.view(-1).scatter_add_(0, cell + labels, ones)
        self._sparse.clear()

    @property
    def n_bins(self) -> int:
        """Number of bins of activations."""
        return self.counts.shape[3]

    def fired(self, shuffled: bool = False, latents: np.ndarray | None = None) -> np.ndarray:
        """(m, C) images of both halves on which each latent fires; (l, C) for `latents` (l,)."""
        counts = self.counts[int(shuffled)]
        if latents is not None:
            counts = counts[:, torch.from_numpy(latents)]
        _, m, n_bins, n_classes = counts.shape
        fired = torch.zeros(m, n_classes, dtype=torch.int32)
        for half in counts:
            for t in range(n_bins):  # a sum() over both would copy all counts to a wider type
                fired += half[:, t]
        return fired.numpy()

    def fit(self, shuffled: bool = False) -> sparse.csr_array:
        """(m·T, C) counts of the fit half; row j·T + T − 1 − t is bin t of latent j.

        The highest bin of a latent is first, so that a cumulative sum over its rows counts the
        images at or above each threshold.
        """
        if shuffled not in self._sparse:
            self._sparse[shuffled] = _csr(self.counts[int(shuffled), 0])
        return self._sparse[shuffled]

    def score(self, shuffled: bool = False) -> Tensor:
        """(m, T, C) counts of the score half."""
        return self.counts[int(shuffled), 1]


class NegativeCounts(Accumulator):
    """`counts (labellings, m, C)`: images of each class on which each latent is below 0.

    None until a latent is.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self.counts: Tensor | None = None

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.active
        below = values < 0
        if not below.any():
            return
        context = self.context
        if self.counts is None:
            n_classes = len(context.taxonomy.classes)
            shape = (2 if context.shuffled else 1, context.d_sae, n_classes)
            self.counts = torch.zeros(shape, dtype=_narrowest(context))
        rows, latents = rows[below], latents[below]
        ones = torch.ones(len(rows), dtype=self.counts.dtype)
        for shuffled, counts in zip((False, True), self.counts):
            cell = latents * counts.shape[1] + batch.labels_of(shuffled)[rows]
            counts.view(-1).scatter_add_(0, cell, ones)


def _narrowest(context: EvaluationContext) -> torch.dtype:
    """The narrowest integer type for the images of the largest class."""
    return next(dtype for most, dtype in DTYPES if context.largest_class <= most)


def _csr(counts: Tensor, block: int = 1024) -> sparse.csr_array:
    """(m, T, C) -> (m·T, C) in 32-bit indices, the bins of each latent from the highest down."""
    m, n_bins, n_classes = counts.shape
    columns, values, ends = [], [], [np.zeros(1, dtype=np.int64)]
    for rows in counts.split(block):
        flat = rows.flip(1).reshape(-1).numpy()
        at = np.flatnonzero(flat)
        per_row = np.bincount(at // n_classes, minlength=len(rows) * n_bins)
        ends.append(ends[-1][-1] + np.cumsum(per_row))
        columns.append((at % n_classes).astype(np.int32))
        values.append(flat[at].astype(np.float32))
    pointers = np.concatenate(ends).astype(np.int32)
    return sparse.csr_array(
        (np.concatenate(values), np.concatenate(columns), pointers), shape=(m * n_bins, n_classes)
    )


class TopImages(Accumulator):
    """The k most activating images of each latent, best first; equal activations in random order.

    An image has five entries: activation, priority in ties, index, true and shuffled label.
    Candidates are collected in a buffer of bounded size and merged when it is full.
    """

    def __init__(self, context: EvaluationContext, k: int = 16) -> None:
        super().__init__(context)
        m = context.d_sae
        self.k = k
        self._columns = (
            np.zeros((m, k), dtype=np.float32),
            np.full((m, k), np.inf),
            np.full((m, k), -1, dtype=np.int64),
            np.full((m, k), -1, dtype=np.int32),
            np.full((m, k), -1, dtype=np.int32),
        )
        self._waiting: list[tuple[np.ndarray, ...]] = []

    @property
    def values(self) -> np.ndarray:
        """(m, k) activations, 0 where the latent fires on fewer images."""
        self._merge()
        return self._columns[0]

    @property
    def index(self) -> np.ndarray:
        """(m, k) positions in the evaluation set, −1 where there is none."""
        self._merge()
        return self._columns[2]

    def labels(self, shuffled: bool = False) -> np.ndarray:
        """(m, k) classes of the images, −1 where there is none."""
        self._merge()
        return self._columns[4 if shuffled else 3]

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = (t.numpy() for t in batch.firings)
        last, last_priority = self._columns[0][:, -1], self._columns[1][:, -1]
        near = np.flatnonzero(values >= last[latents])
        rows, latents, values = rows[near], latents[near], values[near]
        priority = batch.priority[rows]
        enters = (values > last[latents]) | (priority < last_priority[latents])
        rows = rows[enters]
        image = (
            batch.index.cpu().numpy()[rows],
            batch.labels_of(False).numpy()[rows],
            batch.labels_of(True).numpy()[rows],
        )
        self._waiting.append((latents[enters], values[enters], priority[enters], *image))
        if sum(len(entry[0]) for entry in self._waiting) > self._columns[0].size:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        latents, *columns = (np.concatenate(parts) for parts in zip(*self._waiting))
        self._waiting = []
        touched = np.unique(latents)
        kept = self._columns[2][touched] >= 0
        latents = np.concatenate([np.repeat(touched, kept.sum(1)), latents])
        columns = [
            np.concatenate([old[touched][kept], new]) for old, new in zip(self._columns, columns)
        ]
        order = np.lexsort((columns[1], -columns[0], latents))
        latents = latents[order]
        rank = np.arange(len(order)) - np.searchsorted(latents, latents)
        best = rank < self.k
        for old, new in zip(self._columns, columns):
            old[latents[best], rank[best]] = new[order][best]


class FiringRate(Accumulator):
    """Firing rate and activation of each latent.

    `fired (m,)` images, `total (m,)` sum and `largest (m,)` activation; `active`, the number of
    latents that are not 0, summed over the images; `n` images in all.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self.n = self.active = 0
        self.fired = np.zeros(context.d_sae, dtype=np.int64)
        self.total = np.zeros(context.d_sae)
        self.largest = np.zeros(context.d_sae, dtype=np.float32)

    def update(self, batch: EvaluationBatch) -> None:
        _, latents, values = batch.firings
        m = len(self.fired)
        self.n += len(batch)
        self.active += len(batch.active.rows)
        self.fired += torch.bincount(latents, minlength=m).numpy()
        self.total += torch.bincount(latents, weights=values.double(), minlength=m).numpy()
        torch.from_numpy(self.largest).scatter_reduce_(0, latents, values, "amax")

    @property
    def rate(self) -> np.ndarray:
        """(m,) share of images on which each latent fires; NaN before any image."""
        return self.fired / self.n if self.n else np.full(len(self.fired), np.nan)

    @property
    def mean_l0(self) -> float:
        """Mean number of latents that are not 0 on an image."""
        return self.active / self.n if self.n else float("nan")
