"""The node of each of some latents, and how far such nodes are from each other in the tree."""

from __future__ import annotations

import numpy as np

from ...taxonomies.taxonomy import Taxonomy
from ..base import EvaluationContext
from .accumulators import ClassCounts, FiringHistogram
from .node_f1 import best_nodes


class LatentNodes:
    """The node of best F1 with a latent's firing on the fit half.

    Nodes with the same classes that have images count once, and those with all of them not at all,
    as the root.
    """

    def __init__(self, context: EvaluationContext) -> None:
        self._taxonomy = context.taxonomy
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self.nodes, _ = context.distinct_nodes(root=False)

    @property
    def fired(self) -> np.ndarray:
        """(m,) images of the fit half on which each latent fires."""
        return np.asarray(self._firings.fit().sum(1), dtype=np.int64).ravel()

    def of(
        self, latents: np.ndarray, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(l,) the node of each of `latents` (l,), and (l,) its F1 on the fit half."""
        members = self._taxonomy.membership[:, self.nodes]
        members = members if permutation is None else members[permutation]
        fired = self._firings.fit(shuffled)[latents]
        place, f1 = best_nodes(fired, self._classes.fit(shuffled), members)
        return self.nodes[place] if len(self.nodes) else np.zeros(len(latents), dtype=int), f1


def shared_depth(taxonomy: Taxonomy, nodes: np.ndarray) -> np.ndarray:
    """(l, l) depth of the lowest common node of two of `nodes` (l,) on the primary tree."""
    distinct, place = np.unique(nodes, return_inverse=True)
    above = np.zeros((len(distinct), len(taxonomy.nodes)), dtype=np.float32)
    for row, v in zip(above, distinct.tolist()):
        row[list(taxonomy.path_to_root(v))] = 1
    shared = (above @ above.T).round().astype(np.int64) - 1
    return shared[np.ix_(place, place)]
