"""Logistic regressions against scipy's minimiser, and thresholds against trying every one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy.linalg import fractional_matrix_power
from scipy.special import log_expit
from taxolens.registry.evaluators.parts.logistic import (
    LogisticProber,
    _largest_curvature,
    best_threshold,
    class_log_odds,
    f1_score,
    moments,
    sparse_logistic,
)

SEEDS = st.integers(0, 10**6)


def balanced(truth: np.ndarray) -> np.ndarray:
    """(n,) weights of images: positives and negatives have half of the weight each."""
    return np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())


def least(features: np.ndarray, truth: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """(k,) the weights of least weighted log loss + penalty/2·w²."""
    sign, share = np.where(truth, 1, -1), balanced(truth)

    def loss(w: np.ndarray) -> float:
        return float(-(share * log_expit(sign * (features @ w))).sum() + (penalty * w**2).sum() / 2)

    found = optimize.minimize(loss, np.zeros(features.shape[1]), tol=1e-12)
    return found.x


def numbers(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of other scales and offsets, and two yes-or-no targets that they help to predict."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(120, 3)) @ rng.normal(size=(3, 3))) * [1, 20, 0.1] + [0, 5, 1]
    score = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(3, 2)) + rng.normal(size=(120, 2))
    return x, score > [0.0, 1.0]


def single(n: int) -> np.ndarray:
    """(n, 2) a target with one positive, and one with one negative."""
    one = np.arange(n) == 5
    return np.stack([one, ~one], axis=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_probes_of_all_of_x_reach_the_optimum(seed: int) -> None:
    x, truth = numbers(seed)
    truth = np.concatenate([truth, single(len(x))], axis=1)
    ridge, penalty = 0.1, 0.01
    z = (x - x.mean(0)) / x.std(0)
    u = z @ fractional_matrix_power(z.T @ z / len(z) + ridge * np.eye(3), -0.5)
    u = np.append(u, np.ones((len(u), 1)), axis=1)
    probes = LogisticProber(torch.from_numpy(x).float(), ridge=ridge).fit(
        torch.from_numpy(truth), penalty=penalty, steps=2000
    )
    scores = x @ probes.weight.double().numpy().T + probes.bias.double().numpy()
    for found, true in zip(scores.T, truth.T):
        wanted = u @ least(u, true, np.array([penalty, penalty, penalty, 0]))
        assert found == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("unit", [0.1, 1.0, 10.0])
def test_the_curvature_that_steps_are_made_for_is_a_little_above_the_largest(unit: float) -> None:
    rng = np.random.default_rng(0)
    u, share = unit * rng.normal(size=(90, 6)) * [1, 2, 3, 1, 1, 9], rng.random((90, 4))
    found = _largest_curvature(torch.from_numpy(u).float(), torch.from_numpy(share).float())
    largest = [np.linalg.eigvalsh(u.T @ (s[:, None] * u))[-1] for s in share.T]
    assert found.numpy() == pytest.approx(np.multiply(1.2, largest), rel=0.02)


def test_few_steps_come_near_it() -> None:
    x, truth = (torch.from_numpy(v) for v in numbers(2))
    prober = LogisticProber(x.float())
    few, many = (prober.fit(truth, steps=steps) for steps in (60, 2000))
    assert torch.allclose(few.weight, many.weight, rtol=0.05, atol=0.05 * many.weight.abs().max())


def test_a_target_of_one_value_has_no_probe() -> None:
    x, truth = (torch.from_numpy(v) for v in numbers(0))
    truth[:, 0] = True
    found = LogisticProber(x.float()).fit(truth)
    assert found.weight[0].tolist() == [0, 0, 0] and found.bias[0] == 0
    assert found.weight[1].abs().min() > 0


def test_a_feature_that_is_constant_weighs_nothing() -> None:
    mean, deviation = moments(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 1e-7]]))
    assert mean.tolist() == pytest.approx([2, 5, 5e-8])
    assert deviation.tolist() == [1, np.inf, np.inf]
    small = moments(1e-6 * torch.tensor([[1.0, 2.0], [3.0, 2.1]]))[1]
    assert small.tolist() == pytest.approx([1e-6, 5e-8])


def test_logistic_probe_finds_the_direction_that_decides() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=generator) * torch.tensor([1.0, 5, 1, 1, 1, 0]) + 3
    w = torch.tensor([1.0, 0.3, -1, 0, 0, 0])
    score = x @ w
    targets = torch.stack([score > score.median(), score > score.quantile(0.95)], dim=1)
    targets = torch.cat([targets, torch.zeros(2000, 1, dtype=torch.bool)], dim=1)
    probes = LogisticProber(x, ridge=1e-3).fit(targets)
    cosine = torch.nn.functional.cosine_similarity(probes.weight[:2], w[None])
    assert (cosine > 0.97).all()
    said = x @ probes.weight.T + probes.bias > 0
    assert (said[:, 0] == targets[:, 0]).float().mean() > 0.97
    assert probes.weight[2].abs().max() == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_probes_of_a_few_latents_reach_the_optimum(seed: int) -> None:
    x, truth = numbers(seed)
    both = np.stack([x[:, :2], x[:, 1:]])
    given_ = (torch.from_numpy(both[:, :90]), torch.from_numpy(both[:, 90:]))
    found = sparse_logistic(*given_, torch.from_numpy(truth[:90].T), ridge=0.01, rounds=60).numpy()
    for z, true, scores in zip(both, truth.T, found):
        features = np.append(z / np.abs(z[:90]).max(0), np.ones((120, 1)), axis=1)
        weight = least(features[:90], true[:90], np.array([0.01, 0.01, 1e-6]))
        assert scores == pytest.approx(features[90:] @ weight, abs=1e-3)


def test_a_latent_that_never_fires_changes_no_probe() -> None:
    x, truth = numbers(3)
    z = torch.from_numpy(np.abs(x[None, :, :2]))
    padded = torch.cat([z, torch.zeros(1, 120, 1)], dim=2)
    targets = torch.from_numpy(truth[:, :1].T)
    one, other = (sparse_logistic(v, v, targets) for v in (z, padded))
    assert torch.allclose(one, other)


def test_the_regression_of_several_classes_step_by_step() -> None:
    """Nesterov's steps from the frequencies of the classes, stopped where held-back images say."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80)
    z = np.abs(rng.normal(size=(80, 4))) * (rng.random((80, 4)) < 0.5)
    z[:, 3] = 0  # a latent that never fires
    z[np.arange(80), labels] += 1.5
    asked = np.abs(rng.normal(size=(6, 4)))
    held = torch.rand(80, generator=torch.Generator().manual_seed(0)).numpy() < 0.25
    scale = np.sqrt((z**2).mean(0))
    u, v = (np.divide(w, scale, out=np.zeros_like(w), where=scale > 0) for w in (z, asked))
    frequency = np.bincount(labels, minlength=5) + 0.5
    prior = np.log(frequency / frequency.sum())
    target, known = np.eye(5)[labels[~held]], u[~held]
    step = 1 / (0.5 * np.linalg.norm(known, 2) ** 2 / len(known) + 1e-3)

    def log_odds(w: np.ndarray, rows: np.ndarray) -> np.ndarray:
        scores = rows @ w + prior
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))

    for steps in (1, 4, 40):
        weight = ahead = np.zeros((4, 5))
        losses, weights, t = [], [], 1.0
        for _ in range(steps):
            slope = known.T @ (np.exp(log_odds(ahead, known)) - target) / len(known)
            before, weight = weight, ahead - step * slope
            t, last = (1 + np.sqrt(1 + 4 * t**2)) / 2, t
            ahead = weight + (last - 1) / t * (weight - before)
            losses.append(-log_odds(weight, u[held])[np.arange(held.sum()), labels[held]].mean())
            weights.append(weight)
        fitted, of, others = (torch.from_numpy(w) for w in (z, labels, asked))
        found = class_log_odds(fitted.float(), of, others.float(), 5, steps=steps)
        best = weights[int(np.argmin(losses))]
        assert found.numpy() == pytest.approx(log_odds(best, v), abs=1e-3)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_best_threshold_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, 20).astype(float), rng.random(20) < 0.4
    truth[0] = True
    threshold, f1 = best_threshold(scores, truth)
    tried = [
        np.sum((scores > t) & truth) * 2 / (np.sum(scores > t) + truth.sum())
        for t in np.arange(-1.5, 6)
    ]
    assert f1 == pytest.approx(max(tried))
    said = scores > threshold
    assert 2 * (said & truth).sum() / (said.sum() + truth.sum()) == pytest.approx(f1)


def test_a_threshold_lies_half_way_and_below_the_last_score() -> None:
    assert best_threshold(np.array([3.0, 1.0, 2.0]), np.array([True, False, True])) == (1.5, 1.0)
    assert best_threshold(np.array([3.0, 1.0]), np.array([True, True])) == (0.5, 1.0)
    threshold, f1 = best_threshold(np.array([1.0, 2.0]), np.array([False, False]))
    assert threshold == -np.inf and np.isnan(f1)
    # Equal scores are all above a threshold or none is.
    assert best_threshold(np.ones(4), np.array([True, False, False, True])) == (0.5, 2 / 3)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_weight_counts_as_so_many_equal_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, 12).astype(float), rng.random(12) < 0.4
    truth[0] = True
    times = rng.integers(1, 5, 12)
    one, many = (
        best_threshold(scores, truth, times * 0.5),
        best_threshold(scores.repeat(times), truth.repeat(times)),
    )
    assert one[1] == pytest.approx(many[1]) and one[0] == many[0]
    said = scores > 2
    found = f1_score(said, truth, times * 0.5)
    assert found == pytest.approx(f1_score(said.repeat(times), truth.repeat(times)))


def test_f1() -> None:
    yes, no = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
    assert f1_score(yes, np.array([True, False, False])) == 0.5
    assert f1_score(no, yes) == 0 and np.isnan(f1_score(no, no))
