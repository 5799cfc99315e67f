"""`pair_depth`: how deep in the tree the classes of a latent's top images meet, pair by pair.

Pach et al. 2025 (arXiv 2504.02821) average the LCA depth over all pairs; leaving out pairs of
one class is our own definition, and makes the score one that knowing classes alone cannot win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from ..errors import ConfigError
from ..presentation import Headline
from .base import EvaluationContext, Evaluator
from .parts import summary
from .parts.accumulators import TopImages


@dataclass(frozen=True)
class PairDepthOptions:
    """k: the most activating images of a latent; it is skipped where it fires on fewer."""

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError(f"k: a pair needs at least 2 images, got {self.k}")


class Pairs(NamedTuple):
    """Per latent, each (m,)."""

    depth: np.ndarray  # mean depth over the pairs of different classes; NaN without any
    same_class: np.ndarray  # share of pairs of one class; NaN where the latent is skipped


class PairDepth(Evaluator[PairDepthOptions]):
    """Mean depth of the LCH over the pairs of different classes among a latent's top k images.

    Averaged over the latents where it is defined: those that fire on k images of which not all show
    one class. `pair_depth_normalized` divides by the depth of the tree.
    """

    name = "pair_depth"
    description = "how deep the classes of a latent's top images meet, pairs of one class left out"
    higher_is_better = {
        "pair_depth": True,
        "pair_depth_normalized": True,
        "defined": None,
        "same_class_share": None,
    }
    invariant = frozenset({"defined", "same_class_share"})
    headlines = (Headline("pair_depth", "pair depth", priority=20),)
    Options = PairDepthOptions

    def __init__(
        self,
        context: EvaluationContext,
        options: PairDepthOptions | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context, options)
        self._top = context.share(TopImages, k=self.options.k)

    def pairs(self, permutation: np.ndarray | None = None, shuffled: bool = False) -> Pairs:
        """The per-latent numbers."""
        self._check_shuffled(shuffled)
        labels = self._top.labels(shuffled)
        return pair_depths(self.taxonomy.leaf_lca_depth, labels, permutation)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        depth, same_class = self.pairs(permutation, shuffled)
        value = summary.mean(depth)
        deepest = self.taxonomy.max_depth
        return {
            "pair_depth": value,
            "pair_depth_normalized": value / deepest if deepest else float("nan"),
            "defined": float(np.isfinite(depth).sum()),
            "same_class_share": summary.mean(same_class),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: one row for each latent where it is defined, the deepest first."""
        depth, same_class = self.pairs()
        null = np.full(len(depth), np.nan)
        if self.context.permutations:
            null = np.mean([self.pairs(p).depth for p in self.context.permutations], axis=0)
        latent = np.flatnonzero(np.isfinite(depth))
        latent = latent[np.argsort(-depth[latent], kind="stable")]
        table = {
            "latent": latent,
            "pair_depth": depth[latent],
            "permuted": null[latent],
            "excess": depth[latent] - null[latent],
            "same_class_share": same_class[latent],
        }
        return {"latents": pd.DataFrame(table)}

    def figures(self) -> dict[str, Figure]:
        """`pair_depth`: of the latents, against the permuted classes."""
        permuted = [self.pairs(p).depth for p in self.context.permutations]
        return {
            "pair_depth": summary.histograms(
                "Pair depth of latents",
                "mean depth of the LCH over pairs of different classes",
                {
                    "latents": self.pairs().depth,
                    "permuted classes": np.concatenate([*permuted, np.zeros(0)]),
                },
            )
        }


def pair_depths(
    lca_depth: np.ndarray, labels: np.ndarray, permutation: np.ndarray | None = None
) -> Pairs:
    """The pairs of each row of labels.

    Args:
        lca_depth: (C, C) depth of the LCH of two classes.
        labels: (m, k) classes of the top images; a row with any −1 is skipped.
        permutation: (C,) the place that each class takes in the tree.
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
