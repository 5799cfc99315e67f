"""The best latent of each node from sorted firings, on a device with many cores.

It finds what `node_f1` finds on the CPU with bounds and sparse products, to the bit: hits are whole
numbers, and a ratio is computed in double precision.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .samples import shape

PAIRS = 2**23
"""Approximate number of pairs of a count and a node in memory at a time; each takes about 100 bytes."""


class Entries(NamedTuple):
    """Counts above 0 of one half, each (e,) int64, by row."""

    rows: Tensor  # latent · T + T − 1 − bin
    classes: Tensor
    counts: Tensor


class Found(NamedTuple):
    """The detector of each node, each (N,)."""

    f1: np.ndarray  # on the fit half; 0 where no latent fires on the node
    row: np.ndarray  # of `node_f1.Halves.fit`; −1 where no latent fires on the node
    hits: np.ndarray  # on the score half
    fired: np.ndarray  # on the score half


class SortedFirings:
    """Counts of both halves on a device.

    Memory O(counts above 0 + PAIRS).

    Args:
        fit, score: (m·T, C), as of `node_f1.Halves`.
        n_bins: T.
        device: where the search takes place.
    """

    def __init__(
        self, fit: sparse.csr_array, score: sparse.csr_array, n_bins: int, device: torch.device
    ) -> None:
        self.n_bins, self.device = n_bins, device
        self._n_latents = shape(fit)[0] // n_bins
        self._fit, self._score = self._entries(fit), self._entries(score)
        self._reached, self._reached_score = map(self._cumulated, (self._fit, self._score))
        self._ends = torch.from_numpy(fit.indptr[::n_bins].astype(np.int64))  # of each latent

    def _entries(self, counts: sparse.csr_array) -> Entries:
        rows = np.repeat(np.arange(shape(counts)[0]), np.diff(counts.indptr))
        columns = (rows, counts.indices, counts.data)
        return Entries(*(torch.from_numpy(c.astype(np.int64)).to(self.device) for c in columns))

    def _cumulated(self, half: Entries) -> Tensor:
        """(m·T,) images at or above the threshold of each row."""
        images = torch.zeros(self._n_latents * self.n_bins, dtype=torch.int64, device=self.device)
        images.scatter_add_(0, half.rows, half.counts)
        return images.view(-1, self.n_bins).cumsum(1).view(-1)

    def best(self, belongs: sparse.csr_array, positives: np.ndarray) -> Found:
        """The latent and threshold of best F1 on the fit half for each node, and its counts on the other.

        Of equal ones the first latent, and its highest threshold.

        Args:
            belongs: (C, N) of ones, whether a class lies below a node.
            positives: (N,) images of each node in the fit half.
        """
        n_nodes = shape(belongs)[1]
        best = torch.zeros(n_nodes, dtype=torch.float64, device=self.device)
        row = torch.full((n_nodes,), -1, device=self.device)
        above = self._above(belongs)
        images = torch.from_numpy(np.asarray(positives, dtype=np.float64)).to(self.device)
        for part in self._parts(above.shape[1]):
            f1, at = self._best_of(Entries(*(column[part] for column in self._fit)), above, images)
            better = f1 > best  # of equal ones the first
            best, row = torch.where(better, f1, best), torch.where(better, at, row)
        hits, fired = self._scored(above, row)
        return Found(*(column.cpu().numpy() for column in (best, row, hits, fired)))

    def _parts(self, depth: int) -> list[slice]:
        """Ranges of counts, whole latents each, with about `PAIRS` pairs."""
        marks = torch.arange(0, len(self._fit.rows) + 1, max(1, PAIRS // max(depth, 1)))
        cuts = self._ends[torch.searchsorted(self._ends, marks)].tolist()
        cuts = sorted({*cuts, int(self._ends[-1])})
        return [slice(start, stop) for start, stop in pairwise(cuts)]

    def _above(self, belongs: sparse.csr_array) -> Tensor:
        """(C, A) the nodes of each class, filled up with N."""
        n_classes, n_nodes = shape(belongs)
        counts = np.diff(belongs.indptr)
        above = np.full((n_classes, int(counts.max(initial=0))), n_nodes, dtype=np.int32)
        column = np.arange(len(belongs.indices)) - np.repeat(belongs.indptr[:-1], counts)
        above[np.repeat(np.arange(n_classes), counts), column] = belongs.indices
        return torch.from_numpy(above).to(self.device)

    def _best_of(self, fit: Entries, above: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) the best F1 of some counts, and (N,) its row; 0 and −1 without a firing.

        Where a bin adds no hit, the threshold above it has the same hits and no more firings.
        """
        n_nodes = len(images)
        of_count = above[fit.classes]
        at, place = (of_count < n_nodes).nonzero(as_tuple=True)
        nodes, order = of_count[at, place].sort(stable=True)  # by node, then row
        at = at[order]
        rows, counts = fit.rows[at], fit.counts[at]
        latents = rows // self.n_bins
        hits = counts.cumsum(0)
        first = torch.ones_like(nodes, dtype=torch.bool)
        first[1:] = (nodes[1:] != nodes[:-1]) | (latents[1:] != latents[:-1])
        hits -= torch.where(first, hits - counts, 0).cummax(0).values  # of the latents before it
        f1 = hits.double() / (self._reached[rows] + images[nodes])
        ends = torch.searchsorted(nodes, torch.arange(n_nodes + 1, device=self.device))
        sizes = ends.diff()
        most = torch.segment_reduce(f1, "max", lengths=sizes, unsafe=True, initial=0.0)
        # Numbers of rows are exact in double precision.
        other = float(len(self._reached))
        first_row = torch.where(f1 == most[nodes], rows.double(), other)
        row = torch.segment_reduce(first_row, "min", lengths=sizes, unsafe=True, initial=other)
        return 2 * most, torch.where(most > 0, row.long(), -1)

    def _scored(self, above: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) hits and (N,) firings of the detectors at `row` (N,) on the score half."""
        latents = torch.zeros(self._n_latents + 1, dtype=torch.bool, device=self.device)
        latents[row // self.n_bins] = True  # the last is that of −1
        latents[-1] = False
        rows, classes, counts = self._score
        chosen = latents[rows // self.n_bins].nonzero().squeeze(1)
        hits = torch.zeros(len(row), dtype=torch.int64, device=self.device)
        threshold = torch.cat([row, row.new_full((1,), -self.n_bins)])  # the last is of no node
        for some in chosen.split(max(1, PAIRS // max(above.shape[1], 1))):
            nodes, at = above[classes[some]].long(), rows[some, None]
            reached = threshold[nodes]
            same = (reached // self.n_bins == at // self.n_bins) & (at <= reached)
            which, place = same.nonzero(as_tuple=True)
            hits.scatter_add_(0, nodes[which, place], counts[some[which]])
        fired = torch.zeros_like(row)
        if len(self._reached):
            fired = torch.where(row >= 0, self._reached_score[row.clamp(min=0)], 0)
        return hits, fired
