"""`ontological_coverage`: how much of the tree has a detector among the latents.

The idea is that of Olson et al. 2025 (arXiv 2505.15970); the form is our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from scipy import sparse

from ..errors import ConfigError
from ..presentation import Headline, NodeTable
from .base import EvaluationBatch, EvaluationContext, Evaluator
from .parts import summary
from .parts.accumulators import SURVIVAL, ClassCounts, FiringHistogram, check_survival

BLOCK = 2**22
"""About how many nonzeros of (latents × thresholds × nodes) are held at a time."""


@dataclass(frozen=True)
class CoverageOptions:
    """covered: a node counts as covered from this F1. Nodes where saying yes to every image reaches
        it are left out.
    survival: the grid of thresholds, see `accumulators.SURVIVAL`.
    """

    covered: float = 0.5
    survival: tuple[float, ...] = SURVIVAL

    def __post_init__(self) -> None:
        if not 0 < self.covered <= 1:
            raise ConfigError(f"covered: must lie in (0, 1], got {self.covered}")
        check_survival(self.survival)


class Detectors(NamedTuple):
    """The latent and threshold chosen for each node, and their score; each (N,)."""

    latent: np.ndarray  # −1 where no latent fires on the fit half
    bin: np.ndarray  # which threshold of the grid
    fit_f1: np.ndarray  # on the images of the choice
    precision: np.ndarray  # on the other images; NaN where the node is left out
    recall: np.ndarray
    f1: np.ndarray


class OntologicalCoverage(Evaluator[CoverageOptions]):
    """The best latent's F1 for "the image shows a class below v", over the nodes v.

    Latent and threshold are chosen on the fit half and scored on the other. Nodes with the same
    classes count once. Internal nodes (several classes) and leaves (one) are told apart: leaves
    alone would make a flat classifier look hierarchical. Left out: nodes without images in either
    half, and nodes so common that always saying yes would cover them. A node for which nothing
    fires scores 0.

    Permuting the classes moves leaves but leaves each one's detector as good as it was: the leaf
    scores have no permuted-classes null of their own, theirs equals the value.
    """

    name = "ontological_coverage"
    description = "how much of the tree has a detector among the latents"
    higher_is_better = {
        "internal_f1": True,
        "internal_covered_share": True,
        "internal_nodes": None,
        "leaf_f1": True,
        "leaf_covered_share": True,
        "leaf_nodes": None,
    }
    invariant = frozenset({"leaf_f1", "leaf_covered_share", "leaf_nodes"})
    headlines = (
        Headline(
            "internal_f1",
            "node coverage",
            "mean F1 of the best latent for each internal node of the tree",
            priority=10,
        ),
    )
    node_table = NodeTable(
        "nodes",
        meaning="the F1 of the best latent for it: latent and threshold chosen on one half of the "
        "images, scored on the other",
        priority=10,
    )
    Options = CoverageOptions

    def __init__(
        self,
        context: EvaluationContext,
        options: CoverageOptions | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context, options)
        self._classes = context.share(ClassCounts)
        self._histogram = context.share(FiringHistogram, survival=tuple(self.options.survival))
        distinct = self.taxonomy.distinct_nodes
        several = self.taxonomy.n_leaves[distinct] > 1
        self.internal, self.leaves = distinct[several], distinct[~several]
        self._memo: dict[Any, Detectors] = {}

    def update(self, batch: EvaluationBatch) -> None:
        self._memo.clear()

    def detectors(
        self,
        nodes: np.ndarray,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
    ) -> Detectors:
        """The detector of each of `nodes` (N,)."""
        self._check_shuffled(shuffled)
        key = (nodes.tobytes(), None if permutation is None else permutation.tobytes(), shuffled)
        if key not in self._memo:
            members = self.taxonomy.membership[:, nodes]
            if permutation is not None:
                members = members[permutation]
            self._memo[key] = find_detectors(
                self._histogram.fit(shuffled),
                self._histogram.score(shuffled),
                members,
                self._classes.fit(shuffled),
                self._classes.score(shuffled),
                self.options.covered,
            )
        return self._memo[key]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        internal = self.detectors(self.internal, permutation, shuffled).f1
        leaf = self.detectors(self.leaves, None, shuffled).f1  # a permutation changes none
        numbers: dict[str, float] = {}
        for kind, f1 in (("internal", internal), ("leaf", leaf)):
            f1 = f1[np.isfinite(f1)]
            numbers[f"{kind}_f1"] = summary.mean(f1)
            numbers[f"{kind}_covered_share"] = summary.mean(f1 >= self.options.covered)
            numbers[f"{kind}_nodes"] = float(len(f1))
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`nodes`: the best latent of every node that is scored, and its permuted-classes null."""
        parts = [self._table(self.internal, "internal"), self._table(self.leaves, "leaf")]
        return {
            "nodes": pd.concat(parts, ignore_index=True).dropna(subset=["f1"], ignore_index=True)
        }

    def _table(self, nodes: np.ndarray, kind: str) -> pd.DataFrame:
        found = self.detectors(nodes)
        null = np.full(len(nodes), np.nan)
        if kind == "internal" and self.context.permutations:
            nulls = [self.detectors(nodes, p).f1 for p in self.context.permutations]
            null = np.mean(nulls, axis=0)
        thresholds = self._histogram.thresholds.values
        fires = found.latent >= 0
        threshold = np.full(len(nodes), np.nan)
        if thresholds is not None:
            threshold[fires] = thresholds[found.latent[fires], found.bin[fires]]
        taxonomy = self.taxonomy
        return pd.DataFrame(
            {
                "node": [taxonomy.nodes[v] for v in nodes],
                "name": [taxonomy.label(v) for v in nodes],
                "kind": kind,
                "classes": taxonomy.n_leaves[nodes],
                "depth": taxonomy.depth[nodes],
                "height": taxonomy.height[nodes],
                "latent": found.latent,
                "threshold": threshold,
                "precision": found.precision,
                "recall": found.recall,
                "f1": found.f1,
                "fit_f1": found.fit_f1,
                "permuted_f1": null,
                "excess": found.f1 - null,
            }
        )

    def figures(self) -> dict[str, Figure]:
        """`tree`: the nodes coloured by F1; `by_size`: F1 against the number of classes."""
        table = self.tables()["nodes"]
        return {"tree": self._draw_tree(table), "by_size": _draw_by_size(table)}

    def _draw_tree(self, table: pd.DataFrame) -> Figure:
        tree = self.taxonomy.collapsed()
        f1 = dict(zip(table["node"], table["f1"]))
        drawing = summary.figure("Coverage of the tree", "", "")
        drawing.add_trace(
            go.Icicle(
                ids=list(tree.nodes),
                labels=[tree.label(v) for v in range(len(tree.nodes))],
                parents=["" if p < 0 else tree.nodes[p] for p in tree.primary_parent],
                marker={
                    "colors": [f1.get(node) for node in tree.nodes],
                    "colorscale": "Blues",
                    "cmin": 0,
                    "cmax": 1,
                    "colorbar": {"title": "F1"},
                },
                hovertemplate="%{label}<br>F1 %{color:.2f}<extra></extra>",
                maxdepth=6,
            )
        )
        return drawing


def _draw_by_size(table: pd.DataFrame) -> Figure:
    internal = table[table["kind"] == "internal"]
    drawing = summary.figure(
        "F1 of each internal node's best latent", "classes below the node", "F1"
    )
    drawing.update_xaxes(type="log")
    drawing.update_yaxes(range=[0, 1])
    for column, name, colour in (
        ("permuted_f1", "permuted classes", summary.NULL),
        ("f1", "latents", summary.VALUE),
    ):
        drawing.add_scatter(
            x=internal["classes"],
            y=internal[column],
            text=internal["name"],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.7},
        )
    return drawing


def find_detectors(
    fit: sparse.csr_array,
    score: torch.Tensor,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
    covered: float = 0.5,
) -> Detectors:
    """Choose a latent and a threshold for each node on the fit half; score them on the other.

    Args:
        fit: (m·T, C) and
        score: (m, T, C) counts of the halves, as `FiringHistogram` gives them.
        members: (C, N) whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
        covered: nodes where "always yes" reaches this F1 are left out.
    """
    belongs = sparse.csr_array(members.astype(np.float32))
    fit_positives, positives = fit_images @ belongs, score_images @ belongs
    latent, bin_, fit_f1 = _choose(fit, score.shape[1], belongs, fit_positives)

    fired = _fired_from(score, latent, bin_)
    hits = (fired * members.T).sum(1, dtype=np.float64)
    always_yes = summary.ratio(2 * positives, positives + score_images.sum())
    scored = (fit_positives > 0) & (positives > 0) & (always_yes < covered)
    return Detectors(
        latent=latent,
        bin=bin_,
        fit_f1=fit_f1,
        precision=np.where(scored, summary.ratio(hits, fired.sum(1)), np.nan),
        recall=np.where(scored, summary.ratio(hits, positives), np.nan),
        f1=np.where(scored, summary.ratio(2 * hits, fired.sum(1) + positives), np.nan),
    )


def _choose(
    counts: sparse.csr_array, n_bins: int, belongs: sparse.csr_array, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The latent, threshold and F1 that are best for each node, each (N,).

    F1 = 2·hits / (fired + positives) for all at once: hits = counts @ belongs, summed from the
    highest bin down. Only nonzeros are looked at: where a bin adds no hit, the threshold above it
    has the same hits and fewer firings.
    """
    best = np.zeros(len(positives))
    row = np.full(len(positives), -1, dtype=np.int64)
    for start, stop in _blocks(counts, n_bins, belongs):
        block = counts[start:stop]
        fired = block.sum(1).reshape(-1, n_bins).cumsum(1).ravel()
        hits = sparse.csc_array(block @ belongs)  # the conversion sorts rows in linear time
        filled = np.flatnonzero(np.diff(hits.indptr))
        if not len(filled):
            continue
        node = np.repeat(np.arange(len(positives)), np.diff(hits.indptr))
        reached = _running_sum(hits.data, node * (stop - start) + hits.indices // n_bins)
        f1 = 2 * reached / (fired[hits.indices] + positives[node])
        most = np.zeros(len(positives))
        most[filled] = np.maximum.reduceat(f1, hits.indptr[filled])
        at = np.flatnonzero((f1 == most[node]) & (most > best)[node])[::-1]
        row[node[at]] = start + hits.indices[at]  # of several, the first is written last
        best = np.maximum(best, most)
    chosen = row >= 0
    bins = np.where(chosen, n_bins - 1 - row % n_bins, 0)
    return np.where(chosen, row // n_bins, -1), bins, best


def _blocks(
    counts: sparse.csr_array, n_bins: int, belongs: sparse.csr_array
) -> list[tuple[int, int]]:
    """Ranges of rows, whole latents each, whose product with `belongs` has about BLOCK nonzeros."""
    ends = counts.indptr[::n_bins]
    ancestors = max(1.0, float(np.diff(belongs.indptr).mean()))
    marks = np.arange(0, ends[-1] + 1, max(1, int(BLOCK / ancestors)))
    cuts = np.unique(np.append(np.searchsorted(ends, marks), len(ends) - 1)) * n_bins
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist()))


def _running_sum(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The running sum of `values` inside each run of equal `group`."""
    total = np.cumsum(values, dtype=np.float64)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(np.append(starts, len(group)))
    return total - np.repeat(total[starts] - values[starts], lengths)


def _fired_from(counts: torch.Tensor, latent: np.ndarray, bin_: np.ndarray) -> np.ndarray:
    """(N, C) images on which each chosen latent reaches its threshold; counts (m, T, C)."""
    fired = np.zeros((len(latent), counts.shape[2]), dtype=np.float32)
    chosen = np.flatnonzero(latent >= 0)
    rows = counts[torch.from_numpy(latent[chosen])]
    reaches = torch.arange(counts.shape[1]) >= torch.from_numpy(bin_[chosen])[:, None]
    fired[chosen] = (rows * reaches[:, :, None]).sum(1, dtype=torch.int32).numpy()
    return fired
