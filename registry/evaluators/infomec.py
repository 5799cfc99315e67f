"""`infomec`: modularity, compactness and explicitness of latents, with tree depths as factors.

InfoM, InfoC and InfoE are those of Hsu et al. 2023, "Disentanglement via latent quantization"
(arXiv 2305.18378, §4); the groups at each depth as factors are our own definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from scipy import sparse
from scipy.special import xlogy
from torch import Tensor

from ..errors import ConfigError
from ..presentation import Support
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered, require_at_least
from .parts import summary
from .parts.accumulators import SURVIVAL, ClassCounts, FiringHistogram, NegativeCounts
from .parts.logistic import class_log_odds
from .parts.samples import ImageSample, shape


@dataclass(frozen=True)
class InfoMECOptions:
    """levels: a latent is quantised into "below 0", "silent" and one level per number, bounded by the
        activations that these shares of its firings reach; each is one of `accumulators.SURVIVAL`.
    max_images: size of the sample for InfoE.
    probe_latents: number of most variable latents that InfoE uses.
    steps: steps of its regression, at most.
    """

    levels: tuple[float, ...] = (1.0, 0.5, 0.125)
    max_images: int = 4096
    probe_latents: int = 512
    steps: int = 100

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        object.__setattr__(self, "levels", levels)
        falling = list(levels) == sorted(set(levels), reverse=True)
        if not falling or not levels or levels[0] != 1.0 or not set(levels) <= set(SURVIVAL):
            raise ConfigError(
                "levels",
                "not possible",
                given=levels,
                allowed=f"numbers that fall from 1.0, each one of {', '.join(map(str, SURVIVAL))}",
            )
        require_at_least(1, self, "max_images", "probe_latents", "steps")


class Information(NamedTuple):
    """Information of latents about factors, each (n_s, m); NaN where a factor has no entropy."""

    nested: np.ndarray  # I(s_i; z_j) / H(s_i)
    added: np.ndarray  # the same, conditional on the cut above

    @classmethod
    def of(cls, mutual: np.ndarray, entropy: np.ndarray) -> Information:
        """Normalise I (n_s, m) by H (n_s,) of nested factors, the coarsest first."""
        more = np.diff(mutual, axis=0, prepend=0)
        more[more <= 1e-9] = 0.0
        grown = np.diff(entropy, prepend=0)
        grown[grown <= 1e-9] = 0.0
        return cls(summary.ratio(mutual, entropy[:, None]), summary.ratio(more, grown[:, None]))


class InfoMEC(Evaluator[InfoMECOptions]):
    """Whether each latent encodes one depth, few latents encode each depth, and a probe can read it.

    Factors s_i: the group of an image at each cut of the tree that parts the classes with images
    anew, from coarse to the classes.
    z_j is quantised into levels, all below 0 into one. The cuts are nested, unlike the factors of the published measure:
    a group determines those above it. So the information that a depth *adds* is used, A_ij =
    (I(s_i; z_j) − I(s_{i−1}; z_j)) / (H(s_i) − H(s_{i−1})), which by the chain rule is the
    normalised information given the cut above (own definition).

    - `infom` = (mean over active latents of max_i A_ij / Σ_i A_ij − 1/n_s) / (1 − 1/n_s).
    - `infoc` = (mean over factors of max_j A_ij / Σ_j A_ij − 1/n_a) / (1 − 1/n_a), n_a latents with
      any information.
    - `infoe` = mean over factors of (H₀ − H)/H₀: H₀ the entropy of the factor, H the cross-entropy
      of a logistic regression on held-out images. One regression predicts the *class*; the
      probability of a group is the sum over its classes, so a permuted tree needs no second fit.
    - `nested_infom`, `nested_infoc`: the published forms, with I(s_i; z_j) / H(s_i) in place of A.
      Neither direction is better: indicators of the nodes score *below* indicators of random class
      sets, because a hierarchical latent is informative about several depths.

    No set of node indicators is fully modular: an indicator of one of many nodes at a depth is
    informative about the depths above. Read the excess over permuted classes. I is biased upwards
    by about levels·groups/(2·images), which the shuffled null measures. `infoc` decreases with the
    number of informative latents. Memory O(m·T·C + max_images·L0).
    """

    name = "infomec"
    description = "modularity, compactness and explicitness of latents for the depths of the tree"
    higher_is_better = {
        "infoe": True,
        "infom": True,
        "infoc": True,
        "nested_infom": None,
        "nested_infoc": None,
        "factors": None,
        "active": None,
    }
    ranges = {
        **dict.fromkeys(("infom", "infoc", "nested_infom", "nested_infoc"), summary.SHARE),
        "infoe": summary.SCORE,
    }
    support = {
        **dict.fromkeys(("infom", "infoc"), Support("active", "latents")),
        "infoe": Support("factors", "depths of the tree", least=1),
    }
    invariant = label_free = frozenset({"factors"})
    Options = InfoMECOptions

    def prepare(self) -> None:
        self._classes = self.context.share(ClassCounts)
        self._histogram = self.context.share(FiringHistogram, survival=SURVIVAL)
        self._negative = self.context.share(NegativeCounts)
        self._sample = self.context.share(ImageSample, max_images=self.options.max_images)

    @cached_property
    def depths(self) -> list[int]:
        """Depths of the cuts that are factors: distinct groupings of more than one group."""
        return factor_depths(self.taxonomy, self.context.present)

    def groups(self, permutation: np.ndarray | None = None) -> np.ndarray:
        """(n_s, C) the group of each class under each factor, numbered from 0."""
        place = np.arange(len(self.taxonomy.classes)) if permutation is None else permutation
        cuts = [np.unique(self.taxonomy.cut(t)[place], return_inverse=True)[1] for t in self.depths]
        return np.array(cuts, dtype=np.int64).reshape(len(cuts), len(place))

    def information(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Information:
        """Information of each latent about each factor, (n_s, m)."""
        self._check_shuffled(shuffled)
        images = self._classes.all(shuffled)
        counts = self._counts(shuffled)
        n_levels = len(self.options.levels) + (self._negative.of() is not None)
        groups = self.groups(permutation)
        found = [mutual_information(counts, n_levels, images, group) for group in groups]
        mutual = np.array([i for i, _ in found]).reshape(len(found), self.context.d_sae)
        entropy = np.array([h for _, h in found])
        return Information.of(mutual, entropy)

    @remembered
    def _counts(self, shuffled: bool) -> sparse.csr_array:
        below = self._negative.of(shuffled)
        return level_counts(self._histogram, self.options.levels, shuffled, below)

    def explicitness(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> np.ndarray:
        """(n_s,) (H₀ − H)/H₀ of each factor; NaN without held-out images of two groups."""
        sample = self._sample.drawn(shuffled)
        score = ~sample.is_fit
        labels = sample.labels[score]
        if not len(labels) or score.all():
            return np.full(len(self.depths), np.nan)
        log_odds = self._log_odds(shuffled)
        return np.array([explained(log_odds, labels, g) for g in self.groups(permutation)])

    @remembered
    def _log_odds(self, shuffled: bool) -> Tensor:
        """(a, C) log-probabilities of the classes for the score half of the sample; −∞ for those
        without images, which would take most of the probability where they are many."""
        sample = self._sample.drawn(shuffled)
        fit = sample.is_fit
        fit_z = sample.z[fit]
        squares = np.bincount(fit_z.indices, np.square(fit_z.data), self.context.d_sae)
        mean = np.bincount(fit_z.indices, fit_z.data, self.context.d_sae) / max(fit.sum(), 1)
        spread = squares / max(fit.sum(), 1) - mean**2
        chosen = np.sort(np.argsort(-spread, kind="stable")[: self.options.probe_latents])
        z = torch.from_numpy(sparse.csc_array(sample.z)[:, chosen].toarray())
        present = self.context.present
        among = torch.from_numpy((np.cumsum(present) - 1)[sample.labels])
        fitted = torch.from_numpy(fit)
        found = class_log_odds(
            z[fitted], among[fitted], z[~fitted], int(present.sum()), steps=self.options.steps
        )
        log_odds = torch.full((len(found), len(present)), -torch.inf)
        log_odds[:, torch.from_numpy(present)] = found
        return log_odds

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        information = self.information(permutation, shuffled)
        return {
            "infoe": summary.mean(self.explicitness(permutation, shuffled)),
            "infom": modularity(information.added),
            "infoc": compactness(information.added),
            "nested_infom": modularity(information.nested),
            "nested_infoc": compactness(information.nested),
            "factors": float(len(self.depths)),
            "active": float((np.nan_to_num(information.nested).sum(0) > 0).sum()),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`factors`: one row for each depth; `latents`: the main depth of each active latent."""
        information = np.nan_to_num(self.information().added)
        permutations = self.context.permutations
        permuted = [self.explicitness(p) for p in permutations]
        null = np.array(permuted).reshape(len(permuted), len(self.depths))
        groups = self.groups()
        factors = {
            "depth": self.depths,
            "groups": [len(np.unique(g)) for g in groups],
            "explicitness": self.explicitness(),
            "permuted": [summary.mean(column) for column in null.T],
        }
        if self.context.d_sae:
            factors["best_latent"] = information.argmax(1)
            factors["best_information"] = information.max(1)
        total = information.sum(0)
        latent = np.flatnonzero(total > 0)
        latents: dict[str, Any] = {"latent": latent}
        if len(self.depths):
            latents["depth"] = np.array(self.depths)[information[:, latent].argmax(0)]
            latents["information"] = information[:, latent].max(0)
            latents["share"] = latents["information"] / total[latent]
        return {"factors": pd.DataFrame(factors), "latents": pd.DataFrame(latents)}

    def figures(self) -> dict[str, Figure]:
        """`explicitness`: of each depth, with that under permuted classes dotted."""
        table = self.tables()["factors"]
        drawing = summary.figure(
            "Entropy explained by a linear probe on the latents", "depth of the cut", "(H₀ − H)/H₀"
        )
        drawing.update_xaxes(dtick=1)
        for column, name, line in (
            ("explicitness", "latents", {"color": summary.VALUE}),
            ("permuted", "permuted classes", {"color": summary.NULL, "dash": "dot"}),
        ):
            drawing.add_scatter(x=table["depth"], y=table[column], name=name, line=line)
        return {"explicitness": drawing}


def factor_depths(taxonomy: Taxonomy, present: np.ndarray | None = None) -> list[int]:
    """The depths whose cuts differ in their number of groups, from two groups up to the classes.

    Args:
        present: (C,) bool, the classes whose groups count; None: all.
    """
    counted = np.ones(len(taxonomy.classes), dtype=bool) if present is None else present
    depths, last = [], 1
    for t in range(1, taxonomy.max_depth + 1):
        groups = len(np.unique(taxonomy.cut(t)[counted]))
        if groups > last:
            depths.append(t)
            last = groups
    return depths


def level_counts(
    histogram: FiringHistogram,
    levels: Sequence[float],
    shuffled: bool = False,
    below: sparse.csr_array | None = None,
) -> sparse.csr_array:
    """(m·L, C) images of both halves in each level of each latent, lowest level first; with
    `below` (m, C), the images where a latent is below 0, (m·(L + 1), C), these last."""
    survival = np.array(histogram.thresholds.survival)
    level = np.searchsorted(-np.array(levels), -survival, side="right") - 1
    counts = histogram.both(shuffled)
    m = shape(counts)[0] // len(level)
    n_levels = len(levels) + (below is not None)
    # Rows of a latent are its bins from the highest down.
    row = (np.arange(m)[:, None] * n_levels + level[::-1]).ravel()
    rows = np.repeat(row, np.diff(counts.indptr))
    columns, values = counts.indices, counts.data
    if below is not None:
        of_latent = np.repeat(np.arange(m), np.diff(below.indptr))
        rows = np.append(rows, of_latent * n_levels + len(levels))
        columns, values = np.append(columns, below.indices), np.append(values, below.data)
    size = (m * n_levels, shape(counts)[1])
    return sparse.csr_array(
        sparse.coo_array((values, (rows, columns)), shape=size).astype(np.int32)
    )


def mutual_information(
    counts: sparse.csr_array, n_levels: int, images: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, float]:
    """I(s; z_j) of each latent (m,), and H(s), in nats; s is the group of an image's class.

    Only nonzero counts are read.

    Args:
        counts: (m·L, C) images in each level of a latent's firing; the rest are silent.
        images: (C,) images of each class.
        group: (C,) group of each class, numbered from 0.
    """
    n_groups = int(group.max(initial=-1)) + 1
    size = np.bincount(group, images, n_groups)
    n = size.sum()
    m = shape(counts)[0] // n_levels
    entropy = _nlogn(n) - _nlogn(size).sum()  # all in images · nats
    if entropy <= 1e-9 * max(n, 1):
        return np.zeros(m), 0.0
    belongs = sparse.csr_array(
        (np.ones(len(group)), (np.arange(len(group)), group)), shape=(len(group), n_groups)
    )
    joint = sparse.csr_array(counts @ belongs)  # (m·L, G)
    row = np.repeat(np.arange(m * n_levels), np.diff(joint.indptr))
    fires = sparse.csr_array(
        (joint.data, (row // n_levels, joint.indices)), shape=(m, n_groups)
    )  # levels of one latent and group add up
    fires.sum_duplicates()
    latent = np.repeat(np.arange(m), np.diff(fires.indptr))
    whole = size[fires.indices]
    silent = _nlogn(size).sum() + np.bincount(latent, _nlogn(whole - fires.data) - _nlogn(whole), m)
    in_cells = np.bincount(row // n_levels, _nlogn(joint.data), m) + silent
    level_size = np.bincount(row, joint.data, m * n_levels).reshape(m, n_levels)
    in_levels = _nlogn(level_size).sum(1) + _nlogn(n - level_size.sum(1))
    mutual = _nlogn(n) - in_levels - _nlogn(size).sum() + in_cells
    return np.where(mutual > 1e-9 * n, mutual / n, 0.0), float(entropy / n)


def _nlogn(counts: Any) -> Any:
    return xlogy(counts, counts)


def modularity(information: np.ndarray) -> float:
    """InfoM of information (n_s, m); NaN with fewer than two factors or without an active latent."""
    information = information[np.isfinite(information).all(1)]
    n_factors = len(information)
    total = information.sum(0)
    if n_factors < 2 or not (total > 0).any():
        return float("nan")
    share = information.max(0)[total > 0] / total[total > 0]
    return float((share.mean() - 1 / n_factors) / (1 - 1 / n_factors))


def compactness(information: np.ndarray) -> float:
    """InfoC of information (n_s, m); NaN with fewer than two active latents."""
    information = information[np.isfinite(information).all(1)]
    n_active = int((information.sum(0) > 0).sum())
    if n_active < 2:
        return float("nan")
    total = information.sum(1)
    share = summary.mean(information.max(1)[total > 0] / total[total > 0])
    return float((share - 1 / n_active) / (1 - 1 / n_active))


def explained(log_odds: Tensor, labels: np.ndarray, group: np.ndarray) -> float:
    """(H₀ − H)/H₀ of one factor, from log-probabilities of the classes (a, C)."""
    truth = group[labels]
    share = np.bincount(truth) / len(truth)
    entropy = -xlogy(share, share).sum()
    if entropy <= 1e-9:
        return float("nan")
    belongs = torch.from_numpy(group[None] == truth[:, None])
    right = log_odds.masked_fill(~belongs, -torch.inf).logsumexp(1)
    return float((entropy + right.double().mean().item()) / entropy)
