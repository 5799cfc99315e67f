"""`level_information`: information in activations and latents about each depth of the tree.

Own definition, after the layer-by-layer analysis of Olson et al. 2025 (arXiv 2505.15970).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from ..presentation import Headline, Support
from ..taxonomies.taxonomy import Taxonomy
from .base import Evaluator, remembered
from .parts import summary
from .parts.class_probes import FEATURES, PROBES, ClassProbes, FeatureProbes, ProbeOptions
from .parts.moments import BLOCK

FITTING_STEPS = 50


class LevelInformation(Evaluator[ProbeOptions]):
    """Probe accuracy, correct group given a wrong class, and variance share, at each depth.

    Three features: `x` (the activations as trained on), `mean_patch` where given, and `z`. A linear
    probe and kNN, fitted on the fit half, predict the *class* of the images of the other half; at a
    cut both prediction and truth are replaced by their groups.

    - `*_accuracy`: of the class. `*_level_accuracy`: of the group, mean over the informative cuts
      (those with more than one group and fewer groups than classes, of the classes with images).
    - `*_right_group` (own definition): how far the misclassified images are predicted into the right
      group, from 0 (by chance) to 1 (all that can be): Σ(r − e) / Σ(u − e) over the informative cuts.
      At a cut, r is the share of the errors that lie in the right group; e its expectation where the
      wrong class does not depend on the true one (see `right_group_bounds`); u the share of the
      errors whose group has another class at all. A cut near the leaves (u near 0) or
      near the root (e near 1) can show little and counts little, so that trees are comparable. It
      measures hierarchy beyond class accuracy; `n_*_errors` are the images that it rests on.
      `n_images` are those that are predicted.
    - `*_variance_share`: between-group variance over the total, mean over the informative cuts. It
      rises with depth by construction: read only its excess over permuted classes.

    The table `levels` has each depth with its own permuted-classes null. The other sources of
    latents share x, so `x_*` and `mean_patch_*` are NaN there. Memory O(C·(d + m) + d²).
    """

    name = "level_information"
    description = "information in activations and latents about each depth of the tree"
    higher_is_better = {
        f"{feature}_{measure}": True
        for feature in FEATURES
        for measure in (
            *(
                f"{p}_{kind}"
                for p in PROBES
                for kind in ("accuracy", "level_accuracy", "right_group")
            ),
            "variance_share",
        )
    } | {
        **{f"n_{feature}_{probe}_errors": None for feature in FEATURES for probe in PROBES},
        "n_images": None,
    }
    ranges = {
        **{
            f"{f}_{p}_{m}": summary.SHARE
            for f in FEATURES
            for p in PROBES
            for m in ("accuracy", "level_accuracy")
        },
        **{f"{f}_{p}_right_group": summary.SCORE for f in FEATURES for p in PROBES},
        **{f"{f}_variance_share": summary.SHARE for f in FEATURES},
    }
    invariant = frozenset(
        {
            "n_images",
            *(f"{f}_{p}_accuracy" for f in FEATURES for p in PROBES),
            *(f"n_{f}_{p}_errors" for f in FEATURES for p in PROBES),
        }
    )
    support = {
        **{
            f"{f}_{p}_right_group": Support(f"n_{f}_{p}_errors", "misclassified images", least=30)
            for f in FEATURES
            for p in PROBES
        },
        **{
            f"{f}_{p}_{m}": Support("n_images", "predicted images", least=30)
            for f in FEATURES
            for p in PROBES
            for m in ("accuracy", "level_accuracy")
        },
    }
    headlines = (
        Headline(
            "x_probe_level_accuracy",
            "level accuracy",
            "a linear probe on the activations, scored at the levels of the tree",
            priority=40,
        ),
        Headline(
            "x_probe_right_group",
            "right group",
            "how far the images that this probe misclassifies are predicted into the right group: 0 by "
            "chance, 1 for all that can be",
            priority=40,
        ),
    )
    Options = ProbeOptions

    def prepare(self) -> None:
        self._probes = self.context.share(ClassProbes, **asdict(self.options))
        self._cuts = informative_cuts(self.taxonomy, self.context.present)
        n_classes = len(self.taxonomy.classes)
        groups = [np.unique(self.taxonomy.cut(t), return_inverse=True)[1] for t in self._cuts]
        narrow = np.min_scalar_type(n_classes)  # sorted many times as fast
        self._groups = np.array(groups, dtype=narrow).reshape(len(groups), n_classes)

    def levels(
        self, feature: str, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, np.ndarray]:
        """Each measure of a feature at the informative cuts (L,); `*_accuracy`, of the class, and counts (1,).

        `*_right_group_weight` is the weight of a cut in `*_right_group`. Empty where no batch has the
        feature.
        """
        self._check_shuffled(shuffled)
        if feature not in self._probes.features:
            return {}
        draw = self.context.draw_of(permutation)
        if draw is not None:
            return dict(self._levels_of_draws(feature, shuffled)[draw])
        place = np.arange(len(self.taxonomy.classes)) if permutation is None else permutation
        return self._read([place], feature, shuffled)[0]

    @remembered
    def _levels_of_draws(self, feature: str, shuffled: bool) -> list[dict[str, np.ndarray]]:
        """`levels` under each of the permuted classes, computed at once."""
        draws = self.context.permutations
        size = max(1, BLOCK // max(self._groups.size, 1))
        parts = [draws[start : start + size] for start in range(0, len(draws), size)]
        return [found for part in parts for found in self._read(part, feature, shuffled)]

    def _read(
        self, places: Sequence[np.ndarray], feature: str, shuffled: bool
    ) -> list[dict[str, np.ndarray]]:
        """`levels` with class c at position place[c], for each of `places` (C,)."""
        groups = np.concatenate([self._groups[:, place] for place in places])
        found = read_levels(self._probes.features[feature], groups, int(shuffled))
        at_cut = {name for name, values in found.items() if len(values) == len(groups)}
        return [
            {
                name: values.reshape(len(places), -1)[i] if name in at_cut else values
                for name, values in found.items()
            }
            for i in range(len(places))
        ]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        for feature in FEATURES:
            found = self.levels(feature, permutation, shuffled)
            if found:
                numbers["n_images"] = float(found.pop("images")[0])
            for probe in PROBES if found else ():
                name = f"{probe}_right_group"
                weight, values = found.pop(f"{name}_weight"), np.nan_to_num(found.pop(name))
                total = float(summary.ratio(weight @ values, weight.sum()))
                numbers[f"{feature}_{name}"] = total
                numbers[f"n_{feature}_{probe}_errors"] = float(found.pop(f"{probe}_errors")[0])
            for measure, values in found.items():
                numbers[f"{feature}_{measure}"] = summary.mean(values)
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`levels`: each feature, measure and informative depth, with the permuted classes."""
        columns = ["feature", "measure", "depth", "groups", "value", "permuted", "permuted_most"]
        groups = [len(np.unique(group[self.context.present])) for group in self._groups]
        rows = []
        for feature in self._probes.features:
            nulls = [self.levels(feature, p) for p in self.context.permutations]
            for measure, values in self.levels(feature).items():
                name = f"{feature}_{measure}"
                if name in self.invariant or name not in self.higher_is_better:
                    continue  # equal at every depth, or a weight
                null = np.array([n[measure] for n in nulls] or [np.full(len(values), np.nan)])
                for i, depth in enumerate(self._cuts):
                    at = null[:, i]
                    most = at.max() if np.isfinite(at).all() else np.nan
                    rows.append(
                        (feature, measure, depth, groups[i], values[i], summary.mean(at), most)
                    )
        table = pd.DataFrame(rows, columns=columns)
        table["excess"] = table["value"] - table["permuted"]
        return {"levels": table}

    def figures(self) -> dict[str, Figure]:
        """Each measure over depth, with the permuted classes dotted."""
        table = self.tables()["levels"]
        figures = {}
        for measure in table["measure"].unique():
            drawing = summary.figure(measure.replace("_", " "), "depth of the cut", "")
            drawing.update_xaxes(dtick=1)
            for feature, colour in zip(FEATURES, (summary.VALUE, summary.OTHER, "#4a7c3f")):
                of = table[(table["measure"] == measure) & (table["feature"] == feature)]
                name = summary.FEATURE_NAMES[feature]
                line = {"color": colour}
                if len(of):
                    drawing.add_scatter(x=of["depth"], y=of["value"], name=name, line=line)
                    drawing.add_scatter(
                        x=of["depth"],
                        y=of["permuted"],
                        name=f"{name}, permuted classes",
                        line={**line, "dash": "dot"},
                    )
            figures[measure] = drawing
        return figures


def read_levels(
    feature: FeatureProbes, groups: np.ndarray, labelling: int
) -> dict[str, np.ndarray]:
    """Measures (L,) of a feature for groups (L, C), the group of each class at each cut, from 0."""
    found: dict[str, np.ndarray] = {}
    for probe, confusion in zip(PROBES, feature.confusion[:, labelling]):
        accuracy, at_level, right_group = read_off(confusion, groups)
        found[f"{probe}_accuracy"] = np.array([accuracy])
        found[f"{probe}_level_accuracy"] = at_level
        chance, most = right_group_bounds(confusion, groups)
        weight = np.where(most - chance > 1e-9, most - chance, 0.0)
        found[f"{probe}_right_group"] = summary.ratio(right_group - chance, weight)
        found[f"{probe}_right_group_weight"] = weight
        found[f"{probe}_errors"] = np.array([confusion.sum() - np.trace(confusion)])
    found["images"] = np.array([feature.confusion[0, labelling].sum()])
    if feature.moments is not None:
        found["variance_share"] = feature.moments.variance_share(groups, labelling)
    return found


def read_off(confusion: np.ndarray, groups: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Accuracy of the class; accuracy of the group at each cut; right group given wrong class.

    Args:
        confusion: (C, C) images by true and by predicted class.
        groups: (L, C) the group of each class at each cut.

    Returns:
        a number, and two arrays (L,); NaN where no image counts.
    """
    truth, guess = np.divmod(np.flatnonzero(confusion != 0), len(confusion))
    images = confusion[truth, guess].astype(float)
    wrong = truth != guess
    right, errors = images[~wrong].sum(), images[wrong].sum()
    same = np.zeros(len(groups))  # errors in the right group
    truth, guess, images = truth[wrong], guess[wrong], images[wrong]
    of_class = np.ascontiguousarray(groups.T)
    size = max(1, BLOCK // max(len(groups), 1))
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        same += images[part] @ (of_class[truth[part]] == of_class[guess[part]])
    accuracy = float(summary.ratio(right, right + errors))
    return accuracy, summary.ratio(right + same, right + errors), summary.ratio(same, errors)


def right_group_bounds(confusion: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the errors in the right group at each cut (L,) by chance, and at most (own definition).

    By chance: under quasi-independence, where the errors of class a that are taken for class b ≠ a
    are proportional to s_a·t_b, with s and t such that the number of errors of each class and of
    wrong predictions of each class are those observed. At most: of the errors whose true group has
    another class with an image or a prediction. 0 without errors.

    Args:
        confusion: (C, C) images by true and by predicted class.
        groups: (L, C) the group of each class at each cut, integers from 0.
    """
    wrong = confusion - np.diag(np.diag(confusion))
    missed, given = wrong.sum(1).astype(float), wrong.sum(0).astype(float)
    rate = given
    for _ in range(FITTING_STEPS):
        share = _over_others(missed, rate)
        rate = _over_others(given, share)
    occurs = np.logical_or(confusion.any(0), confusion.any(1))
    share = _over_others(missed, rate)
    shape = len(groups), int(groups.max(initial=0)) + 1
    places = (groups + shape[1] * np.arange(len(groups))[:, None]).ravel()

    def sums(part: np.ndarray) -> np.ndarray:
        """Of (C,), over the classes of each group of each cut."""
        tiled = np.tile(part, len(groups))
        return np.bincount(places, tiled, shape[0] * shape[1]).reshape(shape)

    itself = share @ rate  # a class is not among the others of its group
    chance = (sums(share) * sums(rate)).sum(1) - itself
    most = (sums(missed) * (sums(occurs) > 1)).sum(1)
    total = max(missed.sum(), 1.0)
    return chance / total, most / total


def _over_others(part: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """(C,) each of `part` (C,) over the sum of `rate` (C,) of the other classes; 0 where that is 0."""
    others = rate.sum() - rate
    return np.divide(part, others, out=np.zeros(len(part)), where=others != 0)


def informative_cuts(taxonomy: Taxonomy, present: np.ndarray | None = None) -> list[int]:
    """The depths whose cut has more than one group, fewer than classes, and more than the one above.

    Args:
        present: (C,) bool, the classes that count; None: all. A group without images tells nothing
            apart: at a cut with one group of images every prediction would be right.
    """
    counted = np.ones(len(taxonomy.classes), dtype=bool) if present is None else present
    groups = [len(np.unique(taxonomy.cut(t)[counted])) for t in range(taxonomy.max_depth)]
    cuts = range(1, taxonomy.max_depth)
    return [t for t in cuts if groups[t - 1] < groups[t] < counted.sum()]
