"""Best nodes of latents and their outcomes, against counting one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.evaluators.parts import node_f1, sorted_firings
from taxolens.registry.evaluators.parts.node_f1 import (
    Halves,
    Outcome,
    best_nodes,
    explain,
    find_detectors,
)
from taxolens.registry.evaluators.parts.sorted_firings import SortedFirings

SEEDS = st.integers(0, 10**6)


def f1_of(fired: np.ndarray, images: np.ndarray, inside: np.ndarray) -> float:
    """F1 of one latent as a detector of one node; NaN where nothing is counted."""
    whole = fired.sum() + images[inside].sum()
    return 2 * fired[inside].sum() / whole if whole else np.nan


@given(seed=SEEDS, cells=st.sampled_from([1, 10, 2**22]))
@settings(max_examples=30, deadline=None)
def test_the_best_node_of_each_latent_one_by_one(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, 6)
    fired = np.minimum(rng.integers(0, 5, (5, 6)) * (rng.random((5, 1)) < 0.8), images)
    members = rng.random((6, 7)) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_f1, "BLOCK", cells)
        node, best = best_nodes(fired, images, members)
        again = best_nodes(sparse.csr_array(fired.astype(np.float32)), images, members)
    for row, at, f1 in zip(fired, node, best):
        scores = np.nan_to_num([f1_of(row, images, inside) for inside in members.T])
        assert f1 == pytest.approx(scores.max())
        assert at == np.flatnonzero(np.isclose(scores, scores.max()))[0]  # the first of equals
    assert np.array_equal(node, again[0]) and np.array_equal(best, again[1])


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_what_is_chosen_on_one_half_is_scored_on_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 9, size=(2, 5))
    fit, score = (rng.integers(0, n + 1, size=(4, 5)) * (rng.random((4, 1)) < 0.8) for n in images)
    members = rng.random((5, 6)) < 0.4
    node, fit_f1, outcome = explain(halves_of(fit[:, None], score[:, None]), members, *images)
    for j in range(4):
        inside = members[:, node[j]]
        assert fit_f1[j] == pytest.approx(np.nan_to_num(f1_of(fit[j], images[0], inside)))
        hits, fired, positives = score[j, inside].sum(), score[j].sum(), images[1, inside].sum()
        assert (outcome.hits[j], outcome.fired[j]) == (hits, fired)
        assert outcome.positives[j] == positives
        assert outcome.f1[j] == pytest.approx(f1_of(score[j], images[1], inside), nan_ok=True)
        precision = hits / fired if fired else np.nan
        assert outcome.precision[j] == pytest.approx(precision, nan_ok=True)
        recall = hits / positives if positives else np.nan
        assert outcome.recall[j] == pytest.approx(recall, nan_ok=True)


def halves_of(fit: np.ndarray, score: np.ndarray, is_sorted: bool = False) -> Halves:
    """Counts (m, T, C) of both halves, the lowest bin first; with `is_sorted`, detectors are found as on a GPU."""
    rows = (half[:, ::-1].reshape(-1, half.shape[2]) for half in (fit, score))
    found = Halves(*(sparse.csr_array(half.astype(np.float32)) for half in rows), fit.shape[1])
    if is_sorted:
        found.sorted_firings = SortedFirings(
            found.fit, found.score, found.n_bins, torch.device("cpu")
        )
    return found


def detectors(
    fit: np.ndarray, members: np.ndarray, cells: int = 2**22, is_sorted: bool = False
) -> node_f1.Detectors:
    """The detectors of each node from counts (m, T, C), the lowest bin first, of both halves."""
    images = np.full(fit.shape[2], 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_f1, "BLOCK", cells)
        patch.setattr(sorted_firings, "PAIRS", cells)
        return find_detectors(halves_of(fit, fit, is_sorted), members, images, images)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("cells", [1, 3, 2**22])
def test_of_equal_detectors_the_first_is_taken(cells: int, is_sorted: bool) -> None:
    fit = np.zeros((4, 2, 4))
    fit[1:, 1, 0] = 6  # three latents alike, each on 6 images of class 0 at the upper threshold
    found = detectors(fit, np.eye(4, dtype=bool)[:, :3], cells, is_sorted)
    # Nothing fires on the other classes. Both thresholds have the same firings: the upper is taken.
    assert (found.latent.tolist(), found.bin.tolist()) == ([1, -1, -1], [1, 0, 0])
    assert found.fit_f1.tolist() == found.f1.tolist() == [12 / 16, 0, 0]
    assert found.recall.tolist() == [0.6, 0, 0]
    assert found.precision.tolist() == pytest.approx([1, np.nan, np.nan], nan_ok=True)


def test_a_node_without_images_in_a_half_has_no_detector_to_score() -> None:
    fit = np.zeros((1, 1, 5))
    fit[0, 0] = [3, 1, 1, 1, 1]
    halves, members = halves_of(fit, fit), np.eye(5, dtype=bool)
    full, gap = np.full(5, 9), np.array([9, 0, 9, 9, 9])
    for images in ((full, gap), (gap, full)):
        found = find_detectors(halves, members, *images)
        assert np.isfinite(found.f1).tolist() == [True, False, True, True, True]
        assert found.f1[0] == pytest.approx(6 / 16) and found.recall[0] == pytest.approx(1 / 3)
    # "Always yes" has an F1 of 2·9/(9 + 45): a bound below that leaves every node out.
    for covered, left in ((1 / 3, 0), (0.34, 5)):
        found = find_detectors(halves, members, full, full, covered)
        assert np.isfinite(found.f1).sum() == left


def test_a_single_firing_is_found() -> None:
    fit = np.zeros((3, 1, 3))
    fit[2, 0, 1] = 1
    found = detectors(fit, np.eye(3, dtype=bool))
    assert found.latent.tolist() == [-1, 2, -1] and found.fit_f1[1] == 2 / 11


def test_counts_in_narrow_integers_do_not_overflow() -> None:
    fired = sparse.csr_array(np.full((1, 4), 200, dtype=np.uint8))
    own = sparse.csr_array(np.array([[1, 1, 1, 0]], dtype=np.float32))
    found = Outcome.of(fired, own, np.array([600]))
    assert found == (600, 800, 600) and found.precision == 0.75 and found.recall == 1


def test_without_nodes_or_latents() -> None:
    halves, images = halves_of(np.ones((2, 1, 3)), np.ones((2, 1, 3))), np.full(3, 2)
    none = np.zeros((3, 0), dtype=bool)
    node, fit_f1, outcome = explain(halves, none, images, images)
    assert node.tolist() == [0, 0] and np.isnan(fit_f1).all()
    assert np.isnan(outcome.recall).all() and outcome.fired.tolist() == [3, 3]
    assert len(best_nodes(np.zeros((0, 3)), images, np.ones((3, 2), dtype=bool))[0]) == 0


@pytest.mark.parametrize("most", [0, 1, 3, 50])
def test_of_numbers_of_positives_each_is_near_one_below_it(most: int) -> None:
    values = np.unique(np.random.default_rng(0).integers(1, 5000, 200))
    kept, step = node_f1._thin(values, most)
    assert kept.dtype == float and set(kept) <= set(values.tolist())
    assert step >= node_f1.STEP and len(kept) <= max(most, 1) + 1
    below = kept[np.searchsorted(kept, values, side="right") - 1]
    assert ((below <= values) & (values <= step * below)).all()
    assert (kept[1:] > step * kept[:-1]).all()


def best_by_counting(
    fit: np.ndarray, members: np.ndarray, images: np.ndarray
) -> list[tuple[int, int, float]]:
    """Latent, threshold and F1 of each node: all pairs in turn; of equal ones the first latent and
    its highest threshold."""
    chosen = []
    for inside in members.T:
        best = (-1, 0, 0.0)
        for j, counts in enumerate(fit):
            for t in reversed(range(fit.shape[1])):
                f1 = f1_of(counts[t:].sum(0), images, inside)
                if f1 > best[2]:
                    best = (j, t, f1)
        chosen.append(best)
    return chosen


@given(
    seed=SEEDS,
    cells=st.sampled_from([1, 40, 2**22]),
    large=st.sampled_from([0.0, 0.4, 2.0]),
    dense=st.booleans(),
    is_sorted=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_detectors_against_all_pairs_in_turn(
    seed: int, cells: int, large: float, dense: bool, is_sorted: bool
) -> None:
    """With dense products, without, and with both, or from sorted firings; one search serves several sets of nodes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 9, 8)
    fit = rng.integers(0, 3, (9, 3, 8)) * (rng.random((9, 1, 8)) < (0.9 if dense else 0.3))
    fit = fit * (rng.random((9, 1, 1)) < 0.8)
    halves = halves_of(fit, fit, is_sorted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_f1, "BLOCK", cells)
        patch.setattr(sorted_firings, "PAIRS", cells)
        patch.setattr(node_f1, "LARGE", large)
        for _ in range(5):  # as the draws of permuted classes
            members = rng.random((8, 6)) < rng.random(6) ** 2
            found = find_detectors(halves, members, images, images)
            expected = best_by_counting(fit, members, images)
            for latent, bin_, f1, (j, t, best) in zip(
                found.latent, found.bin, found.fit_f1, expected
            ):
                assert (latent, bin_) == ((j, t) if j >= 0 else (-1, 0))
                assert f1 == best


@given(seed=SEEDS, cells=st.sampled_from([1, 40, 2**22]), rate=st.sampled_from([0.0, 0.2, 0.7]))
@settings(max_examples=60, deadline=None)
def test_sorted_firings_give_what_products_give(seed: int, cells: int, rate: float) -> None:
    """To the bit, on halves that differ: some latents fire on one of them alone, some nodes have no image."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 9, (2, 8))
    fit, score = rng.integers(0, 4, (2, 9, 3, 8)) * (rng.random((2, 9, 3, 1)) < rate)
    n_nodes = rng.integers(0, 7)
    members = rng.random((8, n_nodes)) < rng.random(n_nodes) ** 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_firings, "PAIRS", cells)
        found, expected = (
            find_detectors(halves_of(fit, score, is_sorted), members, *images)
            for is_sorted in (True, False)
        )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
