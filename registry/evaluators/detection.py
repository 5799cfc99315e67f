"""`detection`: the tree as explanation of a latent, tested on other images and in the model.

Automatic interpretability (Bills et al. 2023; its detection score is that of Paulo et al. 2024,
arXiv 2410.13928) with the nodes of a taxonomy in place of sentences; the forms are our own
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
from .base import EvaluationBatch, Evaluator, Intervention, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.image_positions import ImagePositions
from .parts.node_f1 import explain
from .parts.readout import ProbeReadout, Readout, head_of
from .parts.steering import Effects, Steered, effects, steer

SALT = 104


@dataclass(frozen=True)
class DetectionOptions:
    """min_fired: latents that fire on fewer images of the fit half are not explained.
    detected: the balanced accuracy from which an explanation counts as right.
    n_latents: how many are steered; 0 leaves the model alone.
    n_directions: random directions beside them.
    max_images: of the score half, on which they are steered.
    kl: nats between untouched and steered outputs, mean over the images.
    probe_images: of the fit half, for the probe that stands in for a missing head.
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
    """The node of each latent and how well it tells where the latent fires; each (m,)."""

    node: np.ndarray  # −1 where the latent is not explained
    fit_f1: np.ndarray  # on the images of the choice; the rest on the others
    recall: np.ndarray  # of the images below the node, where it fires
    false_alarms: np.ndarray  # of the other images
    f1: np.ndarray

    @property
    def balanced_accuracy(self) -> np.ndarray:
        return (self.recall + 1 - self.false_alarms) / 2


class Detection(Evaluator[DetectionOptions]):
    """Each latent is explained by a node v: it fires (z > 0) if and only if the image is below v.

    The explanation has the best F1 on the fit half, among the nodes with distinct classes, the root
    left out; `group_*` have it among nodes of several classes, which is the same question for every
    latent and every tree. `balanced_accuracy` = ½(recall + 1 − false alarms) on the score half,
    mean over the latents explained; `f1` is harder on rare nodes; `detected_share`: of them from
    `detected` on; `group_share`: whose best node is a group.

    *Intervention*: a decoder row of length 1 times a strength is added to the chosen tokens, the
    strength such that KL(untouched‖steered) is `kl`. `steering` = mean change of the explaining
    node's probability (the sum of the outputs below it), over a random sample of latents;
    `steering_other`: what the other latents of the sample do to the same node;
    `steering_direction`: what random directions do; `steering_excess` = steering − steering_other;
    `steering_rank`: the share of the other latents that raise the node less (.5 by chance).
    Outputs are those of the model's own head, or of a linear probe on the final embedding
    (`ProbeReadout`) where no head knows the classes. NaN without decoder rows or a model at hand;
    the table `steering` says why.
    """

    name = "detection"
    description = "whether a latent's best node tells where it fires, and what steering it does"
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
    invariant = frozenset({"latents", "steered"})
    wants_intervention = True
    Options = DetectionOptions

    def prepare(self) -> None:
        context, options, taxonomy = self.context, self.options, self.taxonomy
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self._images = context.share(ImagePositions, max_images=options.max_images)
        self._probed = context.share(ImagePositions, max_images=options.probe_images)
        self._length = [0.0, 0]  # Σ‖x − a mean‖, images: where the search for a strength begins
        self._mean: Tensor | None = None
        nodes = taxonomy.distinct_nodes[taxonomy.distinct_nodes != taxonomy.root]
        # of equally good nodes the smallest explains
        self.nodes = nodes[np.argsort(taxonomy.n_leaves[nodes], kind="stable")]
        self.groups = self.nodes[taxonomy.n_leaves[self.nodes] > 1]

    def update(self, batch: EvaluationBatch) -> None:
        x = batch.x.float()
        if self._mean is None:
            self._mean = x.mean(0)
        self._length[0] += float((x - self._mean).norm(dim=1).sum())
        self._length[1] += len(x)

    # Explaining --------------------------------------------------------------------------------

    @remembered
    def explain(
        self, nodes: np.ndarray, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> Explanations:
        """The best of `nodes` (N,) for each latent."""
        return find_explanations(
            self._firings.fit(shuffled),
            self._firings.score(shuffled)[:, 0].numpy(),
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
        several = self.taxonomy.n_leaves[best.node] > 1
        found = best.balanced_accuracy
        detected = np.where(np.isfinite(found), found >= self.options.detected, np.nan)
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
        """For each latent that was steered (s,): what it, the others and random directions did to
        its node.

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
        """Why nothing is steered; "" where it is."""
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
        """The latents to be steered: at random among those that can be explained; none where
        nothing is steered."""
        if self.reason:
            return np.zeros(0, dtype=np.int64)
        fired = np.asarray(self._firings.fit().sum(1)).ravel()
        latents = np.flatnonzero(fired >= self.options.min_fired)
        order = np.argsort(hashing.uniform(latents, SALT + self.context.seed), kind="stable")
        return np.sort(latents[order[: self.options.n_latents]])

    @remembered
    def steered(self) -> tuple[Steered, Steered]:
        """Steering along the latents of the sample, and along random directions."""
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
        """`latents`: the explanation of each. `steering`: of each that was steered, or why none."""
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
        """(m,) mean balanced accuracy of each latent under the permuted classes."""
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
        """`balanced_accuracy`: beside that under permuted classes. `steering`: own against others."""
        found = self.explain(self.nodes).balanced_accuracy
        drawings = {
            "balanced_accuracy": summary.histograms(
                "How well a node tells where its latent fires",
                "balanced accuracy on held-out images",
                {"latents": found, "permuted classes": self._permuted()},
            )
        }
        table = self._steering_table(self.explain(self.nodes))
        if "change" in table:
            drawing = summary.figure(
                f"Steering at a KL of {self.options.kl:g}",
                "what other latents do to the node's probability",
                "what its latent does",
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
    fit: sparse.csr_array,
    score: np.ndarray,
    members: np.ndarray,
    fit_images: np.ndarray,
    score_images: np.ndarray,
    nodes: np.ndarray,
    min_fired: int,
) -> Explanations:
    """Choose a node for each latent on the fit half by F1; score it on the other.

    Args:
        fit, score: (m, C) images of each class on which each latent fires, in the halves.
        members: (C, N) whether a class lies below a node.
        fit_images, score_images: (C,) images of each class in the halves.
        nodes: (N,); of equally good ones the first is taken.
        min_fired: a latent that fires on fewer images of the fit half is left out.
    """
    explained = (np.asarray(fit.sum(1)).ravel() >= min_fired) & (len(nodes) > 0)
    at, fit_f1, found = explain(fit, score, members, fit_images, score_images)
    others = score_images.sum() - found.positives
    false_alarms = summary.ratio(found.fired - found.hits, others)
    f1 = np.where(found.positives > 0, found.f1, np.nan)
    rates = (fit_f1, found.recall, false_alarms, f1)
    return Explanations(
        np.where(explained, np.append(nodes, -1)[at], -1),
        *(np.where(explained, rate, np.nan) for rate in rates),
    )
