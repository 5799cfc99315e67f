"""`ontological_coverage`: how well the nodes of the tree are detected by latents.

The idea is that of Olson et al. 2025 (arXiv 2505.15970); the form is our own definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.graph_objects import Figure

from ..errors import ConfigError
from ..presentation import Headline, NodeTable, Support
from .base import Evaluator, remembered
from .parts import summary
from .parts.accumulators import SURVIVAL, ClassCounts, FiringHistogram, check_survival
from .parts.node_f1 import Detectors, find_detectors


@dataclass(frozen=True)
class CoverageOptions:
    """covered: least F1 of a covered node. Nodes where always predicting "yes" reaches it are left
        out.
    survival: the grid of thresholds, see `accumulators.SURVIVAL`.
    """

    covered: float = 0.5
    survival: tuple[float, ...] = SURVIVAL

    def __post_init__(self) -> None:
        if not 0 < self.covered <= 1:
            raise ConfigError(
                "covered", "out of range", given=self.covered, allowed="a number in (0, 1]"
            )
        check_survival(self.survival)


class OntologicalCoverage(Evaluator[CoverageOptions]):
    """The best latent's F1 for "the image shows a class below v", over the nodes v.

    Latent and threshold are chosen on the fit half and scored on the other. Only classes with images
    count: nodes with the same ones count once, and a node of one is a leaf. Internal nodes (several classes) and leaves (one) are scored separately,
    since a flat classifier detects all leaves. Left out: nodes without images in either half, and
    nodes so common that always predicting "yes" covers them. Without a firing latent: 0.

    Permuting the classes does not change the detectors of leaves: for leaf scores, the
    permuted-classes null equals the value.
    """

    name = "ontological_coverage"
    description = "how well the nodes of the tree are detected by latents"
    higher_is_better = {
        "internal_f1": True,
        "internal_covered_share": True,
        "internal_nodes": None,
        "leaf_f1": True,
        "leaf_covered_share": True,
        "leaf_nodes": None,
    }
    ranges = {
        **dict.fromkeys(
            ("internal_f1", "internal_covered_share", "leaf_f1", "leaf_covered_share"),
            summary.SHARE,
        ),
    }
    support = {
        **dict.fromkeys(
            ("internal_f1", "internal_covered_share"),
            Support("internal_nodes", "internal nodes", least=5),
        ),
        **dict.fromkeys(("leaf_f1", "leaf_covered_share"), Support("leaf_nodes", "leaves")),
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
        meaning="the F1 of its best latent: latent and threshold chosen on one half of the "
        "images, scored on the other",
        fires_on="fires_on",
        priority=10,
    )
    Options = CoverageOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._histogram = self.context.share(FiringHistogram, survival=tuple(self.options.survival))
        # A node of one class with images is a leaf: a flat classifier detects it.
        distinct, size = self.context.distinct_nodes()
        self.internal, self.leaves = distinct[size > 1], distinct[size == 1]

    @remembered
    def detectors(
        self,
        nodes: np.ndarray,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
    ) -> Detectors:
        """The detector of each of `nodes` (N,)."""
        return find_detectors(
            self._histogram.halves(shuffled),
            self.sparse_members(nodes, permutation),
            self._classes.fit(shuffled),
            self._classes.score(shuffled),
            self.options.covered,
        )

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        internal = self.detectors(self.internal, permutation, shuffled).f1
        leaf = self.detectors(self.leaves, None, shuffled).f1  # permutation invariant
        numbers: dict[str, float] = {}
        for kind, f1 in (("internal", internal), ("leaf", leaf)):
            f1 = f1[np.isfinite(f1)]
            numbers[f"{kind}_f1"] = summary.mean(f1)
            numbers[f"{kind}_covered_share"] = summary.mean(f1 >= self.options.covered)
            numbers[f"{kind}_nodes"] = float(len(f1))
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`nodes`: the best latent of every scored node, with the permuted-classes null."""
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
                "fires_on": found.fires_on,
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
    drawing.update_xaxes(type="log", dtick=math.log10(2))
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
