"""`tree_probe`: a linear map under which distances between class means become those in the tree.

The distance probe of Hewitt and Manning 2019 (https://aclanthology.org/N19-1419) and the AST-Probe
(arXiv 2206.11719), ported to taxonomies and fitted in closed form: own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy import sparse
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata

from ..errors import ConfigError
from ..presentation import Support, support_of_all
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts
from .parts.ranks import pearson
from .parts.sums import ActivationSums, LatentSums

FEATURES = ("z", "x")
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class TreeProbeOptions:
    """splits: number of random divisions of the classes into fitted and held-out ones.
    asked_share: share of the classes held out in each split.
    rank: dimensions of the map; more where the last one has the same eigenvalue as the next.
    """

    splits: int = 5
    asked_share: float = 0.3
    rank: int = 64

    def __post_init__(self) -> None:
        require_at_least(1, self, "splits", "rank")
        if not 0 < self.asked_share < 1:
            raise ConfigError(
                "asked_share", "out of range", given=self.asked_share, allowed="a number in (0, 1)"
            )


class Split(NamedTuple):
    """One division of the leaves of the tree, and the tree over the held-out ones."""

    fitted: np.ndarray
    asked: np.ndarray  # the held-out ones
    members: np.ndarray  # (asked, nodes) of the collapsed tree over the held-out leaves
    edges: frozenset[tuple[int, int]]  # between these nodes


class Fitted(NamedTuple):
    """Scores of a probe, means over the splits."""

    spearman: float  # on held-out classes
    euclidean: float  # the same pairs, without the map
    in_sample: float  # on the fitted classes
    uuas: float
    euclidean_uuas: float
    ceiling: float


UNDEFINED = Fitted(*[float("nan")] * 6)


class TreeProbe(Evaluator[TreeProbeOptions]):
    """Rank correlation of probe and tree distances, on held-out classes.

    The probe is B with ‖B(h_a − h_b)‖² ≈ tree distance of a and b, h the class means. Square roots
    of tree distances are Euclidean, so classical scaling places the fitted classes at points
    whose squared distances equal those of the tree; B is the ridge regression of these points on h,
    its ridge chosen by leave-one-class-out error.

    - `*_spearman`: over the pairs of held-out classes, mean over the splits; `*_euclidean`: without
      the map; `*_excess`: the difference. `*_in_sample`: on the fitted classes, for comparison: it
      approaches its ceiling for any tree.
    - `ceiling`: the largest rank correlation with the tree distances of distances without ties;
      below 1, as many pairs of classes have equal tree distances.
    - `*_uuas`: share of the edges of the collapsed tree over the held-out classes that are in the
      minimum spanning tree of probe distances, a node placed at the mean of its classes (over the
      leaves alone the spanning tree is not unique). Since inner nodes are means of the classes
      below, `*_euclidean_uuas`, without the map, is a strong null.

    `n_classes`: held-out classes with images, mean over the splits. `x_*` describes the model and not the SAE; `z_*` are the class means of the latents. The other
    sources of latents share x, so `x_*` is NaN there. NaN with fewer than 4 held-out or
    fitted classes. Memory O(C·(d + m) + C²).
    """

    name = "tree_probe"
    description = "a linear map under which distances between class means are those in the tree"
    higher_is_better = {
        **{
            f"{feature}_{measure}": better
            for feature in FEATURES
            for measure, better in (
                ("spearman", True),
                ("euclidean", True),
                ("excess", True),
                ("in_sample", None),
                ("uuas", True),
                ("euclidean_uuas", True),
            )
        },
        "ceiling": None,
        "n_classes": None,
    }
    ranges = {
        **dict.fromkeys(
            (
                "z_spearman",
                "z_euclidean",
                "z_in_sample",
                "x_spearman",
                "x_euclidean",
                "x_in_sample",
            ),
            summary.COSINE,
        ),
        **dict.fromkeys(
            ("z_uuas", "z_euclidean_uuas", "x_uuas", "x_euclidean_uuas"), summary.SHARE
        ),
    }
    support = support_of_all(higher_is_better, Support("n_classes", "held-out classes", least=5))
    invariant = frozenset({"n_classes"})
    Options = TreeProbeOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._sums: dict[str, ActivationSums | LatentSums] = {"z": self.context.share(LatentSums)}
        if self.context.source == "sae":
            self._sums["x"] = self.context.share(ActivationSums)

    @cached_property
    def splits(self) -> list[Split]:
        """Divisions of leaves, the same for every permutation, so that results are comparable."""
        n_classes = len(self.taxonomy.classes)
        n_asked = round(self.options.asked_share * n_classes)
        if n_asked < 4 or n_classes - n_asked < 4:
            return []
        generator = np.random.default_rng(self.context.seed)
        splits = []
        for _ in range(self.options.splits):
            order = generator.permutation(n_classes)
            splits.append(self._split(np.sort(order[n_asked:]), np.sort(order[:n_asked])))
        return splits

    def _split(self, fitted: np.ndarray, asked: np.ndarray) -> Split:
        below = self.taxonomy.restrict([self.taxonomy.classes[c] for c in asked]).collapsed()
        pairs = [(p, v) for v, p in enumerate(below.primary_parent.tolist()) if p >= 0]
        return Split(fitted, asked, below.membership, frozenset(pairs))

    @remembered
    def fitted(
        self, feature: str, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Fitted:
        """The probe of one feature."""
        if feature not in self._sums:
            return UNDEFINED
        means = self._means(feature, shuffled)
        if permutation is not None:  # the class at each leaf
            means = means[np.argsort(permutation)]
        found = [self._ask(means, split) for split in self.splits] or [UNDEFINED]
        return Fitted(*(summary.mean(column) for column in zip(*found)))

    @remembered
    def _means(self, feature: str, shuffled: bool) -> np.ndarray:
        """(C, w) class means, NaN for a class without images; the same for every permutation.

        Where w would exceed C they are in coordinates of their span, which have the same distances and
        products.
        """
        means = self._sums[feature].means(shuffled)
        means = (means.T if feature == "z" else means).astype(np.float64)
        known = np.all(np.isfinite(means), axis=1)
        if means.shape[1] <= len(means) or not known.any():
            return means
        spanning = np.full((len(means), np.count_nonzero(known)), np.nan)
        spanning[known] = np.asarray(np.linalg.qr(means[known].T, mode="r")).T
        return spanning

    def _ask(self, means: np.ndarray, split: Split) -> Fitted:
        known = np.all(np.isfinite(means), axis=1)
        fitted = split.fitted[known[split.fitted]]
        seen = known[split.asked]
        asked = split.asked[seen]
        if min(len(fitted), len(asked)) < 4 or not means.shape[1]:
            return UNDEFINED
        coordinates = self._coordinates(fitted)
        mapped = ridge_map(
            means[fitted], coordinates, np.concatenate([means[fitted], means[asked]])
        )
        own, new = mapped[: len(fitted)], mapped[len(fitted) :]
        wanted, ceiling = self._pairs(asked)
        uuas, plain_uuas = float("nan"), float("nan")
        if seen.all():
            uuas, plain_uuas = spanned(new, split), spanned(means[asked], split)
        return Fitted(
            pearson(rankdata(pdist(new, "sqeuclidean")), wanted),
            pearson(rankdata(pdist(means[asked], "sqeuclidean")), wanted),
            pearson(rankdata(pdist(own, "sqeuclidean")), self._pairs(fitted)[0]),
            uuas,
            plain_uuas,
            ceiling,
        )

    @remembered
    def _pairs(self, places: np.ndarray) -> tuple[np.ndarray, float]:
        """Ranks of the tree distances of all pairs of these leaves, and their `tie_ceiling`."""
        distance = self.taxonomy.tree_distance[np.ix_(places, places)].astype(np.float64)
        pairs = squareform(distance, checks=False)
        return rankdata(pairs), tie_ceiling(pairs)

    @remembered
    def _coordinates(self, places: np.ndarray) -> np.ndarray:
        """(n, r) `scaled_points` of these n leaves, the same for every permutation."""
        distance = self.taxonomy.tree_distance[np.ix_(places, places)].astype(np.float64)
        return scaled_points(distance, self.options.rank)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = {}
        for feature in FEATURES:
            found = self.fitted(feature, permutation, shuffled)._asdict()
            ceiling = found.pop("ceiling")
            numbers |= {f"{feature}_{k}": v for k, v in found.items()}
            numbers[f"{feature}_excess"] = found["spearman"] - found["euclidean"]
            if feature == "z":
                numbers["ceiling"] = ceiling
        images = self._classes.all(shuffled)
        placed = images if permutation is None else images[np.argsort(permutation)]
        numbers["n_classes"] = summary.mean(
            [np.count_nonzero(placed[split.asked]) for split in self.splits]
        )
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`features`: the scores on x and on z, with those under permuted classes."""
        rows = []
        for feature in FEATURES:
            null = [self.fitted(feature, p) for p in self.context.permutations]
            for measure, value in self.fitted(feature)._asdict().items():
                permuted = summary.mean([getattr(n, measure) for n in null])
                rows.append((feature, measure, value, permuted))
        return {"features": pd.DataFrame(rows, columns=["feature", "measure", "value", "permuted"])}

    def figures(self) -> dict[str, Figure]:
        """`spearman`: with and without the map, and under permuted classes."""
        table = self.tables()["features"]
        table = table[table["measure"].isin(["spearman", "euclidean"])]
        drawing = summary.figure("Tree distance between classes", "", "rank correlation")
        for column, name, colour in (
            ("value", "classes", summary.VALUE),
            ("permuted", "permuted classes", summary.NULL),
        ):
            drawing.add_bar(
                x=table["feature"] + ", " + table["measure"],
                y=table[column],
                name=name,
                marker={"color": colour},
            )
        return {"spearman": drawing}


def scaled_points(distance: np.ndarray, rank: int) -> np.ndarray:
    """(n, r) centred points with squared distances nearest to `distance` (classical scaling).

    r is at most `rank`, or ends with the eigenvalues equal to the last one: a cut inside of them would
    keep directions that are chosen by rounding.
    """
    centred = distance - distance.mean(0)
    gram = -0.5 * (centred - centred.mean(1, keepdims=True))
    values, vectors = np.linalg.eigh(gram)
    tolerance = 1e-9 * max(values.max(), 1e-30)
    last = np.sort(values)[-min(rank, len(values))]
    kept = np.flatnonzero(values > max(last - tolerance, tolerance))[::-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def ridge_map(fitted: np.ndarray, points: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """(a, r) predictions for `held_out` (a, w) of a ridge regression of `points` (n, r) on `fitted`
    (n, w).

    The ridge, relative to the mean squared length of `fitted`, is the one of `RIDGES` with the
    least leave-one-out error.
    """
    mean = fitted.mean(0)
    centred = fitted - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = values.clip(min=0)
    scale = values.mean()
    if not scale > 1e-12 * np.square(fitted).sum(1).mean():  # constant, up to rounding
        return np.zeros((len(held_out), points.shape[1]))
    turned, squares = vectors.T @ points, vectors**2
    best, least = None, np.inf
    for ridge in RIDGES:
        weight = 1 / (values + ridge * scale)
        # 1/n: the leverage of the estimated mean.
        leverage = 1 / len(fitted) + squares @ (values * weight)
        rest = points - vectors @ ((values * weight)[:, None] * turned)
        error = np.square(rest / (1 - leverage).clip(min=1e-6)[:, None]).sum()
        if error < least:
            best, least = vectors @ (weight[:, None] * turned), error
    assert best is not None
    return (held_out - mean) @ (centred.T @ best)


def tie_ceiling(values: np.ndarray) -> float:
    """The largest rank correlation of numbers without ties with values (n,).

    It is √(1 − Σ(t³ − t)/(n³ − n)), t the sizes of the groups of tied values.
    """
    n = float(len(values))
    ties = np.unique(values, return_counts=True)[1].astype(float)
    return float(np.sqrt(1 - (ties**3 - ties).sum() / (n**3 - n)))


def spanned(points: np.ndarray, split: Split) -> float:
    """The share of the tree's edges that are in the minimum spanning tree of the nodes' points.

    NaN without edges, and where all points are equal.
    """
    if not split.edges or np.ptp(points, axis=0).max(initial=0) <= 1e-6 * np.abs(points).max(
        initial=0
    ):
        return float("nan")
    members = split.members.astype(np.float64)
    nodes = members.T @ points / members.sum(0)[:, None]
    distance = pdist(nodes)
    # A stored 0 is "no edge" to scipy; the spanning tree depends on the order alone.
    _, second = np.triu_indices(len(nodes), 1)
    ends = np.append(0, np.cumsum(np.arange(len(nodes))[::-1]))
    index = (second.astype(np.int32), ends.astype(np.int32))  # scipy 1.13 takes no other
    pairs = sparse.csr_array((1 + distance / distance.max(), *index), shape=(len(nodes),) * 2)
    first, second = minimum_spanning_tree(pairs).nonzero()
    found = set(zip(first.tolist(), second.tolist()))
    return float(np.mean([(min(e), max(e)) in found for e in split.edges]))
