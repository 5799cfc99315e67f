"""`latent_graph`: a hierarchy of the latents from their joint firing, measured on other images.

The protocol of *Do Sparse Autoencoders Learn Meaningful Concept Hierarchies?* (arXiv 2606.22994). Its
full text could not be read; `parts/latent_graphs.py` names what is our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy import sparse

from .. import hashing
from ..errors import ConfigError
from ..presentation import Headline, Support
from .base import ALL_NULLS, Evaluator, remembered, require_at_least
from .parts import latent_graphs as graphs
from .parts import summary
from .parts.embedded import EmbeddedImages
from .parts.latent_graphs import WEIGHTINGS, Graph
from .parts.samples import FiringStore, fires, shape

SHAPES = ("dag", "tree")
Halves = tuple[sparse.csr_array, sparse.csr_array]
LEAST_CHILDREN = 20
"""The bound on the children of a latent is never below this."""
QUALITIES = {
    "implication": "edge",
    "dominance": "edge",
    "abstractness": "edge",
    "refinement": "parent",
    "conditional_correlation": "parent",
    "sibling_similarity": "parent",
}
"""Measure of the hierarchy -> what it is a mean over."""


@dataclass(frozen=True)
class LatentGraphOptions:
    """weighting: of the edges: `firings`, `activations` or `cosine`, see `parts/latent_graphs.py`.
    shape: `dag`, or `tree`: each child keeps its strongest parent.
    threshold: bound of the weights; None: .9, and .8 for `cosine`.
    min_rate: latents that fire on a smaller share of the fit half are left out.
    min_fired: so are latents that fire on fewer images of the fit half.
    max_children: latents with more children are removed; as a share of the dictionary, but never
        fewer than 20.
    min_descendants: roots with fewer descendants are removed.
    min_joint: least joint firings, on the score half, of an edge or parent that is measured.
    k: most activating images of a latent for the similarity of siblings.
    draws: graphs of permuted activations.
    max_images: images on which the graph is built and measured, both halves together.
    max_firings: least number of entries above 0 that reduces `max_images`.
    embedded_images: images of the score half whose embeddings are kept.
    """

    weighting: str = "firings"
    shape: str = "dag"
    threshold: float | None = None
    min_rate: float = 40e-6
    min_fired: int = 10
    max_children: float = 0.05
    min_descendants: int = 5
    min_joint: int = 10
    k: int = 16
    draws: int = 3
    max_images: int = 65536
    max_firings: int = 2**24
    embedded_images: int = 8192

    def __post_init__(self) -> None:
        for field, given, allowed in (
            ("weighting", self.weighting, WEIGHTINGS),
            ("shape", self.shape, SHAPES),
        ):
            if given not in allowed:
                raise ConfigError(
                    field, "not known", given=given, allowed=f"one of {', '.join(allowed)}"
                )
        for field, low in (("threshold", False), ("max_children", False), ("min_rate", True)):
            value = getattr(self, field)
            if value is not None and not (0 <= value <= 1 and (low or value)):
                allowed = "a number in [0, 1]" if low else "a number in (0, 1]"
                raise ConfigError(field, "out of range", given=value, allowed=allowed)
        require_at_least(0, self, "min_descendants", "draws")
        require_at_least(1, self, "min_fired", "min_joint", "max_images", "max_firings")
        require_at_least(1, self, "embedded_images")
        require_at_least(2, self, "k")


class Measured(NamedTuple):
    """A graph on the score half; the arrays are NaN where undefined."""

    graph: Graph
    n_pairs: int  # edges before any is removed
    edges: dict[str, np.ndarray]  # implication, dominance, abstractness: (E,) each
    both: np.ndarray  # (E,) images on which parent and child fire
    parents: graphs.Parents
    siblings: np.ndarray  # (P,) similarity of each parent's children
    bound: float


class LatentGraph(Evaluator[LatentGraphOptions]):
    """Edges p → c where c implies p and not the reverse, built on the fit half.

    An edge needs a weight w(p|c) above and w(c|p) below the threshold. The graph is reduced to its
    direct edges; latents with many children, and roots with few descendants, are removed. On the
    score half, over edges and parents with at least `min_joint` joint firings:

    - `implication`: P(p fires | c fires). `dominance`: share of the images on which both fire
      where p has the larger activation. `abstractness`: share of the edges whose child has a higher
      MonoScore than its parent. Means over edges.
    - `refinement`: P(any child fires | p fires). `conditional_correlation`: rank correlation of
      the activations of p and of its strongest child, over the images on which any child fires; it
      falls below 0 where children take over the activation of their parent. `sibling_similarity`: mean
      cosine of the embeddings of two children's top images, less that of random images;
      `sibling_bound` is the same of the top images of one latent. Means over parents.
    - `children`: mean over parents. `depth`: mean over the latents without children of the longest
      path from a root; `max_depth`.
    - `chance_*`: the same procedure after each latent's activations were permuted over the images
      of a half, mean over `draws`: joint firing by chance at equal rates.

    The embeddings are those of an independent encoder where the batches have them; else `own_layer`
    is 1 and they are the activations. The counts `n_*` say what the means rest on; `n_pairs` are
    the edges before any is removed. Table `graphs` has every weighting and shape. Memory
    O(max_firings + embedded_images·e + n_pairs).
    """

    name = "latent_graph"
    description = "a hierarchy of the latents from their joint firing, measured on other images"
    higher_is_better = {
        **dict.fromkeys(QUALITIES, True),
        **dict.fromkeys(("sibling_bound", "children", "depth", "max_depth", "own_layer"), None),
        **dict.fromkeys(("n_latents", "n_pairs", "n_edges", "n_parents", "n_roots"), None),
        **dict.fromkeys(("n_measured_edges", "n_measured_parents", "n_sibling_parents"), None),
        **dict.fromkeys((f"chance_{name}" for name in ("n_edges", *QUALITIES)), None),
    }
    ranges = {
        **dict.fromkeys(
            (
                "implication",
                "dominance",
                "abstractness",
                "refinement",
                "chance_implication",
                "chance_dominance",
                "chance_abstractness",
                "chance_refinement",
            ),
            summary.SHARE,
        ),
        **dict.fromkeys(
            ("conditional_correlation", "chance_conditional_correlation"), summary.COSINE
        ),
    }
    nulls = {
        **ALL_NULLS,
        "permuted_classes": "latents are compared with latents, with no tree",
        "shuffled": "no label is used",
    }
    invariant = label_free = frozenset(higher_is_better)
    wants_embedding = True
    support = {
        **{
            name: Support(f"n_measured_{unit}s", f"{unit}s")
            for name, unit in QUALITIES.items()
            if name != "sibling_similarity"
        },
        "sibling_similarity": Support("n_sibling_parents", "parents of two measured children"),
    }
    headlines = (
        Headline(
            "refinement",
            "refinement",
            "share of the images of a parent latent on which one of its children fires",
            priority=60,
        ),
    )
    labels = {
        "refinement": "refinement frequency",
        "sibling_bound": "similarity within one latent",
        **{
            f"chance_{name}": f"{name.replace('_', ' ')}, permuted activations"
            for name in ("n_edges", *QUALITIES)
        },
    }
    Options = LatentGraphOptions

    def prepare(self) -> None:
        options = self.options
        self._sample = self.context.share(
            FiringStore, max_images=options.max_images, max_firings=options.max_firings
        )
        self._embedded = self.context.share(EmbeddedImages, max_images=options.embedded_images)

    @property
    @remembered
    def _halves(self) -> Halves:
        """Activations above 0 of the fit half and of the score half."""
        z, fit = self._sample.z, self._sample.is_fit
        return graphs.firing_values(z[fit]), graphs.firing_values(z[~fit])

    def _permuted(self, draw: int) -> Halves:
        """The halves after each latent's activations were permuted over their images."""
        generator = np.random.default_rng((self.context.seed, draw))
        fit, score = (graphs.permute_activations(z, generator) for z in self._halves)
        return fit, score

    @property
    @remembered
    def latents(self) -> np.ndarray:
        """(l,) the latents that fire often enough on the fit half."""
        fit = self._halves[0]
        rate = self.options.min_rate * shape(fit)[0]
        return np.flatnonzero(fires(fit).sum(0) >= max(rate, self.options.min_fired))

    def measure(self, halves: Halves, weighting: str, form: str) -> Measured:
        """The graph of one weighting and form, built on the first half and measured on the second."""
        (fit, score), options = halves, self.options
        threshold = WEIGHTINGS[weighting] if options.threshold is None else options.threshold
        pairs = graphs.weigh_edges(fit, self.latents, weighting, threshold)
        graph = graphs.build_graph(
            pairs,
            fires(fit).sum(0),
            tree=form == "tree",
            max_children=max(options.max_children * self.context.d_sae, LEAST_CHILDREN),
            min_descendants=options.min_descendants,
        )
        return self._measure(graph, len(pairs.child), score)

    @property
    @remembered
    def measured(self) -> Measured:
        """The graph of the chosen weighting and shape on the score half."""
        return self.measure(self._halves, self.options.weighting, self.options.shape)

    def _measure(self, graph: Graph, n_pairs: int, score: sparse.csr_array) -> Measured:
        least = self.options.min_joint
        counts = graphs.count_edges(score, graph)
        enough = counts.both >= least
        z_embedded, unit = self._with_embeddings(score)
        nodes, ends = np.unique(np.stack([graph.parent, graph.child]), return_inverse=True)
        of_parent, of_child = graphs.mono_scores(z_embedded[:, nodes], unit)[ends.reshape(2, -1)]
        edges = {
            "implication": summary.ratio(counts.both, counts.child),
            "dominance": summary.ratio(counts.stronger, counts.both),
            "abstractness": np.where(
                np.isfinite(of_parent + of_child), of_child > of_parent, np.nan
            ),
        }
        parents = graphs.measure_parents(score, graph)
        usable = parents.both >= least
        similar = graphs.similarities(z_embedded, unit, graph, self.options.k)
        return Measured(
            graph,
            n_pairs,
            {name: np.where(enough, values, np.nan) for name, values in edges.items()},
            counts.both,
            parents._replace(
                refinement=np.where(usable, parents.refinement, np.nan),
                correlation=np.where(usable, parents.correlation, np.nan),
            ),
            similar.siblings,
            summary.mean(similar.own),
        )

    def _with_embeddings(self, z: sparse.csr_array) -> tuple[sparse.csr_array, np.ndarray]:
        """The rows of z (n, m), of the score half, whose embeddings are kept, and these of length 1.

        They are in random order, the same each time: data sets are often sorted by class, and of
        equal activations the first would be images of one class.
        """
        sample = self._sample
        index = sample.index[~sample.is_fit]
        common, rows, kept = np.intersect1d(index, self._embedded.index, return_indices=True)
        order = np.argsort(hashing.uniform(common), kind="stable")
        rows, kept = rows[order], kept[order]
        return sparse.csr_array(z[rows]), self._embedded.unit[kept].astype(np.float64)

    def numbers(self, found: Measured) -> dict[str, float]:
        """The metrics of one graph, without those by chance."""
        graph, parents = found.graph, found.parents
        level = graphs.levels(graph, self.context.d_sae)
        last = np.setdiff1d(graph.child, graph.parent)
        return {
            **{name: summary.mean(values) for name, values in found.edges.items()},
            "refinement": summary.mean(parents.refinement),
            "conditional_correlation": summary.mean(parents.correlation),
            "sibling_similarity": summary.mean(found.siblings),
            "sibling_bound": found.bound,
            "children": summary.mean(parents.children),
            "depth": summary.mean(level[last]),
            "max_depth": float(level.max()) if len(graph.child) else float("nan"),
            "n_pairs": float(found.n_pairs),
            "n_edges": float(len(graph.child)),
            "n_parents": float(len(parents.latent)),
            "n_roots": float(len(np.setdiff1d(graph.parent, graph.child))),
            "n_measured_edges": summary.count(found.edges["implication"]),
            "n_measured_parents": summary.count(parents.refinement),
            "n_sibling_parents": summary.count(found.siblings),
        }

    @property
    @remembered
    def _by_chance(self) -> dict[str, float]:
        options, draws = self.options, []
        for draw in range(options.draws):
            found = self.measure(self._permuted(draw), options.weighting, options.shape)
            draws.append(self.numbers(found))
        return {
            f"chance_{name}": summary.mean([draw[name] for draw in draws])
            for name in ("n_edges", *QUALITIES)
        }

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        return {
            **self.numbers(self.measured),
            **self._by_chance,
            "n_latents": float(len(self.latents)),
            "own_layer": float(self._embedded.own_layer),
        }

    def notes(self) -> list[str]:
        """What the numbers rest on, where it is little."""
        numbers, notes = self.compute(), []
        if not numbers["n_edges"]:
            notes.append(
                f"No edge is left of the {numbers['n_pairs']:.0f} pairs within the bounds, among "
                f"{numbers['n_latents']:.0f} latents that fire on {self.options.min_fired} images."
            )
        if numbers["own_layer"]:
            notes.append(
                "No independent embedding is given: images are compared by the activations that the "
                "SAE was trained on."
            )
        return notes

    def tables(self) -> dict[str, pd.DataFrame]:
        """`graphs`: the metrics of every weighting and shape. `edges`: one row for each edge of the
        chosen graph; `parents`: one for each parent."""
        rows = [
            {
                "weighting": weighting,
                "shape": form,
                **self.numbers(self.measure(self._halves, weighting, form)),
            }
            for weighting in WEIGHTINGS
            for form in SHAPES
        ]
        found = self.measured
        edges = {**found.graph._asdict(), "both": found.both, **found.edges}
        parents = {**found.parents._asdict(), "sibling_similarity": found.siblings}
        tables = {"edges": pd.DataFrame(edges), "parents": pd.DataFrame(parents)}
        return {"graphs": pd.DataFrame(rows), **{n: t for n, t in tables.items() if len(t)}}

    def figures(self) -> dict[str, Figure]:
        """`parents`: refinement and conditional correlation of the parents; size: children."""
        parents = self.measured.parents
        drawing = summary.figure(
            "Parents of the latent graph",
            "P(any child | parent)",
            "rank correlation with the strongest child",
        )
        drawing.add_scatter(
            x=parents.refinement,
            y=parents.correlation,
            text=[f"{latent}: {c} children" for latent, c in zip(parents.latent, parents.children)],
            name="parents",
            mode="markers",
            marker={
                "color": summary.VALUE,
                "opacity": 0.6,
                "size": 4 + 3 * np.sqrt(parents.children),
            },
        )
        return {"parents": drawing}
