"""`feature_geometry`: angles between the directions of nodes, and of latents, related in the tree.

Hierarchical orthogonality is that of Park et al. 2024 (arXiv 2406.01506, §4), defined for words;
conditional orthogonality and Babel function are those of MP-SAE (Costa et al. 2025, arXiv
2506.03093); effective rank that of Roy and Vetterli 2007. The ports are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from ..errors import ConfigError
from ..presentation import Support
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.node_f1 import find_detectors
from .parts.samples import ImageSample

RANK_IMAGES, COACTIVE_IMAGES, BLOCK = 1024, 256, 1024


@dataclass(frozen=True)
class FeatureGeometryOptions:
    """max_images: size of the sample of x and z.
    min_images: least number of images of a node in the sample, half of them in either half.
    node_images: images from which the direction of a node is computed, at most.
    max_edges: (parent, child) edges measured at most, chosen at random.
    detector_f1: least F1 on the score half of a latent that represents a node.
    babel: number of rows summed in the Babel function.
    max_latents: decoder rows for the Babel function at most, at random among those that fire.
    """

    max_images: int = 8192
    min_images: int = 50
    node_images: int = 256
    max_edges: int = 200
    detector_f1: float = 0.3
    babel: int = 16
    max_latents: int = 4096

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_images", "min_images", "node_images", "max_edges", "babel")
        require_at_least(2, self, "max_latents")
        if not 0 <= self.detector_f1 <= 1:
            raise ConfigError(
                "detector_f1", "out of range", given=self.detector_f1, allowed="a number in [0, 1]"
            )


class Directions(NamedTuple):
    """The vectors of the nodes, in whitened coordinates."""

    vector: np.ndarray  # (V, d), NaN where a node has too few images
    own: np.ndarray  # (V,) mean of x·ℓ/‖ℓ‖² over held-out images of the node; 1 is ideal
    other: np.ndarray  # (V,) the same over the other held-out images; 0 is ideal


class FeatureGeometry(Evaluator[FeatureGeometryOptions]):
    """Orthogonality of child minus parent to parent, of node vectors on x; cosines of detectors.

    On x, whitened by the Ledoit–Wolf covariance of the fit half: node v has the direction d = Σ_v⁻¹
    m (m its mean, Σ_v its Ledoit–Wolf covariance), d̂ = d/‖d‖ and the vector ℓ = (m·d̂)d̂.

    - `hierarchy_cosine`: |cos(ℓ_child − ℓ_parent, ℓ_parent)|, mean over the edges of the collapsed
      tree of the classes with images, below its root; `random_parent_cosine`: with a random other
      node as parent.
      The parent has the child's images too, so permuted classes are also near 0: this number
      separates nodes from noise, but not one tree from another.
    - `parent_length`: ‖ℓ_parent‖/‖ℓ_child‖, mean over the edges (own definition): size of the
      children's common part. It is small for unrelated classes, thus under permuted classes.
    - `projection_own`, `projection_other`: x·ℓ/‖ℓ‖² on held-out images of the node and on others,
      mean over `n_nodes` nodes.

    Of the decoder: `parent_cosine`, `sibling_cosine`, `random_cosine`: |cos(D_a, D_b)| of the
    latents that best detect a node and its parent, of those of two children of one node, and of
    random pairs; `detected_edges`: number of the first. `coherence` and `babel` = μ₁(1), μ₁(r),
    with μ₁(r) = max_j of the r largest |D_i·D_j|, summed (unit rows); `coactive_babel`: μ₁ over all
    the rows that are active on an image, mean over images. `effective_rank` = exp(entropy of the
    eigenvalues of zᵀz).

    The other sources of latents share x, so its numbers are NaN there. Memory
    O(max_images·(d + L0) + d² + m·C).
    """

    name = "feature_geometry"
    description = (
        "whether a child's direction is orthogonal to its parent's, in x and in the decoder"
    )
    higher_is_better = {
        "hierarchy_cosine": False,
        "random_parent_cosine": None,
        "parent_length": True,
        "projection_own": True,
        "projection_other": None,
        "edges": None,
        "n_nodes": None,
        "parent_cosine": False,
        "sibling_cosine": None,
        "random_cosine": None,
        "detected_edges": None,
        "coherence": False,
        "babel": False,
        "coactive_babel": False,
        "effective_rank": None,
    }
    ranges = {
        **dict.fromkeys(
            (
                "hierarchy_cosine",
                "random_parent_cosine",
                "parent_cosine",
                "sibling_cosine",
                "random_cosine",
                "coherence",
            ),
            summary.SHARE,
        ),
        **dict.fromkeys(
            ("parent_length", "babel", "coactive_babel", "effective_rank"), summary.POSITIVE
        ),
    }
    support = {
        **dict.fromkeys(
            ("hierarchy_cosine", "parent_length"), Support("edges", "edges of the tree")
        ),
        "projection_own": Support("n_nodes", "nodes"),
        "parent_cosine": Support("detected_edges", "edges with detectors"),
    }
    label_free = frozenset(
        {"random_cosine", "coherence", "babel", "coactive_babel", "effective_rank"}
    )
    invariant = label_free
    Options = FeatureGeometryOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._firings = self.context.share(FiringHistogram, survival=(1.0,))
        self._sample = self.context.share(ImageSample, max_images=self.options.max_images)
        # A node above all images has a whitened mean of 0, and one without images no mean.
        present = self.context.present
        self._tree = self.taxonomy.collapsed(present if present.any() else None)
        self._members = np.zeros((len(present), len(self._tree.nodes)), dtype=bool)
        self._members[present if present.any() else slice(None)] = self._tree.membership
        self._edges = self._choose_edges()

    def _choose_edges(self) -> np.ndarray:
        """(E, 2) parent and child in the collapsed tree, without edges from the root."""
        edges = [(p, v) for v, ps in enumerate(self._tree.parents) for p in ps if p != 0]
        order = np.random.default_rng(self.context.seed).permutation(len(edges))
        chosen = np.sort(order[: self.options.max_edges])
        return np.array(edges, dtype=np.int64).reshape(-1, 2)[chosen]

    @remembered
    def _whitened(self, shuffled: bool) -> np.ndarray:
        """(n, d) the sample of x, centred and whitened with the statistics of its fit half."""
        sample = self._sample.drawn(shuffled)
        x = sample.x.double().numpy()
        fit = x[sample.is_fit]
        if len(fit) < 2:
            return np.full_like(x, np.nan)
        mean = fit.mean(0)
        centred = fit - mean
        shrinkage, scale = ledoit_wolf(centred)
        covariance = (1 - shrinkage) * centred.T @ centred / len(fit)
        covariance[np.diag_indices_from(covariance)] += shrinkage * scale
        values, vectors = np.linalg.eigh(covariance)
        large = values > 1e-9 * max(values.max(), 1e-30)
        root = np.where(large, 1 / np.sqrt(np.where(large, values, 1)), 0)
        return (x - mean) @ (vectors * root) @ vectors.T

    def directions(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Directions:
        """The vectors of the edges' nodes, from the fit half, and projections of held-out images."""
        sample = self._sample.drawn(shuffled)
        labels, fit = sample.labels, sample.is_fit
        member = self._members[labels if permutation is None else permutation[labels]]
        x = self._whitened(shuffled and self._sample.draws_differ())
        x_held, member_held, member_fit = x[~fit], member[~fit].T, (member & fit[:, None]).T
        n_nodes = len(self._tree.nodes)
        vector = np.full((n_nodes, x.shape[1]), np.nan)
        own, other = np.full((2, n_nodes), np.nan)
        least = self.options.min_images
        for v in np.unique(self._edges):
            images, held = np.flatnonzero(member_fit[v]), member_held[v]
            if min(len(images), held.sum()) < max(least / 2, 2):
                continue
            rows = images[: self.options.node_images]
            found = node_vector(x[rows])
            length = found @ found
            if length > 0:
                vector[v] = found
                along = x_held @ found / length
                own[v] = along[held].mean()
                other[v] = summary.mean(along[~held])
        return Directions(vector, own, other)

    def _on_x(self, permutation: np.ndarray | None, shuffled: bool) -> dict[str, float]:
        names = (
            "hierarchy_cosine",
            "random_parent_cosine",
            "parent_length",
            "projection_own",
            "projection_other",
        )
        if self.context.source != "sae":
            return {**dict.fromkeys(names, float("nan")), "edges": 0.0, "n_nodes": 0.0}
        found = self.directions(permutation, shuffled)
        cosines = added_cosines(found.vector, self._edges)
        random = added_cosines(found.vector, self._random_parents)
        length, (parent, child) = np.linalg.norm(found.vector, axis=1), self._edges.T
        return {
            "hierarchy_cosine": summary.mean(np.abs(cosines)),
            "random_parent_cosine": summary.mean(np.abs(random)),
            # Nodes with the same images in the sample's fit half are one node: no edge.
            "parent_length": summary.mean(
                summary.ratio(length[parent], length[child]), np.isfinite(cosines)
            ),
            "projection_own": summary.mean(found.own),
            "projection_other": summary.mean(found.other),
            "edges": summary.count(cosines),
            "n_nodes": summary.count(found.own),
        }

    @cached_property
    def _random_parents(self) -> np.ndarray:
        """(E, 2) the edges, each parent replaced by a node that is not above the child."""
        generator = np.random.default_rng(self.context.seed + 1)
        members = self._tree.membership
        pairs = []
        parents = np.unique(self._edges[:, 0])
        for _, child in self._edges:
            above = (members[:, parents] | ~members[:, [child]]).all(0)
            others = parents[~above]
            others = others[others != child]
            if len(others):
                pairs.append((int(generator.choice(others)), int(child)))
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @remembered
    def detectors(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> np.ndarray:
        """(V,) the latent that represents each node of the collapsed tree, −1 where none does."""
        members = self._members
        found = find_detectors(
            self._firings.halves(shuffled),
            members if permutation is None else members[permutation],
            self._classes.fit(shuffled),
            self._classes.score(shuffled),
            1.0,
        )
        return np.where(found.f1 >= self.options.detector_f1, found.latent, -1)

    @cached_property
    def _rows(self) -> Tensor | None:
        """(m, d) the decoder, rows of length 1."""
        if self.context.W_dec is None:
            return None
        rows = self.context.W_dec.detach().float().cpu()
        return torch.nn.functional.normalize(rows, dim=1)

    def _of_latents(self, permutation: np.ndarray | None, shuffled: bool) -> dict[str, float]:
        names = ("parent_cosine", "sibling_cosine")
        if self._rows is None:
            return {**dict.fromkeys(names, float("nan")), "detected_edges": 0.0}
        latent = self.detectors(permutation, shuffled)
        parents = pair_cosines(self._rows, latent[self._edges])
        siblings = pair_cosines(self._rows, latent[self._siblings])
        return {
            "parent_cosine": summary.mean(parents),
            "sibling_cosine": summary.mean(siblings),
            "detected_edges": summary.count(parents),
        }

    @cached_property
    def _siblings(self) -> np.ndarray:
        """(S, 2) for each chosen edge, the child and another child of its parent."""
        generator = np.random.default_rng(self.context.seed + 2)
        pairs = []
        for parent, child in self._edges:
            others = [v for v in self._tree.children[parent] if v != child]
            if others:
                pairs.append((int(child), int(generator.choice(others))))
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @property
    @remembered
    def _fixed(self) -> dict[str, float]:
        """The metrics that depend on no label."""
        numbers = dict.fromkeys(self.invariant, float("nan"))
        z, generator = self._sample.drawn().z, np.random.default_rng(self.context.seed + 3)
        numbers["effective_rank"] = effective_rank(z[:RANK_IMAGES].toarray())
        living = np.unique(z.indices)
        if self._rows is None or len(living) < 2:
            return numbers
        pairs = generator.choice(living, size=(1000, 2))
        numbers["random_cosine"] = summary.mean(pair_cosines(self._rows, pairs))
        chosen = np.sort(generator.permutation(living)[: self.options.max_latents])
        sums = babel(self._rows[torch.from_numpy(chosen)], (1, self.options.babel))
        numbers["coherence"], numbers["babel"] = sums
        coactive = []
        for i in range(min(COACTIVE_IMAGES, len(z.indptr) - 1)):
            active = z.indices[z.indptr[i] : z.indptr[i + 1]]
            if len(active) > 1:
                rows = self._rows[torch.from_numpy(active.astype(np.int64))]
                gram = (rows @ rows.T).abs().fill_diagonal_(0)
                coactive.append(float(gram.sum(1).max()))
        numbers["coactive_babel"] = summary.mean(coactive)
        return numbers

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        self._check_shuffled(shuffled)
        return {
            **self._on_x(permutation, shuffled),
            **self._of_latents(permutation, shuffled),
            **self._fixed,
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`edges`: one row for each (parent, child) measured."""
        tree, (parent, child) = self._tree, self._edges.T
        nan = np.full(len(parent), np.nan)
        cosine, latent = nan, np.full(len(tree.nodes), -1)
        if self.context.source == "sae":
            cosine = added_cosines(self.directions().vector, self._edges)
        of_latents = nan
        if self._rows is not None:
            latent = self.detectors()
            of_latents = pair_cosines(self._rows, latent[self._edges])
        table = {
            "parent": [tree.label(v) for v in parent],
            "child": [tree.label(v) for v in child],
            "cosine": cosine,
            "parent_latent": latent[parent],
            "child_latent": latent[child],
            "latent_cosine": of_latents,
        }
        return {"edges": pd.DataFrame(table)}

    def figures(self) -> dict[str, Figure]:
        """`cosine`: of child − parent with the parent, and under permuted classes."""
        size = self._tree.n_leaves[self._edges[:, 0]]
        drawing = summary.figure(
            "Orthogonality of child and parent",
            "classes below the parent",
            "cos(ℓ child − ℓ parent, ℓ parent)",
        )
        draws = self.context.permutations[: 1 if self.context.source == "sae" else 0]
        drawn = [added_cosines(self.directions(p).vector, self._edges) for p in draws]
        for values, name, colour in (
            *((v, "permuted classes", summary.NULL) for v in drawn),
            (self.tables()["edges"]["cosine"], "edges", summary.VALUE),
        ):
            drawing.add_scatter(
                x=size, y=values, name=name, mode="markers", marker={"color": colour, "size": 5}
            )
        return {"cosine": drawing}


def ledoit_wolf(centred: np.ndarray) -> tuple[float, float]:
    """The shrinkage towards scale·I, and the scale, both scalar, for centred points (n, d).

    Ledoit and Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4; from the smaller of the
    (n, n) and (d, d) Gram matrices.
    """
    n, d = centred.shape
    gram = centred @ centred.T if n < d else centred.T @ centred
    scale = float(np.square(centred).sum() / n / d)
    squares = float(np.square(gram).sum() / n**2)  # ‖S‖²
    fourth = float(np.square(np.square(centred).sum(1)).sum() / n)
    spread = (squares - d * scale**2) / d
    noise = min((fourth - squares) / n / d, spread)
    return (noise / spread if spread > 1e-12 * scale**2 else 1.0), scale


def node_vector(x: np.ndarray) -> np.ndarray:
    """(d,) ℓ = (m·d̂)d̂ of a node's images x (n, d), d = Σ⁻¹m.

    The inverse uses the Woodbury identity: n is far below d for most nodes.
    """
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    shrinkage, scale = ledoit_wolf(centred)
    ridge = shrinkage * scale
    weight = (1 - shrinkage) / n
    if not ridge > 1e-9 * scale:  # no shrinkage: the pseudo-inverse
        direction = np.linalg.pinv(centred.T @ centred / n) @ mean
    elif weight > 0:
        inner = np.eye(n) * (ridge / weight) + centred @ centred.T
        direction = (mean - centred.T @ np.linalg.solve(inner, centred @ mean)) / ridge
    else:
        direction = mean
    length = np.linalg.norm(direction)
    if not length > 0:
        return np.zeros(d)
    unit = direction / length
    return (mean @ unit) * unit


def added_cosines(vector: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(E,) cos(ℓ_child − ℓ_parent, ℓ_parent) of edges (E, 2), parent first; NaN where undefined."""
    parent, child = vector[edges[:, 0]], vector[edges[:, 1]]
    added = child - parent
    lengths = np.linalg.norm(added, axis=1) * np.linalg.norm(parent, axis=1)
    return summary.ratio((added * parent).sum(1), lengths)


def pair_cosines(rows: Tensor, pairs: np.ndarray) -> np.ndarray:
    """(P,) |cos| of pairs (P, 2) of unit rows; NaN for −1 and for a latent with itself."""
    first, second = pairs.T
    cosine = np.full(len(pairs), np.nan)
    defined = np.flatnonzero((first >= 0) & (second >= 0) & (first != second))
    a, b = (rows[torch.from_numpy(side[defined].astype(np.int64))] for side in (first, second))
    cosine[defined] = (a * b).sum(1).abs().numpy()
    return cosine


def babel(rows: Tensor, sizes: tuple[int, ...]) -> list[float]:
    """μ₁(r) of unit rows (l, d) for each r of `sizes`: max over j, sum of the r largest |D_i·D_j|."""
    most = [0.0] * len(sizes)
    for start in range(0, len(rows), BLOCK):
        gram = (rows[start : start + BLOCK] @ rows.T).abs()
        own = torch.arange(len(gram))
        gram[own, own + start] = 0
        largest = gram.topk(min(max(sizes), gram.shape[1]), dim=1).values.cumsum(1)
        for i, r in enumerate(sizes):
            most[i] = max(most[i], float(largest[:, min(r, largest.shape[1]) - 1].max()))
    return most


def effective_rank(z: np.ndarray) -> float:
    """exp(entropy of the eigenvalues of zᵀz) of latents (n, m); NaN where all are 0."""
    if not z.any():
        return float("nan")
    z = z.astype(np.float64)
    values = np.linalg.eigvalsh(z @ z.T if len(z) < z.shape[1] else z.T @ z).clip(min=0)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
