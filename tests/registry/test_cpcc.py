"""`cpcc` against loops over pairs of classes; planted trees, and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group, pearsonr
from taxolens.registry.evaluators.cpcc import CPCC, euclidean
from taxolens.registry.evaluators.parts.ranks import pearson
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_against_loops_over_pairs(
    seed: int, random_dag: Measured, one_batch: Measured, measured: Measured
) -> None:
    taxonomy = random_dag(seed).taxonomy()
    n = len(taxonomy.classes)
    assume(n > 3)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n, 60)
    x = rng.normal(size=(60, 4)).astype(np.float32) + 100  # a large offset
    z = np.maximum(rng.normal(size=(60, 6)), 0).astype(np.float32)
    (evaluator,) = measured(taxonomy, one_batch(z, labels, x=x), [CPCC], size=17)
    for permutation in (None, rng.permutation(n)):
        place = np.arange(n) if permutation is None else permutation
        numbers = evaluator.compute(permutation=permutation)
        for feature, values in (("x", x), ("z", z)):
            tree, distance = [], []
            for a in range(n):
                for b in range(a):
                    if (labels == a).any() and (labels == b).any():
                        path = [
                            taxonomy.path_to_root(taxonomy.class_nodes[place[c]]) for c in (a, b)
                        ]
                        tree.append(len(set(path[0]) ^ set(path[1])))
                        means = [values[labels == c].astype(float).mean(0) for c in (a, b)]
                        distance.append(np.linalg.norm(means[0] - means[1]))
            assert numbers["n_pairs"] == len(tree)
            if len(tree) > 1 and np.ptp(tree):
                wanted = pearsonr(tree, distance).statistic
                assert numbers[f"{feature}_cpcc"] == pytest.approx(wanted, abs=1e-4)
            else:
                assert np.isnan(numbers[f"{feature}_cpcc"])
        assert numbers["n_classes"] == len(set(labels.tolist()))


def test_distances_far_from_the_origin_and_of_points_nearly_equal() -> None:
    """Rounding of squares must not leave a root of a number below 0."""
    points = np.random.default_rng(0).normal(size=(30, 8))
    points[10:20] = points[:10] * (1 + 1e-9)
    for offset in (0.0, 1e7):
        with np.errstate(all="raise"):
            found = euclidean(points + offset)
        assert not np.diag(found).any()
        np.testing.assert_allclose(found, cdist(points, points), atol=1e-5)


def test_points_at_the_distances_of_the_tree_reach_one(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """The classes of this tree are as far as the points of an ultrametric: Euclidean distances."""
    distance = animals.tree_distance.astype(float)
    square = -0.5 * distance**2
    centre = np.eye(12) - 1 / 12
    values, vectors = np.linalg.eigh(centre @ square @ centre)
    assert values.min() > -1e-9
    labels = np.repeat(np.arange(12), 6)
    x = (vectors * np.sqrt(values.clip(min=0)))[labels].astype(np.float32)
    (evaluator,) = measured(animals, one_batch(np.abs(x), labels, x=x), [CPCC])
    value = evaluator.compute()
    assert value["x_cpcc"] == pytest.approx(1, abs=1e-5)
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(5)]
    assert max(p["x_cpcc"] for p in permuted) < 0.8
    assert evaluator.compute(shuffled=True)["x_cpcc"] < 0.8
    table = evaluator.tables()["distances"]
    assert table["n_pairs"].sum() == 2 * 66


@pytest.mark.parametrize("flat", [False, True], ids=["noise", "flat classes"])
def test_without_a_hierarchy_it_stays_inside_its_null(
    animals: Taxonomy, one_batch: Measured, measured: Measured, flat: bool
) -> None:
    labels = np.repeat(np.arange(12), 20)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(labels), 16, generator=generator)
    if flat:
        x += torch.randn(12, 16, generator=generator)[torch.from_numpy(labels)]
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [CPCC])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(40)]
    for name in ("x_cpcc", "z_cpcc"):
        draws = [p[name] for p in permuted]
        assert np.quantile(draws, 0.02) <= value[name] <= np.quantile(draws, 0.98)


def test_equal_distances_are_undefined() -> None:
    distance = euclidean(np.eye(4))
    np.testing.assert_allclose(distance, np.sqrt(2) * (1 - np.eye(4)))
    above = distance[np.triu_indices(4, 1)]
    assert np.isnan(pearson(above, np.arange(6.0)))
    # However they are turned and moved: what rounding makes of equal numbers is no variation.
    turned = ortho_group.rvs(4, random_state=0) + np.array([7.0, 0.1, -3.0, 20.0])
    above = euclidean(turned)[np.triu_indices(4, 1)]
    assert np.ptp(above) > 0 and np.isnan(pearson(above, np.arange(6.0)))
    assert np.isnan(pearson(np.arange(6.0), above))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_correlation_in_any_unit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 9)) * 10.0 ** rng.integers(-12, 13, (2, 1))
    b += a * rng.normal()
    offset = rng.normal() * 1e3 * np.ptp(a)
    assert pearson(a + offset, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-9)
    with np.errstate(all="raise"):
        assert np.isnan(pearson(a[:0], b[:0])) and np.isnan(pearson(a[:1], b[:1]))
        assert np.isnan(pearson(0 * a, b)) and np.isnan(pearson(a, 0 * b))


def test_a_row_that_is_not_finite_has_no_distance() -> None:
    distance = euclidean(np.array([[0.0, 0], [3, 4], [np.nan, 0]]))
    assert distance[0, 1] == 5 and np.isnan(distance[2]).all() and np.isnan(distance[:, 2]).all()
    assert np.isnan(euclidean(np.full((2, 3), np.nan))).all()
