"""`cpcc`: correlation of the distances of class means with the distances in the tree.

The cophenetic correlation coefficient of class means of Zeng et al. 2023 (Learning structured
representations by embedding class hierarchy, ICLR), without its loss: nothing is fitted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.spatial.distance import squareform

from .. import hashing
from ..presentation import Headline, Support
from .base import Evaluator, remembered
from .parts import summary
from .parts.ranks import pearson
from .parts.sums import ActivationSums, LatentSums

FEATURES = ("x", "z")
DRAWN = 2000
"""Maximum number of pairs in the figure."""


class CPCC(Evaluator):
    """Pearson correlation, over pairs of classes, of tree distance and distance of class means.

    The tree distance is the number of edges between the two classes on the primary tree; the
    distance of the means is Euclidean. `x_cpcc`: means of the activations; `z_cpcc`: of the latents.
    `n_classes`: classes with images; `n_pairs`: pairs of them.

    Undefined where either distance is the same for all pairs. The other sources of latents share
    x, so `x_cpcc` is NaN there. Memory O(C·(d + m) + C²).
    """

    name = "cpcc"
    description = "correlation of the distances of class means with the distances in the tree"
    higher_is_better = {"x_cpcc": True, "z_cpcc": True, "n_classes": None, "n_pairs": None}
    ranges = {f"{feature}_cpcc": summary.COSINE for feature in FEATURES}
    invariant = frozenset({"n_classes", "n_pairs"})
    support = {f"{feature}_cpcc": Support("n_pairs", "pairs of classes") for feature in FEATURES}
    headlines = (
        Headline(
            "z_cpcc",
            "CPCC of latents",
            "correlation of tree distance and distance of the latents' class means",
            priority=50,
        ),
    )

    def prepare(self) -> None:
        self._sums: dict[str, ActivationSums | LatentSums] = {"z": self.context.share(LatentSums)}
        if self.context.source == "sae":
            self._sums["x"] = self.context.share(ActivationSums)

    @remembered
    def distances(self, feature: str, shuffled: bool = False) -> np.ndarray:
        """(C, C) Euclidean distances of the class means, NaN for a class without images."""
        means = self._sums[feature].means(shuffled).astype(np.float64)
        return euclidean(means.T if feature == "z" else means)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        for feature in self._sums:
            tree, distance = self._pairs(feature, permutation, shuffled)
            numbers[f"{feature}_cpcc"] = pearson(tree, distance)
        present = np.isfinite(np.diag(self.distances("z", shuffled))).sum()
        return {
            **numbers,
            "n_classes": float(present),
            "n_pairs": float(present * (present - 1) / 2),
        }

    def _pairs(
        self, feature: str, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tree distance and distance of the means, (P,) each, of the pairs of classes with images."""
        tree = self.taxonomy.tree_distance
        if permutation is not None:
            tree = tree[np.ix_(permutation, permutation)]
        tree = squareform(tree.astype(np.float64), checks=False)
        distance = squareform(self.distances(feature, shuffled), checks=False)
        known = np.isfinite(distance)
        return tree[known], distance[known]

    def tables(self) -> dict[str, pd.DataFrame]:
        """`distances`: the distance of the means for each tree distance, mean over the pairs, as a
        multiple of the mean over all pairs."""
        rows = []
        for feature in sorted(self._sums):
            tree, distance = self._pairs(feature)
            whole = summary.mean(distance)
            for d in np.unique(tree):
                here = distance[tree == d]
                rows.append((feature, int(d), len(here), float(summary.ratio(here.mean(), whole))))
        columns = ["feature", "tree_distance", "n_pairs", "relative_distance"]
        return {"distances": pd.DataFrame(rows, columns=columns)} if rows else {}

    def figures(self) -> dict[str, Figure]:
        """`distances`: distance of the means against tree distance, for some pairs of classes."""
        drawing = summary.figure(
            "Distances of class means", "distance in the tree", "distance, relative to the mean"
        )
        for feature, colour in zip(FEATURES, (summary.VALUE, summary.OTHER)):
            if feature in self._sums:
                tree, distance = self._pairs(feature)
                drawn = np.argsort(hashing.uniform(np.arange(len(tree))))[:DRAWN]
                drawing.add_box(
                    x=tree[drawn],
                    y=summary.ratio(distance, summary.mean(distance))[drawn],
                    name=summary.FEATURE_NAMES[feature],
                    marker={"color": colour},
                )
        drawing.update_layout(boxmode="group")
        return {"distances": drawing}


def euclidean(points: np.ndarray) -> np.ndarray:
    """(C, C) distances of the rows of points (C, w), NaN for a row with an entry not finite."""
    known = np.isfinite(points).all(1)
    distance = np.full((len(points), len(points)), np.nan)
    rows = points[known]
    if len(rows):
        rows = rows - rows.mean(0)  # for the precision of the differences below
        gram = rows @ rows.T
        square = np.diag(gram)
        between = np.maximum(square[:, None] + square - 2 * gram, 0)
        distance[np.ix_(known, known)] = np.sqrt(between)
    return distance
