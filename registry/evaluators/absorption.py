"""`absorption`: whether a node's latent is silent where a more specific latent fires instead.

The measure is that of SAEBench (Karvonen et al. 2025, arXiv 2503.09532, after Chanin et al. 2024,
arXiv 2409.14507), defined for the first letters of words; its port to taxonomy nodes is our own
definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from scipy import sparse
from torch import Tensor

from .. import hashing
from ..errors import ConfigError
from ..presentation import Support
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.logistic import LogisticProber, best_threshold, f1_score, sparse_logistic
from .parts.samples import ImageSample, shape

FULL_COSINE, FRACTION_COSINE, LEAST_SHARE, N_ABSORBING = 0.025, 0.1, 0.4, 3
"""Constants of SAEBench: least cosine of an absorbing latent (full, fraction), least share of the
probe's projection that it accounts for, number of absorbing latents."""
SALT = 103


@dataclass(frozen=True)
class AbsorptionOptions:
    """max_images: size of the sample on which probes are fitted and absorption is measured.
    max_nodes: nodes tried at most, chosen at random; None tries every node.
    min_images: least number of images of a node in either half of the sample.
    probe_f1: F1 on held-out images that the probe of a kept node exceeds.
    main_rise: least increase of F1 for which a main latent is added.
    max_main: main latents of a node, at most.
    """

    max_images: int = 4096
    max_nodes: int | None = None
    min_images: int = 15
    probe_f1: float = 0.6
    main_rise: float = 0.03
    max_main: int = 10

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_images", "max_nodes", "min_images", "max_main")
        for field in ("probe_f1", "main_rise"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(
                    field, "out of range", given=getattr(self, field), allowed="a number in [0, 1)"
                )


class Probed(NamedTuple):
    """The probes of k nodes."""

    node: np.ndarray  # (k,)
    member: np.ndarray  # (n, k) whether an image of the sample shows the node
    predicted: np.ndarray  # (n, k) prediction of the probe
    direction: Tensor  # (k, d), of length 1
    f1: np.ndarray  # (k,) on the score half


class Absorbed(NamedTuple):
    """Absorption per image, each (t,)."""

    full: np.ndarray  # bool
    fraction: np.ndarray


class Absorption(Evaluator[AbsorptionOptions]):
    """Full and fractional absorption of the nodes with a linear probe.

    For each node v with several classes below it, on less than a third of the images: a logistic
    probe w on x, with a threshold chosen on fit images held out from its fit. v is kept if its F1
    on the score half exceeds `probe_f1`. The *main latents* are those of k-sparse probing: in order of their
    standardised difference of means, added while F1 increases by `main_rise`.

    On the true positives of the probe in the score half, with ŵ = w/‖w‖, P = (x − b_dec)·ŵ > 0 and
    proj_j = z_j (D_j·ŵ):

    - *full*: no main latent fires; the latent of largest proj has cos(D_j, ŵ) ≥ .025 and is at
      least .4 of P.
    - *fraction*: A = sum of the 3 largest proj of other latents with cos ≥ .1, M = that of the main
      latents: 0 if M ≥ P or A/P < .4; 1 if M ≤ 0; else A'/(A' + M) with A' = min(A, P − M).

    A dead SAE has the best value 0, and an unexplained residual does not count as absorption: read
    both with `reconstructed_share`, Σ proj / P, and `nodes`, the number of nodes kept. Everything
    but the probes is NaN without a decoder. Memory O(max_images·(d + L0) + nodes·m).
    """

    name = "absorption"
    description = "whether a node's latent is silent where a more specific latent fires instead"
    higher_is_better = {
        "full_absorption": False,
        "fraction_absorption": False,
        "reconstructed_share": None,
        "nodes": None,
        "nodes_tried": None,
        "probe_f1": None,
        "main_f1": None,
        "main_latents": None,
    }
    ranges = {
        **dict.fromkeys(
            ("full_absorption", "fraction_absorption", "probe_f1", "main_f1"), summary.SHARE
        ),
    }
    support = dict.fromkeys(("full_absorption", "fraction_absorption"), Support("nodes", "nodes"))
    Options = AbsorptionOptions

    def prepare(self) -> None:
        self._sample = self.context.share(ImageSample, max_images=self.options.max_images)
        nodes, size = self.context.distinct_nodes()
        self._nodes = np.random.default_rng(self.context.seed).permutation(nodes[size > 1])

    def nodes(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(N,) the nodes tried."""
        present, counts = self.context.present, self.context.class_counts
        # Images of each class in the sample, up to a common factor.
        most = self.options.max_images / max(present.sum(), 1)
        images = present.astype(float) if counts is None else np.minimum(counts, most)
        # For a third of the images or more, always predicting "yes" has F1 ≥ .5.
        rare = 3 * (images @ self.members(self._nodes, permutation)) < images.sum()
        return np.sort(self._nodes[rare][: self.options.max_nodes])

    @remembered
    def _halves(self, shuffled: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of images for fitting probes, for choosing thresholds, and of the score half."""
        sample = self._sample.drawn(shuffled)
        fit = np.flatnonzero(sample.is_fit)
        held = hashing.uniform(sample.index[fit], SALT) < 0.25
        return fit[~held], fit[held], np.flatnonzero(~sample.is_fit)

    @remembered
    def _prober(self, shuffled: bool) -> LogisticProber:
        train, _, _ = self._halves(shuffled)
        return LogisticProber(self._sample.drawn(shuffled).x[torch.from_numpy(train)])

    @remembered
    def _latents(self, shuffled: bool) -> tuple[sparse.csr_array, sparse.csr_array]:
        """(n, m) latents of the images for fitting probes and for choosing thresholds."""
        train, choose, _ = self._halves(shuffled)
        z = self._sample.drawn(shuffled).z
        return z[train], z[choose]

    def probe(self, permutation: np.ndarray | None = None, shuffled: bool = False) -> Probed:
        """The probes of the nodes with enough images."""
        sample = self._sample.drawn(shuffled)
        own = shuffled and self._sample.draws_differ()  # else those of the true labels
        labels = sample.labels
        if permutation is not None:
            labels = permutation[labels]
        nodes = self.nodes(permutation)
        member = self.taxonomy.membership[labels][:, nodes]
        train, choose, score = halves = self._halves(own)
        least = self.options.min_images
        train_, choose_, score_ = (member[rows].sum(0) for rows in halves)
        kept = (train_ + choose_ >= least) & (score_ >= least) & (train_ > 0) & (choose_ > 0)
        member = member[:, kept]
        if not member.shape[1]:
            none = np.zeros(0)
            return Probed(nodes[kept], member, member, torch.zeros(0, 1), none)
        probes = self._prober(own).fit(torch.from_numpy(member[train]))
        scores = (sample.x @ probes.weight.T + probes.bias).numpy()
        threshold = [best_threshold(s[choose], y[choose])[0] for s, y in zip(scores.T, member.T)]
        predicted = scores > threshold
        f1 = np.array([f1_score(a[score], b[score]) for a, b in zip(predicted.T, member.T)])
        direction = torch.nn.functional.normalize(probes.weight, dim=1)
        return Probed(nodes[kept], member, predicted, direction, f1)

    @remembered
    def measure(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> pd.DataFrame:
        """One row for each node with enough images; NaN absorption where the probe fails."""
        probed = self.probe(permutation, shuffled)
        table = {
            "node": probed.node,
            "probe_f1": probed.f1,
            "passed": probed.f1 > self.options.probe_f1,
        }
        numbers = ("full", "fraction", "reconstructed_share", "true_positives", "main_f1")
        for column in (*numbers, "main_latents", "absorber"):
            table[column] = np.full(len(probed.node), np.nan)
        passed = np.flatnonzero(table["passed"])
        decoder = self.context.W_dec
        if decoder is None or not len(passed) or not self.context.d_sae:
            return pd.DataFrame(table)
        decoder = decoder.detach().float().cpu()
        sample = self._sample.drawn(shuffled)
        own = shuffled and self._sample.draws_differ()
        train, choose, score = self._halves(own)
        z = sample.z
        mains, main_f1 = main_latents(
            *self._latents(own),
            probed.member[train][:, passed],
            probed.member[choose][:, passed],
            rise=self.options.main_rise,
            most=self.options.max_main,
        )
        x = self.context.as_decoded(sample.x)
        if self.context.b_dec is not None:
            x = x - self.context.b_dec.detach().float().cpu()
        gain = (decoder @ probed.direction[passed].T).numpy()
        cosine = gain / decoder.norm(dim=1).clamp(min=1e-12).numpy()[:, None]
        for i, v in enumerate(passed):
            rows = score[(probed.member & probed.predicted)[score, v]]
            target = (x[torch.from_numpy(rows)] @ probed.direction[v]).numpy()
            rows, target = rows[target > 0], target[target > 0]
            table["true_positives"][v], table["main_latents"][v] = len(rows), len(mains[i])
            table["main_f1"][v] = main_f1[i]
            if len(rows):
                columns, dense = active_part(z[rows], mains[i])
                main = np.isin(columns, mains[i])
                found = absorbed(dense, gain[columns, i], cosine[columns, i], main, target)
                projection = dense * gain[columns, i]
                table["full"][v] = found.full.mean()
                table["fraction"][v] = found.fraction.mean()
                table["reconstructed_share"][v] = projection.sum() / target.sum()
                others = np.where(main, -np.inf, projection.sum(0))
                if not main.all():
                    table["absorber"][v] = columns[others.argmax()]
        return pd.DataFrame(table)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        table = self.measure(permutation, shuffled)
        return {
            "full_absorption": summary.mean(table["full"]),
            "fraction_absorption": summary.mean(table["fraction"]),
            "reconstructed_share": summary.mean(table["reconstructed_share"]),
            "nodes": float(np.sum(table["passed"].to_numpy())),
            "nodes_tried": float(len(table)),
            "probe_f1": summary.mean(table["probe_f1"]),
            "main_f1": summary.mean(table["main_f1"]),
            "main_latents": summary.mean(table["main_latents"]),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`nodes`: every node tried, with the permuted classes.

        `absorber`: the latent other than the main ones with the largest total projection.
        """
        table = self.measure().copy()
        permuted = [
            self.measure(p).set_index("node")["fraction"] for p in self.context.permutations
        ]
        null: Any = pd.concat([*permuted, pd.Series(dtype=float)])
        mean: Any = null.groupby(level=0).mean()
        table["permuted_fraction"] = mean.reindex(table["node"]).to_numpy(dtype=float)
        taxonomy, node = self.taxonomy, table["node"].to_numpy()
        table["node"] = [taxonomy.nodes[v] for v in node]
        table.insert(1, "name", [taxonomy.label(v) for v in node])
        table.insert(2, "classes", taxonomy.n_leaves[node])
        return {"nodes": table}

    def figures(self) -> dict[str, Figure]:
        """`fraction`: of each node against its number of classes, and under permuted classes."""
        table = self.tables()["nodes"]
        drawing = summary.figure(
            "Absorption of each node", "classes below the node", "fraction absorbed"
        )
        for column, name, colour in (
            ("permuted_fraction", "permuted classes", summary.NULL),
            ("fraction", "nodes", summary.VALUE),
        ):
            drawing.add_scatter(
                x=table["classes"],
                y=table[column],
                text=table["name"],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 6},
            )
        return {"fraction": drawing}


def absorbed(
    z: np.ndarray, gain: np.ndarray, cosine: np.ndarray, main: np.ndarray, target: np.ndarray
) -> Absorbed:
    """Full and fractional absorption, each (t,), on images of one node.

    Args:
        z: (t, l) latents, including every one that fires on these images.
        gain, cosine: (l,) D_j·ŵ and the cosine of D_j and ŵ.
        main: (l,) bool, whether a latent is a main one.
        target: (t,) P, above 0.
    """
    projection = z * gain
    silent = (z[:, main] == 0).all(1)
    top = projection.argmax(1)
    largest = projection[np.arange(len(top)), top]
    full = silent & (cosine[top] >= FULL_COSINE) & (largest >= LEAST_SHARE * target)

    near = np.where(~main & (cosine >= FRACTION_COSINE), projection, 0.0)
    count = min(N_ABSORBING, near.shape[1])
    absorbing = np.partition(near, near.shape[1] - count, axis=1)[:, -count:].sum(1)
    by_main = projection[:, main].sum(1)
    bounded = np.minimum(absorbing, target - by_main)
    both = np.where(by_main > 0, bounded + by_main, 1.0)
    fraction = np.where(by_main > 0, bounded / both, 1.0)
    none = (by_main >= target) | (absorbing < LEAST_SHARE * target)
    return Absorbed(full, np.where(none, 0.0, fraction))


def active_part(z: sparse.csr_array, always: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents (l,) that fire in z or are in `always`, and the dense (t, l) z of these."""
    columns = np.union1d(np.unique(z.indices), always)
    return columns, sparse.csc_array(z)[:, columns].toarray()


def main_latents(
    train: sparse.csr_array,
    choose: sparse.csr_array,
    train_truth: np.ndarray,
    choose_truth: np.ndarray,
    *,
    rise: float = 0.03,
    most: int = 10,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The latents that jointly detect each of g nodes, by k-sparse probing, and their F1 (g,).

    Latents are tried in the order of (mean on the node − mean elsewhere) / deviation. The k-th is
    added while the F1 of a logistic regression over the first k, on held-out images, increases by
    `rise`.

    Args:
        train, choose: (n, m) latents; truth: (n, g) bool.
    """
    k = min(most, shape(train)[1])
    ordered = order_latents(train, train_truth)[:, :k]
    chosen = [np.zeros(0, dtype=np.int64)] * len(ordered)
    best = np.zeros(len(ordered))
    rising = np.arange(len(ordered))
    columns, place = np.unique(ordered, return_inverse=True)
    place = place.reshape(ordered.shape)
    dense = [sparse.csr_array(part[:, columns]).toarray() for part in (train, choose)]
    for size in range(1, k + 1):
        if not len(rising):
            break
        both = [
            np.ascontiguousarray(part[:, place[rising, :size]].swapaxes(0, 1)) for part in dense
        ]
        truth = torch.from_numpy(train_truth[:, rising].T)
        features, held_out = map(torch.from_numpy, both)
        scores = sparse_logistic(features, held_out, truth).numpy()
        reached = np.array(
            [best_threshold(s, choose_truth[:, g])[1] for s, g in zip(scores, rising)]
        )
        better = reached >= best[rising] + (rise if size > 1 else 0.0)
        rising, reached = rising[better], reached[better]
        best[rising] = reached
        for g in rising:
            chosen[g] = ordered[g, :size]
    return chosen, best


def order_latents(z: sparse.csr_array, truth: np.ndarray) -> np.ndarray:
    """(g, m) latents by decreasing standardised difference of means; z (n, m), truth (n, g) bool."""
    n = len(truth)
    inside = truth.sum(0)[:, None]
    total = z.sum(0)
    sums = truth.T.astype(np.float32) @ z
    squares = sparse.csr_array((np.square(z.data), z.indices, z.indptr), shape=shape(z)).sum(0)
    deviation = np.sqrt((squares / n - (total / n) ** 2).clip(min=0))
    difference = summary.ratio(sums, inside) - summary.ratio(total - sums, n - inside)
    score = np.where(deviation > 0, difference / np.where(deviation > 0, deviation, 1), -np.inf)
    return np.argsort(-score, axis=1, kind="stable")
