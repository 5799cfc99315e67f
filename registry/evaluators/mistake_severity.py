"""`mistake_severity`: how far from the true class, in the tree, the predictions of probes are.

Mistake severity and the hierarchical distance of the top k are those of Bertinetto et al. 2020 (arXiv
1912.09393); hierarchical precision, recall and F1 those of Kiritchenko et al. 2006
(https://doi.org/10.1007/11766247_34). The probes are those of `level_information`.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from ..presentation import Headline, Support, support_of_all
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered
from .parts import summary
from .parts.class_probes import PROBES, TOPS, ClassProbes, ProbeOptions

FEATURES = ("x", "z")
OF_CONFUSION = {
    "mistake_severity": False,
    "distance_1": False,
    "hierarchical_precision": True,
    "hierarchical_recall": True,
    "hierarchical_f1": True,
}
"""Measures of both probes -> direction."""


class Counts(NamedTuple):
    """Images by true and by predicted class, each (P,)."""

    truth: np.ndarray
    guess: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray) -> Counts:
        """Those of counts (C, C) that are not 0."""
        truth, guess = np.nonzero(counts)
        return cls(truth, guess, counts[truth, guess].astype(np.float64))

    def at(self, permutation: np.ndarray | None) -> Counts:
        """The same where class c takes the position of class permutation[c]; None: as they are."""
        if permutation is None:
            return self
        return Counts(permutation[self.truth], permutation[self.guess], self.images)


class MistakeSeverity(Evaluator[ProbeOptions]):
    """Heights of the LCH of true and predicted class, and shares of common ancestors.

    A linear probe and kNN on x, and on the most variable latents, are fitted on the fit half and
    predict the class of the images of the score half.

    - `*_mistake_severity`: the height of the LCH of true and predicted class, mean over the
      misclassified images; `n_*_errors` is their number.
    - `*_distance_1`: the same mean over all images, 0 for a right prediction. `x_probe_distance_5`
      and `_20`: mean over the 5 or 20 classes of highest score, the true one counting 0; undefined
      with fewer classes. kNN has votes for a few classes only, so it has none of these.
    - `*_hierarchical_precision`: nodes that are at or above both classes over nodes at or above the
      predicted one, each summed over the images; `*_hierarchical_recall`: over nodes at or above
      the true one; `*_hierarchical_f1`: their harmonic mean. Nodes above every class that has images,
      as the root, are left out: every prediction has them right.

    `n_images` are the images that are predicted. Undefined without an error, or without an image. The other sources of latents share x, so `x_*`
    is NaN there. Memory O(C·(C + d + m) + d²).
    """

    name = "mistake_severity"
    description = "how far in the tree the wrong predictions of probes are from the true class"
    higher_is_better = {
        f"{feature}_{probe}_{measure}": better
        for feature in FEATURES
        for probe in PROBES
        for measure, better in {
            **OF_CONFUSION,
            **({f"distance_{k}": False for k in TOPS} if probe == "probe" else {}),
        }.items()
    } | {
        **{f"n_{feature}_{probe}_errors": None for feature in FEATURES for probe in PROBES},
        "n_images": None,
    }
    ranges = {
        metric: summary.SHARE if "hierarchical" in metric else summary.POSITIVE
        for metric in higher_is_better
    }
    invariant = frozenset(name for name in higher_is_better if name.startswith("n_"))
    support = {
        **support_of_all(higher_is_better, Support("n_images", "predicted images", least=30)),
        **{
            f"{feature}_{probe}_mistake_severity": Support(f"n_{feature}_{probe}_errors", "errors")
            for feature in FEATURES
            for probe in PROBES
        },
    }
    headlines = (
        Headline(
            "x_probe_mistake_severity",
            "mistake severity",
            "height of the lowest node above the true class and a wrong prediction of a linear probe",
            priority=45,
        ),
    )
    Options = ProbeOptions

    def prepare(self) -> None:
        self._probes = self.context.share(ClassProbes, **asdict(self.options))

    @cached_property
    def _heights(self) -> np.ndarray:
        return heights(self.taxonomy)

    @cached_property
    def _common(self) -> np.ndarray:
        return common_ancestors(self.taxonomy, self.context.present)

    @remembered
    def _counts(self, feature: str, probe: str, k: int, shuffled: bool) -> Counts:
        """The predictions of a probe, or of the k most probable classes of the linear one."""
        found = self._probes.features[feature]
        if k == 1:
            return Counts.of(found.confusion[PROBES.index(probe), int(shuffled)])
        return Counts.of(found.near[k][int(shuffled)])

    @remembered
    def measures(
        self,
        feature: str,
        probe: str,
        permutation: np.ndarray | None = None,
        shuffled: bool = False,
    ) -> dict[str, float]:
        """The measures of one probe on one feature; empty where there is no such feature."""
        if feature not in self._probes.features:
            return {}
        counts = self._counts(feature, probe, 1, shuffled)
        measured = read_predictions(counts.at(permutation), self._heights, self._common)
        for k in self._probes.features[feature].near if probe == "probe" else ():
            near = self._counts(feature, probe, k, shuffled)
            if near.images.sum() == k * counts.images.sum():
                measured[f"distance_{k}"] = mean_height(near.at(permutation), self._heights)
        return measured

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        for feature in FEATURES:
            for probe in PROBES:
                found = self.measures(feature, probe, permutation, shuffled)
                if found:
                    counts = self._counts(feature, probe, 1, shuffled)
                    numbers["n_images"] = float(counts.images.sum())
                for name, value in found.items():
                    known = f"{feature}_{probe}_{name}"
                    numbers[f"n_{feature}_{probe}_errors" if name == "n_errors" else known] = value
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`measures`: of each feature and probe, with the permuted classes. `errors`: the images of
        the linear probe on x (on z where there is none) by the height of the LCH."""
        rows = []
        for feature in FEATURES:
            for probe in PROBES:
                nulls = [self.measures(feature, probe, p) for p in self.context.permutations]
                for name, value in self.measures(feature, probe).items():
                    permuted = summary.mean([null.get(name, np.nan) for null in nulls])
                    rows.append((feature, probe, name, value, permuted))
        columns = ["feature", "probe", "measure", "value", "permuted"]
        tables = {"measures": pd.DataFrame(rows, columns=columns)}
        if len(errors := self._errors()):
            tables["errors"] = errors
        return {name: table for name, table in tables.items() if len(table)}

    def _errors(self) -> pd.DataFrame:
        """Share of the errors of the linear probe at each height, with the permuted classes."""
        at_hand = [name for name in FEATURES if name in self._probes.features]
        if not at_hand:
            return pd.DataFrame()
        counts = self._counts(at_hand[0], "probe", 1, False)
        errors = Counts(*(column[counts.truth != counts.guess] for column in counts))

        def shares(permutation: np.ndarray | None) -> np.ndarray:
            truth, guess, images = errors.at(permutation)
            height = self._heights[truth, guess]
            found = np.bincount(height, images, minlength=int(self.taxonomy.height.max()) + 1)
            return summary.ratio(found, images.sum())

        if not len(errors.images):
            return pd.DataFrame()
        own = shares(None)
        null = [shares(p) for p in self.context.permutations] or [np.full(len(own), np.nan)]
        return pd.DataFrame(
            {"height": np.arange(len(own)), "share": own, "permuted": np.mean(null, axis=0)}
        ).assign(feature=at_hand[0])

    def figures(self) -> dict[str, Figure]:
        """`errors`: the wrong predictions by the height of the LCH, with the permuted classes."""
        table = self._errors()
        drawing = summary.figure(
            "Wrong predictions of the linear probe",
            "height of the lowest node above the true and the predicted class",
            "share of the errors",
        )
        for column, name, colour in (
            ("share", "classes", summary.VALUE),
            ("permuted", "permuted classes", summary.NULL),
        ):
            at, values = (table["height"], table[column]) if len(table) else ([], [])
            drawing.add_bar(x=at, y=values, name=name, marker={"color": colour})
        return {"errors": drawing}


def heights(taxonomy: Taxonomy) -> np.ndarray:
    """(C, C) int64, the height of the LCH of two classes; 0 for a class and itself."""
    height = taxonomy.height[taxonomy.leaf_lch].copy()
    np.fill_diagonal(height, 0)
    return height


def common_ancestors(taxonomy: Taxonomy, present: np.ndarray | None = None) -> np.ndarray:
    """(C, C) number of nodes at or above both of two classes, without those above all.

    Args:
        present: (C,) bool, the classes of which a node above all is left out; None: every class, so
            that this node is the root.
    """
    membership = taxonomy.membership
    above_all = (membership if present is None else membership[present]).all(0)
    members = membership[:, ~above_all].astype(np.float32)
    return (members @ members.T).astype(np.float64)


def mean_height(counts: Counts, height: np.ndarray) -> float:
    """The mean of height (C, C) over the images; NaN without any."""
    truth, guess, images = counts
    return float(summary.ratio((images * height[truth, guess]).sum(), images.sum()))


def read_predictions(counts: Counts, height: np.ndarray, common: np.ndarray) -> dict[str, float]:
    """The measures in `OF_CONFUSION` and `n_errors`; height and common (C, C)."""
    truth, guess, images = counts
    wrong = truth != guess
    own = np.diag(common)
    shared = images @ common[truth, guess]
    precision = float(summary.ratio(shared, images @ own[guess]))
    recall = float(summary.ratio(shared, images @ own[truth]))
    return {
        "mistake_severity": mean_height(Counts(*(c[wrong] for c in counts)), height),
        "distance_1": mean_height(counts, height),
        "hierarchical_precision": precision,
        "hierarchical_recall": recall,
        "hierarchical_f1": float(summary.ratio(2 * precision * recall, precision + recall)),
        "n_errors": float(images[wrong].sum()),
    }
