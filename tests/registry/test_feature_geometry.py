"""`feature_geometry`: its parts against plain algebra, and data constructed as in the theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators import feature_geometry
from taxolens.registry.evaluators.feature_geometry import (
    FeatureGeometry,
    added_cosines,
    babel,
    effective_rank,
    ledoit_wolf,
    node_vector,
    pair_cosines,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6), n=st.integers(3, 30), d=st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_a_node_vector_is_that_of_the_shrunk_covariance(seed: int, n: int, d: int) -> None:
    from sklearn.covariance import LedoitWolf

    x = np.random.default_rng(seed).normal(size=(n, d)) + 1
    model = LedoitWolf().fit(x)
    shrinkage, scale = ledoit_wolf(x - x.mean(0))
    assert shrinkage == pytest.approx(model.shrinkage_, abs=1e-9)
    assert scale == pytest.approx(np.trace(np.cov(x.T, bias=True)) / d)
    direction = np.linalg.pinv(model.covariance_) @ x.mean(0)
    unit = direction / np.linalg.norm(direction)
    np.testing.assert_allclose(node_vector(x), (x.mean(0) @ unit) * unit, atol=1e-6)


@given(seed=st.integers(0, 10**6), r=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_babel_is_the_maximum_over_sets(seed: int, r: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(6, 3)))
    rows = torch.nn.functional.normalize(rows, dim=1)
    gram = (rows @ rows.T).abs().numpy()
    wanted = max(
        sum(gram[i, j] for i in chosen)
        for chosen in combinations(range(6), r)
        for j in set(range(6)) - set(chosen)
    )
    assert babel(rows, (r,)) == [pytest.approx(wanted)]


def test_babel_of_more_rows_than_there_are() -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    gram = (rows @ rows.T).abs().fill_diagonal_(0)
    wanted = [float(gram.max()), float(gram.sum(1).max())]
    assert babel(rows, (1, 20)) == pytest.approx(wanted)
    assert babel(rows[:0], (1, 20)) == [0.0, 0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_geometry, "BLOCK", 2)
        assert babel(rows, (1, 20)) == pytest.approx(wanted)


def test_points_that_do_not_spread() -> None:
    assert ledoit_wolf(np.zeros((4, 3))) == (1.0, 0.0)
    assert node_vector(np.zeros((4, 3))).tolist() == [0, 0, 0]


def test_two_points_spread_along_one_line() -> None:
    """Nothing is shrunk: ℓ is the part of the mean along that line."""
    x = np.array([[4.0, 1, 0], [2, 1, 0]])
    assert ledoit_wolf(x - x.mean(0)) == (0.0, pytest.approx(1 / 3))
    np.testing.assert_allclose(node_vector(x), [3, 0, 0], atol=1e-12)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_a_node_vector_is_in_the_unit_of_the_points(unit: float) -> None:
    x = np.random.default_rng(0).normal(size=(9, 5)) + 1
    np.testing.assert_allclose(node_vector(unit * x), unit * node_vector(x))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_cosines_of_what_a_child_adds(seed: int) -> None:
    vector = np.random.default_rng(seed).normal(size=(4, 3))
    vector[2] = np.nan
    vector[3] = vector[0]  # adds nothing
    found = added_cosines(vector, np.array([[0, 1], [0, 2], [0, 3]]))
    added = vector[1] - vector[0]
    wanted = added @ vector[0] / np.linalg.norm(added) / np.linalg.norm(vector[0])
    assert found == pytest.approx([wanted, np.nan, np.nan], nan_ok=True)


def test_cosines_of_pairs_of_latents() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, 1.0]])
    pairs = np.array([[0, 1], [1, 2], [1, 1], [-1, 2], [0, -1], [2, 0]])
    wanted = [0.6, 0.8, np.nan, np.nan, np.nan, 0]
    assert pair_cosines(rows, pairs) == pytest.approx(wanted, nan_ok=True)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.repeat(np.eye(5), 3, axis=0)) == pytest.approx(5)
    assert effective_rank(np.ones((4, 9))) == pytest.approx(1)
    assert np.isnan(effective_rank(np.zeros((3, 3))))
    z = np.random.default_rng(0).random((7, 4))
    assert effective_rank(1e-4 * z) == pytest.approx(effective_rank(z))
    assert effective_rank(z.T) == pytest.approx(effective_rank(z))


def test_shrinkage_does_not_depend_on_the_unit() -> None:
    x = np.random.default_rng(0).normal(size=(9, 5))
    shrinkage, scale = ledoit_wolf(x)
    for unit in (1e-8, 1e8):
        found = ledoit_wolf(unit * x)
        assert found == pytest.approx((shrinkage, scale * unit**2))


def tree() -> Taxonomy:
    """4 orders of 3 families of 2 species."""
    edges = []
    for o in range(4):
        edges.append(("root", f"o{o}"))
        for f in range(3):
            edges.append((f"o{o}", f"o{o}f{f}"))
            edges += [(f"o{o}f{f}", f"o{o}f{f}s{s}") for s in range(2)]
    return Taxonomy.from_edges(edges)


TREE = tree()


def world(one_batch: Measured, **kwargs: Any) -> tuple[Any, torch.Tensor]:
    """x is a sum of one direction for each node above the image; the latents are these nodes."""
    labels = np.repeat(np.arange(24), 60)
    latents = PlantedLatents(TREE, recall=1.0, false_alarm=0.0, binary=True, **kwargs)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    m = z.shape[1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(m, m, generator=generator))[0]
    x = z @ directions + 0.5 * torch.randn(len(labels), m, generator=generator)
    return one_batch(z, labels, x=x), directions


def test_a_world_of_added_directions_is_the_ideal(one_batch: Measured, measured: Measured) -> None:
    batch, directions = world(one_batch)
    (evaluator,) = measured(TREE, batch, [FeatureGeometry], W_dec=directions, size=300)
    numbers = evaluator.compute()
    assert set(numbers) == set(FeatureGeometry.higher_is_better)
    assert numbers["edges"] == numbers["detected_edges"] == 12 + 24
    assert numbers["n_nodes"] == 4 + 12 + 24  # all but the root
    assert numbers["hierarchy_cosine"] < 0.25
    assert numbers["random_parent_cosine"] > numbers["hierarchy_cosine"] + 0.3
    assert numbers["projection_own"] == pytest.approx(1, abs=0.15)
    assert numbers["projection_other"] < 0.2
    assert numbers["parent_cosine"] == pytest.approx(0, abs=1e-5)
    assert numbers["coherence"] == pytest.approx(0, abs=1e-5)
    assert numbers["coactive_babel"] == pytest.approx(0, abs=1e-5)
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["parent_length"] for n in permuted) < numbers["parent_length"] - 0.05
    # Why it is not evidence of this tree:
    assert max(n["hierarchy_cosine"] for n in permuted) < 0.25
    assert max(n["detected_edges"] for n in permuted) < 36
    assert evaluator.compute(shuffled=True)["projection_own"] < 0.5
    table = evaluator.tables()["edges"]
    assert len(table) == 36 and (table["parent_latent"] != table["child_latent"]).all()
    assert len(evaluator.figures()["cosine"].data) == 2


def test_a_child_that_repeats_its_parent_is_detected_in_the_decoder(
    one_batch: Measured, measured: Measured
) -> None:
    batch, directions = world(one_batch)
    node = PlantedLatents(TREE).node
    position = {int(v): j for j, v in enumerate(node)}
    repeated = directions.clone()
    for j, v in enumerate(node):
        if TREE.depth[v] == 3:
            repeated[j] += directions[position[TREE.parents[v][0]]]
    (evaluator,) = measured(TREE, batch, [FeatureGeometry], W_dec=repeated)
    numbers = evaluator.compute()
    assert numbers["parent_cosine"] == pytest.approx(24 / 36 * 0.5**0.5, abs=1e-4)
    assert numbers["coherence"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert numbers["sibling_cosine"] == pytest.approx(24 / 36 * 0.5, abs=1e-4)


def test_nodes_with_the_same_images_have_no_edge(one_batch: Measured, measured: Measured) -> None:
    batch, _ = world(one_batch)
    present = np.delete(np.arange(24), [1, 8])  # two families of one species each are left
    rows = torch.isin(batch.labels, torch.from_numpy(present))
    fields = {k: v[rows] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    batch = replace(batch, **fields)
    (absent,) = measured(TREE, batch, [FeatureGeometry])
    place = {int(c): i for i, c in enumerate(present)}
    labels = torch.tensor([place[int(c)] for c in batch.labels])
    kept = TREE.restrict([TREE.classes[c] for c in present])
    (alone,) = measured(
        kept, replace(batch, labels=labels, shuffled_labels=labels), [FeatureGeometry]
    )
    for metric in ("edges", "hierarchy_cosine", "parent_length"):
        assert absent.compute()[metric] == pytest.approx(alone.compute()[metric]), metric


def test_other_sources_share_x(one_batch: Measured, measured: Measured) -> None:
    batch, directions = world(one_batch)
    facts = {"source": "random", "W_dec": directions}
    (evaluator,) = measured(TREE, batch, [FeatureGeometry], **facts)
    numbers = evaluator.compute()
    assert np.isnan(numbers["hierarchy_cosine"]) and np.isfinite(numbers["parent_cosine"])
    evaluator.tables(), evaluator.figures()


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_latents: out of range; given 1; allowed: 2 or more"):
        FeatureGeometry.Options(max_latents=1)
    with pytest.raises(
        ConfigError, match=r"detector_f1: out of range; given 2; allowed: a number in \[0, 1\]"
    ):
        FeatureGeometry.Options(detector_f1=2)
