"""`taxonomic_autocorrelation` against the double sum, and on planted latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.ranks import benjamini_hochberg
from taxolens.registry.evaluators.taxonomic_autocorrelation import (
    TaxonomicAutocorrelation,
    moran,
    standardised,
    weight_factor,
)
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_equals_the_double_sum(seed: int, scale: float, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    n = len(taxonomy.classes)
    factor = weight_factor(taxonomy, scale)
    weights = np.exp(-taxonomy.tree_distance.astype(float) / scale)
    assert factor.shape == (n, len(taxonomy.nodes))
    np.testing.assert_allclose((factor @ factor.T).toarray(), weights, atol=1e-12)
    if n < 2:
        return
    np.fill_diagonal(weights, 0)
    values = np.random.default_rng(seed).random((3, n))
    values[2] = 4.0
    for y, found in zip(values[:2], moran(standardised(values), factor)):
        c = y - y.mean()
        double = sum(weights[a, b] * c[a] * c[b] for a in range(n) for b in range(n))
        assert found == pytest.approx(n / weights.sum() * double / (c @ c))
    assert np.isnan(moran(standardised(values), factor)[2])


def test_two_classes_are_as_far_apart_as_can_be() -> None:
    pair = Taxonomy.from_edges([("r", "a"), ("r", "b")])
    assert moran(standardised(np.array([[1.0, 3.0]])), weight_factor(pair)) == pytest.approx([-1])
    alone = Taxonomy.from_edges([("r", "a")])
    assert np.isnan(moran(standardised(np.array([[1.0]])), weight_factor(alone))).all()
    # At a scale so small no class has a neighbour: every weight is 0.
    assert np.isnan(moran(standardised(np.array([[1.0, 3.0]])), weight_factor(pair, 1e-3))).all()


def test_what_differs_by_rounding_is_constant() -> None:
    rows = np.array([[3.0, 3.0 + 1e-7, 3.0], [0.0, 0.0, 0.0], [1.0, 2.0, 6.0], [-5.0, 5.0, 0.0]])
    (found,) = standardised(rows)
    assert np.isnan(found[:, :2]).all()
    assert found[:, 2] == pytest.approx(np.array([-2, -1, 3]) / np.sqrt(14))
    assert found[:, 3] == pytest.approx(np.array([-1, 1, 0]) / np.sqrt(2))
    assert [block.shape[1] for block in standardised(np.ones((600, 2)))] == [256, 256, 88]


def planted(animals: Taxonomy, one_batch: Measured) -> Any:
    labels = np.repeat(np.arange(12), 30)
    latents = PlantedLatents(animals, recall=1.0, false_alarm=0.0)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    several = animals.n_leaves[latents.node] == 6
    return one_batch(z[:, several], labels)


def test_families_are_significant_and_random_sets_are_not(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    options = {"draws": 399}
    batch = planted(animals, one_batch)
    (evaluator,) = measured(animals, batch, [TaxonomicAutocorrelation], size=64, options=options)
    numbers = evaluator.compute()
    assert numbers["defined"] == 2
    assert numbers["expected"] == pytest.approx(-1 / 11)
    assert numbers["moran_i"] > 0.35 and numbers["significant_share"] == 1.0
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["moran_i"] for n in permuted) < numbers["moran_i"] - 0.2
    assert evaluator.compute(shuffled=True)["moran_i"] < numbers["moran_i"]
    rng = np.random.default_rng(0)
    sets = rng.permuted(np.tile(np.arange(12) < 6, (60, 1)), axis=1)
    labels = np.repeat(np.arange(12), 4)
    random = one_batch(sets.T.astype(np.float32)[labels], labels)
    (null,) = measured(animals, random, [TaxonomicAutocorrelation], options=options)
    assert null.compute()["significant_share"] < 0.1
    table = evaluator.tables()["latents"]
    assert table["significant"].all() and (table["q"] >= table["p"]).all()


def test_p_values_are_uniform_without_structure(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 4)
    z = np.random.default_rng(0).random((12, 400)).astype(np.float32)[labels]
    (evaluator,) = measured(animals, one_batch(z, labels), [TaxonomicAutocorrelation])
    p = evaluator.autocorrelation().p
    assert p.mean() == pytest.approx(0.5, abs=0.06)
    assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.05)
    assert evaluator.compute()["moran_i"] == pytest.approx(-1 / 11, abs=0.02)


def test_p_values_of_noise_do_not_depend_on_the_sizes_of_classes(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """The means of a genus with few images scatter more, and lie together in the tree."""
    labels = np.repeat(np.arange(12), np.where(np.arange(12) < 4, 4, 80))
    z = np.random.default_rng(0).random((len(labels), 400)).astype(np.float32)
    (evaluator,) = measured(animals, one_batch(z, labels), [TaxonomicAutocorrelation])
    for shuffled in (False, True):
        p = evaluator.autocorrelation(shuffled=shuffled).p
        assert p.mean() == pytest.approx(0.5, abs=0.06)
        assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.05)
    draw = evaluator.context.permutations[0]
    assert evaluator.autocorrelation(draw).p.mean() == pytest.approx(0.5, abs=0.06)
    assert not evaluator.notes()


def test_no_p_value_where_no_two_classes_are_alike(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 4 * 2 ** (np.arange(12) % 8) + 3 * np.arange(12))
    kept = np.isin(labels, [0, 1, 2, 3])
    z = np.random.default_rng(0).random((len(labels), 3)).astype(np.float32)
    batch = one_batch(z[kept], labels[kept])
    (evaluator,) = measured(animals, batch, [TaxonomicAutocorrelation])
    numbers = evaluator.compute()
    assert np.isfinite(numbers["moran_i"]) and numbers["defined"] == 3
    assert np.isnan(numbers["significant_share"])
    assert evaluator.notes() == [
        "No p-values: no two of the 4 classes have a like number of images (within a factor of 1.25), "
        "so that no class means can be exchanged."
    ]
    evaluator.tables()


def test_a_latent_of_one_class_is_never_significant(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """In a balanced tree every arrangement of it is as good: equal values count as reached."""
    labels = np.repeat(np.arange(12), 4)
    batch = one_batch(np.eye(12, dtype=np.float32)[labels], labels)
    (evaluator,) = measured(animals, batch, [TaxonomicAutocorrelation])
    np.testing.assert_array_equal(evaluator.autocorrelation().p, 1.0)


def test_each_latent_has_arrangements_of_its_own(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 4)
    values = np.random.default_rng(0).random((12, 3)).astype(np.float32)
    values[:, 1] = values[:, 0]
    drawn = []
    for third in (values[:, 2], 1 - values[:, 2]):
        z = np.stack([values[:, 0], values[:, 1], third], axis=1)[labels]
        (evaluator,) = measured(animals, one_batch(z, labels), [TaxonomicAutocorrelation])
        drawn.append(evaluator._drawn(np.arange(12), np.zeros(12, dtype=int), False))
    assert drawn[0].shape == (3, 199)
    assert not np.isclose(drawn[0][0], drawn[0][1]).all()
    assert np.array_equal(drawn[0][:2], drawn[1][:2])  # not a matter of the other latents
    assert drawn[0].mean() == pytest.approx(-1 / 11, abs=0.03)


def test_the_share_of_significant_latents_is_not_the_seeds(
    one_batch: Measured, measured: Measured
) -> None:
    """Of 300 latents with a weak family effect; beside it permutations common to all latents."""
    edges = [("r", f"o{o}") for o in range(4)]
    edges += [(f"o{f // 4}", f"f{f}") for f in range(16)]
    tree = Taxonomy.from_edges(
        [*edges, *((f"f{f}", f"f{f}s{s}") for f in range(16) for s in "abc")]
    )
    family = np.unique(tree.cut(2), return_inverse=True)[1]
    rng = np.random.default_rng(0)
    means = rng.random((48, 300)) + 0.6 * rng.random((16, 300))[family]
    labels = np.repeat(np.arange(48), 4)
    batch = one_batch(means.astype(np.float32)[labels], labels)
    own, common, factor = [], [], weight_factor(tree)
    observed = moran(standardised(means.T), factor)
    blocks = standardised(np.sort(means.T, axis=1))
    for seed in range(10):
        (evaluator,) = measured(tree, batch, [TaxonomicAutocorrelation], seed=seed)
        own.append(evaluator.compute()["significant_share"])
        rng = np.random.default_rng(seed)
        drawn = [moran(blocks, sparse.csr_array(factor[rng.permutation(48)])) for _ in range(199)]
        p = (1 + (np.array(drawn) >= observed - 1e-6).sum(0)) / 200
        common.append((benjamini_hochberg(p) <= 0.05).mean())
    assert 3 * np.std(own) < np.std(common) and np.std(own) < 0.05
    assert np.mean(own) > 0.1


@pytest.mark.parametrize("field", ["scale", "draws", "level"])
def test_options_out_of_range(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: out of range; given 0; allowed: "):
        TaxonomicAutocorrelation.Options(**{field: 0})
