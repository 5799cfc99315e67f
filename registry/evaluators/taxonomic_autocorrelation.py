"""`taxonomic_autocorrelation`: similarity of a latent's activation on classes near in the tree.

Moran's I (Moran 1950, https://doi.org/10.2307/2332142) with tree distances in place of
geographic ones: own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy import sparse

from ..errors import ConfigError
from ..presentation import Support
from ..taxonomies.permuted_classes import SIZE_FACTOR, strata
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts
from .parts.ranks import benjamini_hochberg
from .parts.sums import LatentSums

BLOCK = 256
"""Latents processed at a time."""


@dataclass(frozen=True)
class AutocorrelationOptions:
    """scale: two classes at tree distance t have weight e^(−t/scale).
    draws: random permutations of the classes of like size for each p-value.
    level: level of the false discovery rate.
    """

    scale: float = 1.0
    draws: int = 199
    level: float = 0.05

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError("scale", "out of range", given=self.scale, allowed="above 0")
        require_at_least(1, self, "draws")
        if not 0 < self.level < 1:
            raise ConfigError(
                "level", "out of range", given=self.level, allowed="a number in (0, 1)"
            )


class Autocorrelation(NamedTuple):
    """Per latent, each (m,); NaN where its class means are all equal, p and q also where they are equal among
    classes of like size."""

    moran_i: np.ndarray
    p: np.ndarray
    q: np.ndarray


class TaxonomicAutocorrelation(Evaluator[AutocorrelationOptions]):
    """Moran's I of each latent's class means over the tree.

    I = (C / ΣW) · Σ_{a≠b} W_ab (y_a − ȳ)(y_b − ȳ) / Σ_a (y_a − ȳ)², y the mean activation on a
    class and W_ab = e^(−distance/scale) on the primary tree. Without structure it is −1/(C − 1) on
    average. p: the share of random permutations of the class means with at least I, the observed
    one included, among classes with like numbers of images, as those of the permuted classes: the
    mean over few images scatters more. Undefined where the means of such classes are equal, as where no two
    classes are alike. q: p adjusted for the false discovery rate over the `tested` latents, those with a p
    (Benjamini and Hochberg). The smallest p is 1/(draws + 1), so few draws limit the number of significant
    latents.

    Each latent has permutations of its own: with common ones its p-values would be right alone, but
    the share of significant latents would depend mostly on the seed. As W = BBᵀ − 1 with B (C, V)
    sparse, a permutation costs C·depth for each latent, not C². The permutations start from the
    sorted means and are thus the same for every permuted tree. Memory
    O(m·(C + draws)).
    """

    name = "taxonomic_autocorrelation"
    description = "similarity of a latent's activation on classes near in the tree (Moran's I)"
    higher_is_better = {
        "moran_i": True,
        "significant_share": True,
        "expected": None,
        "defined": None,
        "tested": None,
    }
    ranges = {
        "significant_share": summary.SHARE,
    }
    labels = {"moran_i": "Moran's I"}
    support = {
        "moran_i": Support("defined", "latents"),
        "significant_share": Support("tested", "latents"),
    }
    invariant = frozenset({"expected", "defined", "tested"})
    Options = AutocorrelationOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._sums = self.context.share(LatentSums)
        self._factor = weight_factor(self.taxonomy, self.options.scale)

    def autocorrelation(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Autocorrelation:
        """I, p and q of each latent."""
        self._check_shuffled(shuffled)
        present = np.flatnonzero(self._classes.all(shuffled))
        places = present if permutation is None else permutation[present]
        order = np.argsort(places)
        factor = sparse.csr_array(self._factor[places[order]])
        means = self._sums.means(shuffled)[:, present[order]]
        observed = moran(standardised(means), factor)
        groups = strata(self._classes.all(shuffled))
        if all(len(group) < 2 for group in groups):
            undefined = np.full(len(observed), np.nan)
            return Autocorrelation(observed, undefined, undefined)
        stratum = np.zeros(len(self.taxonomy.classes), dtype=np.int64)
        for i, group in enumerate(groups):
            stratum[group] = i
        drawn = self._drawn(places[order], stratum[present[order]], shuffled)
        # Draws are in single precision: the tolerance exceeds its rounding, so that equal ones tie.
        reached = (drawn >= observed[:, None] - 1e-6).sum(1)
        tested = np.isfinite(observed) & moves(means, stratum[present[order]])
        p = np.where(tested, (1 + reached) / (1 + self.options.draws), np.nan)
        return Autocorrelation(observed, p, benjamini_hochberg(p))

    @remembered
    def _drawn(self, places: np.ndarray, stratum: np.ndarray, shuffled: bool) -> np.ndarray:
        """(m, draws) I of random permutations of the class means over the leaves.

        Args:
            places: (P,) the leaves of the P classes with images.
            stratum: (P,) that of the class at each; means are permuted within it.
        """
        images = self._classes.all(shuffled)
        means = np.empty((self.context.d_sae, len(places)), dtype=self._sums.means(shuffled).dtype)
        groups = [np.flatnonzero(stratum == i) for i in range(stratum.max() + 1)]
        for at, classes in zip(groups, strata(images), strict=True):
            means[:, at] = np.sort(self._sums.means(shuffled)[:, classes], axis=1)
        factor = sparse.csr_array(self._factor[places])
        drawn = np.empty((len(means), self.options.draws), dtype=np.float32)
        blocks = standardised(means)
        for i in range(self.options.draws):
            generator = np.random.default_rng((self.context.seed, i))
            permuted = [permuted_within(groups, block, generator) for block in blocks]
            drawn[:, i] = moran(permuted, factor)
        return drawn

    def notes(self) -> list[str]:
        """That there is nothing to permute, for all latents or for some."""
        groups = strata(self._classes.all())
        alike = f"a like number of images (within a factor of {SIZE_FACTOR})"
        if len(groups) > 1 and all(len(group) < 2 for group in groups):
            return [
                f"No p-values: no two of the {len(groups)} classes have {alike}, so that no class means can "
                "be exchanged."
            ]
        found = self.autocorrelation()
        defined, tested = (int(np.isfinite(each).sum()) for each in (found.moran_i, found.p))
        if tested == defined:
            return []
        return [
            f"{defined - tested} of {defined} latents have no p-value: their means are equal among classes "
            f"with {alike}, so that exchanging them changes nothing."
        ]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        found = self.autocorrelation(permutation, shuffled)
        n_classes = int(np.count_nonzero(self._classes.all(shuffled)))
        defined = np.isfinite(found.moran_i)
        return {
            "moran_i": summary.mean(found.moran_i),
            # q can exceed the level by its rounding.
            "significant_share": summary.mean(
                found.q <= self.options.level * (1 + 1e-9), np.isfinite(found.q)
            ),
            "expected": -1 / (n_classes - 1) if n_classes > 1 else float("nan"),
            "defined": float(defined.sum()),
            "tested": float(np.isfinite(found.p).sum()),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: one row for each defined latent, by decreasing I."""
        found = self.autocorrelation()
        latent = np.flatnonzero(np.isfinite(found.moran_i))
        latent = latent[np.argsort(-found.moran_i[latent], kind="stable")]
        table = {"latent": latent, **{k: v[latent] for k, v in found._asdict().items()}}
        table["significant"] = table["q"] <= self.options.level * (1 + 1e-9)
        return {"latents": pd.DataFrame(table)}

    def figures(self) -> dict[str, Figure]:
        """`moran_i`: histogram over latents, with the permuted classes."""
        permuted = [self.autocorrelation(p).moran_i for p in self.context.permutations]
        return {
            "moran_i": summary.histograms(
                "Autocorrelation of latents over the tree",
                "Moran's I",
                {
                    "latents": self.autocorrelation().moran_i,
                    "permuted classes": np.concatenate([*permuted, np.zeros(0)]),
                },
            )
        }


def weight_factor(taxonomy: Taxonomy, scale: float = 1.0) -> sparse.csr_array:
    """B (C, V) with (BBᵀ)_ab = e^(−tree distance of a and b / scale).

    The distance is depth(a) + depth(b) − 2·depth of the last common node of their primary paths, so
    the entry of a node on a class's path is the increment of one more shared level.
    """
    rows, columns, values = [], [], []
    step = np.sqrt(-np.expm1(-2 / scale))
    for c, leaf in enumerate(taxonomy.class_nodes):
        for v in taxonomy.path_to_root(int(leaf)):
            rows.append(c)
            columns.append(v)
            nearness = np.exp((taxonomy.depth[v] - taxonomy.depth[leaf]) / scale)
            values.append(nearness * (step if v != taxonomy.root else 1.0))
    size = (len(taxonomy.classes), len(taxonomy.nodes))
    return sparse.csr_array((values, (rows, columns)), shape=size)


def moves(means: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """(m,) whether exchanging the class means (m, P) within the strata (P,) of their classes changes a row."""
    spread = np.zeros(len(means))
    for i in np.unique(stratum):
        spread = np.maximum(spread, np.ptp(means[:, stratum == i], axis=1))
    return spread > 1e-6 * np.abs(means).max(1, initial=0)


def standardised(values: np.ndarray) -> list[np.ndarray]:
    """The rows of values (m, C), centred and of length 1, as columns of blocks (C, b).

    NaN where a row is constant.
    """
    blocks = []
    for start in range(0, len(values), BLOCK):
        y = values[start : start + BLOCK].T
        if len(y):
            spread = np.ptp(y, axis=0) > 1e-6 * np.abs(y).max(0)  # else rounding error
            y = y - y.mean(0)
            y = np.where(spread, y / np.where(spread, np.sqrt(np.square(y).sum(0)), 1), np.nan)
        blocks.append(np.ascontiguousarray(y))
    return blocks


def permuted_within(
    groups: list[np.ndarray], block: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """(C, b) block with the rows of each of `groups` permuted, in each column on its own."""
    if len(groups) == 1:
        return generator.permuted(block, axis=0)
    permuted = np.empty_like(block)
    for rows in groups:
        permuted[rows] = generator.permuted(block[rows], axis=0)
    return permuted


def moran(blocks: list[np.ndarray], factor: sparse.csr_array) -> np.ndarray:
    """(m,) Moran's I, weights BBᵀ off the diagonal.

    Args:
        blocks: `standardised(values)` of values (m, C).
        factor: B (C, V), rows of length 1.
    """
    # Columns of one class affect only the diagonal; leaving them out avoids cancellation.
    shared = sparse.csr_array(factor[:, np.diff(sparse.csc_array(factor).indptr) > 1])
    own = np.asarray(shared.multiply(shared).sum(1))
    total = float(np.square(shared.sum(0)).sum() - own.sum())
    if len(own) < 2 or total <= 0:
        return np.full(sum(block.shape[1] for block in blocks), np.nan)
    groups = sparse.csr_array(shared.T)
    near = [np.zeros(0)]
    for block in blocks:
        sums = np.asarray(groups @ block)
        near.append(np.einsum("vj,vj->j", sums, sums) - own @ np.square(block))
    return len(own) / total * np.concatenate(near)
