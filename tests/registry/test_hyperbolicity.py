"""`hyperbolicity` against all triples, and on trees."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.hyperbolicity import (
    Hyperbolicity,
    distances,
    gaussian_like,
    gromov_delta,
    relative_delta,
)
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_equals_the_maximum_over_triples(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(7, 3))
    distance = distances(points)
    np.testing.assert_allclose(distance[1, 2], np.linalg.norm(points[1] - points[2]), atol=1e-6)
    n, w = len(points), 2
    product = np.array(
        [
            [(distance[a, w] + distance[b, w] - distance[a, b]) / 2 for b in range(n)]
            for a in range(n)
        ]
    )
    wanted = max(
        min(product[a, c], product[c, b]) - product[a, b]
        for a in range(n)
        for b in range(n)
        for c in range(n)
    )
    assert gromov_delta(distance, w) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("base", [0, 33])
@pytest.mark.parametrize("world", ["cloud", "plane", "copies", "lengths", "simplex", "tree"])
def test_pairs_left_out_by_their_bound_change_nothing(world: str, base: int) -> None:
    rng = np.random.default_rng(1)
    points = {
        "cloud": rng.normal(size=(70, 64)),
        "plane": rng.normal(size=(70, 2)),
        "copies": np.repeat(rng.normal(size=(10, 5)), 7, axis=0),
        "lengths": rng.normal(size=(70, 9)) * np.exp(2 * rng.normal(size=(70, 1))),
        "simplex": np.eye(70),
    }
    if world == "tree":
        classes = Taxonomy.from_edges([(f"n{rng.integers(v)}", f"n{v}") for v in range(1, 150)])
        distance = classes.tree_distance.astype(float)
    else:
        distance = distances(points[world])
    to_base = distance[base]
    product = (0.5 * (to_base[:, None] + to_base - distance)).astype(np.float32)
    through = np.minimum(product[:, :, None], product[None]).max(1)
    assert gromov_delta(distance, base) == (through - product).max()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_tree_has_none_and_a_square_has_the_most_of_four(seed: int, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    delta = relative_delta(taxonomy.tree_distance.astype(float), bases=9)
    assert np.isnan(delta) if len(taxonomy.classes) < 4 else delta == pytest.approx(0, abs=1e-6)
    square = np.array([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]], dtype=float)
    assert relative_delta(square) == 1.0


def test_distances_far_from_the_origin_and_of_equal_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 8))
    points[10:20] = points[:10] * (1 + 1e-9)  # squares that rounding takes below 0
    wanted = np.linalg.norm(points[:, None] - points, axis=2)
    for offset in (0.0, 1e7):
        with np.errstate(all="raise"):
            found = distances(points + offset)
        assert not np.diag(found).any()
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_too_few_points_or_all_in_one_place_is_undefined() -> None:
    assert np.isnan(relative_delta(np.ones((3, 3)) - np.eye(3)))
    assert np.isnan(relative_delta(np.zeros((5, 5))))
    assert np.isnan(relative_delta((np.ones((5, 5)) - np.eye(5)) * 1e39))  # beyond float32


def test_1500_points_need_little_memory() -> None:
    distance = distances(np.random.default_rng(0).normal(size=(1500, 4)))[:, :1500]
    tracemalloc.start()
    try:
        gromov_delta(distance[:400, :400], 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * 400 * 400 * 8  # quadratic: 180 MB at 1,500, where all triples are 27 GB


def test_a_gaussian_cloud_has_the_same_moments() -> None:
    points = np.random.default_rng(0).normal(size=(3000, 2)) @ np.array([[2.0, 1], [0, 0.5]]) + 5
    cloud = gaussian_like(points, np.random.default_rng(1))
    np.testing.assert_allclose(cloud.mean(0), points.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(cloud.T), np.cov(points.T), rtol=0.15)


def test_class_means_on_a_star_are_more_tree_like_than_a_cloud(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 10)
    arms = np.repeat(np.eye(3), 4, axis=0) * np.tile([1.0, 4, 7, 10], 3)[:, None]
    x = torch.from_numpy(arms[labels].astype(np.float32)) + 100
    batch = one_batch(np.eye(12, dtype=np.float32)[labels], labels, x=x)
    (evaluator,) = measured(animals, batch, [Hyperbolicity], size=17, W_dec=torch.randn(12, 3))
    numbers = evaluator.compute()
    assert set(numbers) == set(Hyperbolicity.higher_is_better)
    assert numbers["tree_delta"] == pytest.approx(0, abs=1e-6)
    assert numbers["class_means_delta"] == pytest.approx(numbers["images_delta"], abs=0.1)
    assert numbers["latent_means_delta"] == pytest.approx(0, abs=1e-5)  # all equally far: a star
    assert 0 < numbers["decoder_delta"] < 1
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["class_means_delta"] != numbers["class_means_delta"]
    assert shuffled["decoder_delta"] == numbers["decoder_delta"]
    assert len(evaluator.tables()["sets"]) == 5


def test_other_sources_share_x(animals: Taxonomy, one_batch: Measured, measured: Measured) -> None:
    labels = np.repeat(np.arange(12), 4)
    batch = one_batch(np.random.default_rng(0).random((48, 6)).astype(np.float32), labels)
    (evaluator,) = measured(animals, batch, [Hyperbolicity], source="random")
    numbers = evaluator.compute()
    assert np.isnan(numbers["class_means_delta"]) and np.isnan(numbers["images_delta"])
    assert np.isfinite(numbers["latent_means_delta"])


def test_large_sets_are_sampled(animals: Taxonomy, one_batch: Measured, measured: Measured) -> None:
    labels = np.repeat(np.arange(12), 4)
    batch = one_batch(np.eye(12, dtype=np.float32)[labels], labels)
    options = {"max_points": 6, "sample_images": 10}
    (evaluator,) = measured(
        animals, batch, [Hyperbolicity], options=options, W_dec=torch.randn(12, 5)
    )
    assert [len(evaluator.points(s)) for s in ("class_means", "decoder")] == [6, 6]
    assert evaluator.tables()["sets"]["points"][1] <= 6


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_points: out of range; given 3; allowed: 4 or more"):
        Hyperbolicity.Options(max_points=3)
