"""Probes of the class on activations and latents, with what they predict, computed once per pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...errors import ConfigError
from ..base import (
    Accumulator,
    EvaluationBatch,
    EvaluationContext,
    require_at_least,
    require_same,
)
from .moments import ClassMoments
from .probes import NeighbourProbe, RidgeProbe

FEATURES = ("x", "mean_patch", "z")
PROBES = ("probe", "knn")
TOPS = (5, 20)
"""Numbers of most probable classes that are counted, besides the first."""


@dataclass(frozen=True)
class ProbeOptions:
    """ridge: of the linear probe, relative to the variance of a feature.
    neighbours, neighbours_per_class: k of kNN, and the size of its database per class.
    probe_latents: number of most variable latents of z that are probed.

    Evaluators with equal options share their probes.
    """

    ridge: float = 0.01
    neighbours: int = 10
    neighbours_per_class: int = 10
    probe_latents: int = 1024

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ConfigError("ridge", "out of range", given=self.ridge, allowed="above 0")
        require_at_least(1, self, "neighbours", "neighbours_per_class", "probe_latents")


class ClassProbes(Accumulator):
    """Linear probe and kNN of each feature, fitted on the fit half; their predictions on the other.

    `features`: name -> its probes; only z for the sources of latents that share x. Memory
    O(C·(C + d + m) + d²).

    Args:
        ridge: of the linear probe, relative to the variance of a feature.
        neighbours, neighbours_per_class: k of kNN, and the size of its database per class.
        probe_latents: number of most variable latents of z that are probed.
    """

    def __init__(
        self,
        context: EvaluationContext,
        ridge: float = 0.01,
        neighbours: int = 10,
        neighbours_per_class: int = 10,
        probe_latents: int = 1024,
    ) -> None:
        super().__init__(context)
        self.ridge, self.probe_latents = ridge, probe_latents
        self.neighbours = (neighbours, neighbours_per_class)
        self.features: dict[str, FeatureProbes] = {}
        self.latents: Tensor | None = None

    def calibrate(self, batch: EvaluationBatch) -> None:
        z = batch.z.float()
        spread = (z - z.mean(0)).square().mean(0)
        most = min(self.probe_latents, batch.z.shape[1])
        self.latents = spread.topk(most).indices.sort().values
        for name, feature, probed in self._values(batch):
            self._feature(name).calibrate(feature, probed)

    def update(self, batch: EvaluationBatch) -> None:
        if self.latents is None:
            self.calibrate(batch)
        for name, feature, probed in self._values(batch):
            self._feature(name).update(batch, feature, probed)

    def fit_state(self) -> dict[str, tuple[RidgeProbe, NeighbourProbe]]:
        return {name: (each.ridge, each.knn) for name, each in self.features.items()}

    def join_fit(self, states: Sequence[dict[str, tuple[RidgeProbe, NeighbourProbe]]]) -> None:
        for name in dict.fromkeys(name for state in states for name in state):
            self._feature(name).join_fit([state[name] for state in states if name in state])

    def merge(self, other: ClassProbes) -> None:
        require_same("probed latents", self.latents, other.latents)
        for name, feature in other.features.items():
            self._feature(name).merge(feature)

    def _values(self, batch: EvaluationBatch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of a feature, the feature (n, d), and what the probes get of it (n, e)."""
        z = batch.z.float()
        yield "z", z, z[:, self.latents]
        if self.context.source == "sae":
            x = batch.x.float()
            yield "x", x, x
            if batch.mean_patch is not None:
                patch = batch.mean_patch.float()
                yield "mean_patch", patch, patch

    def _feature(self, name: str) -> FeatureProbes:
        if name not in self.features:
            n_labellings = 2 if self.context.shuffled else 1
            n_classes = len(self.context.taxonomy.classes)
            self.features[name] = FeatureProbes(
                n_classes, n_labellings, self.ridge, *self.neighbours
            )
        return self.features[name]


class FeatureProbes:
    """Moments, probes and counted predictions of one feature.

    `confusion (2, labellings, C, C)`: images of the score half by true and by predicted class, of the
    linear probe and of kNN. `near`: k -> (labellings, C, C), images by true class and by each of
    the k classes that the linear probe gives the highest scores; classes without fit images are none.
    """

    def __init__(
        self,
        n_classes: int,
        n_labellings: int,
        ridge: float,
        neighbours: int,
        neighbours_per_class: int,
    ) -> None:
        self.n_labellings = n_labellings
        self._n_classes = n_classes
        self._predicted = 0  # images of the score half
        self.moments: ClassMoments | None = None
        self.ridge = RidgeProbe(n_classes, n_labellings, ridge)
        self.knn = NeighbourProbe(n_classes, n_labellings, neighbours, neighbours_per_class)
        size = (n_labellings, n_classes, n_classes)
        self.confusion = np.zeros((len(PROBES), *size), dtype=np.int32)
        self.near = {k: np.zeros(size, dtype=np.int32) for k in TOPS if k <= n_classes}

    def calibrate(self, feature: Tensor, probed: Tensor) -> None:
        """Centre on a sample of the feature (n, d), of which `probed` (n, e) is given to the probes."""
        if probed.shape[1]:
            self.moments = ClassMoments(self._n_classes, self.n_labellings, feature)
            self.ridge.centre(probed)

    def update(self, batch: EvaluationBatch, feature: Tensor, probed: Tensor) -> None:
        """Add a batch of the feature (n, d), of which `probed` (n, e) is given to the probes."""
        if not probed.shape[1]:
            return
        labellings = [batch.labels_of(s) for s in (False, True)[: self.n_labellings]]
        if self.moments is None:
            self.moments = ClassMoments(self._n_classes, self.n_labellings, feature)
        self.moments.update(feature, labellings)
        fit = batch.is_fit.cpu()
        if fit.any():
            on = fit.to(probed.device)
            chosen = [labels[fit] for labels in labellings]
            self.ridge.fit(probed[on], chosen)
            self.knn.fit(probed[on], chosen, batch.index.cpu()[fit])
        if not fit.all():
            held_out = probed[~fit.to(probed.device)]
            self._predicted += len(held_out)
            truth = [labels[~fit] for labels in labellings]
            for i, (labels, scores) in enumerate(zip(truth, self.ridge.scores(held_out))):
                _count(self.confusion[0, i], labels, scores.topk(1, dim=1).indices)
                for k, counts in self.near.items():
                    best = scores.topk(k, dim=1)
                    _count(counts[i], labels, best.indices.where(best.values > -np.inf, -1))
            for counts, labels, guess in zip(self.confusion[1], truth, self.knn.predict(held_out)):
                _count(counts, labels, guess[:, None])

    def join_fit(self, parts: Sequence[tuple[RidgeProbe, NeighbourProbe]]) -> None:
        """Use the probes of the whole fit half, from those of its parts."""
        self.ridge, self.knn = copy.deepcopy(parts[0])
        for ridge, knn in parts[1:]:
            self.ridge.merge(ridge)
            self.knn.merge(knn)

    def merge(self, other: FeatureProbes) -> None:
        """Add another part of the images.

        Raises:
            ConfigError: score-half images were predicted by probes of different images.
        """
        if self._predicted or other._predicted:
            require_same("probes of the fit half", self.ridge.fitted_on, other.ridge.fitted_on)
        else:
            self.ridge.merge(other.ridge)
            self.knn.merge(other.knn)
        if self.moments is None:
            self.moments = other.moments
        elif other.moments is not None:
            self.moments.merge(other.moments)
        self._predicted += other._predicted
        self.confusion += other.confusion
        for k, counts in self.near.items():
            counts += other.near[k]


def _count(counts: np.ndarray, truth: Tensor, guess: Tensor) -> None:
    """Add images with classes `truth` (n,) and guesses (n, k), below 0 where none, to counts (C, C)."""
    guesses = guess.cpu().numpy()
    cells = truth.numpy()[:, None] * counts.shape[1] + guesses
    one = counts.dtype.type(1)  # of this type and on one axis: more than 20 times as fast
    np.add.at(counts.reshape(-1), cells[guesses >= 0], one)
