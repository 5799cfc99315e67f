"""The node of each of some latents, and how far such nodes are from each other in the tree."""

from __future__ import annotations

import numpy as np

from ...taxonomies.taxonomy import Taxonomy
from ..base import EvaluationContext
from .accumulators import ClassCounts, FiringHistogram
from .node_f1 import best_nodes
from .samples import FiringSample, fires


class LatentNodes:
    """The node of best F1 with a latent's firing on the fit half, the root left out.

    `sample`: the firings of about `max_images` images, of which only the score half is read here.
    """

    def __init__(self, context: EvaluationContext, max_images: int = 16384) -> None:
        self._taxonomy = context.taxonomy
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self.sample = context.share(FiringSample, max_images=max_images)
        nodes = context.taxonomy.distinct_nodes
        self.nodes = nodes[nodes != context.taxonomy.root]

    @property
    def fired(self) -> np.ndarray:
        """(m,) images of the fit half on which each latent fires."""
        return np.asarray(self._firings.fit().sum(1), dtype=np.int64).ravel()

    @property
    def held_out(self) -> np.ndarray:
        """(m,) images of the score half of the sample on which each latent fires."""
        return fires(self.sample.z[~self.sample.is_fit]).sum(0).astype(np.int64)

    def most_firing(self, most: int, least: int, *, varying: bool = False) -> np.ndarray:
        """(≤ most,) the latents that fire on most images of the fit half, ascending.

        Args:
            most: their number.
            least: images of the fit half on which they fire at least.
            varying: only those that fire on some but not all images of the score half.
        """
        fired = self.fired
        able = fired >= least
        if varying:
            held_out = self.held_out
            able &= (held_out > 0) & (held_out < (~self.sample.is_fit).sum())
        order = np.argsort(-fired, kind="stable")
        return np.sort(order[able[order]][:most])

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
