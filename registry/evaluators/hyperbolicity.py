"""`hyperbolicity`: deviation of distances from those on a tree.

Gromov's four-point δ relative to the diameter, as in Khrulkov et al. 2020 (arXiv 1904.02239, §3)
and later work on hyperbolic category discovery.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from .base import ALL_NULLS, Evaluator, remembered, require_at_least
from .parts import summary
from .parts.samples import ImageSample
from .parts.sums import ActivationSums, LatentSums

SETS = ("class_means", "images", "decoder", "latent_means")
PAIRS = 512
"""Pairs of points that are evaluated at once."""


@dataclass(frozen=True)
class HyperbolicityOptions:
    """max_points: points of a set at most, at random; time is up to cubic.
    sample_images: size of the sample of x.
    bases: number of base points, over which the mean is taken.
    draws: number of Gaussian samples compared with each set.
    """

    max_points: int = 512
    sample_images: int = 512
    bases: int = 4
    draws: int = 2

    def __post_init__(self) -> None:
        require_at_least(4, self, "max_points", "sample_images")
        require_at_least(1, self, "bases", "draws")


class Hyperbolicity(Evaluator[HyperbolicityOptions]):
    """δ_rel = 2δ/diameter: 0 on a tree, 1 at the most.

    With Gromov products (a|b) = ½(d(a,w) + d(b,w) − d(a,b)) at a base point w,
    δ = max over a, b, c of min((a|c), (c|b)) − (a|b); Euclidean distances. Of four sets: the class
    means of x, images, the decoder's rows, and the class means of the latents. For
    comparison: Gaussian samples of equal size, mean and covariance, and the tree itself.

    Not a hierarchy score by itself: a small δ shows that a set is tree-like, not that its tree is
    the taxonomy, and any high-dimensional set of nearly equal distances is tree-like. The other
    sources of latents share x, so `class_means` and `images` are NaN there. Memory O(max_points²).
    """

    name = "hyperbolicity"
    description = "deviation of distances of means, images and decoder rows from tree distances"
    higher_is_better = {
        **{f"{kind}_{what}": None for kind in SETS for what in ("delta", "gaussian_delta")},
        "tree_delta": None,
    }
    ranges = dict.fromkeys(higher_is_better, summary.POSITIVE)
    nulls = {**ALL_NULLS, "permuted_classes": "points are compared with each other, with no tree"}
    invariant = frozenset(higher_is_better)
    label_free = invariant - {
        f"{kind}_{what}"
        for kind in ("class_means", "latent_means")
        for what in ("delta", "gaussian_delta")
    }
    Options = HyperbolicityOptions

    def prepare(self) -> None:
        self._latents = self.context.share(LatentSums)
        self._own_x = self.context.source == "sae"
        if self._own_x:
            self._activations = self.context.share(ActivationSums)
            self._images = self.context.share(ImageSample, max_images=self.options.sample_images)

    def points(self, kind: str, shuffled: bool = False) -> np.ndarray:
        """(n, width) the points of a set, without undefined ones."""
        if kind == "latent_means":
            points = self._latents.means(shuffled).T
        elif kind == "decoder":
            points = self._living_rows()
        elif not self._own_x:
            points = np.zeros((0, 1))
        elif kind == "class_means":
            points = self._activations.means(shuffled)
        else:
            points = self._images.drawn().x.double().numpy()
        points = points[np.isfinite(points).all(1)]
        if len(points) > self.options.max_points:
            kept = np.random.default_rng(self.context.seed).permutation(len(points))
            points = points[np.sort(kept[: self.options.max_points])]
        return points

    def _living_rows(self) -> np.ndarray:
        """(l, d_in) decoder rows of the latents that are active on some image: the others are as initialised."""
        rows = self.context.W_dec
        if rows is None:
            return np.zeros((0, 1))
        living = (self._latents.sums[0] != 0).any(1)
        return rows.detach()[living.to(rows.device)].double().cpu().numpy()

    def deltas(self, kind: str, shuffled: bool = False) -> tuple[float, float]:
        """δ_rel of a set, and of Gaussian samples of equal moments."""
        return self._deltas(kind, shuffled and kind in ("class_means", "latent_means"))

    @remembered
    def _deltas(self, kind: str, shuffled: bool) -> tuple[float, float]:
        points = self.points(kind, shuffled)
        generator = np.random.default_rng(self.context.seed)
        clouds = [gaussian_like(points, generator) for _ in range(self.options.draws)]
        gaussian = summary.mean([self._relative(distances(cloud)) for cloud in clouds])
        return self._relative(distances(points)), gaussian

    def _relative(self, distance: np.ndarray) -> float:
        return relative_delta(distance, self.options.bases, self.context.seed)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        self._check_shuffled(shuffled)
        numbers = {}
        for kind in SETS:
            numbers[f"{kind}_delta"], numbers[f"{kind}_gaussian_delta"] = self.deltas(
                kind, shuffled
            )
        return {**numbers, "tree_delta": self._tree_delta()}

    def _tree_delta(self) -> float:
        most = self.options.max_points
        kept = np.random.default_rng(self.context.seed).permutation(len(self.taxonomy.classes))
        kept = np.sort(kept[:most])
        return self._relative(self.taxonomy.tree_distance[np.ix_(kept, kept)].astype(float))

    def tables(self) -> dict[str, pd.DataFrame]:
        """`sets`: one row for each set, and one for the tree."""
        rows = [(kind, len(self.points(kind)), *self.deltas(kind)) for kind in SETS]
        rows.append(("tree", len(self.taxonomy.classes), self._tree_delta(), float("nan")))
        return {"sets": pd.DataFrame(rows, columns=["set", "points", "delta", "gaussian_delta"])}

    def figures(self) -> dict[str, Figure]:
        """`delta`: of each set, with Gaussian samples of equal moments."""
        table = self.tables()["sets"]
        drawing = summary.figure("Distance from a tree", "", "2δ / diameter")
        for column, name, colour in (
            ("delta", "points", summary.VALUE),
            ("gaussian_delta", "Gaussian of equal covariance", summary.NULL),
        ):
            drawing.add_bar(x=table["set"], y=table[column], name=name, marker={"color": colour})
        return {"delta": drawing}


def distances(points: np.ndarray) -> np.ndarray:
    """(n, n) Euclidean distances of points (n, width)."""
    centred = points - points.mean(0) if len(points) else points
    gram = centred @ centred.T
    square = np.diag(gram)
    return np.sqrt((square[:, None] + square - 2 * gram).clip(min=0))


def gaussian_like(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(n, width) Gaussian sample with the size, mean and covariance of points (n, width)."""
    if not len(points):
        return points
    mean = points.mean(0)
    weights = generator.standard_normal((len(points), len(points)))
    return mean + weights @ (points - mean) / np.sqrt(len(points))


def gromov_delta(distance: np.ndarray, base: int) -> float:
    """δ at one base point; distance (n, n). NaN where a distance is not a float32.

    A pair (a, b) contributes at most min(max over c ≠ a of (a|c), max over c ≠ b of (c|b)) − (a|b). Pairs are
    evaluated by this bound, the largest first, until no bound exceeds the greatest contribution: the
    same δ as from all triples, of which few are evaluated unless most pairs are alike. Memory
    O(n²), time O(n²) to O(n³).
    """
    to_base = distance[base]
    with np.errstate(over="ignore"):
        product = (0.5 * (to_base[:, None] + to_base - distance)).astype(np.float32)
    if not np.isfinite(product).all():
        return float("nan")
    others = product.copy()
    np.fill_diagonal(others, -np.inf)
    most = others.max(1)
    bound = np.triu(np.minimum(most[:, None], most) - product, 1).ravel()
    left = np.arange(len(bound))
    greatest = np.float32(0)
    while len(left := left[bound[left] > greatest]):
        order = np.argpartition(-bound[left], min(PAIRS, len(left)) - 1)
        a, b = np.divmod(left[order[:PAIRS]], len(product))
        through = np.minimum(product[a], product[b]).max(1)
        greatest = max(greatest, (through - product[a, b]).max())
        left = left[order[PAIRS:]]
    return float(greatest)


def relative_delta(distance: np.ndarray, bases: int = 4, seed: int = 0) -> float:
    """2δ/diameter, mean over base points; NaN for fewer than 4 points or a diameter of 0."""
    n = len(distance)
    if n < 4 or not distance.max() > 0:
        return float("nan")
    chosen = np.random.default_rng(seed).permutation(n)[:bases]
    return float(2 * np.mean([gromov_delta(distance, int(w)) for w in chosen]) / distance.max())
