"""`parent_child`: which latents fire only where another fires, and whether the tree agrees.

Implication and the test against the decoder are those of Tree SAE (arXiv 2605.07922), the Hamming
distance that of HSAE (arXiv 2602.11881); forest, agreement and rewiring are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.graph_objects import Figure
from scipy import sparse

from ..errors import ConfigError
from .base import EvaluationBatch, EvaluationContext, Evaluator, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.logistic import LogisticProber
from .parts.samples import FiringSample, ImageSample, fires, shape, together

DRAWN = 300
"""Latents in the drawing at most."""
BLOCK = 1024
"""Latents at a time."""
REWIRINGS = 5
"""Draws behind each `rewired_` number."""


@dataclass(frozen=True)
class ParentChildOptions:
    """When a latent p is a parent of a latent c, on the fit half of a sample of images.

    implication: P(p fires | c fires) is at least this.
    ratio: p fires at least so many times as often as c.
    lift: P(p | c) / P(p) is at least this; else a latent that fires nearly everywhere would be the
        parent of all.
    min_fired: c fires on so many images.
    max_images: size of the sample for co-firing.
    probed: edges that are tested against the decoder, at random; 0 for none.
    probe_images: size of the sample of x for their probes.
    nearest: an edge passes where both decoder rows are among so many nearest to the probe.
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
            raise ConfigError(f"implication: must lie in (0, 1], got {self.implication}")
        if not self.ratio > 1:
            raise ConfigError(f"ratio: must be above 1, or pairs form circles; got {self.ratio}")
        require_at_least(1, self, "min_fired", "max_images", "probe_images", "nearest")


class Pairs(NamedTuple):
    """Parents and children, each (P,)."""

    parent: np.ndarray
    child: np.ndarray


class Edges(NamedTuple):
    """The forest on the images of the score half; each (E,), NaN where undefined."""

    implication: np.ndarray  # P(p | c)
    reverse: np.ndarray  # P(c | p)
    lift: np.ndarray


class ParentChild(Evaluator[ParentChildOptions]):
    """The forest of latents by implication, and that of the SAE itself, against the taxonomy.

    A pair: c fires on `min_fired` images, P(p|c) ≥ `implication`, p fires `ratio` times as often
    and with `lift`. Of several parents the *forest* keeps the one that fires least. Pairs are
    chosen on the fit half and measured on the other.

    - `pairs`, `edges`, `child_share`: pairs; children with a parent; these per latent that fires
      `min_fired` times. `implication`, `holds_share`: mean P(p|c) on the score half, and the share
      of edges that still reach the bound there.
    - `hamming`: share of images on which a parent and the OR of its children differ, mean over the
      parents; `hamming_relative`: of the images where either fires.
    - `reconstruction_share`: of at most `probed` edges those that pass Tree SAE's condition: with a
      logistic probe of the child's firing on x, the decoder rows of parent and child both are among
      the `nearest` to it by cosine. NaN without a decoder.
    - `edge_precision`: each latent stands for the node of best F1 with its firing; of the edges,
      those whose parent's node holds strictly more classes than the child's, among them all of the
      child's, and is not the root. `edge_recall`: of the (parent, child) edges of the collapsed
      tree below its root, those that some forest edge stands for.

    An SAE that has a forest of its own (`parents` in its config, as `tree` and `hsae` write it) has
    that one measured too, over the edges whose child fires `min_fired` times on the fit half; NaN
    for all other SAEs.

    - `recorded_edges`: these edges; `recorded_found`: the share of them that are edges of the forest
      by implication too. The other `recorded_` numbers are those above, over these edges.
    - `rewired_implication`, `rewired_reconstruction_share`, `rewired_edge_precision`: the same after
      children of equal depth exchanged their parents at random, mean over draws: what a forest of
      this shape over these latents has by chance.

    Memory O(max_images·L0 + probe_images·d + m·L0).
    """

    name = "parent_child"
    description = "latents that fire only where another fires, and whether the tree agrees"
    higher_is_better = {
        "edge_precision": True,
        "edge_recall": True,
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
        "rewired_implication": None,
        "rewired_reconstruction_share": None,
        "rewired_edge_precision": None,
    }
    label_free = frozenset(n for n in higher_is_better if "edge_" not in n)
    invariant = label_free
    Options = ParentChildOptions

    def __init__(
        self,
        context: EvaluationContext,
        options: ParentChildOptions | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context, options)
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self._sample = context.share(FiringSample, max_images=self.options.max_images)
        self._probing = self.options.probed > 0 and context.W_dec is not None
        if self._probing:
            self._images = context.share(ImageSample, max_images=self.options.probe_images)
        distinct = self.taxonomy.distinct_nodes
        self._nodes = distinct[np.argsort(-self.taxonomy.n_leaves[distinct], kind="stable")]

    def update(self, batch: EvaluationBatch) -> None:
        for kept in KEPT:
            vars(self).pop(kept, None)

    @cached_property
    def pairs(self) -> Pairs:
        """Every pair that the fit half shows."""
        sample, options = self._sample, self.options
        return implied_pairs(
            fires(sample.z[sample.is_fit]),
            implication=options.implication,
            ratio=options.ratio,
            lift=options.lift,
            min_fired=options.min_fired,
        )

    @cached_property
    def forest(self) -> Pairs:
        """One parent for each child."""
        return nearest_parents(self.pairs, self._fired)

    @cached_property
    def recorded(self) -> Pairs:
        """The edges of the SAE's own forest whose child is alive."""
        parents = self._parents
        child = np.flatnonzero((parents >= 0) & (self._fired >= self.options.min_fired))
        return Pairs(parents[child], child)

    @cached_property
    def rewired(self) -> list[Pairs]:
        """`recorded` with the parents of children of equal depth exchanged, once per draw."""
        generator = np.random.default_rng(self.context.seed)
        depth = depths(self._parents)[self.recorded.child]
        return [rewire(self.recorded, depth, generator) for _ in range(REWIRINGS)]

    @cached_property
    def edges(self) -> Edges:
        """The forest on the score half."""
        return measure_edges(self._scored, self.forest)

    @cached_property
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

    @cached_property
    def _fired(self) -> np.ndarray:
        """(m,) images of the fit half on which each latent fires."""
        sample = self._sample
        fit = sample.z[sample.is_fit]
        return np.bincount(fit.indices, minlength=shape(fit)[1])

    @cached_property
    def _hamming(self) -> pd.DataFrame:
        return hamming(self._scored, self.forest)

    @cached_property
    def reconstructs(self) -> np.ndarray:
        """(E,) whether an edge passes Tree SAE's condition: 1, 0, or NaN where it was not asked."""
        return self._condition([self.forest])[0]

    @cached_property
    def recorded_reconstructs(self) -> list[np.ndarray]:
        """The same for `recorded`, then for each of `rewired`."""
        return self._condition([self.recorded, *self.rewired])

    def _condition(self, forests: list[Pairs]) -> list[np.ndarray]:
        """Tree SAE's condition for several forests over the same children, with one probe each."""
        child = forests[0].child
        passes = [np.full(len(child), np.nan) for _ in forests]
        decoder = self.context.W_dec
        if not self._probing or decoder is None:
            return passes
        z = fires(self._images.z)
        n, m = shape(z)
        fired = np.bincount(z.indices, minlength=m)[child]
        able = np.flatnonzero((fired >= 5) & (fired < n))
        generator = np.random.default_rng(self.context.seed)
        asked = np.sort(generator.permutation(able)[: self.options.probed])
        if len(asked):
            targets = torch.from_numpy(z[:, child[asked]].toarray() > 0)
            direction = LogisticProber(self._images.x).fit(targets).weight
            rows = decoder.detach().float().cpu()
            for forest, passed in zip(forests, passes):
                pairs = np.stack([forest.parent[asked], child[asked]])
                passed[asked] = near_probe(rows, direction, pairs, self.options.nearest)
        return passes

    def best_nodes(
        self,
        latents: np.ndarray,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
    ) -> np.ndarray:
        """The node of best F1 with the firing of each latent, as a position in `_nodes`."""
        members = self.taxonomy.membership[:, self._nodes]
        if permutation is not None:
            members = members[permutation]
        known, place = np.unique(latents, return_inverse=True)
        fired = self._firings.fired(shuffled, known)
        return best_nodes(fired, self._classes.all(shuffled), members)[place]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        self._check_shuffled(shuffled)
        forest, edges, distances = self.forest, self.edges, self._hamming
        living = int((self._fired >= self.options.min_fired).sum())
        precision, recall = self._agreement(forest, permutation, shuffled)
        return {
            "edge_precision": precision,
            "edge_recall": recall,
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
            names = [n for n in self.higher_is_better if n.startswith(("recorded_", "rewired_"))]
            return dict.fromkeys(names, float("nan"))
        precision, recall = self._agreement(self.recorded, permutation, shuffled)
        rewired = [self._agreement(forest, permutation, shuffled)[0] for forest in self.rewired]
        return {
            **self._recorded_facts,
            "recorded_edge_precision": precision,
            "recorded_edge_recall": recall,
            "rewired_edge_precision": summary.mean(rewired),
        }

    @cached_property
    def _recorded_facts(self) -> dict[str, float]:
        """What the tree has no part in."""
        recorded, scored = self.recorded, self._scored
        own, *chance = (summary.mean(passed) for passed in self.recorded_reconstructs)
        implied = [measure_edges(scored, forest).implication for forest in self.rewired]
        edges = np.stack([recorded.parent, recorded.child], axis=1)
        return {
            "recorded_edges": float(len(recorded.child)),
            "recorded_found": recall_of(edges, np.stack(self.forest, axis=1)),
            "recorded_implication": summary.mean(self.recorded_edges.implication),
            "recorded_hamming_relative": summary.mean(
                hamming(scored, recorded)["hamming_relative"]
            ),
            "recorded_reconstruction_share": own,
            "rewired_implication": summary.mean(implied),
            "rewired_reconstruction_share": summary.mean(chance),
        }

    def _agreement(
        self, forest: Pairs, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[float, float]:
        ends = np.stack(forest)
        parent, child = self.best_nodes(ends.ravel(), permutation, shuffled).reshape(ends.shape)
        return (
            summary.mean(self._above[parent, child] & (parent > 0)),
            recall_of(self._tree_edges, np.stack([parent, child], axis=1)),
        )

    @cached_property
    def _above(self) -> np.ndarray:
        """(N, N) whether the classes of one node are a strict part of the other's."""
        members = self.taxonomy.membership[:, self._nodes].astype(np.float32)
        size = members.sum(0)
        return (members.T @ members == size) & (size[:, None] > size)

    @cached_property
    def _tree_edges(self) -> np.ndarray:
        """(E, 2) parent and child of the collapsed tree as positions in `_nodes`, root left out."""
        position = {self.taxonomy.nodes[v]: i for i, v in enumerate(self._nodes)}
        edges = [(position[p], position[c]) for p, c in self.taxonomy.collapsed().edges()]
        return np.array([edge for edge in edges if edge[0] != 0], dtype=np.int64).reshape(-1, 2)

    def tables(self) -> dict[str, pd.DataFrame]:
        """`forest`: one row for each child; `parents`: one for each parent; `recorded`: as `forest`,
        where the SAE has a forest of its own."""
        tables = {"forest": self._rows(self.forest, self.edges, self.reconstructs)}
        parents = self._hamming.copy()
        nodes = self.best_nodes(parents["parent"].to_numpy())
        parents.insert(1, "name", self._names[nodes])
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
                "child_name": self._names[child],
                "parent_name": self._names[parent],
                "agrees": self._above[parent, child] & (parent > 0),
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
        """`forest`: the latents that fire most, each below its parent; colour: P(p|c)."""
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


KEPT = (
    "pairs",
    "forest",
    "edges",
    "recorded",
    "rewired",
    "recorded_edges",
    "reconstructs",
    "recorded_reconstructs",
    "_fired",
    "_hamming",
    "_recorded_facts",
)
"""What is computed once, from all images seen so far."""


def recorded_parents(sae: Any, m: int) -> np.ndarray:
    """(m,) the latent above each latent in the forest that an SAE has of its own, −1 where none.

    Read from the forest by which the SAE fires, where it has one, or else from its config.
    """
    own: Any = getattr(getattr(sae, "forest", None), "parents", None)
    parents = own if own is not None else getattr(getattr(sae, "cfg", None), "parents", None)
    if parents is None or len(parents) != m:
        return np.full(m, -1)
    return np.array([int(parent) for parent in parents], dtype=np.int64)


def depths(parents: np.ndarray) -> np.ndarray:
    """(m,) how many ancestors each latent has; `parents` (m,) holds −1 at a root."""
    depth, above = np.zeros_like(parents), parents
    for _ in range(len(parents)):  # as many rounds as the longest chain; circles end here
        inner = above >= 0
        if not inner.any():
            break
        depth = depth + inner
        above = np.where(inner, parents[above], -1)
    return depth


def rewire(forest: Pairs, depth: np.ndarray, generator: np.random.Generator) -> Pairs:
    """The forest after children of equal `depth` (E,) exchanged their parents at random."""
    parent = forest.parent.copy()
    for level in np.unique(depth):
        here = np.flatnonzero(depth == level)
        parent[here] = parent[generator.permutation(here)]
    return Pairs(parent, forest.child)


def implied_pairs(
    firings: sparse.csr_array,
    *,
    implication: float = 0.9,
    ratio: float = 2.0,
    lift: float = 1.0,
    min_fired: int = 1,
    block: int = BLOCK,
) -> Pairs:
    """All pairs of latents that meet the bounds, by child and then parent.

    Args:
        firings: (n, m) of zeros and ones.
    """
    n, m = shape(firings)
    fired = np.bincount(firings.indices, minlength=m)
    children = np.flatnonzero(fired >= max(min_fired, 1))
    found = []
    for start in range(0, len(children), block):
        child = children[start : start + block]
        at, parent, both = together(firings, child)
        own, above = fired[child[at]], fired[parent]
        # In whole numbers but for a hair, or rounding would decide at a bound like 0.9 · 10.
        holds = (both >= implication * own - 1e-9) & (above >= ratio * own - 1e-9)
        holds &= both * n >= lift * own * above - 1e-9
        found.append(np.stack([parent[holds], child[at[holds]]]))
    parent, child = np.concatenate([*found, np.zeros((2, 0), dtype=np.int64)], axis=1)
    return Pairs(parent, child)


def nearest_parents(pairs: Pairs, fired: np.ndarray) -> Pairs:
    """For each child the parent that fires least (ties: the smallest number), by child."""
    order = np.lexsort((pairs.parent, fired[pairs.parent], pairs.child))
    child, first = np.unique(pairs.child[order], return_index=True)
    return Pairs(pairs.parent[order][first], child)


def measure_edges(firings: sparse.csr_array, forest: Pairs) -> Edges:
    """P(p|c), P(c|p) and lift of each edge; firings (n, m) of zeros and ones."""
    columns = sparse.csc_array(firings)
    fired = np.diff(columns.indptr)
    both = columns[:, forest.parent].multiply(columns[:, forest.child]).sum(0)
    own, above = fired[forest.child], fired[forest.parent]
    lift = summary.ratio(both * shape(firings)[0], own.astype(float) * above)
    return Edges(summary.ratio(both, own), summary.ratio(both, above), lift)


def hamming(firings: sparse.csr_array, forest: Pairs) -> pd.DataFrame:
    """Where each parent's firing differs from the OR of its children's.

    Returns:
        one row for each parent: its number of `children`; `hamming`, the share of images on which
        the two differ; `hamming_relative`, of those on which either fires.
    """
    n, m = shape(firings)
    parents, group = np.unique(forest.parent, return_inverse=True)
    size = (m, len(parents))
    belongs = sparse.csr_array((np.ones(len(group)), (forest.child, group)), shape=size)
    either = fires(sparse.csr_array(firings @ belongs))
    own = sparse.csr_array(sparse.csc_array(firings)[:, parents])
    both = own.multiply(either).sum(0)
    total = own.sum(0) + either.sum(0)
    return pd.DataFrame(
        {
            "parent": parents,
            "children": np.bincount(group, minlength=len(parents)),
            "hamming": summary.ratio(total - 2 * both, n),
            "hamming_relative": summary.ratio(total - 2 * both, total - both),
        }
    )


def near_probe(
    decoder: torch.Tensor, direction: torch.Tensor, latents: np.ndarray, nearest: int
) -> np.ndarray:
    """(E,) whether all of an edge's latents are among the nearest decoder rows by cosine.

    Args:
        decoder: (m, d).
        direction: (E, d) the probes.
        latents: (2, E).
    """
    rows = torch.nn.functional.normalize(decoder, dim=1)
    cosine = torch.nn.functional.normalize(direction, dim=1) @ rows.T
    top = cosine.topk(min(nearest, len(decoder)), dim=1).indices.numpy()
    return (top[None] == latents[:, :, None]).any(2).all(0)


def best_nodes(fired: np.ndarray, images: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(L,) the node whose F1 with a latent's firing is best; ties go to the first.

    Args:
        fired: (L, C) images on which the latent fires.
        images: (C,) images of each class.
        members: (C, N) whether a class lies below a node.
    """
    belongs = sparse.csr_array(members.astype(np.float32))
    positives = images @ belongs
    best = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(fired), BLOCK):
        block = fired[start : start + BLOCK].astype(np.float32)
        f1 = 2 * (block @ belongs) / np.maximum(block.sum(1, keepdims=True) + positives, 1)
        best.append(f1.argmax(1))
    return np.concatenate(best)


def recall_of(wanted: np.ndarray, found: np.ndarray) -> float:
    """The share of the rows of `wanted` (W, 2) that are among those of `found` (F, 2)."""
    if not len(wanted):
        return float("nan")
    have = set(map(tuple, found.tolist()))
    return float(np.mean([tuple(row) in have for row in wanted.tolist()]))
