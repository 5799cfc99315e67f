"""LCA depths of pairs of classes among a latent's top images."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from . import summary
from .samples import shape


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
        first, second = np.divmod(found, len(lca_depth))
        order = np.argsort(first == second, kind="stable")  # pairs of different classes first
        self.first, self.second = first[order], second[order]  # (U,) classes of each pair
        ends = np.arange(len(codes) + 1) * codes.shape[1]
        place = np.argsort(order)[place.ravel()]
        counts = sparse.csr_array(
            (np.ones(codes.size), place, ends), shape=(len(codes), len(found))
        )
        counts.sum_duplicates()
        n = int((first != second).sum())
        self._differ, self._same = sparse.csr_array(counts[:, :n]), sparse.csr_array(counts[:, n:])
        self.n_pairs = codes.shape[1]
        self.n_differ = self._differ.sum(1)
        self._found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def depth(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(m,) mean depth over all pairs; NaN where undefined.

        Args:
            permutation: (C,) the position that each class takes in the tree.
        """
        return self._depths(permutation)[0]

    def different_depth(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(m,) the same over the pairs of different classes; NaN where there are none."""
        return self._depths(permutation)[1]

    @property
    def same_class(self) -> np.ndarray:
        """(m,) share of pairs of one class; NaN where undefined."""
        return self._by_latent(1 - self.n_differ / self.n_pairs)

    def _depths(self, permutation: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Depths over all pairs, and over those of different classes; kept for each permutation."""
        place = np.arange(len(self.lca_depth)) if permutation is None else permutation
        key = place.tobytes()
        if key not in self._found:
            above = place[self.first] * len(place)
            above += place[self.second]
            depths = self.lca_depth.ravel().take(above).astype(float)
            n = shape(self._differ)[1]
            different, same = self._differ @ depths[:n], self._same @ depths[n:]
            self._found[key] = (
                self._by_latent((different + same) / self.n_pairs),
                self._by_latent(summary.ratio(different, self.n_differ)),
            )
        return self._found[key]

    def _by_latent(self, values: np.ndarray) -> np.ndarray:
        every = np.full(len(self.full), np.nan)
        every[self.full] = values
        return every
