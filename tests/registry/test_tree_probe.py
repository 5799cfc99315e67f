"""`tree_probe`: its parts against plain computation, and class means laid out as the tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taxolens  # noqa: F401 (fills the table of named taxonomies)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parts.ranks import spearman
from taxolens.registry.evaluators.tree_probe import (
    RIDGES,
    Split,
    TreeProbe,
    ridge_map,
    scaled_points,
    spanned,
    tie_ceiling,
)
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy

Measured = Callable[..., Any]
TINY_IMAGENET = Path(__file__).parents[2] / "benchmarks" / "tiny_imagenet.txt"


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_scaled_points_have_the_tree_distances(seed: int, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    distance = taxonomy.tree_distance.astype(float)
    points = scaled_points(distance, 99)
    if len(distance) > 1:
        np.testing.assert_allclose(squareform(pdist(points, "sqeuclidean")), distance, atol=1e-8)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_ridge_is_the_one_of_least_error_with_one_left_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, points = rng.normal(size=(9, 4)), rng.normal(size=(9, 2))
    known[:, 0] += points[:, 0]
    asked = rng.normal(size=(3, 4))
    scale = np.linalg.eigvalsh((known - known.mean(0)) @ (known - known.mean(0)).T).mean()

    def fit(x: np.ndarray, y: np.ndarray, at: np.ndarray, ridge: float) -> np.ndarray:
        c = x - x.mean(0)
        w = np.linalg.solve(c.T @ c + ridge * scale * np.eye(4), c.T @ (y - y.mean(0)))
        return (at - x.mean(0)) @ w + y.mean(0)

    points -= points.mean(0)
    errors = []
    for ridge in RIDGES:
        rest = [
            points[i] - fit(np.delete(known, i, 0), np.delete(points, i, 0), known[i], ridge)
            for i in range(9)
        ]
        errors.append(np.square(rest).sum())
    wanted = fit(known, points, asked, RIDGES[int(np.argmin(errors))])
    np.testing.assert_allclose(ridge_map(known, points, asked), wanted, atol=1e-8)


def test_few_dimensions_are_those_that_spread_most() -> None:
    points = np.array([[0, 0], [4, 1], [8, 0], [12, 1], [20, 0]], dtype=float)
    distance = squareform(pdist(points, "sqeuclidean"))
    (line,) = scaled_points(distance, 1).T
    assert abs(np.corrcoef(line, points[:, 0])[0, 1]) > 0.999
    assert scaled_points(distance, 2).shape == scaled_points(distance, 9).shape == (5, 2)
    assert scaled_points(np.zeros((3, 3)), 2).shape == (3, 0)


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_no_direction_is_kept_out_of_equal_ones(seed: int, rank: int, random_dag: Measured) -> None:
    """Points of the tree with its leaves in another order differ by a rotation alone."""
    taxonomy = random_dag(seed).taxonomy()
    distance = taxonomy.tree_distance.astype(float)
    order = np.random.default_rng(seed).permutation(len(distance))
    points = scaled_points(distance, rank)
    moved = scaled_points(distance[np.ix_(order, order)], rank)
    assert moved.shape == points.shape
    np.testing.assert_allclose(
        moved @ moved.T, (points @ points.T)[np.ix_(order, order)], atol=1e-6
    )
    values = np.sort(np.linalg.eigvalsh(centred(distance)))[::-1]
    size = points.shape[1]
    assert size >= min(rank, (values > 1e-8).sum())
    if size < len(values):
        assert values[size] < values[size - 1] - 1e-10 if size else values[0] < 1e-8
    if size > rank:
        assert values[size - 1] == pytest.approx(values[rank - 1])


def centred(distance: np.ndarray) -> np.ndarray:
    n = len(distance)
    middle = np.eye(n) - 1 / n
    return -0.5 * middle @ distance @ middle


def test_a_star_has_no_direction_before_another() -> None:
    distance = 2.0 * (1 - np.eye(6))
    assert scaled_points(distance, 2).shape == (6, 5)
    pairs = squareform(pdist(np.repeat(4.0 * np.eye(3), 2, 0) + 0.5 * np.eye(6)[:, [0, 2, 4]]))
    assert scaled_points(np.square(pairs), 1).shape[1] == 2


def test_points_that_are_all_alike_predict_the_mean() -> None:
    found = ridge_map(np.ones((5, 3)), np.arange(10.0).reshape(5, 2), np.eye(3)[:2])
    assert found.tolist() == [[0, 0], [0, 0]]


def test_edges_of_the_spanning_tree_by_hand() -> None:
    """Two families of two leaves; nodes: root, two families, four leaves."""
    members = np.zeros((4, 7), dtype=bool)
    members[:, 0] = members[:2, 1] = members[2:, 2] = True
    members[np.arange(4), np.arange(3, 7)] = True
    edges = frozenset({(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)})
    split = Split(np.arange(4), np.arange(4), members, edges)
    points = np.array([[0, 1], [0, -1], [9, 1], [9, -1]], dtype=float)
    assert spanned(points, split) == 1
    crossed = points[[0, 2, 1, 3]]
    # The places are nearest: each joins the rest by one of its two leaves.
    assert spanned(crossed, split) == pytest.approx(4 / 6)
    assert np.isnan(spanned(points, split._replace(edges=frozenset())))


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_a_node_at_the_place_of_a_leaf_is_joined_with_it(unit: float) -> None:
    """Two families of three leaves, the middle one at the mean of its family."""
    members = np.zeros((6, 9), dtype=bool)
    members[:, 0] = members[:3, 1] = members[3:, 2] = True
    members[np.arange(6), np.arange(3, 9)] = True
    edges = frozenset({(0, 1), (0, 2), *((1, v) for v in (3, 4, 5)), *((2, v) for v in (6, 7, 8))})
    points = np.array([[0, -1], [0, 0], [0, 1], [9, -1], [9, 0], [9, 1]]) * unit
    split = Split(np.arange(6), np.arange(6), members, edges)
    # The other edges of a family are ties: its node and the leaf are equally far from them.
    joined = sum(spanned(points, split._replace(edges=frozenset({e}))) for e in [(1, 4), (2, 7)])
    assert joined == 2


def test_the_ceiling_is_reached_by_the_same_order_without_ties() -> None:
    values = np.array([2, 2, 4, 4, 4, 6])
    assert tie_ceiling(values) == pytest.approx(spearman(values, np.arange(6)))
    assert tie_ceiling(np.arange(5)) == 1.0 and tie_ceiling(np.ones(5)) == 0.0


def test_the_ceiling_is_near_1_on_a_large_tree(one_batch: Measured, measured: Measured) -> None:
    """The value of docs/evaluators.md."""
    tree = load_taxonomy("imagenet", classes=TINY_IMAGENET.read_text().split())
    labels = np.repeat(np.arange(len(tree.classes)), 4)
    z = np.random.default_rng(0).random((len(labels), 3)).astype(np.float32)
    (evaluator,) = measured(tree, one_batch(z, labels), [TreeProbe])
    assert evaluator.compute()["ceiling"] == pytest.approx(0.997, abs=5e-4)


def wide_tree() -> Taxonomy:
    """4 orders of 3 families of 3 species."""
    edges = []
    for o in range(4):
        edges.append(("root", f"o{o}"))
        for f in range(3):
            edges.append((f"o{o}", f"o{o}f{f}"))
            edges += [(f"o{o}f{f}", f"o{o}f{f}s{s}") for s in range(3)]
    return Taxonomy.from_edges(edges)


def laid_out(tree: Taxonomy, one_batch: Measured, *, loud: float = 0.0) -> Any:
    """x: a direction for each order and family, under `loud` uninformative directions.

    All classes of a family share its direction, so what is learnt of one holds for the next.
    """
    labels = np.repeat(np.arange(36), 12)
    rng = np.random.default_rng(0)
    order, family = labels // 9, labels // 3
    means = np.concatenate([np.eye(4)[order], 0.7 * np.eye(12)[family]], axis=1)
    noise = loud * rng.normal(size=(36, 6))[labels]
    x = np.concatenate([means, noise], axis=1) + 0.01 * rng.normal(size=(len(labels), 22))
    z = np.maximum(x, 0).astype(np.float32)
    return one_batch(z, labels, x=torch.from_numpy(x.astype(np.float32)))


def test_means_laid_out_as_the_tree_are_the_ideal(one_batch: Measured, measured: Measured) -> None:
    tree = wide_tree()
    (evaluator,) = measured(tree, laid_out(tree, one_batch), [TreeProbe], size=90)
    numbers = evaluator.compute()
    assert set(numbers) == set(TreeProbe.higher_is_better)
    assert numbers["x_spearman"] > 0.95 * numbers["ceiling"]
    assert numbers["x_euclidean"] > 0.95 * numbers["ceiling"]
    assert numbers["x_uuas"] > 0.8
    assert numbers["n_classes"] == 11  # .3 of 36
    assert numbers["z_spearman"] > 0.9 * numbers["ceiling"]
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["x_spearman"] for n in permuted) < 0.4
    assert np.mean([n["x_spearman"] for n in permuted]) == pytest.approx(0, abs=0.25)
    assert max(n["x_uuas"] for n in permuted) < numbers["x_uuas"]
    assert evaluator.compute(shuffled=True)["x_spearman"] < 0.4
    assert len(evaluator.tables()["features"]) == 12
    assert len(evaluator.figures()["spearman"].data) == 2


def test_the_probe_finds_directions_of_low_variance(
    one_batch: Measured, measured: Measured
) -> None:
    tree = wide_tree()
    (evaluator,) = measured(tree, laid_out(tree, one_batch, loud=2.0), [TreeProbe])
    numbers = evaluator.compute()
    assert numbers["x_euclidean"] < 0.4
    assert numbers["x_spearman"] > numbers["x_euclidean"] + 0.3
    assert numbers["x_excess"] == numbers["x_spearman"] - numbers["x_euclidean"]


def test_in_sample_it_fits_anything(one_batch: Measured, measured: Measured) -> None:
    """Why only classes that it was not fitted on count."""
    tree = wide_tree()
    labels = np.repeat(np.arange(36), 4)
    x = torch.randn(36, 200, generator=torch.Generator().manual_seed(0))[torch.from_numpy(labels)]
    batch = one_batch(np.ones((len(labels), 2), dtype=np.float32), labels, x=x)
    (evaluator,) = measured(tree, batch, [TreeProbe])
    numbers = evaluator.compute()
    assert numbers["x_in_sample"] > 0.7
    assert abs(numbers["x_spearman"]) < 0.25


def test_an_absent_class_is_no_held_out_class(one_batch: Measured, measured: Measured) -> None:
    tree = wide_tree()
    labels = np.repeat(np.arange(30), 4)
    x = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
    z = np.random.default_rng(0).random((120, 4)).astype(np.float32)
    (evaluator,) = measured(tree, one_batch(z, labels, x=x), [TreeProbe])
    wanted = np.mean([(split.asked < 30).sum() for split in evaluator.splits])
    assert evaluator.compute()["n_classes"] == pytest.approx(wanted)
    place = np.roll(np.arange(36), 6)  # class c in the place of c − 6: the first six are empty
    moved = np.mean([np.isin(split.asked, place[:30]).sum() for split in evaluator.splits])
    assert evaluator.compute(permutation=place)["n_classes"] == pytest.approx(moved)
    assert np.isfinite(evaluator.compute()["x_spearman"])


def test_more_dimensions_than_classes_change_nothing(
    one_batch: Measured, measured: Measured
) -> None:
    """Means in coordinates of their span have the same distances: zeros and turns add nothing."""
    tree = wide_tree()
    labels = np.repeat(np.arange(30), 4)  # six classes are absent
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 20, generator=generator)
    z = np.random.default_rng(0).random((120, 20)).astype(np.float32)
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    wide_x = (torch.nn.functional.pad(x, (0, 280)).double() @ turn).float()
    wide_z = np.pad(z, ((0, 0), (0, 280)))
    numbers, wide = (
        measured(tree, one_batch(latents, labels, x=of), [TreeProbe])[0].compute()
        for latents, of in ((z, x), (wide_z, wide_x))
    )
    assert np.isfinite(numbers["x_spearman"])
    for metric, value in numbers.items():
        assert wide[metric] == pytest.approx(value, abs=1e-5, nan_ok=True), metric


def test_few_classes_are_undefined(one_batch: Measured, measured: Measured) -> None:
    tree = Taxonomy.from_edges([("r", c) for c in "abcdef"])
    labels = np.repeat(np.arange(6), 4)
    (evaluator,) = measured(tree, one_batch(np.eye(6)[labels], labels), [TreeProbe])
    assert all(np.isnan(value) for value in evaluator.compute().values())


def test_options_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r"asked_share: out of range; given 1; allowed: a number in \(0, 1\)"
    ):
        TreeProbe.Options(asked_share=1)
    with pytest.raises(ConfigError, match="rank: out of range; given 0; allowed: 1 or more"):
        TreeProbe.Options(rank=0)
