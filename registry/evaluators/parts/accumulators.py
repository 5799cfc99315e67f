"""Shared statistics of the count-based evaluators, each computed once per pass.

All are computed from the nonzeros of z, on the device of z, so the cost is that of the firings.
Results are numpy arrays, moved from the device when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...errors import ConfigError
from ..base import Accumulator, EvaluationBatch, EvaluationContext, require_same
from .cells import CellCounts
from .node_f1 import Halves, merge_rows
from .pair_depths import ClassPairs

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

    def merge(self, other: ClassCounts) -> None:
        self.counts += other.counts

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
    falls = all(a > b for a, b in pairwise(survival))  # false for NaN
    if not survival or survival[0] != 1 or not falls:
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
        self._on_device: Tensor | None = None

    def calibrate(self, batch: EvaluationBatch) -> None:
        latents, values = (t.cpu().numpy() for t in batch.firings[1:])
        # Numbers above 0 have the order of their bits: one sort orders latents and values.
        keys = np.sort((latents << 32) + values.view(np.int32))
        ordered = keys.astype(np.int32).view(np.float32)  # the lower 32 bits
        counts = np.bincount(latents, minlength=self.context.d_sae)
        quantiles = self._quantiles(ordered, np.cumsum(counts) - counts, counts)
        if len(ordered):
            pooled = self._quantiles(np.sort(ordered), np.zeros(1, int), np.array([len(ordered)]))
            quantiles[counts == 0] = pooled
        self.values, self._on_device = quantiles, None

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

    def merge(self, other: Thresholds) -> None:
        require_same("thresholds", self.values, other.values)

    def bins(self, latents: Tensor, values: Tensor) -> Tensor:
        """(nnz,) the last threshold that each firing reaches."""
        assert self.values is not None, "Thresholds.bins is called before the first batch"
        if self._on_device is None or self._on_device.device != latents.device:
            self._on_device = torch.from_numpy(self.values).to(latents.device)
        found = torch.empty_like(latents)
        for start in range(0, len(latents), 2**20):
            part = slice(start, start + 2**20)
            own = self._on_device[latents[part]]
            reached = torch.searchsorted(own, values[part, None], right=True)
            found[part] = reached.squeeze(1) - 1
        return found


class FiringHistogram(Accumulator):
    """Number of images of each class in each bin between the thresholds of each latent.

    Bin t holds the firings from threshold t up to the next. Counted for the true and the shuffled
    labels, in the fit and the score half. Memory O(number of counts above 0).

    Args:
        survival: see `SURVIVAL`; `(1.0,)` counts firings only.
    """

    def __init__(self, context: EvaluationContext, survival: tuple[float, ...] = SURVIVAL) -> None:
        super().__init__(context)
        self.thresholds = context.share(Thresholds, survival=survival)
        self.n_bins = len(survival)
        self.n_classes = len(context.taxonomy.classes)
        self._counts = _cells(context, 2 * context.d_sae * self.n_bins * self.n_classes)
        self._device = torch.device("cpu")
        self._halves: dict[bool, Halves] = {}
        self._both: dict[bool, sparse.csr_array] = {}

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.firings
        self._device = rows.device
        half = (~batch.is_fit).to(rows.device).long()[rows]
        # The highest bin of a latent is first: see `Halves`.
        row = (half * self.context.d_sae + latents + 1) * self.n_bins - 1
        cell = (row - self.thresholds.bins(latents, values)) * self.n_classes
        for shuffled, counts in zip((False, True), self._counts):
            counts.add(cell + batch.labels_of(shuffled, rows.device)[rows])
        self._halves.clear()
        self._both.clear()

    def merge(self, other: FiringHistogram) -> None:
        for counts, more in zip(self._counts, other._counts):
            counts.merge(more)
        self._halves.clear()
        self._both.clear()

    def halves(self, shuffled: bool = False) -> Halves:
        """The counts of both halves, (m·T, C) each."""
        if shuffled not in self._halves:
            n_rows = self.context.d_sae * self.n_bins
            cells, counts = self._counts[int(shuffled)].read()
            ends = np.searchsorted(cells, [0, n_rows * self.n_classes])
            parts = (slice(ends[0], ends[1]), slice(ends[1], None))
            found = [
                _csr(
                    cells[part] - first * n_rows * self.n_classes,
                    counts[part],
                    n_rows,
                    self.n_classes,
                )
                for first, part in enumerate(parts)
            ]
            self._halves[shuffled] = Halves(found[0], found[1], self.n_bins, self._device)
        return self._halves[shuffled]

    def both(self, shuffled: bool = False) -> sparse.csr_array:
        """(m·T, C) counts of both halves together; rows as of `fit`."""
        if shuffled not in self._both:
            halves = self.halves(shuffled)
            self._both[shuffled] = sparse.csr_array(halves.fit + halves.score)
        return self._both[shuffled]

    def fired(self, shuffled: bool = False, latents: np.ndarray | None = None) -> np.ndarray:
        """(m, C) images of both halves on which each latent fires; (l, C) for `latents` (l,)."""
        counts = self.fired_sparse(shuffled)
        chosen = counts if latents is None else counts[latents]
        return chosen.astype(np.int32).toarray()

    def fired_sparse(self, shuffled: bool = False) -> sparse.csr_array:
        """(m, C) images of both halves on which each latent fires."""
        return merge_rows(self.both(shuffled), self.n_bins)

    def fit(self, shuffled: bool = False) -> sparse.csr_array:
        """(m·T, C) counts of the fit half; row j·T + T − 1 − t is bin t of latent j.

        The highest bin of a latent is first, so that a cumulative sum over its rows counts the
        images at or above each threshold.
        """
        return self.halves(shuffled).fit

    def score(self, shuffled: bool = False) -> Tensor:
        """(m, T, C) counts of the score half, dense."""
        counts = self.halves(shuffled).score.astype(np.int32).toarray()
        by_row = torch.from_numpy(counts).to(_narrowest(self.context))
        return by_row.reshape(self.context.d_sae, self.n_bins, self.n_classes).flip(1)


class NegativeCounts(Accumulator):
    """Images of each class on which each latent is below 0."""

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._n_classes = len(context.taxonomy.classes)
        self._counts = _cells(context, context.d_sae * self._n_classes)
        self._any = False

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.active
        below = values < 0
        if not below.any():
            return
        self._any = True
        rows, latents = rows[below], latents[below]
        for shuffled, counts in zip((False, True), self._counts):
            labels = batch.labels_of(shuffled, rows.device)[rows]
            counts.add(latents * self._n_classes + labels)

    def merge(self, other: NegativeCounts) -> None:
        self._any |= other._any
        for counts, more in zip(self._counts, other._counts):
            counts.merge(more)

    def of(self, shuffled: bool = False) -> sparse.csr_array | None:
        """(m, C) the images; None where no latent is below 0."""
        if not self._any:
            return None
        return _csr(*self._counts[int(shuffled)].read(), self.context.d_sae, self._n_classes)

    @property
    def counts(self) -> Tensor | None:
        """(labellings, m, C) the images, dense; None where no latent is below 0."""
        if not self._any:
            return None
        found = [self.of(bool(shuffled)) for shuffled in range(len(self._counts))]
        dense = np.stack([counts.toarray() for counts in found if counts is not None])
        return torch.from_numpy(dense).to(_narrowest(self.context))


def _cells(context: EvaluationContext, n_cells: int) -> list[CellCounts]:
    """Counts of cells for each labelling."""
    return [CellCounts(n_cells, _narrowest(context)) for _ in range(2 if context.shuffled else 1)]


def _narrowest(context: EvaluationContext) -> torch.dtype:
    """The narrowest integer type for the images of the largest class."""
    return next(dtype for most, dtype in DTYPES if context.largest_class <= most)


def _csr(cells: np.ndarray, counts: np.ndarray, n_rows: int, n_columns: int) -> sparse.csr_array:
    """The counts (u,) of ascending cells (u,) as float32 in 32-bit indices where these suffice."""
    row = cells // n_columns
    column = cells - row * n_columns
    ends = np.append(0, np.cumsum(np.bincount(row, minlength=n_rows)))
    index = np.int32 if len(cells) < 2**31 else np.int64
    entries = (counts.astype(np.float32), column.astype(index), ends.astype(index))
    return sparse.csr_array(entries, shape=(n_rows, n_columns))


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
            torch.zeros(m, k),
            torch.full((m, k), torch.inf, dtype=torch.float64),
            torch.full((m, k), -1),
            torch.full((m, k), -1, dtype=torch.int32),
            torch.full((m, k), -1, dtype=torch.int32),
        )
        self._waiting: list[tuple[Tensor, ...]] = []
        self._pairs: dict[bool, ClassPairs] = {}

    @property
    def values(self) -> np.ndarray:
        """(m, k) activations, 0 where the latent fires on fewer images."""
        return self._column(0)

    @property
    def index(self) -> np.ndarray:
        """(m, k) positions in the evaluation set, −1 where there is none."""
        return self._column(2)

    def labels(self, shuffled: bool = False) -> np.ndarray:
        """(m, k) classes of the images, −1 where there is none."""
        return self._column(4 if shuffled else 3)

    def pairs(self, shuffled: bool = False) -> ClassPairs:
        """The pairs of classes among the images of each latent."""
        if shuffled not in self._pairs:
            depth = self.context.taxonomy.leaf_lca_depth
            self._pairs[shuffled] = ClassPairs(self.labels(shuffled), depth)
        return self._pairs[shuffled]

    def _column(self, i: int) -> np.ndarray:
        self._merge()
        return self._columns[i].cpu().numpy()

    def update(self, batch: EvaluationBatch) -> None:
        rows, latents, values = batch.firings
        device = rows.device
        self._columns = tuple(column.to(device) for column in self._columns)
        last, last_priority = self._columns[0][:, -1], self._columns[1][:, -1]
        near = values >= last[latents]
        rows, latents, values = rows[near], latents[near], values[near]
        priority = torch.from_numpy(batch.priority).to(device)[rows]
        enters = (values > last[latents]) | (priority < last_priority[latents])
        rows = rows[enters]
        image = (
            batch.index.to(device)[rows],
            batch.labels_of(False, device)[rows].int(),
            batch.labels_of(True, device)[rows].int(),
        )
        self._waiting.append((latents[enters], values[enters], priority[enters], *image))
        self._pairs.clear()
        if sum(len(entry[0]) for entry in self._waiting) > self._columns[0].numel():
            self._merge()

    def merge(self, other: TopImages) -> None:
        other._merge()
        device = self._columns[0].device
        columns = [column.to(device) for column in other._columns]
        latents, rank = (columns[2] >= 0).nonzero(as_tuple=True)
        self._waiting.append((latents, *(column[latents, rank] for column in columns)))
        self._pairs.clear()
        self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        latents, *columns = (torch.cat(parts) for parts in zip(*self._waiting))
        self._waiting = []
        touched = latents.unique()
        kept = self._columns[2][touched] >= 0
        latents = torch.cat([touched.repeat_interleave(kept.sum(1)), latents])
        columns = [torch.cat([old[touched][kept], new]) for old, new in zip(self._columns, columns)]
        order = torch.arange(len(latents), device=latents.device)
        for key in (columns[1], -columns[0], latents):  # the last key orders first
            order = order[key[order].argsort(stable=True)]
        latents = latents[order]
        start = torch.searchsorted(latents, latents)
        rank = torch.arange(len(order), device=latents.device) - start
        best = rank < self.k
        for old, new in zip(self._columns, columns):
            old[latents[best], rank[best]] = new[order][best]


class FiringRate(Accumulator):
    """Firing rate and activation of each latent; `n` images in all.

    `active` is the number of latents that are not 0, summed over the images.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self.n = self.active = 0
        m = context.d_sae
        self._columns = (
            torch.zeros(m, dtype=torch.int64),
            torch.zeros(m, dtype=torch.float64),
            torch.zeros(m),
        )

    def update(self, batch: EvaluationBatch) -> None:
        _, latents, values = batch.firings
        self._columns = tuple(column.to(latents.device) for column in self._columns)
        fired, total, largest = self._columns
        self.n += len(batch)
        self.active += len(batch.active.rows)
        fired += torch.bincount(latents, minlength=len(fired))
        total += torch.bincount(latents, weights=values.double(), minlength=len(fired))
        largest.scatter_reduce_(0, latents, values, "amax")

    def merge(self, other: FiringRate) -> None:
        self.n += other.n
        self.active += other.active
        fired, total, largest = (column.to(self._columns[0].device) for column in other._columns)
        self._columns = (
            self._columns[0] + fired,
            self._columns[1] + total,
            self._columns[2].maximum(largest),
        )

    @property
    def fired(self) -> np.ndarray:
        """(m,) images on which each latent fires."""
        return self._columns[0].cpu().numpy()

    @property
    def total(self) -> np.ndarray:
        """(m,) sum of the activations above 0."""
        return self._columns[1].cpu().numpy()

    @property
    def largest(self) -> np.ndarray:
        """(m,) largest activation, 0 where there is none above 0."""
        return self._columns[2].cpu().numpy()

    @property
    def rate(self) -> np.ndarray:
        """(m,) share of images on which each latent fires; NaN before any image."""
        return self.fired / self.n if self.n else np.full(len(self.fired), np.nan)

    @property
    def mean_l0(self) -> float:
        """Mean number of latents that are not 0 on an image."""
        return self.active / self.n if self.n else float("nan")
