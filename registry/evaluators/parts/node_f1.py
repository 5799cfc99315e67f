"""F1 of latents as detectors of nodes: the best latent of a node, and the best node of a latent.

Both are chosen on the fit half of the images and scored on the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from . import summary
from .samples import shape

BLOCK = 2**22
"""Approximate number of nonzeros of (latents × thresholds × nodes), or cells of (latents × nodes),
in memory at a time."""


class Outcome(NamedTuple):
    """Counts of k detectors on some images, each (k,); ratios are NaN where a denominator is 0."""

    hits: np.ndarray  # images of the detector's node on which it fires
    fired: np.ndarray  # images on which it fires
    positives: np.ndarray  # images of its node

    @classmethod
    def of(cls, fired: np.ndarray, members: np.ndarray, images: np.ndarray) -> Outcome:
        """Count the images of each detector.

        Args:
            fired: (k, C) images of each class on which a detector fires.
            members: (k, C) bool, whether a class lies below its node.
            images: (C,) images of each class.
        """
        hits = (fired * members).sum(1, dtype=np.float64)
        return cls(hits, fired.sum(1, dtype=np.float64), members @ images)

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
    fired: np.ndarray | sparse.csr_array, images: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) the first node of best F1 with a latent's firing, and (L,) that F1.

    Without nodes 0 and NaN.

    Args:
        fired: (L, C) images of each class on which the latent fires.
        images: (C,) images of each class.
        members: (C, N) bool, whether a class lies below a node.
    """
    counts = sparse.csr_array(fired, dtype=np.float32)
    n_latents, n_nodes = shape(counts)[0], members.shape[1]
    belongs = sparse.csr_array(members.astype(np.float32))
    positives = images @ belongs
    node, best = np.zeros(n_latents, dtype=np.int64), np.full(n_latents, np.nan)
    size = max(1, BLOCK // max(n_nodes, 1))
    for start in range(0, n_latents if n_nodes else 0, size):
        block = counts[start : start + size]
        hits = sparse.csr_array(block @ belongs).toarray()
        f1 = 2 * hits / np.maximum(block.sum(1)[:, None] + positives, 1)
        node[start : start + size], best[start : start + size] = f1.argmax(1), f1.max(1)
    return node, best


def explain(
    fit: sparse.csr_array,
    score: np.ndarray,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Outcome]:
    """For each latent its best node on the fit half (m,), its F1 there (m,), and the outcome (m,)
    on the score half. Without nodes 0, NaN and an outcome without positives.

    Args:
        fit, score: (m, C) images of each class on which a latent fires, in the halves.
        members: (C, N) bool, whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
    """
    node, fit_f1 = best_nodes(fit, fit_images, members)
    own = members.T[node] if members.shape[1] else np.zeros(score.shape, dtype=bool)
    return node, fit_f1, Outcome.of(score, own, score_images)


class Detectors(NamedTuple):
    """The latent and threshold chosen for each node, and their score; each (N,)."""

    latent: np.ndarray  # −1 where no latent fires on the fit half
    bin: np.ndarray  # threshold, as position in the grid
    fit_f1: np.ndarray  # on the fit half
    precision: np.ndarray  # on the score half; NaN where the node is left out
    recall: np.ndarray
    f1: np.ndarray
    fires_on: np.ndarray  # share of the images on which the latent reaches the threshold


def find_detectors(
    fit: sparse.csr_array,
    score: torch.Tensor,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
    covered: float = 0.5,
) -> Detectors:
    """Choose a latent and a threshold for each node on the fit half; score them on the other.

    Args:
        fit: (m·T, C) and
        score: (m, T, C) counts of the halves, from `FiringHistogram`.
        members: (C, N) whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
        covered: nodes where always predicting "yes" reaches this F1 are left out.
    """
    belongs = sparse.csr_array(members.astype(np.float32))
    fit_positives = fit_images @ belongs
    latent, bin_, fit_f1 = _choose(fit, score.shape[1], belongs, fit_positives)
    found = Outcome.of(_fired_from(score, latent, bin_), members.T, score_images)
    positives = found.positives
    always_yes = summary.ratio(2 * positives, positives + score_images.sum())
    scored = (fit_positives > 0) & (positives > 0) & (always_yes < covered)
    fires_on = summary.ratio(found.fired, score_images.sum())
    rates = (found.precision, found.recall, found.f1, fires_on)
    rates = (np.where(scored, rate, np.nan) for rate in rates)
    return Detectors(latent, bin_, fit_f1, *rates)


def _choose(
    counts: sparse.csr_array, n_bins: int, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The latent and threshold of best F1 for each node, and that F1, each (N,).

    F1 = 2·hits / (fired + positives) of all pairs: hits = counts @ belongs, summed from the highest
    bin down. Only nonzeros are read: where a bin adds no hit, the threshold above it
    has the same hits and fewer firings.
    """
    best = np.zeros(len(positives))
    row = np.full(len(positives), -1, dtype=np.int64)
    of_latent = np.repeat(np.arange(shape(counts)[0] // n_bins, dtype=np.int32), n_bins)
    for start, stop in _blocks(counts, n_bins, belongs):
        block = counts[start:stop]
        fired = block.sum(1).reshape(-1, n_bins).cumsum(1).ravel()
        hits = sparse.csc_array(block @ belongs)  # the conversion sorts rows in linear time
        filled = np.flatnonzero(np.diff(hits.indptr))
        if not len(filled):
            continue
        per_node = np.diff(hits.indptr)
        latent = of_latent[hits.indices]
        first = np.append(True, latent[1:] != latent[:-1])  # of a latent at a node
        first[hits.indptr[filled]] = True
        f1 = _running_sum(hits.data, first)
        f1 /= fired[hits.indices] + np.repeat(positives, per_node)
        most = np.zeros(len(positives))
        most[filled] = 2 * np.maximum.reduceat(f1, hits.indptr[filled])
        better = np.flatnonzero(most > best)
        at = np.flatnonzero(2 * f1 == np.repeat(np.where(most > best, most, np.nan), per_node))
        # The first of equal ones.
        row[better] = start + hits.indices[at[np.searchsorted(at, hits.indptr[better])]]
        best = np.maximum(best, most)
    return row // n_bins, n_bins - 1 - row % n_bins, best  # −1 and 0 where none is chosen


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


def _fired_from(counts: torch.Tensor, latent: np.ndarray, bin_: np.ndarray) -> np.ndarray:
    """(N, C) images on which each chosen latent reaches its threshold; counts (m, T, C)."""
    fired = np.zeros((len(latent), counts.shape[2]), dtype=np.float32)
    chosen = np.flatnonzero(latent >= 0)
    rows = counts[torch.from_numpy(latent[chosen])]
    reaches = torch.arange(counts.shape[1]) >= torch.from_numpy(bin_[chosen])[:, None]
    fired[chosen] = (rows * reaches[:, :, None]).sum(1, dtype=torch.int32).numpy()
    return fired
