"""Logistic regressions: many binary targets on x or on a few latents each, and multinomial ones.

`best_threshold` and `f1_score` evaluate their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Probes(NamedTuple):
    """score = x @ weight.T + bias."""

    weight: Tensor  # (k, d)
    bias: Tensor  # (k,)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns of x (n, d), each (d,). The deviation of columns
    that are constant relative to the others is ∞, so that scaled they are 0."""
    deviation = x.std(0, unbiased=False)
    return x.mean(0), torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)


class LogisticProber:
    """Logistic regressions on the same x, with equal total weights of positives and negatives.

    Solved by accelerated gradient steps (Nesterov 1983) in the coordinates u = (R + ridge·I)^{-1/2}
    (x − mean)/deviation with R the correlations, penalised by penalty/2·‖weight in u‖².

    Args:
        x: (n, d).
    """

    def __init__(self, x: Tensor, *, ridge: float = 0.1) -> None:
        self._mean, self._deviation = moments(x)
        z = (x - self._mean) / self._deviation
        values, vectors = torch.linalg.eigh(z.T @ z / len(z))
        self._whiten = vectors * (values.clamp(min=0) + ridge).rsqrt() @ vectors.T
        self._u = torch.cat([z @ self._whiten, torch.ones(len(z), 1)], dim=1)

    def fit(self, targets: Tensor, *, penalty: float = 1e-3, steps: int = 60) -> Probes:
        """One probe for each column of targets (n, k) bool; 0 for constant columns."""
        y = targets.to(self._u.dtype)
        positives, negatives = y.sum(0), (1 - y).sum(0)
        solvable = (positives > 0) & (negatives > 0)
        share = 0.5 * (y / positives.clamp(min=1) + (1 - y) / negatives.clamp(min=1))
        weight = _descend(self._u, y, share * solvable, penalty, steps)
        direction = weight[:-1].T @ self._whiten / self._deviation
        return Probes(direction, weight[-1] - direction @ self._mean)


def _descend(u: Tensor, y: Tensor, share: Tensor, penalty: float, steps: int) -> Tensor:
    """(d + 1, k), the last row the bias."""
    step = 1 / (0.25 * _largest_curvature(u, share) + penalty)
    shrink = torch.full((u.shape[1], 1), penalty)
    shrink[-1] = 0.0

    def slope(w: Tensor) -> Tensor:
        return u.T @ (share * (torch.sigmoid(u @ w) - y)) + shrink * w

    return _accelerated(slope, torch.zeros(u.shape[1], y.shape[1]), step, steps)


def _accelerated(
    slope: Callable[[Tensor], Tensor],
    weight: Tensor,
    step: Tensor | float,
    steps: int,
    visit: Callable[[Tensor], None] = lambda weight: None,
) -> Tensor:
    """The weight after accelerated gradient steps (Nesterov 1983); `visit` is called after each."""
    ahead, momentum = weight, 1.0
    for _ in range(steps):
        following = ahead - step * slope(ahead)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - weight)
        weight, momentum = following, grown
        visit(weight)
    return weight


def _largest_curvature(u: Tensor, share: Tensor, rounds: int = 12) -> Tensor:
    """(k,) an upper estimate of the largest eigenvalue of Σ share·uuᵀ for each target."""
    v = torch.randn(u.shape[1], share.shape[1], generator=torch.Generator().manual_seed(0))
    size = torch.ones(share.shape[1])
    for _ in range(rounds):
        v = u.T @ (share * (u @ v))
        size = v.norm(dim=0).clamp(min=1e-12)
        v = v / size
    return 1.2 * size  # the power method converges from below


def sparse_logistic(
    train: Tensor, held_out: Tensor, targets: Tensor, *, ridge: float = 1e-3, rounds: int = 12
) -> Tensor:
    """(g, a) the scores of g logistic regressions, each on its own k latents.

    Newton's method; equal total weights of positives and negatives. Features are scaled by their
    largest value, and the weights penalised by ridge/2·‖weight‖².

    Args:
        train: (g, n, k) features to fit; held_out: (g, a, k) features to score.
        targets: (g, n) bool, each with positives and negatives.
    """
    scale = train.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)

    def features(z: Tensor) -> Tensor:
        return torch.cat([z / scale, torch.ones_like(z[..., :1])], dim=2).double()

    u, y = features(train), targets.double()
    share = 0.5 * (y / y.sum(1, keepdim=True) + (1 - y) / (1 - y).sum(1, keepdim=True))
    penalty = torch.full((u.shape[2],), ridge, dtype=u.dtype)
    penalty[-1] = 1e-6
    weight = torch.zeros(u.shape[0], u.shape[2], dtype=u.dtype)
    for _ in range(rounds):
        p = torch.sigmoid((u @ weight[..., None])[..., 0])
        slope = (u * (share * (p - y))[..., None]).sum(1) + penalty * weight
        curvature = u.mT @ (u * (share * p * (1 - p))[..., None]) + torch.diag(penalty)
        weight = weight - torch.linalg.solve(curvature, slope).clamp(-10, 10)
    return (features(held_out) @ weight[..., None])[..., 0]


def multinomial(x: Tensor, labels: Tensor, n_classes: int, *, penalty: float, steps: int) -> Probes:
    """Multinomial logistic regression on standardised x (n, d): cross-entropy + penalty/2·‖W‖².

    At most `steps` steps of L-BFGS from 0. A class that labels (n,) lack has bias −∞.
    """
    mean, deviation = moments(x)
    z = (x - mean) / deviation
    unseen = torch.where(torch.bincount(labels, minlength=n_classes) > 0, 0.0, -torch.inf).to(x)
    weight = torch.zeros(x.shape[1], n_classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        log_probs = (z @ weight + bias + unseen).log_softmax(1)
        error = torch.nn.functional.nll_loss(log_probs, labels)
        error = error + penalty / 2 * weight.square().sum()
        error.backward()
        return error

    with torch.enable_grad():
        solver.step(loss)  # pyright: ignore[reportArgumentType]
    direction = weight.detach().T / deviation
    return Probes(direction, bias.detach() + unseen - direction @ mean)


def class_log_odds(
    z: Tensor, labels: Tensor, held_out: Tensor, n_classes: int, *, steps: int = 100
) -> Tensor:
    """(a, C) log-probabilities of the classes by multinomial logistic regression.

    Accelerated gradient steps from the class frequencies; the step with the least loss on about a
    quarter of the images, held out from the fit, is used. Features are scaled to unit deviation but
    not centred: zeros stay zeros.

    Args:
        z: (n, k) to fit, with labels (n,); held_out: (a, k) to score.
    """
    held = torch.rand(len(z), generator=torch.Generator().manual_seed(0)) < 0.25
    scale = z.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.inf)
    u = z / scale
    frequency = torch.bincount(labels, minlength=n_classes) + 0.5
    prior = (frequency / frequency.sum()).log()
    target = torch.nn.functional.one_hot(labels[~held], n_classes).to(u.dtype)
    kept, n = u[~held], max(int((~held).sum()), 1)
    step = 1 / (0.5 * float(torch.linalg.matrix_norm(kept, 2) ** 2 if u.numel() else 1) / n + 1e-3)

    def slope(w: Tensor) -> Tensor:
        return kept.T @ (torch.softmax(kept @ w + prior, dim=1) - target) / n

    best, least = torch.zeros(u.shape[1], n_classes), torch.inf

    def keep_best(w: Tensor) -> None:
        nonlocal best, least
        loss = float(torch.nn.functional.cross_entropy(u[held] @ w + prior, labels[held]))
        if loss < least:
            best, least = w, loss

    last = _accelerated(slope, best, step, steps, keep_best)
    return torch.log_softmax(held_out / scale @ (best if held.any() else last) + prior, dim=1)


def best_threshold(
    scores: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """The threshold such that score > threshold has the largest F1, and that F1 (scalars).

    It is the midpoint of two scores. Without positives (−inf, NaN).

    Args:
        scores: (n,).
        truth: (n,) bool.
        weights: (n,) above 0, how often each counts; None: once.
    """
    if not truth.any():
        return -np.inf, float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    counted = np.ones(len(scores)) if weights is None else weights[order]
    hits = np.cumsum(truth[order] * counted)
    f1 = 2 * hits / (np.cumsum(counted) + hits[-1])
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # no threshold separates equal scores
    best = int(f1.argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else ordered[best] - 1.0
    return float((ordered[best] + below) / 2), float(f1[best])


def f1_score(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> float:
    """F1 of two boolean (n,), scalar; NaN where both are all false.

    Args:
        weights: (n,) above 0, how often each counts; None: once.
    """
    counted = np.ones(len(truth)) if weights is None else weights
    whole = counted @ predicted + counted @ truth
    return float(2 * (counted @ (predicted & truth)) / whole) if whole else float("nan")
