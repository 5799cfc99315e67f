"""`pair_depth`: depth of the lowest common ancestor of pairs of classes of a latent's top images.

Pach et al. 2025 (arXiv 2504.02821) average the LCA depth over all pairs; leaving out pairs of
one class is our own definition, so that detectors of single classes do not raise the score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from ..errors import ConfigError
from ..presentation import Headline, Support
from .base import Evaluator, remembered
from .parts import summary
from .parts.accumulators import TopImages
from .parts.pair_depths import ClassPairs


@dataclass(frozen=True)
class PairDepthOptions:
    """k: number of most activating images of a latent; undefined where it fires on fewer."""

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError(
                "k", "too small", given=self.k, allowed="2 or more, since a pair needs two images"
            )


class PairDepth(Evaluator[PairDepthOptions]):
    """Mean depth of the LCH over the pairs of different classes among a latent's top k images.

    Averaged over the latents where it is defined: those that fire on k images of which not all show
    one class. `pair_depth_normalized` divides by the depth of the tree.
    """

    name = "pair_depth"
    description = "LCA depth of pairs of different classes among a latent's top images"
    higher_is_better = {
        "pair_depth": True,
        "pair_depth_normalized": True,
        "defined": None,
        "same_class_share": None,
    }
    ranges = {
        "pair_depth": summary.POSITIVE,
        **dict.fromkeys(("pair_depth_normalized", "same_class_share"), summary.SHARE),
    }
    support = dict.fromkeys(("pair_depth", "pair_depth_normalized"), Support("defined", "latents"))
    invariant = frozenset({"defined", "same_class_share"})
    headlines = (Headline("pair_depth", "pair depth", priority=20),)
    Options = PairDepthOptions

    def prepare(self) -> None:
        self._top = self.context.share(TopImages, k=self.options.k)

    @remembered
    def pairs(self, shuffled: bool = False) -> ClassPairs:
        """The pairs of classes of each latent."""
        return self._top.pairs(shuffled)

    @remembered
    def depth(self, permutation: np.ndarray | None = None, shuffled: bool = False) -> np.ndarray:
        """(m,) mean depth of the LCH over pairs of different classes; NaN where undefined."""
        return self.pairs(shuffled).different_depth(permutation)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        depth = self.depth(permutation, shuffled)
        value = summary.mean(depth)
        deepest = self.taxonomy.max_depth
        return {
            "pair_depth": value,
            "pair_depth_normalized": value / deepest if deepest else float("nan"),
            "defined": summary.count(depth),
            "same_class_share": summary.mean(self.pairs(shuffled).same_class),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: one row for each defined latent, by decreasing depth."""
        depth, same_class = self.depth(), self.pairs().same_class
        null = np.full(len(depth), np.nan)
        if self.context.permutations:
            null = np.mean([self.depth(p) for p in self.context.permutations], axis=0)
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
        """`pair_depth`: histogram over latents, with the permuted classes."""
        permuted = [self.depth(p) for p in self.context.permutations]
        return {
            "pair_depth": summary.histograms(
                "Pair depth of latents",
                "mean LCH depth of pairs of different classes",
                {
                    "latents": self.depth(),
                    "permuted classes": np.concatenate([*permuted, np.zeros(0)]),
                },
            )
        }
