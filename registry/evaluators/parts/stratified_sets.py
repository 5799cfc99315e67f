"""Random sets of classes with as many of each stratum of like size as given sets have.

Classes that differ in their number of images are not exchangeable (`taxonomies/permuted_classes.py`):
where firing depends on that number, the classes of a latent are of one size, and lie together in a
tree whose branches differ in size.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ...taxonomies.taxonomy import Taxonomy

BLOCK = 2**22
"""Pairs of classes in memory at a time."""
LARGE = 1 / 8
"""Share of the classes from which on a node is large."""


class Expected(NamedTuple):
    """What random sets like k given ones give, each (k,); NaN where a given one is the only set like it."""

    height: np.ndarray  # mean of the LCH
    generality: np.ndarray
    lower: np.ndarray  # share of the sets whose LCH is at most as high


class Reached(NamedTuple):
    """The LCH of random sets of one composition; NaN where there is one such set, not of all classes."""

    height: float  # mean
    generality: float
    lower: np.ndarray  # (H + 1,) share of the sets with an LCH of at most this height


class StratifiedSets:
    """Random sets of classes: the first classes of random orders of each stratum.

    Memory O(repeats·P), P the number of classes.

    Args:
        taxonomy: the class tree.
        repeats: sets of each composition; of pairs all are taken.
        seed: of the orders.
        groups: the positions in the tree of the classes of each stratum.
    """

    def __init__(
        self, taxonomy: Taxonomy, repeats: int, seed: int, groups: tuple[tuple[int, ...], ...]
    ) -> None:
        self._taxonomy, self._repeats, self._seed = taxonomy, repeats, seed
        self._groups = [np.array(group, dtype=np.int32) for group in groups]
        self._reached: dict[bytes, Reached] = {}

    def of(self, parts: np.ndarray, height: np.ndarray) -> Expected:
        """Random sets like k given ones.

        Args:
            parts: (k, S) classes of each stratum in each set, one at least.
            height: (k,) of the LCH of each set.
        """
        found = [self._of(row) for row in parts]
        return Expected(
            np.array([sets.height for sets in found]),
            np.array([sets.generality for sets in found]),
            np.array([sets.lower[h] for sets, h in zip(found, height)]),
        )

    def _of(self, parts: np.ndarray) -> Reached:
        key = parts.tobytes()
        if self._is_alone(parts):
            nothing = np.full(self._taxonomy.height.max() + 1, np.nan)
            return Reached(float("nan"), float("nan"), nothing)
        if key not in self._reached:
            pair = parts.sum() == 2
            counts = self._pairs(np.flatnonzero(parts)) if pair else self._draws(parts)
            heights = np.bincount(self._taxonomy.height, counts)
            own = 0 if pair else 1  # of sets that are drawn the given one is counted as one
            self._reached[key] = Reached(
                float(counts @ self._taxonomy.height / counts.sum()),
                float(counts @ self._taxonomy.generality / counts.sum()),
                (own + np.cumsum(heights)) / (own + counts.sum()),
            )
        return self._reached[key]

    def _is_alone(self, parts: np.ndarray) -> bool:
        """Whether a set has all classes of the strata in which it has any, and not those of others."""
        sizes = np.array([len(group) for group in self._groups])
        full = parts == sizes
        return bool((full | (parts == 0)).all() and not full.all())

    def _pairs(self, strata: np.ndarray) -> np.ndarray:
        """(V,) how many pairs of two classes of one stratum, or one of each of two, have each LCH."""
        first, second = self._groups[strata[0]], self._groups[strata[-1]]
        lch, n_nodes = self._taxonomy.leaf_lch, len(self._taxonomy.nodes)
        counts = np.zeros(n_nodes)
        for rows in np.array_split(first, -(-len(first) * len(second) // BLOCK)):
            counts += np.bincount(lch[np.ix_(rows, second)].ravel(), minlength=n_nodes)
        if len(strata) == 1:  # each pair twice, and each class with itself
            counts = (counts - np.bincount(lch[first, first], minlength=n_nodes)) / 2
        return counts

    def _draws(self, parts: np.ndarray) -> np.ndarray:
        """(V,) how many of the sets drawn have each LCH."""
        members, strata = self._taxonomy.membership, np.flatnonzero(parts)
        holds = np.all([self._below_large[i] >= parts[i] for i in strata], axis=0)
        large = self._large[holds.argmax(0)]  # the root, the last one, holds all
        above = self._small_above[self._orders[strata[0]][:, 0]]
        draw, place = np.nonzero(above >= 0)
        node = above[draw, place]  # by draw and preference
        for rank in range(parts.max()):
            for i in strata[parts[strata] > rank]:
                if not len(draw):
                    break
                held = members[self._orders[i][draw, rank], node]
                draw, node = draw[held], node[held]
        small = np.full(self._repeats, self._taxonomy.root)
        small[draw[::-1]] = node[::-1]  # the last one written is the preferred
        found = np.where(self._preference[small] > self._preference[large], small, large)
        return np.bincount(found, minlength=len(self._taxonomy.nodes)).astype(float)

    @cached_property
    def _orders(self) -> list[np.ndarray]:
        """(repeats, n) the classes of each stratum in random orders."""
        generator = np.random.default_rng(self._seed)
        tiled = (np.tile(group, (self._repeats, 1)) for group in self._groups)
        return [generator.permuted(rows, axis=1) for rows in tiled]

    @cached_property
    def _preference(self) -> np.ndarray:
        """(V,) rank of each node as LCH."""
        return np.argsort(self._taxonomy.by_preference)

    @cached_property
    def _large(self) -> np.ndarray:
        """(L,) the nodes with many of the classes, the preferred one as LCH first, the root last."""
        classes = np.concatenate(self._groups)
        large = np.flatnonzero(self._taxonomy.membership[classes].mean(0) >= LARGE)
        return large[np.argsort(-self._preference[large])]

    @cached_property
    def _below_large(self) -> list[np.ndarray]:
        """Per stratum (L, repeats), the classes at the head of its orders that lie below a large node.

        Whole sets lie below these, so that class by class is slow.
        """
        found = []
        for orders in self._orders:
            length = np.empty((len(self._large), len(orders)), dtype=np.int32)
            for row, v in zip(length, self._large):
                below = self._taxonomy.membership[:, v][orders]
                row[:] = np.where(below.all(1), orders.shape[1], below.argmin(1))
            found.append(length)
        return found

    @cached_property
    def _small_above(self) -> np.ndarray:
        """(C, A) the other nodes above each class, the preferred one as LCH first; then −1."""
        small = np.setdiff1d(np.arange(len(self._taxonomy.nodes)), self._large)
        rows, nodes = np.nonzero(self._taxonomy.membership[:, small])
        order = np.lexsort((-self._preference[small[nodes]], rows))
        rows, nodes = rows[order], small[nodes[order]]
        sizes = np.bincount(rows, minlength=len(self._taxonomy.classes))
        above = np.full((len(sizes), sizes.max(initial=0)), -1, dtype=np.int32)
        above[rows, np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[rows]] = nodes
        return above


@lru_cache(maxsize=2)
def stratified_sets(
    taxonomy: Taxonomy, repeats: int, seed: int, groups: tuple[tuple[int, ...], ...]
) -> StratifiedSets:
    """The one `StratifiedSets` of these arguments, which every permuted tree needs."""
    return StratifiedSets(taxonomy, repeats, seed, groups)
