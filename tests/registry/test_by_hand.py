"""Values of the evaluators' parts worked out by hand: every bound, tie and offset has one that is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from taxolens.registry import hashing
from taxolens.registry.evaluators.base import EvaluationContext
from taxolens.registry.evaluators.infomec import explained, level_counts, mutual_information
from taxolens.registry.evaluators.parts.accumulators import (
    FiringHistogram,
    NegativeCounts,
    Thresholds,
    TopImages,
)
from taxolens.registry.evaluators.parts.implication import (
    Pairs,
    hamming,
    implied_pairs,
    measure_edges,
    near_probe,
    nearest_parents,
)
from taxolens.registry.evaluators.parts.probes import NeighbourProbe, RidgeProbe
from taxolens.registry.evaluators.parts.samples import FiringSample, ImageSample, together
from taxolens.registry.evaluators.tree_probe import (
    Split,
    ridge_map,
    scaled_points,
    spanned,
    tie_ceiling,
)
from taxolens.registry.taxonomies import Taxonomy

ABC = Taxonomy.from_edges([("r", c) for c in "abc"])


def firing(rows: list[list[float]]) -> sparse.csr_array:
    return sparse.csr_array(np.array(rows, dtype=np.float32))


# probes ------------------------------------------------------------------------------------------


def test_a_ridge_probe_of_two_images() -> None:
    """Standardised to −1 and 1; a feature that is constant has weight 0; class 2 has no image."""
    probe = RidgeProbe(3, 2, ridge=0.25)
    x = torch.tensor([[10.0, 5.0], [14.0, 5.0]])
    probe.fit(x[:1], [torch.tensor([0]), torch.tensor([1])])
    probe.fit(x[1:], [torch.tensor([1]), torch.tensor([1])])
    asked = torch.tensor([[8.0, 9.0], [12.0, 5.0], [16.0, 0.0]])
    first, second = probe.predict(asked)
    assert first.tolist() == [0, 0, 1]  # between the two: the first of equal ones
    assert second.tolist() == [1, 1, 1]
    weight, other = probe._weights or []
    torch.testing.assert_close(weight, torch.tensor([[-0.4, 0.4, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(other, torch.zeros(2, 3))
    assert [bias.tolist() for bias in probe._bias] == [[0.5, 0.5, -np.inf], [-np.inf, 1, -np.inf]]
    assert probe._mean.tolist() == [2, 0] and probe._scale.tolist() == [2, np.inf]  # about 10, 5
    assert probe.n == 2
    later = torch.tensor([[30.0, 5.0]])
    probe.fit(later, [torch.tensor([2]), torch.tensor([0])])
    assert probe.predict(later)[0].tolist() == [2]  # what is fitted later counts


def test_a_ridge_weighs_features_by_their_covariance() -> None:
    """Two equal features share the weight: each has ½ / (1 + ½·ridge) of it."""
    probe = RidgeProbe(2, ridge=0.5)
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    probe.fit(x, [torch.tensor([0, 1])])
    probe.predict(x)
    weight = (probe._weights or [])[0]
    torch.testing.assert_close(weight, torch.tensor([[-0.2, 0.2], [-0.2, 0.2]]))


def neighbours(k: int, temperature: float, per_class: int = 4) -> NeighbourProbe:
    """Four images around (5, 5): of classes 0 and 1 along the first axis, two of class 2 along the
    second; under the second labelling all are of class 1."""
    probe = NeighbourProbe(3, 2, k=k, per_class=per_class, temperature=temperature)
    x = torch.tensor([[6.0, 5.0], [4.0, 5.0], [5.0, 6.0], [5.0, 4.0]])
    labellings = [torch.tensor([0, 1, 2, 2]), torch.ones(4, dtype=torch.int64)]
    probe.fit(x, labellings, torch.arange(4))
    return probe


@pytest.mark.parametrize(
    ("k", "temperature", "expected"),
    [
        (1, 0.07, [0, 2]),
        (2, 0.07, [0, 2]),
        (4, 0.07, [0, 2]),
        (4, 1e3, [2, 2]),  # near equal weights: the two images of class 2
        (9, 1e3, [2, 2]),  # no more neighbours than images
        (3, 1.0, [0, 2]),  # cosines .89, .45, −.45: e^−.11 against e^−.55 + e^−1.45 of class 2
    ],
)
def test_votes_of_neighbours(k: int, temperature: float, expected: list[int]) -> None:
    asked = torch.tensor([[7.0, 6.0], [6.0, 7.0]])
    first, second = neighbours(k, temperature).predict(asked)
    assert first.tolist() == expected and second.tolist() == [1, 1]


def test_the_votes_of_three_neighbours_can_outweigh_the_nearest() -> None:
    """Of class 2, e^((.447 − 1)/5) + e^((−.447 − 1)/5) = 1.64 is above e^((.894 − 1)/5) = .98."""
    asked = torch.tensor([[7.0, 6.0]])
    assert neighbours(4, 5.0).predict(asked)[0].tolist() == [2]
    assert neighbours(2, 5.0).predict(asked)[0].tolist() == [0]
    # At a low temperature all votes are near 0: cosines .743 and .669 give e^−25.7 and e^−33.1.
    assert neighbours(4, 0.01).predict(torch.tensor([[4.0, 5.9]]))[0].tolist() == [1]


def test_of_a_class_the_images_of_smallest_hash_are_kept() -> None:
    probe, _ = neighbours(4, 1.0, per_class=1)._databases
    priority = hashing.uniform(np.arange(4), salt=1)
    kept = 2 if priority[2] < priority[3] else 3
    assert probe._features is not None
    assert probe._features[2, 0].tolist() == ([5, 6] if kept == 2 else [5, 4])
    np.testing.assert_allclose(probe._priority[:, 0], [priority[0], priority[1], priority[kept]])
    empty = NeighbourProbe(2, 3)
    assert [p.tolist() for p in empty.predict(torch.ones(1, 2))] == [[-1]] * 3
    for database in empty._databases:
        assert (database.k, database.temperature) == (10, 0.07)
        assert database._priority.shape == (2, 10)


# samples -----------------------------------------------------------------------------------------


def test_the_odds_of_an_image() -> None:
    context = EvaluationContext(ABC, 40, 5, 2, class_counts=np.array([10, 0, 30]))
    assert FiringSample(context, max_images=8).odds(np.array([0, 2])) == 0.2
    assert FiringSample(EvaluationContext(ABC, 0, 5, 2), max_images=3).odds(np.zeros(0)) == 3
    odds = ImageSample(context, max_images=6).odds(np.array([0, 2, 2]))
    assert np.asarray(odds).tolist() == pytest.approx([0.3, 0.1, 0.1])
    no_counts = EvaluationContext(ABC, 40, 5, 2)
    assert ImageSample(no_counts, max_images=6).odds(np.array([0])) == 0.15
    defaults = FiringSample(context), ImageSample(context)
    assert [sample.max_images for sample in defaults] == [16384, 4096]


@pytest.mark.parametrize("silent", [0, 400])
def test_images_on_which_two_latents_fire(silent: int) -> None:
    """By a dense product, and by a sparse one where most images are silent."""
    rows = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]]
    found = together(firing(rows + [[0.0] * 4] * silent), np.array([2, 0, 3]))
    assert list(zip(*(v.tolist() for v in found))) == [
        *((0, 0, 1), (0, 1, 2), (0, 2, 2)),
        *((1, 0, 2), (1, 1, 2), (1, 2, 1)),
    ]


# implication -------------------------------------------------------------------------------------

FAMILY = firing([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
"""Latent 0 on 4 of 5 images, 1 and 2 on two each, of which 1 is below 0; 3 never fires."""


def test_pairs_with_bounds_met_and_just_missed() -> None:
    def pairs(**bounds: Any) -> list[tuple[int, int]]:
        found = implied_pairs(FAMILY, **bounds)
        return list(zip(found.parent.tolist(), found.child.tolist()))

    assert pairs() == [(0, 1)]  # lift 5/4, ratio 2
    assert pairs(implication=0.5) == [(0, 1)]  # 2 below 0: lift 5/8
    assert pairs(implication=0.5, lift=0.625) == [(0, 1), (0, 2)]
    assert pairs(implication=0.5, lift=0.626) == [(0, 1)]
    assert pairs(lift=1.25, min_fired=2) == [(0, 1)]
    assert pairs(lift=1.26) == pairs(ratio=2.01) == pairs(min_fired=3) == []
    every = {"implication": 0.01, "ratio": 0.01, "lift": 0.01}
    assert pairs(**every, min_fired=0) == pairs(**every, min_fired=0, block=1)
    assert {child for _, child in pairs(**every, min_fired=0)} == {0, 1, 2}  # 3 never fires
    once = implied_pairs(firing([[1, 1], [1, 0], [1, 0]]))
    assert (once.parent.tolist(), once.child.tolist()) == ([0], [1])


def test_decoder_rows_nearest_to_a_probe_by_cosine() -> None:
    rng = np.random.default_rng(0)
    decoder, direction = rng.normal(size=(12, 4)) * [1, 5, 1, 9], rng.normal(size=(60, 4))
    decoder *= rng.uniform(0.1, 9, (12, 1))
    direction[::2] *= 100
    latents = rng.integers(0, 12, (2, 60))
    found = near_probe(torch.from_numpy(decoder), torch.from_numpy(direction), latents, 6)
    for e, row in enumerate(direction):
        cosine = [row @ d / np.linalg.norm(d) for d in decoder]
        assert found[e] == (set(latents[:, e]) <= set(np.argsort(cosine)[-6:]))
    assert 5 < found.sum() < 55
    every = near_probe(torch.from_numpy(decoder), torch.from_numpy(direction), latents, 99)
    assert every.all()


def test_edges_and_hamming_of_a_small_forest() -> None:
    forest = Pairs(np.array([0, 0, 2, 3]), np.array([1, 2, 3, 2]))
    implication, reverse, lift = measure_edges(FAMILY, forest)
    np.testing.assert_allclose(implication, [1, 0.5, np.nan, 0])
    np.testing.assert_allclose(reverse, [0.5, 0.25, 0, np.nan])
    np.testing.assert_allclose(lift, [1.25, 0.625, np.nan, np.nan])
    table = hamming(FAMILY, forest)
    assert table["parent"].tolist() == [0, 2, 3] and table["children"].tolist() == [2, 1, 1]
    # 0 against 1 or 2: they differ on the fourth and the fifth image, and either fires on all.
    np.testing.assert_allclose(table["hamming"], [2 / 5, 2 / 5, 2 / 5])
    np.testing.assert_allclose(table["hamming_relative"], [2 / 5, 1, 1])


def test_the_parent_that_fires_least_and_of_equal_ones_the_first() -> None:
    pairs = Pairs(np.array([5, 3, 4, 2, 3]), np.array([1, 1, 1, 0, 0]))
    found = nearest_parents(pairs, np.array([9, 9, 7, 7, 7, 8]))
    assert (found.parent.tolist(), found.child.tolist()) == ([2, 3], [0, 1])


# accumulators ------------------------------------------------------------------------------------


def test_thresholds_of_five_firings(one_batch: Any) -> None:
    """Midpoints between firings; a latent that is silent has the quantiles of all firings pooled."""
    z = np.zeros((6, 3), dtype=np.float32)
    z[:5, 0], z[5, 1] = [1, 2, 3, 4, 5], 10
    context = EvaluationContext(ABC, 6, 5, 3)
    thresholds = Thresholds(context, survival=(1.0, 0.6, 0.2))
    thresholds.update(one_batch(z, np.arange(6) % 3))
    assert thresholds.values is not None
    assert thresholds.values[0].tolist() == [0, 2.5, 4.5]
    assert thresholds.values[1].tolist() == [0, 5, 5]  # its one firing, halved
    assert thresholds.values[2].tolist() == [0, 2.5, 4.5]  # of 1 2 3 4 5 10
    bins = thresholds.bins(torch.tensor([0, 0, 0, 1]), torch.tensor([2.5, 2.4, 9.0, 4.9]))
    assert bins.tolist() == [1, 0, 2, 0]


def test_the_best_two_images_of_a_latent(one_batch: Any) -> None:
    batch = one_batch(np.array([[3.0], [5.0], [0.0], [4.0], [-9.0]]), np.array([0, 1, 2, 0, 1]))
    context = EvaluationContext(ABC, 5, 5, 1)
    top = TopImages(context, k=2)
    top.update(batch)
    assert top.values.tolist() == [[5, 4]] and top.index.tolist() == [[1, 3]]
    assert top.labels().tolist() == [[1, 0]]
    assert TopImages(context).values.shape == (1, 16)


# infomec -----------------------------------------------------------------------------------------


def test_counts_of_levels(one_batch: Any) -> None:
    """Latent 0 fires at 1 2 3 4 and is below 0 on one image; latent 1 fires once."""
    z = np.array([[1, 0], [2, 0], [3, 0], [4, 7], [-1, 0], [0, 0]], dtype=np.float32)
    context = EvaluationContext(ABC, 6, 5, 2)
    histogram = context.share(FiringHistogram)
    negative = context.share(NegativeCounts)
    context.update(one_batch(z, np.array([0, 1, 2, 0, 1, 2])))
    found = level_counts(histogram, (1.0, 0.5)).toarray()
    assert found.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]]
    found = level_counts(histogram, (1.0, 0.5), below=negative.of()).toarray()
    assert found.tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_information_of_a_latent_about_two_groups() -> None:
    """Of 4 and 4 images it fires on 4 of the first: ln 2; on 2 of each: 0; on 3 and 1 in between."""
    counts = firing([[4, 0], [2, 2], [3, 1]])
    found, entropy = mutual_information(counts, 1, np.array([4, 4]), np.array([0, 1]))
    middle = np.log(2) + 2 * (3 / 8 * np.log(3 / 4) + 1 / 8 * np.log(1 / 4))
    assert entropy == pytest.approx(np.log(2))
    assert found == pytest.approx([np.log(2), 0, middle], abs=1e-9)
    # As two levels of one latent, 1 of the first and 3 of the second level: they are told apart.
    found, _ = mutual_information(firing([[3, 0], [1, 4]]), 2, np.array([4, 4]), np.array([0, 1]))
    joint = np.array([[3, 0], [1, 4]]) / 8
    wanted = sum(p * np.log(p / joint[i].sum() * 2) for i in (0, 1) for p in joint[i] if p)
    assert found == pytest.approx([wanted], abs=1e-9)


def test_entropy_that_a_probe_explains() -> None:
    log_odds = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    labels, group = np.array([0, 2]), np.array([0, 0, 1])
    # The two groups have ln 2; the probe gives the right one .75 and .8.
    wanted = 1 + (np.log(0.75) + np.log(0.8)) / 2 / np.log(2)
    assert explained(log_odds, labels, group) == pytest.approx(wanted)
    assert np.isnan(explained(log_odds, labels, np.zeros(3, dtype=int)))


# tree_probe --------------------------------------------------------------------------------------


def test_the_ceiling_of_tied_distances() -> None:
    assert tie_ceiling(np.array([1, 1, 2])) == pytest.approx(np.sqrt(1 - 6 / 24))
    assert tie_ceiling(np.array([1, 1, 2, 2])) == pytest.approx(np.sqrt(1 - 12 / 60))


def test_points_of_two_leaves_and_of_four() -> None:
    (points,) = np.abs(scaled_points(np.array([[0.0, 4.0], [4.0, 0.0]]), 5)).T
    assert points.tolist() == pytest.approx([1, 1])
    distance = np.array([[0, 2, 4, 4], [2, 0, 4, 4], [4, 4, 0, 2], [4, 4, 2, 0.0]])
    points = scaled_points(distance, 1)  # one direction between the pairs: eigenvalue 3 before 1, 1
    assert np.abs(points).ravel().tolist() == pytest.approx([np.sqrt(3) / 2] * 4)
    assert np.sign(points[:, 0] * points[0, 0]).tolist() == [1, 1, -1, -1]
    assert scaled_points(distance, 2).shape == (4, 3)  # the next two are equal


def test_a_ridge_of_two_points() -> None:
    """Of centred ±1, with 1e-4 of the mean square as ridge: nearly the line through both."""
    found = ridge_map(np.array([[1.0], [3.0]]), np.array([[-1.0], [1.0]]), np.array([[2.0], [5.0]]))
    assert found.ravel().tolist() == pytest.approx([0, 3], rel=1e-3)


def test_edges_of_a_spanning_tree_on_a_line() -> None:
    """Root at 5, its groups at 0 and 10: each leaf is nearest to its group, except where two move."""
    members = np.array([[1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 1, 0],
                        [1, 0, 1, 0, 0, 0, 1]], dtype=bool)  # fmt: skip
    edges = frozenset({(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)})
    split = Split(np.arange(4), np.arange(4), members, edges)
    points = np.array([[-1.0], [1.0], [9.0], [11.0]])
    # Of the edges to the root, at 4 from its nearest leaves, none is in the spanning tree.
    assert spanned(points, split) == pytest.approx(4 / 6)
    assert np.isnan(spanned(np.ones((4, 2)), split))
    assert np.isnan(spanned(np.ones((4, 0)), split))
    assert np.isfinite(spanned(points * 1e-9, split))
