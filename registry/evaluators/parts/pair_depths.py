"""LCA depths of pairs of classes among a latent's top images."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from . import summary


class ClassPairs:
    """The pairs of classes among the top images of each latent, counted once for all permutations.

    Args:
        labels: (m, k) classes of the top images; a row with any −1 is undefined.
        lca_depth: (C, C) depth of the LCH of two classes.
    """

    def __init__(self, labels: np.ndarray, lca_depth: np.ndarray) -> None:
        self.lca_depth = lca_depth
        self.full: np.ndarray = np.all(labels >= 0, axis=1)
        kept = np.sort(labels[self.full], axis=1)
        first, second = np.triu_indices(labels.shape[1], 1)
        codes = kept[:, first].astype(np.int64) * len(lca_depth) + kept[:, second]
        found, place = np.unique(codes, return_inverse=True)
        self.first, self.second = np.divmod(found, len(lca_depth))  # (U,) classes of each pair
        self.differ = self.first != self.second
        ends = np.arange(len(codes) + 1) * codes.shape[1]
        ones = np.ones(codes.size)
        self.counts = sparse.csr_array((ones, place.ravel(), ends), shape=(len(codes), len(found)))
        self.counts.sum_duplicates()
        self.n_pairs = codes.shape[1]
        self.n_differ = np.asarray(self.counts @ self.differ.astype(float))

    def depth(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(m,) mean depth over all pairs; NaN where undefined.

        Args:
            permutation: (C,) the position that each class takes in the tree.
        """
        return self._by_latent(self.counts @ self._depths(permutation) / self.n_pairs)

    def different_depth(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(m,) the same over the pairs of different classes; NaN where there are none."""
        total = np.asarray(self.counts @ np.where(self.differ, self._depths(permutation), 0.0))
        return self._by_latent(summary.ratio(total, self.n_differ))

    @property
    def same_class(self) -> np.ndarray:
        """(m,) share of pairs of one class; NaN where undefined."""
        return self._by_latent(1 - self.n_differ / self.n_pairs)

    def _depths(self, permutation: np.ndarray | None) -> np.ndarray:
        """(U,) depth of the LCH of each pair."""
        if permutation is None:
            return self.lca_depth[self.first, self.second].astype(float)
        return self.lca_depth[permutation[self.first], permutation[self.second]].astype(float)

    def _by_latent(self, values: np.ndarray) -> np.ndarray:
        every = np.full(len(self.full), np.nan)
        every[self.full] = values
        return every
