"""`detection`: nodes as explanations of latents, scored on held-out images and by steering.

Automatic interpretability (Bills et al. 2023; detection score of Paulo et al. 2024, arXiv
2410.13928) with taxonomy nodes in place of sentences; these forms are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from .. import hashing
from ..errors import ConfigError
from ..presentation import Support
from .base import (
    EvaluationBatch,
    Evaluator,
    Intervention,
    remembered,
    require_at_least,
    require_same,
)
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.image_positions import ImagePositions
from .parts.node_f1 import Halves, explain
from .parts.readout import ProbeReadout, Readout, head_of
from .parts.steering import Effects, Steered, effects, steer

SALT = 104


@dataclass(frozen=True)
class DetectionOptions:
    """min_fired: latents that fire on fewer images of the fit half are not explained.
    detected: least balanced accuracy at which an explanation counts as correct.
    n_latents: number of latents steered; 0 for no steering.
    n_directions: number of random directions steered for comparison.
    max_images: images of the score half used for steering, at most.
    kl: KL divergence of steered from unmodified outputs, in nats, mean over the images.
    probe_images: images of the fit half for the linear probe that replaces a missing head.
    """

    min_fired: int = 5
    detected: float = 0.75
    n_latents: int = 16
    n_directions: int = 8
    max_images: int = 32
    kl: float = 0.1
    probe_images: int = 512

    def __post_init__(self) -> None:
        require_at_least(1, self, "min_fired", "max_images", "probe_images")
        require_at_least(0, self, "n_latents", "n_directions")
        if not 0.5 <= self.detected <= 1:
            raise ConfigError(
                "detected", "out of range", given=self.detected, allowed="a number in [0.5, 1]"
            )
        if not self.kl > 0:
            raise ConfigError("kl", "out of range", given=self.kl, allowed="above 0")


class Explanations(NamedTuple):
    """The explaining node of each latent and its scores; each (m,)."""

    node: np.ndarray  # −1 where the latent is not explained
    fit_f1: np.ndarray  # on the fit half; the scores below are on the score half
    recall: np.ndarray  # share of the images below the node on which the latent fires
    false_alarms: np.ndarray  # share of the other images on which it fires
    f1: np.ndarray

    @property
    def balanced_accuracy(self) -> np.ndarray:
        """(m,) ½(recall + 1 − false alarms)."""
        return (self.recall + 1 - self.false_alarms) / 2


class Detection(Evaluator[DetectionOptions]):
    """Each latent is explained by a node v: it fires (z > 0) if and only if the image is below v.

    The explanation is the node of best F1 on the fit half, among the nodes with distinct classes
    without the root; for `group_*`, among those of several classes, which makes latents and trees
    comparable. On the score half, mean over the explained latents: `balanced_accuracy` =
    ½(recall + 1 − false alarms); `f1`, which penalises false alarms more on rare nodes. Shares of
    these latents: `detected_share`: balanced accuracy ≥ `detected`; `group_share`: best node has
    several classes.

    *Intervention*: a decoder row of length 1 times a strength is added to the chosen tokens, the
    strength such that KL(unmodified‖steered) is `kl`. `steering` = mean change of the explaining
    node's probability (the sum over its classes), over a random sample of latents;
    `steering_other`: mean change of the same node by the other latents of the sample;
    `steering_direction`: by random directions; `steering_excess` = steering − steering_other;
    `steering_rank`: share of the other latents that raise the node less (.5 by chance).
    Outputs are those of the model's head, or of a linear probe on the final embedding
    (`ProbeReadout`) where the head lacks the classes. NaN without decoder rows or a model; the
    table `steering` gives the reason.
    """

    name = "detection"
    description = "how well a node predicts where a latent fires, and what steering the latent does"
    higher_is_better = {
        "balanced_accuracy": True,
        "f1": True,
        "detected_share": True,
        "group_balanced_accuracy": True,
        "group_f1": True,
        "group_share": None,
        "latents": None,
        "steering": True,
        "steering_other": None,
        "steering_direction": None,
        "steering_excess": True,
        "steering_rank": True,
        "group_steering": True,
        "group_steering_excess": True,
        "group_steering_rank": True,
        "steered": None,
    }
    ranges = {
        **dict.fromkeys(
            (
                "balanced_accuracy",
                "f1",
                "detected_share",
                "group_balanced_accuracy",
                "group_f1",
                "group_share",
                "steering_rank",
                "group_steering_rank",
            ),
            summary.SHARE,
        ),
        **dict.fromkeys(
            ("steering", "steering_other", "steering_direction", "group_steering"), summary.COSINE
        ),
    }
    support = {
        **dict.fromkeys(
            ("balanced_accuracy", "f1", "detected_share", "group_balanced_accuracy", "group_f1"),
            Support("latents", "latents"),
        ),
        **dict.fromkeys(
            (
                "steering",
                "steering_excess",
                "steering_rank",
                "group_steering",
                "group_steering_excess",
                "group_steering_rank",
            ),
            Support("steered", "steered latents"),
        ),
    }
    invariant = frozenset({"latents", "steered"})
    wants_intervention = True
    Options = DetectionOptions

    def prepare(self) -> None:
        context, options = self.context, self.options
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self._images = context.share(ImagePositions, max_images=options.max_images)
        self._probed = context.share(ImagePositions, max_images=options.probe_images)
        self._length = [0.0, 0]  # Σ‖x − mean of the sample‖, images: first strength tried
        self._mean: Tensor | None = None
        nodes, size = context.distinct_nodes(root=False)
        # smallest first: among equally good nodes the smallest is chosen
        order = np.argsort(size, kind="stable")
        self.nodes = nodes[order]
        self.groups = self.nodes[size[order] > 1]

    def calibrate(self, batch: EvaluationBatch) -> None:
        self._mean = batch.x.float().mean(0)

    def update(self, batch: EvaluationBatch) -> None:
        if self._mean is None:
            self.calibrate(batch)
        assert self._mean is not None
        self._length[0] += float((batch.x.float() - self._mean).norm(dim=1).sum())
        self._length[1] += len(batch)

    def merge(self, other: Detection) -> None:
        require_same("mean of x", self._mean, other._mean)
        self._length = [a + b for a, b in zip(self._length, other._length)]

    # Explaining --------------------------------------------------------------------------------

    @remembered
    def explain(
        self, nodes: np.ndarray, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Explanations:
        """The best of `nodes` (N,) for each latent, with scores (m,)."""
        return find_explanations(
            self._firings.halves(shuffled),
            self.members(nodes, permutation),
            self._classes.fit(shuffled),
            self._classes.score(shuffled),
            nodes,
            self.options.min_fired,
        )

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        best = self.explain(self.nodes, permutation, shuffled)
        group = self.explain(self.groups, permutation, shuffled)
        explained = best.node >= 0
        several = np.isin(best.node, self.groups)
        found = best.balanced_accuracy
        # A tolerance for the rounding of sums like 2/3 + 1 − 1/6.
        reached = found >= self.options.detected - 1e-9
        detected = np.where(np.isfinite(found), reached, np.nan)
        numbers = {
            "balanced_accuracy": summary.mean(found),
            "f1": summary.mean(best.f1),
            "detected_share": summary.mean(detected),
            "group_balanced_accuracy": summary.mean(group.balanced_accuracy),
            "group_f1": summary.mean(group.f1),
            "group_share": summary.mean(several, explained),
            "latents": float(explained.sum()),
        }
        for prefix, explanations in (("", best), ("group_", group)):
            found = self.effects(explanations.node, permutation)
            numbers |= {
                f"{prefix}steering": summary.mean(found.own),
                f"{prefix}steering_excess": summary.mean(found.own - found.others),
                f"{prefix}steering_rank": summary.mean(found.rank),
            }
            if not prefix:
                numbers["steering_other"] = summary.mean(found.others)
                numbers["steering_direction"] = summary.mean(found.random)
        numbers["steered"] = float(self.steered()[0].reached.sum())
        return numbers

    # Steering ----------------------------------------------------------------------------------

    def effects(self, node: np.ndarray, permutation: np.ndarray | None = None) -> Effects:
        """Effects (s,) of each steered latent, of the others and of random directions on its node.

        Args:
            node: (m,) the node that explains each latent.
        """
        latents, directions = self.steered()
        explained = node[self.sample()[latents.reached]]
        found = effects(
            latents.change[latents.reached],
            directions.change[directions.reached],
            self.members(explained, permutation),
        )
        return Effects(*(np.where(explained < 0, np.nan, effect) for effect in found))

    @property
    def reason(self) -> str:
        """Why no latent is steered; "" where latents are steered."""
        if self.context.intervene is None:
            return self.context.no_intervention
        if self.context.W_dec is None:
            return f"the latents ({self.context.source}) have no decoder rows"
        if not self.options.n_latents:
            return "n_latents is 0"
        if not len(self._images.index(fit=False)):
            return "there is no image in the score half"
        if head_of(self.context.intervene) is None and not len(self._probed.index(fit=True)):
            return "there is no head, and no image in the fit half to fit a probe on"
        return ""

    @remembered
    def sample(self) -> np.ndarray:
        """(s,) latents to steer, at random among those that fire often enough; empty if `reason`."""
        if self.reason:
            return np.zeros(0, dtype=np.int64)
        fired = np.asarray(self._firings.fit().sum(1)).ravel()
        latents = np.flatnonzero(fired >= self.options.min_fired)
        order = np.argsort(hashing.uniform(latents, SALT + self.context.seed), kind="stable")
        return np.sort(latents[order[: self.options.n_latents]])

    @remembered
    def steered(self) -> tuple[Steered, Steered]:
        """Results of steering along the latents of the sample, and along random directions."""
        n_classes = len(self.taxonomy.classes)
        intervene, rows = self.context.intervene, self.context.W_dec
        if self.reason or intervene is None or rows is None:
            nothing = Steered(np.zeros(0), np.zeros(0), np.zeros((0, n_classes)))
            return nothing, nothing
        generator = torch.Generator().manual_seed(self.context.seed)
        random = torch.randn(self.options.n_directions, self.context.d_in, generator=generator)
        chosen = rows.detach().float().cpu()[torch.from_numpy(self.sample())]
        found = steer(
            intervene,
            self._readout(intervene),
            torch.from_numpy(self._images.index(fit=False)),
            torch.cat([chosen, random]),
            kl=self.options.kl,
            start=self._length[0] / max(self._length[1], 1),
            n_classes=n_classes,
        )
        n = len(chosen)
        return Steered(*(v[:n] for v in found)), Steered(*(v[n:] for v in found))

    def _readout(self, intervene: Intervention) -> Readout:
        head = head_of(intervene)
        if head is not None:
            return head
        embedding = intervene(torch.from_numpy(self._probed.index(fit=True))).embedding
        labels = torch.from_numpy(self._probed.labels(fit=True))
        return ProbeReadout(embedding, labels, len(self.taxonomy.classes))

    # Showing -----------------------------------------------------------------------------------

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: explanation of each. `steering`: effects of each steered one, or the reason."""
        best, group = self.explain(self.nodes), self.explain(self.groups)
        latent = np.flatnonzero(best.node >= 0)
        latents = {
            "latent": latent,
            **self._described(best.node[latent]),
            "fit_f1": best.fit_f1[latent],
            "balanced_accuracy": best.balanced_accuracy[latent],
            "recall": best.recall[latent],
            "false_alarms": best.false_alarms[latent],
            "f1": best.f1[latent],
            "permuted_balanced_accuracy": self._permuted()[latent],
            **{f"group_{k}": v for k, v in self._described(group.node[latent]).items()},
            "group_balanced_accuracy": group.balanced_accuracy[latent],
        }
        return {"latents": pd.DataFrame(latents), "steering": self._steering_table(best)}

    def _described(self, nodes: np.ndarray) -> dict[str, Any]:
        taxonomy = self.taxonomy
        return {
            "node": [taxonomy.nodes[v] if v >= 0 else "" for v in nodes],
            "name": [taxonomy.label(v) if v >= 0 else "" for v in nodes],
            "classes": np.where(nodes >= 0, taxonomy.n_leaves[nodes], 0),
        }

    def _permuted(self) -> np.ndarray:
        """(m,) balanced accuracy of each latent, mean over the permuted classes."""
        nulls = [
            self.explain(self.nodes, p).balanced_accuracy for p in self.context.permutations
        ] or [np.full(self.context.d_sae, np.nan)]
        return np.mean(nulls, axis=0)

    def _steering_table(self, best: Explanations) -> pd.DataFrame:
        steered, _ = self.steered()
        reached = steered.reached
        if not reached.any():
            reason = self.reason or f"no direction reaches a KL of {self.options.kl:g}"
            return pd.DataFrame({"latent": [-1], "reason": [reason]})
        latents, effect = self.sample()[reached], self.effects(best.node)
        table = {
            "latent": latents,
            **self._described(best.node[latents]),
            "strength": steered.strength[reached],
            "kl": steered.kl[reached],
            "change": effect.own,
            "change_by_others": effect.others,
            "change_by_random_directions": effect.random,
            "rank": effect.rank,
        }
        return pd.DataFrame(table)

    def figures(self) -> dict[str, Figure]:
        """`balanced_accuracy`: and under permuted classes. `steering`: own against others."""
        found = self.explain(self.nodes).balanced_accuracy
        drawings = {
            "balanced_accuracy": summary.histograms(
                "Nodes as predictors of where their latents fire",
                "balanced accuracy on held-out images",
                {"latents": found, "permuted classes": self._permuted()},
            )
        }
        table = self._steering_table(self.explain(self.nodes))
        if "change" in table:
            drawing = summary.figure(
                f"Steering at a KL of {self.options.kl:g}",
                "change of the node's probability by other latents",
                "change by its own latent",
            )
            drawing.add_scatter(
                x=table["change_by_others"],
                y=table["change"],
                text=table["name"],
                mode="markers",
                name="latents",
                marker={"color": summary.VALUE},
            )
            drawings["steering"] = drawing
        return drawings


def find_explanations(
    halves: Halves,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
    nodes: np.ndarray,
    min_fired: int,
) -> Explanations:
    """Choose a node for each latent by F1 on the fit half; score it (m,) on the score half.

    Args:
        halves: images of each class on which each latent fires, one bin.
        members: (C, N) whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
        nodes: (N,); among equally good ones the first is chosen.
        min_fired: latents that fire on fewer images of the fit half are not explained.
    """
    at, fit_f1, found = explain(halves, members, fit_images, score_images)
    others = score_images.sum() - found.positives
    false_alarms = summary.ratio(found.fired - found.hits, others)
    f1 = np.where(found.positives > 0, found.f1, np.nan)
    known = np.asarray(halves.fit.sum(1)).ravel() >= min_fired
    node = np.where(known, np.append(nodes, -1)[at], -1)
    rates = (fit_f1, found.recall, false_alarms, f1)
    return Explanations(node, *(np.where(node >= 0, rate, np.nan) for rate in rates))
