"""F1 of latents as detectors of nodes: the best latent of a node, and the best node of a latent.

Both are chosen on the fit half of the images and scored on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from ...taxonomies.taxonomy import first_columns
from . import summary
from .samples import shape
from .sorted_firings import SortedFirings

BLOCK = 2**22
"""Approximate number of nonzeros, or cells, of (latents × thresholds × nodes) in memory at a time."""
LARGE = 1 / 64
"""Share of the classes from which on a node is large: its hits are computed by dense products."""
STEP = 1.2
"""Least ratio of the numbers of positives for which bounds are computed."""
UNBOUNDED = 2
"""First searches in the same counts that are made without bounds, which cost about three."""
TOLERANCE = 1e-5
"""Relative rounding of bounds in single precision."""


class Outcome(NamedTuple):
    """Counts of k detectors on some images, each (k,); ratios are NaN where a denominator is 0."""

    hits: np.ndarray  # images of the detector's node on which it fires
    fired: np.ndarray  # images on which it fires
    positives: np.ndarray  # images of its node

    @classmethod
    def of(cls, fired: sparse.csr_array, own: sparse.csr_array, positives: np.ndarray) -> Outcome:
        """Count the images of each detector.

        Args:
            fired: (k, C) images of each class on which a detector fires.
            own: (k, C) of zeros and ones, whether a class lies below its node.
            positives: (k,) images of its node.
        """
        hits = sparse.csr_array(fired.multiply(own)).sum(1, dtype=np.float64)
        return cls(hits, fired.sum(1, dtype=np.float64), np.asarray(positives, dtype=np.float64))

    @property
    def precision(self) -> np.ndarray:
        """(k,) hits / fired."""
        return summary.ratio(self.hits, self.fired)

    @property
    def recall(self) -> np.ndarray:
        """(k,) hits / positives."""
        return summary.ratio(self.hits, self.positives)

    @property
    def f1(self) -> np.ndarray:
        """(k,) 2·hits / (fired + positives)."""
        return summary.ratio(2 * self.hits, self.fired + self.positives)


def best_nodes(
    fired: np.ndarray | sparse.csr_array,
    images: np.ndarray,
    members: np.ndarray | sparse.csr_array,
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) the first node of best F1 with a latent's firing, and (L,) that F1.

    Without nodes 0 and NaN.

    Args:
        fired: (L, C) images of each class on which the latent fires.
        images: (C,) images of each class.
        members: (C, N) bool, whether a class lies below a node.
    """
    counts = sparse.csr_array(fired, dtype=np.float32)
    belongs = sparse.csr_array(members, dtype=np.float32)
    n_latents, n_nodes = shape(counts)[0], shape(belongs)[1]
    node = np.zeros(n_latents, dtype=np.int64)
    if not n_nodes:
        return node, np.full(n_latents, np.nan)
    best, total = np.zeros(n_latents), counts.sum(1)
    positives = images @ belongs
    for start, stop in _blocks(counts, 1, belongs):
        hits = sparse.csr_array(counts[start:stop] @ belongs)
        per_latent = np.diff(hits.indptr)
        filled = np.flatnonzero(per_latent)
        if not len(filled):
            continue
        f1 = 2 * hits.data.astype(np.float64)
        f1 /= np.maximum(np.repeat(total[start:stop], per_latent) + positives[hits.indices], 1)
        best[start + filled] = np.maximum.reduceat(f1, hits.indptr[filled])
        reached = f1 == np.repeat(best[start:stop], per_latent)
        node[start:stop] = np.maximum(first_columns(hits, reached), 0)
    return node, best


def explain(
    halves: Halves,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Outcome]:
    """For each latent its best node on the fit half (m,), its F1 there (m,), and the outcome (m,)
    on the score half. Without nodes 0, NaN and an outcome without positives.

    Args:
        halves: images of each class on which a latent fires, one bin.
        members: (C, N) bool, whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
    """
    node, fit_f1 = best_nodes(halves.fit, fit_images, members)
    if not members.shape[1]:
        members = np.zeros((len(members), 1), dtype=bool)
    belongs = sparse.csr_array(members, dtype=np.float32)
    own = sparse.csr_array(belongs.T)[node]
    return node, fit_f1, Outcome.of(halves.score, own, (score_images @ belongs)[node])


class Detectors(NamedTuple):
    """The latent and threshold chosen for each node, and their score; each (N,)."""

    latent: np.ndarray  # −1 where no latent fires on the fit half
    bin: np.ndarray  # threshold, as position in the grid
    fit_f1: np.ndarray  # on the fit half
    precision: np.ndarray  # on the score half; NaN where the node is left out
    recall: np.ndarray
    f1: np.ndarray
    fires_on: np.ndarray  # share of the images on which the latent reaches the threshold


@dataclass(eq=False)
class Halves:
    """Counts of both halves, and what follows from them whatever the nodes are.

    Args:
        fit, score: (m·T, C) images of each class; row j·T + T − 1 − t is bin t of latent j.
        n_bins: T.
        device: where the latents lie; on a GPU detectors are found there.

    Attributes:
        searches: number of searches for detectors of small nodes so far.
        unbounded: whether bounds left few latents out in the last one.
    """

    fit: sparse.csr_array
    score: sparse.csr_array
    n_bins: int
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        self._shares = np.zeros(0), 1.0, sparse.csr_array((0, 0))
        self.searches = 0
        self.unbounded = False

    @cached_property
    def sorted_firings(self) -> SortedFirings | None:
        """The counts on the device; None where that is the CPU, as for firings of a device without double precision."""
        if self.device.type == "cpu":
            return None
        return SortedFirings(self.fit, self.score, self.n_bins, self.device)

    @cached_property
    def reached(self) -> np.ndarray:
        """(m·T,) images of the fit half at or above each threshold."""
        return self.fit.sum(1, dtype=np.float64).reshape(-1, self.n_bins).cumsum(1).ravel()

    @cached_property
    def fired(self) -> sparse.csr_array:
        """(m, C) images of the fit half on which each latent fires."""
        return merge_rows(self.fit, self.n_bins)

    def latent_and_bin(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latent and bin of each row (k,); −1 and 0 for −1."""
        return row // self.n_bins, self.n_bins - 1 - row % self.n_bins

    def rows_of(self, latents: np.ndarray) -> np.ndarray:
        """(l·T,) the rows of `latents` (l,)."""
        return (latents[:, None] * self.n_bins + np.arange(self.n_bins)).ravel()

    def shares(self, positives: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
        """The best of 2·hits / (fired + p) over the thresholds of each latent, with hits on one
        class only, at some numbers of positives p.

        Returns:
            (L·C, m) of L numbers p in ascending order, by p and class; and for each of `positives`
            (N,) the last p that does not exceed it, (N,).
        """
        wanted = np.maximum(positives, 1)
        levels, step, shares = self._shares
        level = np.searchsorted(levels, wanted, side="right") - 1
        if level.min() < 0 or (wanted > step * levels[level]).any():
            rows, hits, starts, latents, pointers = self._of_classes
            levels, step = _thin(np.union1d(levels, wanted), BLOCK * 4 // max(len(starts), 1))
            best = [2 * hits / (self.reached[rows] + p) for p in levels]
            best = [np.maximum.reduceat(b, starts) if len(starts) else b for b in best]
            ends = [i * len(starts) + pointers[1:] for i in range(len(levels))]
            entries = (
                np.concatenate(best).astype(np.float32),
                np.tile(latents, len(levels)),
                np.concatenate([[0], *ends]),
            )
            n_rows, n_classes = shape(self.fit)
            size = (len(levels) * n_classes, n_rows // self.n_bins)
            shares = sparse.csr_array(entries, shape=size)
            self._shares = levels, step, shares
            level = np.searchsorted(levels, wanted, side="right") - 1
        return shares, level

    @cached_property
    def _of_classes(self) -> tuple[np.ndarray, ...]:
        """Rows and hits at or above the threshold of each entry, by class; where each latent begins
        in these, which latent it is, and (C + 1,) where each class begins in those."""
        columns = sparse.csc_array(self.fit)
        first = _first_of_latent(columns, self.n_bins)
        starts = np.flatnonzero(first)
        hits = _running_sum(columns.data, first)
        latents = columns.indices[starts] // self.n_bins
        pointers = np.append(0, np.cumsum(first))[columns.indptr]
        return columns.indices, hits, starts, latents, pointers

    def score_of(self, latent: np.ndarray, bin_: np.ndarray) -> sparse.csr_array:
        """(k, C) images of the score half on which latents (k,) reach thresholds (k,); none for −1."""
        size = np.where(latent >= 0, self.n_bins - bin_, 0)
        ends = np.append(0, np.cumsum(size))
        rows = np.arange(ends[-1]) + np.repeat(latent * self.n_bins - ends[:-1], size)
        chosen = self.score[rows]
        pointers = chosen.indptr[ends]
        return sparse.csr_array(
            (chosen.data, chosen.indices, pointers), shape=(len(latent), shape(chosen)[1])
        )


def _thin(values: np.ndarray, most: int) -> tuple[np.ndarray, float]:
    """Of ascending `values` the first, and each that exceeds the last one kept by a ratio; and this
    ratio, at least `STEP`, such that about `most` are kept."""
    step = max(STEP, (values[-1] / values[0]) ** (1 / max(most, 1)))
    kept = [values[0]]
    for value in values:
        if value > step * kept[-1]:
            kept.append(value)
    return np.array(kept, dtype=float), step


def merge_rows(counts: sparse.csr_array, n: int) -> sparse.csr_array:
    """(m·n, C) -> (m, C), the sums of n rows each."""
    m, n_classes = shape(counts)[0] // n, shape(counts)[1]
    if n == 1:
        return counts
    entries = (counts.data, counts.indices, counts.indptr[::n])
    merged = sparse.csr_array(entries, shape=(m, n_classes), copy=True)
    merged.sum_duplicates()
    return merged


def find_detectors(
    halves: Halves,
    members: np.ndarray | sparse.csr_array,
    fit_images: np.ndarray,
    score_images: np.ndarray,
    covered: float = 0.5,
) -> Detectors:
    """Choose a latent and a threshold for each node on the fit half; score them on the other.

    Args:
        halves: the counts, from `FiringHistogram`.
        members: (C, N) whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
        covered: nodes where always predicting "yes" reaches this F1 are left out.
    """
    belongs = sparse.csr_array(members, dtype=np.float32)
    fit_positives, positives = fit_images @ belongs, score_images @ belongs
    if halves.sorted_firings is not None:
        fit_f1, row, hits, fired = halves.sorted_firings.best(belongs, fit_positives)
        latent, bin_ = halves.latent_and_bin(row)
        found = Outcome(hits.astype(float), fired.astype(float), positives.astype(float))
    else:
        fit_f1, row = _choose(halves, belongs, fit_positives)
        latent, bin_ = halves.latent_and_bin(row)
        own = sparse.csr_array(belongs.T)
        found = Outcome.of(halves.score_of(latent, bin_), own, positives)
    always_yes = summary.ratio(2 * found.positives, found.positives + score_images.sum())
    scored = (fit_positives > 0) & (found.positives > 0) & (always_yes < covered)
    fires_on = summary.ratio(found.fired, score_images.sum())
    rates = (found.precision, found.recall, found.f1, fires_on)
    rates = (np.where(scored, rate, np.nan) for rate in rates)
    return Detectors(latent, bin_, fit_f1, *rates)


def _choose(
    halves: Halves, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best F1 of a latent at a threshold for each node (N,), and its row (N,); 0 and −1 where none fires.

    F1 = 2·hits / (fired + positives) of all pairs; of equal ones the first latent, and its highest
    threshold, is chosen.
    """
    best = np.zeros(len(positives))
    row = np.full(len(positives), -1, dtype=np.int64)
    n_classes, n_nodes = shape(belongs)
    large = np.bincount(belongs.indices, minlength=n_nodes) >= LARGE * n_classes
    for nodes, choose in ((large, _choose_large), (~large, _choose_small)):
        if nodes.any() and shape(halves.fit)[0]:
            best[nodes], row[nodes] = choose(halves, belongs[:, nodes], positives[nodes])
    return best, row


def _choose_large(
    halves: Halves, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best F1 and its row for each of the nodes of many classes.

    The F1 of a latent is at least 2H / (fired + positives), H the hits at the lowest threshold, and
    at most 2H / (H + positives). All thresholds are compared only for latents that can be the best
    of a node by these bounds.
    """
    m = shape(halves.fired)[0]
    fired = halves.reached[halves.n_bins - 1 :: halves.n_bins].astype(np.float32)[:, None]
    found = []
    size = max(1, BLOCK // max(m, 1))
    for start in range(0, len(positives), size):
        of = positives[start : start + size]
        members = belongs[:, start : start + size].toarray()
        hits = halves.fired @ members
        promising = np.unique((hits / np.maximum(fired + of.astype(np.float32), 1)).argmax(0))
        f1, _ = _best_rows_dense(halves, promising, members, of)
        least = f1 * of / (2 - f1)  # 2H / (H + positives) ≥ f1
        # A tolerance for the rounding of the bounds; no hit is no detector.
        able = hits >= np.maximum(least * (1 - TOLERANCE), 0.5).astype(np.float32)
        found.append(_best_rows_dense(halves, np.flatnonzero(able.any(1)), members, of))
    best, row = zip(*found)
    return np.concatenate(best), np.concatenate(row)


def _choose_small(
    halves: Halves, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best F1 and its row for each of the nodes of few classes.

    The F1 of a latent is a sum over the classes of the node, at one threshold; so it is at most the
    sum of `Halves.shares` of these classes. All thresholds are compared only for latents that can
    be the best of a node by this bound, once several searches repay its cost, and while it leaves
    latents out.
    """
    halves.searches += 1
    every = np.arange(shape(halves.fired)[0])
    if halves.searches <= UNBOUNDED or halves.unbounded:
        return _best_rows_sparse(halves, every, belongs, positives)
    shares, level = halves.shares(positives)
    chosen = sparse.csr_array(belongs.T)
    n_nodes, n_classes = shape(chosen)
    at_level = chosen.indices + np.repeat(level * n_classes, np.diff(chosen.indptr))
    at_level = sparse.csr_array(
        (chosen.data, at_level, chosen.indptr), shape=(n_nodes, shape(shares)[0])
    )
    bound = sparse.csr_array(at_level @ shares)  # (N, m)
    per_node = np.diff(bound.indptr)
    filled = per_node > 0
    most = np.zeros(n_nodes, dtype=np.float32)
    if filled.any():
        most[filled] = np.maximum.reduceat(bound.data, bound.indptr[:-1][filled])
    likely = np.unique(bound.indices[bound.data == np.repeat(most, per_node)])
    best, _ = _best_rows_sparse(halves, likely, belongs, positives)
    able = bound.data >= np.repeat((best * (1 - TOLERANCE)).astype(np.float32), per_node)
    latents = np.unique(bound.indices[able])
    halves.unbounded = len(latents) > len(every) / 2
    return _best_rows_sparse(halves, latents, belongs, positives)


def _best_rows_dense(
    halves: Halves, latents: np.ndarray, belongs: np.ndarray, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best F1 among `latents` (l,), ascending, and its row, for each node of `belongs` (C, N)."""
    n_bins, every = halves.n_bins, np.arange(len(positives))
    best, row = np.zeros(len(positives)), np.full(len(positives), -1, dtype=np.int64)
    size = max(1, BLOCK // max(n_bins * len(positives), 1))
    for start in range(0, len(latents), size):
        some = latents[start : start + size]
        rows = halves.rows_of(some)
        hits = (halves.fit[rows] @ belongs).reshape(len(some), n_bins, -1)
        f1 = hits.cumsum(1, dtype=np.float64).reshape(len(rows), -1)
        f1 /= np.maximum(halves.reached[rows][:, None] + positives, 1)
        at = f1.argmax(0)
        most = 2 * f1[at, every]
        row = np.where(most > best, rows[at], row)
        best = np.maximum(best, most)
    return best, row


def _best_rows_sparse(
    halves: Halves, latents: np.ndarray, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `_best_rows_dense`, from the nonzeros of a product.

    Where a bin adds no hit, the threshold above it has the same hits and no more firings.
    """
    best = np.zeros(len(positives))
    row = np.full(len(positives), -1, dtype=np.int64)
    rows, counts, reached = halves.rows_of(latents), halves.fit, halves.reached
    if len(rows) < len(reached):
        counts, reached = counts[rows], reached[rows]
    for start, stop in _blocks(counts, halves.n_bins, belongs):
        hits = sparse.csc_array(counts[start:stop] @ belongs)  # sorts rows in linear time
        filled = np.flatnonzero(np.diff(hits.indptr))
        if not len(filled):
            continue
        per_node = np.diff(hits.indptr)
        f1 = _running_sum(hits.data, _first_of_latent(hits, halves.n_bins))
        f1 /= reached[start:stop][hits.indices] + np.repeat(positives, per_node)
        most = np.zeros(len(positives))
        most[filled] = 2 * np.maximum.reduceat(f1, hits.indptr[filled])
        better = np.flatnonzero(most > best)
        at = np.flatnonzero(2 * f1 == np.repeat(np.where(most > best, most, np.nan), per_node))
        # The first of equal ones.
        row[better] = rows[start + hits.indices[at[np.searchsorted(at, hits.indptr[better])]]]
        best = np.maximum(best, most)
    return best, row


def _first_of_latent(columns: sparse.csc_array, n_bins: int) -> np.ndarray:
    """(nnz,) whether an entry is the first of its latent in its column; n_bins rows a latent."""
    latent = columns.indices // n_bins
    first = np.append(True, latent[1:] != latent[:-1])
    starts = columns.indptr[:-1]
    first[starts[starts < len(latent)]] = True
    return first[: len(latent)]


def _blocks(
    counts: sparse.csr_array, n_bins: int, belongs: sparse.csr_array
) -> list[tuple[int, int]]:
    """Ranges of rows, whole latents each, whose product with `belongs` has about BLOCK nonzeros."""
    ends = counts.indptr[::n_bins]
    ancestors = max(1.0, float(np.diff(belongs.indptr).mean()))
    marks = np.arange(0, ends[-1] + 1, max(1, int(BLOCK / ancestors)))
    cuts = np.unique(np.append(np.searchsorted(ends, marks), len(ends) - 1)) * n_bins
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist()))


def _running_sum(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The cumulative sum of `values` within each run, which begins where `first` is true."""
    total = np.cumsum(values, dtype=np.float64)
    starts = np.flatnonzero(first)
    total -= np.repeat(total[starts] - values[starts], np.diff(starts, append=len(values)))
    return total
