"""LCA depths of pairs of classes among a latent's top images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import summary


class Pairs(NamedTuple):
    """Per latent, each (m,)."""

    depth: np.ndarray  # mean depth over the pairs of different classes; NaN without any
    same_class: np.ndarray  # share of pairs of one class; NaN where undefined


def pair_depths(
    lca_depth: np.ndarray, labels: np.ndarray, permutation: np.ndarray | None = None
) -> Pairs:
    """Mean LCA depth of pairs of different classes in each row of labels.

    Args:
        lca_depth: (C, C) depth of the LCH of two classes.
        labels: (m, k) classes of the top images; a row with any −1 is undefined.
        permutation: (C,) the position that each class takes in the tree.
    """
    first, second = np.triu_indices(labels.shape[1], 1)
    full = (labels >= 0).all(1)
    kept = labels[full]
    placed = kept if permutation is None else permutation[kept]
    differ = kept[:, first] != kept[:, second]
    total = np.where(differ, lca_depth[placed[:, first], placed[:, second]], 0).sum(1)
    depth = np.full(len(labels), np.nan)
    same_class = np.full(len(labels), np.nan)
    depth[full] = summary.ratio(total, differ.sum(1))
    same_class[full] = 1 - differ.mean(1)
    return Pairs(depth, same_class)


def all_pair_depths(
    lca_depth: np.ndarray, labels: np.ndarray, permutation: np.ndarray | None = None
) -> np.ndarray:
    """(m,) mean LCA depth over all pairs of each row of labels (m, k); NaN where one is −1."""
    first, second = np.triu_indices(labels.shape[1], 1)
    full = (labels >= 0).all(1)
    placed = labels[full] if permutation is None else permutation[labels[full]]
    depth = np.full(len(labels), np.nan)
    depth[full] = lca_depth[placed[:, first], placed[:, second]].mean(1)
    return depth
