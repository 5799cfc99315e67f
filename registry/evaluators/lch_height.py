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
from ..presentation import Headline, NodeTable
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram, TopImages

RULES = ("frequency", "topk", "topk_strict", "any")


@dataclass(frozen=True)
class LCHHeightOptions:
    """Assignment of classes to a latent.

    rule: `frequency`: the classes on at least `tau` of whose images it fires. `topk`: the smallest
        node with at least `keep` of its `k` most activating images. `topk_strict`: the LCH of all
        classes among these images; one outlier image can make it the root, and its trend over depth
        can have the wrong sign: for comparison with the paper only. `any`: every class it fires on.
    tau: least share of a class's images, above 0.
    k: number of most activating images, bounded by half of the smallest class.
    keep: least share of the k images.
    repeats: random class sets of each size for the gaps.
    """

    rule: str = "frequency"
    tau: float = 0.5
    k: int = 16
    keep: float = 0.9
    repeats: int = 64

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
        require_at_least(1, self, "k", "repeats")


class Assignment(NamedTuple):
    """The node of each latent (−1 where undefined) and the number of its classes."""

    node: np.ndarray  # (m,)
    size: np.ndarray  # (m,)


class LCHHeight(Evaluator[LCHHeightOptions]):
    """Height and generality of LCH(S_j), S_j the classes of latent j.

    A latent with empty S_j is undefined and left out of means. Read `height` and `generality` with
    `single_class_share`: a latent of one class has height 0, so few specific latents give a low
    mean. The gaps are the differences between random sets of as many classes and the latents of
    several classes. The metrics are those of the chosen rule; the tables compare all rules.
    """

    name = "lch_height"
    description = "height in the tree of the lowest common hypernym of a latent's classes"
    higher_is_better = {
        "height": None,
        "generality": None,
        "defined": None,
        "single_class_share": None,
        "multi_class_height": None,
        "multi_class_generality": None,
        "height_gap": True,
        "generality_gap": True,
    }
    invariant = frozenset({"defined", "single_class_share"})
    headlines = (
        Headline(
            "height_gap",
            "LCH height",
            "LCH height of random class sets of equal size minus that of a latent's classes",
            priority=30,
        ),
        Headline(
            "generality_gap",
            "LCH generality",
            "the same difference in log₂ of the number of classes below the node",
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
        options, rule = self.options, rule or self.options.rule
        if rule.startswith("topk"):
            counts = self._classes.all(shuffled)
            smallest = counts[counts > 0].min(initial=2 * options.k)
            labels = top_labels(self._top, max(1, min(options.k, int(smallest) // 2)), shuffled)
            if permutation is not None:
                labels = np.where(labels >= 0, permutation[labels], -1)
            return smallest_holding(self.taxonomy, labels, options.keep if rule == "topk" else 1.0)
        sets = self._sets(options.tau if rule == "frequency" else 0.0, shuffled)
        return Assignment(self.taxonomy.lch_many(sets, permutation), np.diff(sets.indptr))

    @remembered
    def _sets(self, tau: float, shuffled: bool) -> sparse.csr_array:
        """(m, C) the classes of each latent."""
        fired, images = self._firings.fired(shuffled), self._classes.all(shuffled)
        return sparse.csr_array(frequent_classes(fired, images, tau))

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        return self._numbers(self.assign(permutation, shuffled))

    def _numbers(self, assignment: Assignment) -> dict[str, float]:
        node, size = assignment
        node, size = node[node >= 0], size[node >= 0]
        height, generality = self.taxonomy.height[node], self.taxonomy.generality[node]
        random_height, random_generality = self._random()
        several = size > 1
        return {
            "height": summary.mean(height),
            "generality": summary.mean(generality),
            "defined": float(len(node)),
            "single_class_share": summary.mean(~several),
            "multi_class_height": summary.mean(height, several),
            "multi_class_generality": summary.mean(generality, several),
            "height_gap": summary.mean(random_height[size] - height, several),
            "generality_gap": summary.mean(random_generality[size] - generality, several),
        }

    def _random(self) -> tuple[np.ndarray, np.ndarray]:
        return random_sets(self.taxonomy, self.options.repeats, self.context.seed)

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
        taxonomy = self.taxonomy
        table = {
            "latent": latent,
            "node": [taxonomy.nodes[v] for v in node],
            "name": [taxonomy.label(v) for v in node],
            "classes": size,
            "height": taxonomy.height[node],
            "random_height": self._random()[0][size],
            "generality": taxonomy.generality[node],
            "random_generality": self._random()[1][size],
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
        for rule, found in assigned.items():
            nulls = [self._numbers(self.assign(p, rule=rule)) for p in self.context.permutations]
            permuted = summary.mean([n["generality_gap"] for n in nulls])
            row = {"rule": rule, **self._numbers(found), "permuted_generality_gap": permuted}
            rows.append(row)
        return pd.DataFrame(rows)

    def figures(self) -> dict[str, Figure]:
        """`generality`: of the latents of several classes, against random class sets."""
        node, size = self.assign()
        node, size = node[size > 1], size[size > 1]
        return {
            "generality": summary.histograms(
                "Generality of latents of several classes",
                "log₂ classes below the LCH",
                {
                    "latents": self.taxonomy.generality[node],
                    "random sets of the same size": self._random()[1][size],
                },
            )
        }


def frequent_classes(fired: np.ndarray, images: np.ndarray, tau: float) -> np.ndarray:
    """(m, C) the classes on at least `tau` of whose images, and at least one, a latent fires.

    Args:
        fired: (m, C) images on which the latent fires.
        images: (C,) images of each class.
    """
    return (fired > 0) & (fired >= tau * images)


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
    images = np.zeros((m, len(taxonomy.classes)), dtype=np.float32)
    rows, columns = np.nonzero(labels >= 0)
    np.add.at(images, (rows, labels[rows, columns]), 1)
    order = np.lexsort((np.arange(len(taxonomy.nodes)), -taxonomy.depth, taxonomy.n_leaves))
    held = images @ taxonomy.sparse_membership[:, order]
    node = order[(held >= keep * k - 1e-6).argmax(1)]
    size = ((images > 0) & taxonomy.membership[:, node].T).sum(1)
    return Assignment(np.where(labels[:, 0] >= 0, node, -1), size)


@lru_cache(maxsize=8)
def random_sets(taxonomy: Taxonomy, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean height and generality of the LCH of s random classes, each (C + 1,); NaN at s = 0.

    The prefixes of each of `repeats` random orders of the classes are the sets.
    """
    generator = np.random.default_rng(seed)
    best_first = taxonomy.by_preference[::-1]
    membership = taxonomy.membership[:, best_first]
    height = np.zeros(len(taxonomy.classes))
    generality = np.zeros(len(taxonomy.classes))
    for _ in range(repeats):
        order = generator.permutation(len(height))
        above_first = np.flatnonzero(membership[order[0]])  # only these can contain a prefix
        common = np.logical_and.accumulate(membership[order][:, above_first])
        lch = best_first[above_first[common.argmax(1)]]
        height += taxonomy.height[lch] / repeats
        generality += taxonomy.generality[lch] / repeats
    return np.append(np.nan, height), np.append(np.nan, generality)
