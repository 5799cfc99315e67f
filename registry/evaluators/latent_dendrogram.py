"""`latent_dendrogram`: a dendrogram of the latents against the tree of the nodes that they detect.

Average linkage by decoder cosine and by correlation of firing. Dendrogram purity is that of Heller and
Ghahramani 2005 (https://doi.org/10.1145/1102351.1102389), γ that of Baker 1974
(https://doi.org/10.1080/01621459.1974.10482971); pairs of latents of one node are left out: own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from scipy import sparse
from scipy.cluster.hierarchy import cophenet, dendrogram, leaves_list, linkage

from ..presentation import Headline, Support
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.latent_nodes import LatentNodes, shared_depth
from .parts.ranks import pearson, spearman
from .parts.samples import FiringSample, fires, shape

SIMILARITIES = ("decoder", "firing")
DRAWN = 60
"""Maximum number of latents in the figure."""


@dataclass(frozen=True)
class LatentDendrogramOptions:
    """max_latents: number of most frequently firing latents; memory is quadratic in it.
    min_fired: least number of images of the fit half on which a latent fires.
    max_images: size of the sample of images for the correlation of firing, both halves together.
    """

    max_latents: int = 512
    min_fired: int = 10
    max_images: int = 16384

    def __post_init__(self) -> None:
        require_at_least(3, self, "max_latents")
        require_at_least(1, self, "min_fired", "max_images")


class Dendrogram(NamedTuple):
    """An average-linkage dendrogram of l latents, over their P pairs."""

    merges: np.ndarray  # scipy's linkage matrix
    height: np.ndarray  # (P,) cophenetic distance
    stage: np.ndarray  # (P,) the merge at which the two meet, of equally high ones the last
    leaves: np.ndarray  # (l − 1, l) 0 or 1, the latents below each merge


class LatentDendrogram(Evaluator[LatentDendrogramOptions]):
    """Agreement of a dendrogram of the latents with the tree, over pairs of latents of different nodes.

    A latent has the node of best F1 with its firing on the fit half, the root left out. Average
    linkage, of the cosine of decoder rows (`decoder_*`) and of the correlation of firing on the
    score half (`firing_*`), each as 1 − similarity.

    - `*_cophenetic`: Pearson correlation of the height at which two latents meet and the distance
      of their nodes in the primary tree.
    - `*_gamma`: Baker's γ, the rank correlation of the order in which pairs meet in the dendrogram,
      by height, with the order in the tree, from the deepest common node up.
    - `*_purity`: for a depth t the group of a latent is the ancestor at t of its node, if there is one;
      depths at which all images have one ancestor are left out.
      Of two latents of one group: the share of that group among the latents below the merge at which
      they meet. Mean over such pairs of all depths.

    `n_latents`, `n_nodes` and `n_pairs` (of different nodes) are the numbers behind them. NaN
    without a decoder, and where either order is constant. Memory O(max_images·L0 + max_latents²).
    """

    name = "latent_dendrogram"
    description = "a dendrogram of the latents against the tree of the nodes that they detect"
    higher_is_better = {
        **{
            f"{similarity}_{measure}": True
            for similarity in SIMILARITIES
            for measure in ("cophenetic", "gamma", "purity")
        },
        **dict.fromkeys(("n_latents", "n_nodes", "n_pairs"), None),
    }
    ranges = {
        **dict.fromkeys(
            ("decoder_cophenetic", "decoder_gamma", "firing_cophenetic", "firing_gamma"),
            summary.COSINE,
        ),
        **dict.fromkeys(("decoder_purity", "firing_purity"), summary.SHARE),
    }
    invariant = label_free = frozenset({"n_latents"})
    support = {
        name: Support("n_latents", "latents")
        for name, better in higher_is_better.items()
        if better is not None
    }
    headlines = (
        Headline(
            "decoder_cophenetic",
            "decoder dendrogram",
            "correlation of a dendrogram of decoder rows with the tree of their nodes",
            priority=70,
        ),
    )
    Options = LatentDendrogramOptions

    def prepare(self) -> None:
        self._nodes = LatentNodes(self.context)
        self._sample = self.context.share(FiringSample, max_images=self.options.max_images)

    @property
    @remembered
    def latents(self) -> np.ndarray:
        """(l,) the latents compared, ascending: none that is constant on the score half."""
        return self._most_firing(self.options.max_latents)

    def _most_firing(self, most: int) -> np.ndarray:
        fired, held_out = self._nodes.fired, self._scored.sum(0)
        able = (fired >= self.options.min_fired) & (held_out > 0)
        able &= held_out < shape(self._scored)[0]
        order = np.argsort(-fired, kind="stable")
        return np.sort(order[able[order]][:most])

    @property
    @remembered
    def _scored(self) -> sparse.csr_array:
        """(n, m) ones where a latent fires on an image of the score half of the sample."""
        return fires(self._sample.z[~self._sample.is_fit])

    @remembered
    def dendrogram(self, similarity: str) -> Dendrogram | None:
        """The dendrogram of one similarity; None for fewer than 3 latents, and without a decoder."""
        latents = self.latents
        if len(latents) < 3:
            return None
        if similarity == "firing":
            return grow(self._correlation(latents))
        decoder = self.context.W_dec
        if decoder is None:
            return None
        rows = torch.nn.functional.normalize(decoder.detach().float().cpu()[latents], dim=1)
        return grow((rows @ rows.T).double().numpy())

    def _correlation(self, latents: np.ndarray) -> np.ndarray:
        firings = self._scored[:, latents].astype(np.float64)
        n = shape(firings)[0]
        rate = firings.sum(0) / n
        both = (firings.T @ firings).toarray() / n
        spread = np.sqrt(rate * (1 - rate))
        return (both - np.outer(rate, rate)) / np.outer(spread, spread)

    @remembered
    def nodes(self, permutation: np.ndarray | None = None, shuffled: bool = False) -> np.ndarray:
        """(l,) the node of each latent compared."""
        return self._nodes.of(self.latents, permutation, shuffled)[0]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        nodes = self.nodes(permutation, shuffled)
        first, second = np.triu_indices(len(nodes), 1)
        different = nodes[first] != nodes[second]
        shared = shared_depth(self.taxonomy, nodes)[first, second][different]
        depth = self.taxonomy.depth[nodes]
        distance = (depth[first] + depth[second])[different] - 2 * shared
        groups = node_groups(self.taxonomy, nodes, int(self.taxonomy.depth[self.context.lch]))
        for similarity in SIMILARITIES:
            found = self.dendrogram(similarity)
            if found is not None:
                numbers |= {
                    f"{similarity}_cophenetic": pearson(
                        found.height[different], distance.astype(np.float64)
                    ),
                    f"{similarity}_gamma": spearman(found.height[different], -shared),
                    f"{similarity}_purity": purity(found, groups, different),
                }
        return {
            **numbers,
            "n_latents": float(len(nodes)),
            "n_nodes": float(len(np.unique(nodes))),
            "n_pairs": float(different.sum()),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: the node of each latent compared, and its place in each dendrogram."""
        latents = self.latents
        nodes, f1 = self._nodes.of(latents)
        table = pd.DataFrame(
            {
                "latent": latents,
                "node": [self.taxonomy.nodes[v] for v in nodes],
                "name": [self.taxonomy.label(v) for v in nodes],
                "fit_f1": f1,
                "fired": self._nodes.fired[latents],
            }
        )
        for similarity in SIMILARITIES:
            found = self.dendrogram(similarity)
            if found is not None:
                table[f"{similarity}_place"] = np.argsort(leaves_list(found.merges))
        return {"latents": table} if len(table) else {}

    def figures(self) -> dict[str, Figure]:
        """`firing`: the dendrogram of the most frequently firing latents by correlation of firing."""
        latents = self._most_firing(DRAWN)
        drawing = summary.figure("Latents by correlation of firing", "", "1 − correlation")
        drawing.update_layout(showlegend=False)
        if len(latents) < 3:
            drawing.add_scatter(x=[], y=[], name="too few latents")
            return {"firing": drawing}
        found = dendrogram(grow(self._correlation(latents)).merges, no_plot=True)
        line = {"color": summary.VALUE, "width": 1}
        for x, y in zip(found["icoord"], found["dcoord"]):
            drawing.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip")
        nodes, _ = self._nodes.of(latents)
        names = [f"{self.taxonomy.label(int(nodes[i]))} ({latents[i]})" for i in found["leaves"]]
        drawing.update_xaxes(
            tickvals=5 + 10 * np.arange(len(latents)), ticktext=names, tickangle=90
        )
        return {"firing": drawing}


def grow(similarity: np.ndarray) -> Dendrogram:
    """The average-linkage dendrogram of 1 − similarity (l, l), to six digits."""
    size = len(similarity)
    distance = 1 - similarity[np.triu_indices(size, 1)].clip(-1, 1)
    merges = linkage(distance.round(6), "average")
    merges[:, 2] = merges[:, 2].round(9)
    order = merges.copy()
    order[:, 2] = np.arange(1, size)
    leaves = np.eye(2 * size - 1, size, dtype=np.float32)
    for merge, (a, b) in enumerate(merges[:, :2].astype(int), size):
        leaves[merge] = leaves[a] + leaves[b]
    last = np.arange(size - 1)
    for merge in range(size - 2, -1, -1):  # merges of one height are one merge of several
        inner = merges[merge, :2].astype(int) - size
        inner = inner[inner >= 0]
        equal = inner[merges[inner, 2] == merges[merge, 2]]
        last[equal] = last[merge]
    stage = last[cophenet(order).astype(int) - 1]
    return Dendrogram(merges, cophenet(merges), stage, leaves[size:])


def node_groups(taxonomy: Taxonomy, nodes: np.ndarray, above: int = 0) -> np.ndarray:
    """(T, l) the primary ancestor of each of `nodes` (l,) at each depth below `above`, down to the
    deepest; −1 where a node is above."""
    paths = [taxonomy.path_to_root(v)[::-1] for v in nodes.tolist()]
    depths = range(above + 1, taxonomy.max_depth + 1)
    return np.array(
        [[path[t] if t < len(path) else -1 for path in paths] for t in depths], dtype=np.int64
    ).reshape(len(depths), len(nodes))


def purity(found: Dendrogram, groups: np.ndarray, counted: np.ndarray) -> float:
    """Dendrogram purity over the pairs at `counted` (P,), pooled over the rows of groups (T, l)."""
    first, second = np.triu_indices(groups.shape[1], 1)
    first, second, stage = first[counted], second[counted], found.stage[counted]
    size = found.leaves.sum(1)
    total, pairs = 0.0, 0
    for group in groups:
        same = (group[first] == group[second]) & (group[first] >= 0)
        if not same.any():
            continue
        _, code = np.unique(group, return_inverse=True)
        counts = found.leaves @ np.eye(code.max() + 1, dtype=np.float32)[code]
        total += float((counts[stage[same], code[first[same]]] / size[stage[same]]).sum())
        pairs += int(same.sum())
    return total / pairs if pairs else float("nan")
