"""`lch_height`: height of the lowest common hypernym (LCH) of the classes of a latent.

The idea is that of Olson et al. 2025 (arXiv 2505.15970); the forms are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy import sparse

from ..errors import ConfigError
from ..presentation import Headline, NodeTable, Support
from ..taxonomies.permuted_classes import SIZE_FACTOR, strata
from ..taxonomies.taxonomy import Taxonomy, first_columns
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram, TopImages
from .parts.ranks import benjamini_hochberg
from .parts.samples import shape
from .parts.stratified_sets import Expected, stratified_sets

FEW_IMAGES = 5
"""Images of a class below which the rule `frequency` takes false alarms for classes of a latent."""
PREFIX = 64
"""Classes by which random sets are extended at a time."""
RULES = ("frequency", "topk", "topk_strict", "any")


@dataclass(frozen=True)
class LCHHeightOptions:
    """Assignment of classes to a latent.

    rule: `frequency`: the classes on at least `tau` of whose images it fires; needs about 5 images
        a class. `topk`: the smallest node with at least `keep` of its `k` most activating images.
        `topk_strict`: the LCH of all classes among these images; one outlier image can make it the
        root, and its trend over depth can have the wrong sign: for comparison with the paper only.
        `any`: every class it fires on.
    tau: least share of a class's images, above 0.
    k: number of most activating images, bounded by half of the smallest class; below 2 the rules
        `topk` and `topk_strict` are undefined.
    keep: least share of the k images.
    repeats: random class sets of each size; of pairs all are taken.
    level: false discovery rate of `lower_share`.
    """

    rule: str = "frequency"
    tau: float = 0.5
    k: int = 16
    keep: float = 0.9
    repeats: int = 1999
    level: float = 0.05

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(
                "rule", "not known", given=self.rule, allowed=f"one of {', '.join(RULES)}"
            )
        for field in ("tau", "keep"):
            if not 0 < getattr(self, field) <= 1:
                raise ConfigError(
                    field, "out of range", given=getattr(self, field), allowed="a number in (0, 1]"
                )
        if not 0 < self.level < 1:
            raise ConfigError(
                "level", "out of range", given=self.level, allowed="a number in (0, 1)"
            )
        require_at_least(1, self, "k", "repeats")


class Assignment(NamedTuple):
    """The node of each latent (−1 where undefined) and the number of its classes."""

    node: np.ndarray  # (m,)
    size: np.ndarray  # (m,)


class LCHHeight(Evaluator[LCHHeightOptions]):
    """Height and generality of LCH(S_j), S_j the classes of latent j.

    A latent with empty S_j is undefined and left out of means. Read `height` and `generality` with
    `single_class_share`: a latent of one class has height 0, so few specific latents give a low
    mean. The gaps are the differences between random sets of as many of the present classes and the
    latents of several classes; where classes differ in size, of as many of each stratum of like size
    (see `permuted_classes`), without the latents whose classes are all of their strata: no other set is like
    theirs. `lower_share` (own definition) is the share of these `n_latents`
    whose classes meet lower than those of random sets: p of a latent is the share of the random
    sets whose LCH is at most as high as its own (all such pairs of classes for a latent of two; else
    `repeats` draws, the latent's own set counted as one), adjusted over the latents by Benjamini and
    Hochberg to the false discovery rate `level`. The metrics are those of the chosen rule; the
    tables compare all rules.
    """

    name = "lch_height"
    description = "height in the tree of the lowest common hypernym of a latent's classes"
    higher_is_better = {
        "lower_share": True,
        "n_latents": None,
        "height": None,
        "generality": None,
        "defined": None,
        "single_class_share": None,
        "multi_class_height": None,
        "multi_class_generality": None,
        "height_gap": True,
        "generality_gap": True,
    }
    ranges = {
        **dict.fromkeys(("lower_share", "single_class_share"), summary.SHARE),
        **dict.fromkeys(
            ("height", "generality", "multi_class_height", "multi_class_generality"),
            summary.POSITIVE,
        ),
    }
    support = dict.fromkeys(
        ("lower_share", "height_gap", "generality_gap"),
        Support("n_latents", "latents of several classes"),
    )
    invariant = frozenset({"n_latents", "defined", "single_class_share"})
    headlines = (
        Headline(
            "lower_share",
            "lower LCH",
            "share of the latents of several classes whose classes meet lower in the tree than random "
            "sets of as many classes, at a false discovery rate of 5 %",
            priority=30,
        ),
    )
    node_table = NodeTable("latents", f1=None, priority=20)
    Options = LCHHeightOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._top = self.context.share(TopImages, k=self.options.k)
        self._firings = self.context.share(FiringHistogram, survival=(1.0,))

    def assign(
        self,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
        rule: str | None = None,
    ) -> Assignment:
        """The node of each latent under `rule`; None for the chosen rule."""
        self._check_shuffled(shuffled)
        rule = rule or self.options.rule
        if rule == "topk":
            labels = self._top_labels(shuffled)
            if permutation is not None:
                labels = np.where(labels >= 0, permutation[labels], -1)
            return smallest_holding(self.taxonomy, labels, self.options.keep)
        sets = self._class_sets(shuffled, rule)
        return Assignment(self.taxonomy.lch_many(sets, permutation), np.diff(sets.indptr))

    @property
    def _k(self) -> int:
        """Most activating images used, at most half of the smallest class."""
        counts = self._classes.all()
        return min(self.options.k, int(counts[counts > 0].min(initial=2 * self.options.k)) // 2)

    def _top_labels(self, shuffled: bool) -> np.ndarray:
        """(m, k) classes of the most activating images; −1 everywhere where k is below 2."""
        if self._k < 2:
            return np.full((self.context.d_sae, 1), -1)
        return top_labels(self._top, self._k, shuffled)

    @remembered
    def _sets(self, tau: float, shuffled: bool) -> sparse.csr_array:
        """(m, C) the classes of each latent."""
        return frequent_classes(
            self._firings.fired_sparse(shuffled), self._classes.all(shuffled), tau
        )

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        return dict(self._measured(permutation, shuffled))

    @remembered
    def _measured(self, permutation: np.ndarray | None, shuffled: bool) -> dict[str, float]:
        return self._numbers(permutation, shuffled, self.options.rule)

    def _numbers(
        self, permutation: np.ndarray | None, shuffled: bool, rule: str
    ) -> dict[str, float]:
        node, size = self.assign(permutation, shuffled, rule)
        random = self._random(permutation, shuffled, rule)
        node, size = node[node >= 0], size[node >= 0]
        height, generality = self.taxonomy.height[node], self.taxonomy.generality[node]
        several = size > 1
        compared = several & np.isfinite(random.height)
        q = benjamini_hochberg(random.lower[compared])
        return {
            # q can exceed the level by its rounding.
            "lower_share": summary.mean(q <= self.options.level * (1 + 1e-9)),
            "n_latents": float(compared.sum()),
            "height": summary.mean(height),
            "generality": summary.mean(generality),
            "defined": float(len(node)),
            "single_class_share": summary.mean(~several),
            "multi_class_height": summary.mean(height, several),
            "multi_class_generality": summary.mean(generality, several),
            "height_gap": summary.mean(random.height - height, compared),
            "generality_gap": summary.mean(random.generality - generality, compared),
        }

    @remembered
    def _random(self, permutation: np.ndarray | None, shuffled: bool, rule: str) -> Expected:
        """Of the latents with a node under `rule`: random sets like theirs of the present classes, at
        the places of these in the tree."""
        node, size = self.assign(permutation, shuffled, rule)
        size, height = size[node >= 0], self.taxonomy.height[node[node >= 0]]
        groups = strata(self._classes.all())
        places = [np.sort(group if permutation is None else permutation[group]) for group in groups]
        facts = self.taxonomy, self.options.repeats, self.context.seed
        if len(groups) > 1:
            parts = self._parts(permutation, shuffled, rule)[node >= 0]
            sets = stratified_sets(*facts, tuple(tuple(group.tolist()) for group in places))
            return sets.of(parts, height)
        found = random_class_sets(*facts, tuple(places[0].tolist()) if places else ())
        several, lower = size > 1, np.ones(len(size))
        lower[several] = found.p_lower(size[several], height[several])
        return Expected(found.height[size], found.generality[size], lower)

    def _parts(self, permutation: np.ndarray | None, shuffled: bool, rule: str) -> np.ndarray:
        """(m, S) the classes of each latent in each stratum of like size."""
        groups = strata(self._classes.all())
        stratum = np.zeros((len(self.taxonomy.classes), len(groups)), dtype=np.int64)
        for i, group in enumerate(groups):
            stratum[group, i] = 1
        sets = self._class_sets(shuffled, rule)
        if rule == "topk":  # of the classes of the images those below the node
            node = self.assign(permutation, shuffled, rule).node
            latent = np.repeat(np.arange(len(node)), np.diff(sets.indptr))
            place = sets.indices if permutation is None else permutation[sets.indices]
            below = self.taxonomy.membership[place, node[latent]]
            sets = sparse.csr_array((below, sets.indices, sets.indptr), shape=shape(sets))
        return np.asarray(sets.astype(np.int64) @ stratum)

    def _class_sets(self, shuffled: bool, rule: str) -> sparse.csr_array:
        """(m, C) the classes of each latent; under `topk` those of all of its images."""
        if rule in ("topk", "topk_strict"):
            return class_sets(self._top_labels(shuffled), len(self.taxonomy.classes))
        return self._sets(self.options.tau if rule == "frequency" else 0.0, shuffled)

    def notes(self) -> list[str]:
        """Classes with too few images for a rule, and latents that are not compared with random sets."""
        counts, options = self._classes.all(), self.options
        present = np.flatnonzero(counts)
        notes = []
        few = int((counts[present] < FEW_IMAGES).sum())
        if options.rule == "frequency" and few:
            notes.append(
                f"{few} of {len(present)} classes have fewer than {FEW_IMAGES} images: the rule "
                "`frequency` then takes false alarms for classes of a latent, and its node rises to "
                "the root. Evaluate on more images of each class."
            )
        if len(present) and (self._k < 2 or (options.rule != "frequency" and self._k < options.k)):
            smallest = present[counts[present].argmin()]
            name = self.taxonomy.label(int(self.taxonomy.class_nodes[smallest]))
            what = "are undefined" if self._k < 2 else f"use k = {self._k}"
            notes.append(
                f"The rules `topk` and `topk_strict` {what}, since k is at most half of the smallest "
                f"class, and {name!r} has {counts[smallest]} images."
            )
        node, size = self.assign()
        alone = np.isnan(self._random(None, False, options.rule).height) & (size[node >= 0] > 1)
        if alone.any():
            notes.append(
                f"{alone.sum()} of {(size > 1).sum()} latents of several classes are not among the `n_latents`: "
                "their classes are all that have a like number of images (within a factor of "
                f"{SIZE_FACTOR}), so that no random set is like theirs."
            )
        return notes

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: each latent defined under the chosen rule, with its node under the other
        rules; `nodes`: number of latents per node and rule; `rules`: metrics of each rule."""
        assigned = {rule: self.assign(rule=rule) for rule in RULES}
        return {
            "latents": self._latent_table(assigned),
            "nodes": self._node_table(assigned),
            "rules": self._rule_table(assigned),
        }

    def _latent_table(self, assigned: dict[str, Assignment]) -> pd.DataFrame:
        node, size = assigned[self.options.rule]
        latent = np.flatnonzero(node >= 0)
        node, size = node[latent], size[latent]
        taxonomy, random = self.taxonomy, self._random(None, False, self.options.rule)
        table = {
            "latent": latent,
            "node": [taxonomy.nodes[v] for v in node],
            "name": [taxonomy.label(v) for v in node],
            "classes": size,
            "height": taxonomy.height[node],
            "random_height": random.height,
            "generality": taxonomy.generality[node],
            "random_generality": random.generality,
            "depth": taxonomy.depth[node],
        }
        for rule in RULES:
            if rule != self.options.rule:
                others = assigned[rule].node[latent]
                table[f"by_{rule}"] = [taxonomy.label(v) if v >= 0 else None for v in others]
        return pd.DataFrame(table)

    def _node_table(self, assigned: dict[str, Assignment]) -> pd.DataFrame:
        taxonomy = self.taxonomy
        counts = {
            rule: np.bincount(found.node[found.node >= 0], minlength=len(taxonomy.nodes))
            for rule, found in assigned.items()
        }
        node = np.flatnonzero(np.any(list(counts.values()), axis=0))
        node = node[np.argsort(-taxonomy.n_leaves[node], kind="stable")]
        table = {
            "node": [taxonomy.nodes[v] for v in node],
            "name": [taxonomy.label(v) for v in node],
            "classes": taxonomy.n_leaves[node],
            "depth": taxonomy.depth[node],
            "height": taxonomy.height[node],
        }
        return pd.DataFrame(table | {rule: count[node] for rule, count in counts.items()})

    def _rule_table(self, assigned: dict[str, Assignment]) -> pd.DataFrame:
        rows = []
        for rule in assigned:
            permuted = summary.mean(
                [self._permuted_gap(rule, p) for p in self.context.permutations]
            )
            numbers = self._numbers(None, False, rule)
            rows.append({"rule": rule, **numbers, "permuted_generality_gap": permuted})
        return pd.DataFrame(rows)

    def _permuted_gap(self, rule: str, permutation: np.ndarray) -> float:
        if rule == self.options.rule:  # computed for the null
            return self._measured(permutation, False)["generality_gap"]
        return self._numbers(permutation, False, rule)["generality_gap"]

    def figures(self) -> dict[str, Figure]:
        """`generality`: of the latents of several classes, against random class sets."""
        node, size = self.assign()
        random = self._random(None, False, self.options.rule).generality
        several = (size[node >= 0] > 1) & np.isfinite(random)
        return {
            "generality": summary.histograms(
                "Generality of latents of several classes",
                "log₂ classes below the LCH",
                {
                    "latents": self.taxonomy.generality[node[node >= 0][several]],
                    "random sets of the same size": random[several],
                },
            )
        }


def frequent_classes(fired: sparse.csr_array, images: np.ndarray, tau: float) -> sparse.csr_array:
    """(m, C) of bool, the classes on at least `tau` of whose images, and one, a latent fires.

    Args:
        fired: (m, C) images on which the latent fires.
        images: (C,) images of each class.
    """
    # A tolerance for the rounding of bounds like .07 · 100.
    frequent = fired.data >= np.maximum(tau * images[fired.indices] - 1e-9, 1)
    entries = (frequent, fired.indices, fired.indptr)
    sets = sparse.csr_array(entries, shape=shape(fired), copy=True)
    sets.eliminate_zeros()
    return sets


def top_labels(top: TopImages, k: int, shuffled: bool) -> np.ndarray:
    """(m, k) classes of the k most activating images; −1 where the latent fires on fewer."""
    labels = top.labels(shuffled)[:, :k]
    return np.where((labels >= 0).all(1, keepdims=True), labels, -1)


def smallest_holding(taxonomy: Taxonomy, labels: np.ndarray, keep: float) -> Assignment:
    """The smallest node above at least `keep` of the labels of each row (m, k).

    Smallest: fewest classes; ties: the deepest node, then the smallest id. `size` is the number of
    distinct classes of the labels below it.
    """
    m, k = labels.shape
    images = _count_labels(labels, len(taxonomy.classes))
    order = np.lexsort((np.arange(len(taxonomy.nodes)), -taxonomy.depth, taxonomy.n_leaves))
    held = sparse.csr_array(images @ taxonomy.sparse_membership[:, order])
    node = first_columns(held, held.data >= keep * k - 1e-6)
    node = np.where(node >= 0, order[node], -1)
    latent = np.repeat(np.arange(m), np.diff(images.indptr))
    size = np.bincount(latent, taxonomy.membership[images.indices, node[latent]], m)
    return Assignment(node, size.astype(np.int64))


def class_sets(labels: np.ndarray, n_classes: int) -> sparse.csr_array:
    """(m, C) of bool, the distinct labels of each row (m, k); none where they are −1."""
    return sparse.csr_array(_count_labels(labels, n_classes), dtype=bool)


def _count_labels(labels: np.ndarray, n_classes: int) -> sparse.csr_array:
    """(m, C) how often each class is in a row of `labels` (m, k), −1 left out."""
    rows, columns = np.nonzero(labels >= 0)
    entries = (np.ones(len(rows), dtype=np.float32), (rows, labels[rows, columns]))
    counts = sparse.csr_array(entries, shape=(len(labels), n_classes))
    counts.sum_duplicates()
    return counts


@dataclass(frozen=True)
class RandomSets:
    """Random sets of classes of every size s."""

    height: np.ndarray  # (C + 1,) mean height of the LCH of s classes; NaN at s = 0
    generality: np.ndarray  # (C + 1,)
    heights: np.ndarray  # (P, repeats) heights of the drawn sets of s = 1 … P classes, ascending
    pairs: np.ndarray  # (H + 1,) pairs of classes with an LCH of at most this height

    def p_lower(self, size: np.ndarray, height: np.ndarray) -> np.ndarray:
        """(L,) share of the sets of size (L,) ≥ 2 with an LCH of at most this height (L,).

        Of pairs, all; of other sizes the draws, the set itself counted as one.
        """
        p = np.full(len(size), np.nan)
        for s in np.unique(size):
            own = height[size == s]
            if s == 2:
                p[size == s] = self.pairs[own] / self.pairs[-1]
            else:
                heights = self.heights[s - 1]
                reached = np.searchsorted(heights, own, side="right")
                p[size == s] = (1 + reached) / (1 + len(heights))
        return p


@lru_cache(maxsize=8)
def random_class_sets(
    taxonomy: Taxonomy, repeats: int, seed: int, places: tuple[int, ...]
) -> RandomSets:
    """Random sets of the P classes at `places`: the prefixes of each of `repeats` random orders, and
    all pairs for s = 2."""
    generator = np.random.default_rng(seed)
    preference = np.argsort(taxonomy.by_preference)  # rank of each node as LCH
    nodes = np.full((repeats, len(places)), taxonomy.root, dtype=np.int32)
    for row in nodes if places else ():
        order = generator.permutation(places)
        common = np.flatnonzero(taxonomy.membership[order[0]])  # only these can contain a prefix
        common = common[np.argsort(-preference[common])]
        for start in range(0, len(order), PREFIX):
            if len(common) == 1:  # the root
                break
            some = order[start : start + PREFIX]
            holds = np.logical_and.accumulate(taxonomy.membership[np.ix_(some, common)])
            row[start : start + PREFIX] = common[holds.argmax(1)]
            common = common[holds[-1]]
    pairs = np.zeros(len(taxonomy.nodes))  # with this LCH
    at = np.array(places, dtype=np.int64)
    for i, place in enumerate(places):
        lch = taxonomy.leaf_lch[place][at[i + 1 :]]
        pairs += np.bincount(lch, minlength=len(pairs))
    means = np.full((2, len(taxonomy.classes) + 1), np.nan)
    for mean, of_node in zip(means, (taxonomy.height, taxonomy.generality)):
        mean[1 : len(places) + 1] = of_node[nodes].mean(0)
        if pairs.any():
            mean[2] = pairs @ of_node / pairs.sum()
    heights = taxonomy.height.astype(np.int16)
    ordered = np.sort(heights[nodes].T, axis=1)
    return RandomSets(means[0], means[1], ordered, np.cumsum(np.bincount(heights, pairs)))


def random_sets(taxonomy: Taxonomy, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean height and generality of the LCH of s random classes, each (C + 1,); NaN at s = 0."""
    found = random_class_sets(taxonomy, repeats, seed, tuple(range(len(taxonomy.classes))))
    return found.height, found.generality
