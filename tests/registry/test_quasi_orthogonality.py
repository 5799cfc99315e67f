"""`quasi_orthogonality` against the formula image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.quasi_orthogonality import QuasiOrthogonality
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


def random_case(
    one_batch: Measured, n: int = 60, seed: int = 0
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    z = (rng.random((n, 8)) * (rng.random((n, 8)) < 0.4)).astype(np.float32)
    x = torch.from_numpy(rng.normal(size=(n, 5)).astype(np.float32))
    W_dec, b_dec = torch.from_numpy(rng.normal(size=(8, 5))), torch.from_numpy(rng.normal(size=5))
    return one_batch(z, np.arange(n) % 12, x=x), W_dec, b_dec


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_equals_the_formula(
    seed: int, animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, W_dec, b_dec = random_case(one_batch, seed=seed)
    (evaluator,) = measured(animals, batch, [QuasiOrthogonality], W_dec=W_dec, b_dec=b_dec, size=7)
    gaps, bounds, active, norms = [], [], [], []
    for x, z in zip(batch.x.double(), batch.z.double()):
        f = torch.cat([z * W_dec.norm(dim=1), b_dec.norm()[None]])
        gap = abs(x @ x - f @ f) / (f @ f)
        gaps.append(float(gap))
        bounds.append(float(gap) / 7)
        if (l0 := int((z > 0).sum())) > 1:
            active.append(float(gap) / (l0 - 1))
        norms.append((float(x.norm()), float(f.norm())))
    x_norm, f_norm = np.array(norms).T
    numbers = evaluator.compute()
    assert set(numbers) == set(QuasiOrthogonality.higher_is_better)
    assert numbers["epsilon_lbo"] == pytest.approx(np.mean(bounds))
    assert numbers["epsilon_lbo_l0"] == pytest.approx(np.mean(active))
    assert numbers["within_half"] == pytest.approx(np.mean(np.array(gaps) <= 0.5))
    assert numbers["norm_ratio"] == pytest.approx(np.mean(f_norm / x_norm))
    assert numbers["norm_correlation"] == pytest.approx(np.corrcoef(x_norm, f_norm)[0, 1])
    assert numbers["norm_spread"] == pytest.approx(x_norm.std() / x_norm.mean())
    assert numbers["images"] == 60


def test_orthogonal_rows_that_reconstruct_are_the_ideal(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z = np.random.default_rng(0).random((48, 6)).astype(np.float32)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    batch = one_batch(z, np.arange(48) % 12, x=torch.from_numpy(z) @ directions)
    (evaluator,) = measured(animals, batch, [QuasiOrthogonality], W_dec=directions)
    numbers = evaluator.compute()
    assert numbers["epsilon_lbo"] == pytest.approx(0, abs=1e-6)
    assert numbers["within_quarter"] == 1.0
    assert numbers["norm_correlation"] == pytest.approx(1, abs=1e-6)
    assert numbers["norm_ratio"] == pytest.approx(1, abs=1e-6)
    (other,) = measured(animals, batch, [QuasiOrthogonality], W_dec=torch.ones(6, 6))
    assert other.compute()["within_quarter"] < 0.1


def test_a_band_is_where_the_lines_of_the_plot_say(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """‖f̃‖ = ‖x‖·√(1/(1 − c)) lies on the edge of band c."""
    x = torch.ones(12, 1)
    z = torch.full((12, 1), float(np.sqrt(1 / (1 - 0.25))))
    for factor, inside in ((0.999, 1.0), (1.001, 0.0)):
        batch = one_batch(z * factor, np.arange(12), x=x)
        (evaluator,) = measured(animals, batch, [QuasiOrthogonality], W_dec=torch.ones(1, 1))
        assert evaluator.compute()["within_quarter"] == inside
        assert np.isnan(evaluator.compute()["epsilon_lbo"])  # one latent has no other


def test_without_a_decoder_or_a_firing_it_is_undefined(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, W_dec, _ = random_case(one_batch)
    (evaluator,) = measured(animals, batch, [QuasiOrthogonality])
    assert np.isnan(evaluator.compute()["epsilon_lbo"])
    dead = one_batch(np.zeros((12, 8), dtype=np.float32), np.arange(12))
    (evaluator,) = measured(animals, dead, [QuasiOrthogonality], W_dec=W_dec)
    numbers = evaluator.compute()
    assert np.isnan(numbers["epsilon_lbo"]) and numbers["norm_ratio"] == 0.0
    assert np.isnan(numbers["norm_correlation"])


def test_the_plot_is_capped(animals: Taxonomy, one_batch: Measured, measured: Measured) -> None:
    batch, W_dec, b_dec = random_case(one_batch, 240)
    facts = {"W_dec": W_dec, "b_dec": b_dec, "options": {"plot_images": 40}}
    (evaluator,) = measured(animals, batch, [QuasiOrthogonality], size=30, **facts)
    assert 20 < len(evaluator.figures()["zf"].data[0].x) < 70
    assert evaluator.tables()["bands"]["share"].is_monotonic_increasing
    with pytest.raises(ConfigError, match="plot_images: out of range; given 0; allowed: 1 or more"):
        QuasiOrthogonality.Options(plot_images=0)
