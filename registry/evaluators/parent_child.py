"""`parent_child`: latents that fire only where another fires, compared with the tree.

Implication and the test against the decoder are those of Tree SAE (arXiv 2605.07922), the Hamming
distance that of HSAE (arXiv 2602.11881); forest, agreement and rewiring are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from scipy import sparse

from ..errors import ConfigError
from ..presentation import Support
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.implication import (
    Edges,
    Pairs,
    depths,
    hamming,
    implied_pairs,
    measure_edges,
    near_probe,
    nearest_parents,
    recall_of,
    recorded_parents,
    rewire,
)
from .parts.logistic import LogisticProber
from .parts.node_f1 import best_nodes
from .parts.samples import FiringSample, ImageSample, fires, shape

DRAWN = 300
"""Maximum number of latents in the figure."""
REWIRINGS = 5
"""Random draws for each `rewired_` number."""


@dataclass(frozen=True)
class ParentChildOptions:
    """Conditions for a latent p to be a parent of a latent c, on the fit half of a sample of images.

    implication: least P(p fires | c fires).
    ratio: least quotient of the firing rates of p and c.
    lift: least P(p | c) / P(p); excludes latents that fire nearly everywhere as parents of all.
    min_fired: least number of images on which c fires.
    max_images: size of the sample for co-firing.
    probed: edges tested against the decoder, chosen at random; 0 for none.
    probe_images: size of the sample of x for their probes.
    nearest: an edge passes if both decoder rows are among this many nearest to the probe.
    """

    implication: float = 0.9
    ratio: float = 2.0
    lift: float = 1.5
    min_fired: int = 10
    max_images: int = 16384
    probed: int = 100
    probe_images: int = 4096
    nearest: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.implication <= 1:
            raise ConfigError(
                "implication", "out of range", given=self.implication, allowed="a number in (0, 1]"
            )
        if not self.ratio > 1:
            raise ConfigError(
                "ratio", "out of range", given=self.ratio, allowed="above 1, or pairs form circles"
            )
        if not self.lift >= 0:
            raise ConfigError("lift", "out of range", given=self.lift, allowed="0 or more")
        require_at_least(1, self, "min_fired", "max_images", "probe_images", "nearest")


class ParentChild(Evaluator[ParentChildOptions]):
    """Compares the forest of latents by implication, and the SAE's own, with the taxonomy.

    A pair (p, c) meets the conditions of the options. Of several parents the *forest* keeps the one
    that fires least. Pairs are chosen on the fit half and measured on the score half.

    - `n_measured_edges`: edges whose child fires on the score half; `n_parents`: parents that fire there or
      have such a child; `n_probed_edges`: edges that are tested; `n_tree_edges`: edges of the
      tree below its root. The means of the same names rest on them; `n_recorded_*` likewise.
    - `pairs`, `edges`, `child_share`: pairs; children with a parent; these per latent that fires
      `min_fired` times. `implication`, `holds_share`: mean P(p|c) on the score half, and the share
      of edges that still reach the bound there.
    - `hamming`: share of images on which a parent and the OR of its children differ, mean over the
      parents; `hamming_relative`: of the images where either fires.
    - `reconstruction_share`: of at most `probed` edges those that pass Tree SAE's condition: with a
      logistic probe of the child's firing on x, the decoder rows of parent and child both are among
      the `nearest` to it by cosine. NaN without a decoder.
    - `edge_precision`: each latent represents the node of best F1 with its firing on the score half,
      so that nodes are not chosen on the images that the edge was; share of the edges whose parent's
      classes are a strict superset of the child's and whose parent is not the root, over the
      `n_edges` whose latents both fire there. `edge_recall`: share of the (parent, child) edges of
      the collapsed tree below its root that some forest edge represents. Only classes with images
      count: nodes with the same ones are one node.

    An SAE's own forest (`parents` in its config, as `tree` and `hsae` write it) is measured too,
    over the edges whose child fires `min_fired` times on the fit half; NaN for all other SAEs.

    - `recorded_edges`: these edges; `recorded_found`: the share of them that are edges of the
      forest by implication too. The other `recorded_` numbers are those above, over these edges;
      `n_recorded_edges` are those whose latents both fire on the score half.
    - `rewired_implication`, `rewired_reconstruction_share`, `rewired_edge_precision`: the same
      after parents are permuted among children of equal depth, mean over draws: the value by chance
      for a forest of this shape over these latents.

    Memory O(max_images·L0 + probe_images·d + m·L0).
    """

    name = "parent_child"
    description = "latents that fire only where another fires, compared with the tree"
    higher_is_better = {
        "edge_precision": True,
        "edge_recall": True,
        "n_edges": None,
        "n_measured_edges": None,
        "n_parents": None,
        "n_probed_edges": None,
        "n_tree_edges": None,
        "pairs": None,
        "edges": None,
        "child_share": None,
        "implication": True,
        "holds_share": True,
        "lift": None,
        "hamming": False,
        "hamming_relative": False,
        "reconstruction_share": True,
        "recorded_edges": None,
        "recorded_found": None,
        "recorded_implication": True,
        "recorded_hamming_relative": False,
        "recorded_reconstruction_share": True,
        "recorded_edge_precision": True,
        "recorded_edge_recall": True,
        "n_recorded_edges": None,
        "n_recorded_measured_edges": None,
        "n_recorded_parents": None,
        "n_recorded_probed_edges": None,
        "rewired_implication": None,
        "rewired_reconstruction_share": None,
        "rewired_edge_precision": None,
    }
    ranges = {
        **dict.fromkeys(
            (
                "edge_precision",
                "edge_recall",
                "child_share",
                "implication",
                "holds_share",
                "hamming",
                "hamming_relative",
                "reconstruction_share",
                "recorded_found",
                "recorded_implication",
                "recorded_hamming_relative",
                "recorded_reconstruction_share",
                "recorded_edge_precision",
                "recorded_edge_recall",
                "rewired_implication",
                "rewired_reconstruction_share",
                "rewired_edge_precision",
            ),
            summary.SHARE,
        ),
        "lift": summary.POSITIVE,
    }
    support = {
        "edge_precision": Support("n_edges", "edges"),
        **dict.fromkeys(("implication", "holds_share"), Support("n_measured_edges", "edges")),
        **dict.fromkeys(("hamming", "hamming_relative"), Support("n_parents", "parents")),
        "reconstruction_share": Support("n_probed_edges", "probed edges"),
        **dict.fromkeys(
            ("edge_recall", "recorded_edge_recall"), Support("n_tree_edges", "edges of the tree")
        ),
        "recorded_edge_precision": Support("n_recorded_edges", "recorded edges"),
        "recorded_implication": Support("n_recorded_measured_edges", "recorded edges"),
        "recorded_hamming_relative": Support("n_recorded_parents", "recorded parents"),
        "recorded_reconstruction_share": Support(
            "n_recorded_probed_edges", "probed recorded edges"
        ),
    }
    label_free = frozenset(n for n in higher_is_better if "edge_" not in n)
    invariant = label_free
    Options = ParentChildOptions

    def prepare(self) -> None:
        context, options = self.context, self.options
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self._sample = context.share(FiringSample, max_images=options.max_images)
        self._probing = options.probed > 0 and context.W_dec is not None
        if self._probing:
            self._images = context.share(ImageSample, max_images=options.probe_images)
        nodes, size = context.distinct_nodes()
        order = np.argsort(-size, kind="stable")  # the root first
        self._nodes, self._size = nodes[order], size[order]

    @property
    @remembered
    def pairs(self) -> Pairs:
        """Every (parent, child) pair on the fit half."""
        sample, options = self._sample, self.options
        return implied_pairs(
            fires(sample.z[sample.is_fit]),
            implication=options.implication,
            ratio=options.ratio,
            lift=options.lift,
            min_fired=options.min_fired,
        )

    @property
    @remembered
    def forest(self) -> Pairs:
        """One parent for each child."""
        return nearest_parents(self.pairs, self._fired)

    @property
    @remembered
    def recorded(self) -> Pairs:
        """The edges of the SAE's own forest whose child fires `min_fired` times."""
        parents = self._parents
        child = np.flatnonzero((parents >= 0) & (self._fired >= self.options.min_fired))
        return Pairs(parents[child], child)

    @property
    @remembered
    def rewired(self) -> list[Pairs]:
        """`recorded` with parents permuted among children of equal depth, once per draw."""
        generator = np.random.default_rng(self.context.seed)
        depth = depths(self._parents)[self.recorded.child]
        return [rewire(self.recorded, depth, generator) for _ in range(REWIRINGS)]

    @property
    @remembered
    def edges(self) -> Edges:
        """The forest on the score half."""
        return measure_edges(self._scored, self.forest)

    @property
    @remembered
    def recorded_edges(self) -> Edges:
        """The SAE's own forest on the score half."""
        return measure_edges(self._scored, self.recorded)

    @property
    def _scored(self) -> sparse.csr_array:
        sample = self._sample
        return fires(sample.z[~sample.is_fit])

    @cached_property
    def _parents(self) -> np.ndarray:
        return recorded_parents(self.context.sae, self.context.d_sae)

    @property
    @remembered
    def _fired(self) -> np.ndarray:
        """(m,) images of the fit half on which each latent fires."""
        sample = self._sample
        fit = fires(sample.z[sample.is_fit])
        return np.bincount(fit.indices, minlength=shape(fit)[1])

    @property
    @remembered
    def _hamming(self) -> pd.DataFrame:
        return hamming(self._scored, self.forest)

    @property
    @remembered
    def reconstructs(self) -> np.ndarray:
        """(E,) whether an edge passes Tree SAE's condition: 1, 0, or NaN where not tested."""
        return self._condition([self.forest])[0]

    @property
    @remembered
    def recorded_reconstructs(self) -> list[np.ndarray]:
        """`reconstructs`, (E,) each, of `recorded` and then of each of `rewired`."""
        return self._condition([self.recorded, *self.rewired])

    def _condition(self, forests: list[Pairs]) -> list[np.ndarray]:
        """Tree SAE's condition, (E,) each, of forests over the same children; one probe per child."""
        child = forests[0].child
        passes = [np.full(len(child), np.nan) for _ in forests]
        decoder = self.context.W_dec
        if not self._probing or decoder is None:
            return passes
        images = self._images.drawn()
        z = fires(images.z)
        n, m = shape(z)
        fired = np.bincount(z.indices, minlength=m)[child]
        able = np.flatnonzero((fired >= 5) & (fired < n))
        generator = np.random.default_rng(self.context.seed)
        tested = np.sort(generator.permutation(able)[: self.options.probed])
        if len(tested):
            targets = torch.from_numpy(z[:, child[tested]].toarray() > 0)
            direction = LogisticProber(images.x).fit(targets).weight
            rows = decoder.detach().float().cpu()
            for forest, passed in zip(forests, passes):
                pairs = np.stack([forest.parent[tested], child[tested]])
                passed[tested] = near_probe(rows, direction, pairs, self.options.nearest)
        return passes

    def best_nodes(
        self,
        latents: np.ndarray,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
    ) -> np.ndarray:
        """(l,) position in `_nodes` of the node of best F1 with each of `latents` (l,), on the score
        half; −1 where a latent does not fire there."""
        members = self.sparse_members(self._nodes, permutation)
        distinct, place = np.unique(latents, return_inverse=True)
        fired = self._firings.halves(shuffled).score[distinct]
        node, f1 = best_nodes(fired, self._classes.score(shuffled), members)
        return np.where(f1 > 0, node, -1)[place]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        self._check_shuffled(shuffled)
        forest, edges, distances = self.forest, self.edges, self._hamming
        living = int((self._fired >= self.options.min_fired).sum())
        precision, recall, n_edges = self._agreement(forest, permutation, shuffled)
        return {
            "edge_precision": precision,
            "edge_recall": recall,
            "n_edges": float(n_edges),
            "n_measured_edges": summary.count(edges.implication),
            "n_parents": summary.count(distances["hamming_relative"]),
            "n_probed_edges": summary.count(self.reconstructs),
            "n_tree_edges": float(len(self._tree_edges)),
            "pairs": float(len(self.pairs.child)),
            "edges": float(len(forest.child)),
            "child_share": len(forest.child) / living if living else float("nan"),
            "implication": summary.mean(edges.implication),
            "holds_share": summary.mean(
                edges.implication >= self.options.implication, np.isfinite(edges.implication)
            ),
            "lift": summary.mean(edges.lift),
            "hamming": summary.mean(distances["hamming"]),
            "hamming_relative": summary.mean(distances["hamming_relative"]),
            "reconstruction_share": summary.mean(self.reconstructs),
            **self._compute_recorded(permutation, shuffled),
        }

    def _compute_recorded(self, permutation: np.ndarray | None, shuffled: bool) -> dict[str, float]:
        if not len(self.recorded.child):
            own = ("recorded_", "rewired_", "n_recorded_")
            names = [n for n in self.higher_is_better if n.startswith(own)]
            return dict.fromkeys(names, float("nan"))
        precision, recall, n_edges = self._agreement(self.recorded, permutation, shuffled)
        rewired = [self._agreement(forest, permutation, shuffled)[0] for forest in self.rewired]
        return {
            **self._recorded_facts,
            "recorded_edge_precision": precision,
            "recorded_edge_recall": recall,
            "n_recorded_edges": float(n_edges),
            "rewired_edge_precision": summary.mean(rewired),
        }

    @property
    @remembered
    def _recorded_facts(self) -> dict[str, float]:
        """The `recorded_` and `rewired_` metrics that do not depend on the tree."""
        recorded, scored = self.recorded, self._scored
        own, *chance = (summary.mean(passed) for passed in self.recorded_reconstructs)
        implied = [measure_edges(scored, forest).implication for forest in self.rewired]
        edges = np.stack([recorded.parent, recorded.child], axis=1)
        distances = hamming(scored, recorded)["hamming_relative"]
        return {
            "n_recorded_measured_edges": summary.count(self.recorded_edges.implication),
            "n_recorded_parents": summary.count(distances),
            "n_recorded_probed_edges": summary.count(self.recorded_reconstructs[0]),
            "recorded_edges": float(len(recorded.child)),
            "recorded_found": recall_of(edges, np.stack(self.forest, axis=1)),
            "recorded_implication": summary.mean(self.recorded_edges.implication),
            "recorded_hamming_relative": summary.mean(distances),
            "recorded_reconstruction_share": own,
            "rewired_implication": summary.mean(implied),
            "rewired_reconstruction_share": summary.mean(chance),
        }

    def _agreement(
        self, forest: Pairs, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[float, float, int]:
        """Precision and recall of the edges, and how many have two latents that fire."""
        ends = np.stack(forest)
        parent, child = self.best_nodes(ends.ravel(), permutation, shuffled).reshape(ends.shape)
        fire = (parent >= 0) & (child >= 0)
        return (
            summary.mean(self._above(parent, child), fire),
            recall_of(self._tree_edges, np.stack([parent, child], axis=1)),
            int(fire.sum()),
        )

    def _above(self, parent: np.ndarray, child: np.ndarray) -> np.ndarray:
        """(E,) whether the classes of the node at `child` (E,) are a strict subset of those of the
        node at `parent` (E,), not the root; False where either is −1."""
        members, size = self._classes_of, self._size
        shared = members[parent].multiply(members[child]).sum(1)
        known = (parent > 0) & (child >= 0)
        return known & (shared == size[child]) & (size[parent] > size[child])

    @cached_property
    def _classes_of(self) -> sparse.csr_array:
        """(N, c) the classes with images of each node."""
        return sparse.csr_array(self.sparse_members(self._nodes)[self.context.present].T)

    @cached_property
    def _tree_edges(self) -> np.ndarray:
        """(E, 2) parent and child of the tree as positions in `_nodes`, without the root."""
        edges = self.taxonomy.edges_among(self._nodes, self.context.present)
        return edges[edges[:, 0] > 0]

    def tables(self) -> dict[str, pd.DataFrame]:
        """`forest`: one row for each child; `parents`: one for each parent; `recorded`: as
        `forest`, of the SAE's own forest."""
        tables = {"forest": self._rows(self.forest, self.edges, self.reconstructs)}
        parents = self._hamming.copy()
        nodes = self.best_nodes(parents["parent"].to_numpy())
        parents.insert(1, "name", np.where(nodes >= 0, self._names[nodes], ""))
        tables["parents"] = parents
        if len(self.recorded.child):
            passes = self.recorded_reconstructs[0]
            tables["recorded"] = self._rows(self.recorded, self.recorded_edges, passes)
        return tables

    def _rows(self, forest: Pairs, edges: Edges, passes: np.ndarray) -> pd.DataFrame:
        parent, child = (self.best_nodes(latents) for latents in forest)
        return pd.DataFrame(
            {
                "child": forest.child,
                "parent": forest.parent,
                "child_name": np.where(child >= 0, self._names[child], ""),
                "parent_name": np.where(parent >= 0, self._names[parent], ""),
                "agrees": self._above(parent, child),
                "child_fired": self._fired[forest.child],
                "parent_fired": self._fired[forest.parent],
                **edges._asdict(),
                "reconstructs": passes,
            }
        )

    @cached_property
    def _names(self) -> np.ndarray:
        return np.array([self.taxonomy.label(v) for v in self._nodes], dtype=object)

    def figures(self) -> dict[str, Figure]:
        """`forest`: the most frequently firing latents below their parents; colour: P(p|c)."""
        table = self.tables()["forest"]
        fired = self._fired
        latents = np.unique(np.concatenate([self.forest.parent, self.forest.child]))
        latents = latents[np.argsort(-fired[latents], kind="stable")][:DRAWN]
        above = dict(zip(table["child"], table["parent"]))
        implication = dict(zip(table["child"], table["implication"]))
        named = dict(zip(table["child"], table["child_name"]))
        named |= dict(zip(table["parent"], table["parent_name"]))
        drawing = summary.figure("Forest of latents by implication", "", "")
        drawing.add_trace(
            go.Icicle(
                ids=[str(j) for j in latents],
                labels=[f"{named[j]} ({j})" for j in latents],
                parents=[str(above[j]) if j in above else "" for j in latents],
                marker={
                    "colors": [implication.get(j) for j in latents],
                    "colorscale": "Blues",
                    "cmin": 0,
                    "cmax": 1,
                    "colorbar": {"title": "P(parent | latent)"},
                },
                maxdepth=5,
            )
        )
        return {"forest": drawing}
