"""Linear and nearest-neighbour probes in one pass: fitted on the fit half, scored on the other.

Both predict the class. Accuracy at any cut of the tree follows from the confusion matrix, so a
permuted tree needs no second fit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import hashing
from ..base import require_same


class RidgeProbe:
    """Ridge regression of one-hot classes on standardised features; predicts the largest.

    W = (ZᵀZ + λ·n·I)⁻¹ Zᵀ(Y − Ȳ) with Z the features minus their mean over their deviation (own
    definition; a least-squares linear probe). Memory O(d² + labellings·C·d).

    Args:
        n_classes: C.
        n_labellings: how many labellings are fitted at once.
        ridge: λ, relative to the variance of a feature.
    """

    def __init__(self, n_classes: int, n_labellings: int = 1, ridge: float = 0.01) -> None:
        self.n_classes, self.n_labellings, self.ridge = n_classes, n_labellings, ridge
        self.n = 0
        self._gram: Tensor | None = None  # (d, d)
        self._weights: list[Tensor] | None = None

    def centre(self, x: Tensor) -> None:
        """Begin, with features about the mean of a sample x (n, d): a large one would cancel precision."""
        d = x.shape[1]
        self._offset = x.mean(0)
        zeros = _double(self._offset).new_zeros
        self._gram = zeros(d, d)
        self._sums = zeros(self.n_labellings, self.n_classes, d)
        self._counts = zeros(self.n_labellings, self.n_classes)

    def fit(self, x: Tensor, labellings: Sequence[Tensor]) -> None:
        """Add x (n, d) and its labels (n,) of the fit half."""
        if self._gram is None:
            self.centre(x)
        assert self._gram is not None
        x = x - self._offset
        self.n += len(x)
        self._gram += _double(x.T @ x)
        own = _double(x)
        for sums, counts, labels in zip(self._sums, self._counts, labellings):
            sums.index_add_(0, labels.to(own.device), own)
            counts += torch.bincount(labels.cpu(), minlength=self.n_classes).to(counts.device)
        self._weights = None

    def merge(self, other: RidgeProbe) -> None:
        """Add another part of the fit half, about the same mean."""
        if self._gram is None:
            vars(self).update(copy.deepcopy(vars(other)))
            return
        if other._gram is None:
            return
        require_same("mean of a feature", self._offset, other._offset)
        self.n += other.n
        device = self._gram.device
        self._gram += other._gram.to(device)
        self._sums += other._sums.to(device)
        self._counts += other._counts.to(device)
        self._weights = None

    @property
    def fitted_on(self) -> Tensor | None:
        """(d, d) second moments of what it is fitted on, by which two fits are told apart."""
        return self._gram

    def scores(self, x: Tensor) -> list[Tensor]:
        """(n, C) scores of the classes for x (n, d) under every labelling, on the device of x; none
        if nothing was fitted."""
        if self._gram is None or not self.n:
            return []
        if self._weights is None:
            self._solve(self._gram)
        assert self._weights is not None
        z = (x - self._offset - self._mean.to(x.device)) / self._scale.to(x.device)
        return [
            torch.addmm(bias.to(x.device), z, weight.to(x.device))
            for weight, bias in zip(self._weights, self._bias)
        ]

    def predict(self, x: Tensor) -> list[Tensor]:
        """(n,) classes of x (n, d) under every labelling; −1 if nothing was fitted."""
        if self._gram is None or not self.n:
            return [torch.full((len(x),), -1, dtype=torch.int64)] * self.n_labellings
        return [scores.argmax(1).cpu() for scores in self.scores(x)]

    def _solve(self, gram: Tensor) -> None:
        mean = self._sums[0].sum(0) / self.n
        covariance = gram / self.n - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        scale = variance.sqrt()
        scale[scale <= 1e-6 * scale.max()] = torch.inf  # a constant feature has weight 0
        correlation = covariance / torch.outer(scale, scale)
        correlation.diagonal().add_(self.ridge)
        factor = torch.linalg.cholesky(correlation)
        self._mean, self._scale = mean.float(), scale.float()
        self._weights, self._bias = [], []
        for sums, counts in zip(self._sums, self._counts):
            moments = (sums - counts[:, None] * mean) / scale / self.n
            self._weights.append(torch.cholesky_solve(moments.T, factor).float())
            # A class without images is never predicted.
            self._bias.append(torch.where(counts > 0, counts / self.n, -torch.inf).float())


class NeighbourProbe:
    """The k nearest of a capped database by cosine, votes weighted by exp(cos / temperature).

    Features are centred on the mean of the database. It keeps at most `per_class` fit images of a
    class, chosen by a hash of their index: memory O(labellings·C·d), independent of the number of
    images. Every labelling has a database of its own, capped by its own classes. The form of the vote
    is that of DINO (Caron et al. 2021, arXiv 2104.14294); centring and cap are ours.

    Args:
        n_classes: C.
        n_labellings: how many labellings vote at once.
        k: number of neighbours.
        per_class: images of the database for each class.
        temperature: temperature of the vote.
    """

    def __init__(
        self,
        n_classes: int,
        n_labellings: int = 1,
        k: int = 10,
        per_class: int = 10,
        temperature: float = 0.07,
    ) -> None:
        self._databases = [
            _Database(n_classes, k, per_class, temperature) for _ in range(n_labellings)
        ]

    def fit(self, x: Tensor, labellings: Sequence[Tensor], index: Tensor) -> None:
        """Add x (n, d), its labels (n,) and its positions (n,) of the fit half."""
        priority = hashing.uniform(index.cpu().numpy(), salt=1)
        for database, labels in zip(self._databases, labellings):
            database.offer(x, labels.cpu().numpy(), priority)

    def merge(self, other: NeighbourProbe) -> None:
        """Add the databases of another part of the fit half."""
        for database, of_other in zip(self._databases, other._databases):
            database.merge(of_other)

    def predict(self, x: Tensor) -> list[Tensor]:
        """(n,) classes of x (n, d) under every labelling; −1 if the database is empty."""
        return [database.predict(x) for database in self._databases]


class _Database:
    """The images that vote under one labelling: of each class those of the lowest priority."""

    def __init__(self, n_classes: int, k: int, per_class: int, temperature: float) -> None:
        self.k, self.temperature = k, temperature
        self._priority = np.full((n_classes, per_class), np.inf)
        self._features: Tensor | None = None  # (C, per_class, d)
        self._ready: Tensor | None = None  # (N, d), centred, of length 1

    def offer(self, x: Tensor, classes: np.ndarray, priority: np.ndarray) -> None:
        """Keep those of x (n, d), of these classes (n,), whose priority (n,) is lower than that of others."""
        if self._features is None:
            shape = (*self._priority.shape, x.shape[1])
            self._features = torch.zeros(shape, dtype=torch.float32, device=x.device)
        entered: dict[tuple[int, int], int] = {}  # class and slot -> image
        for i in np.flatnonzero(priority < self._priority[classes].max(1)).tolist():
            c = int(classes[i])
            slot = int(self._priority[c].argmax())
            if priority[i] < self._priority[c, slot]:
                self._priority[c, slot] = priority[i]
                entered[c, slot] = i
        if entered:
            of, slots = torch.tensor(list(entered)).T
            images = torch.tensor(list(entered.values()))
            device = self._features.device
            self._features[of.to(device), slots.to(device)] = x[images.to(x.device)]
            self._ready = None

    def merge(self, other: _Database) -> None:
        """Offer the images of another database."""
        if other._features is None:
            return
        kept = np.isfinite(other._priority)
        device = other._features.device if self._features is None else self._features.device
        x = other._features[torch.from_numpy(kept).to(other._features.device)].to(device)
        self.offer(x, np.nonzero(kept)[0], other._priority[kept])

    def predict(self, x: Tensor) -> Tensor:
        """(n,) classes of x (n, d); −1 if there are no images."""
        kept = np.isfinite(self._priority)
        if self._features is None or not kept.any():
            return torch.full((len(x),), -1, dtype=torch.int64)
        if self._ready is None:
            features = self._features[torch.from_numpy(kept).to(x.device)]
            self._mean = features.mean(0)
            self._ready = torch.nn.functional.normalize(features - self._mean, dim=1)
        cosine = torch.nn.functional.normalize(x - self._mean, dim=1) @ self._ready.T
        nearest = cosine.topk(min(self.k, len(self._ready)), dim=1)
        weight = ((nearest.values - 1) / self.temperature).exp().cpu()
        classes = torch.from_numpy(np.nonzero(kept)[0])
        votes = torch.zeros(len(x), len(self._priority))
        votes.scatter_add_(1, classes[nearest.indices.cpu()], weight)
        # The first of equal ones, as in torch, whose argmax is slower on the CPU.
        return torch.from_numpy(votes.numpy().argmax(1))


def _double(x: Tensor) -> Tensor:
    """x in double precision, on the CPU where its device lacks it."""
    return (x.cpu() if x.device.type == "mps" else x).double()
