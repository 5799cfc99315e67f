"""Shared statistics against plain loops; nothing depends on how the images are cut into batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError, TaxolensError
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, stream
from taxolens.registry.evaluators.parts import cells as cells_module
from taxolens.registry.evaluators.parts.accumulators import (
    ClassCounts,
    FiringHistogram,
    FiringRate,
    NegativeCounts,
    Thresholds,
    TopImages,
)
from taxolens.registry.evaluators.parts.cells import CellCounts

seeds = st.integers(0, 10**6)
few = settings(max_examples=10, deadline=None)
SURVIVAL = (1.0, 0.5, 0.2)


def sparse_latents(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """(n, m) with dead and rare latents, ties, and values below 0, which are no firings."""
    z = np.round(rng.normal(size=(n, m)), 1) * (rng.random((n, m)) < rng.random(m) ** 2)
    z[:, 0] = 0
    return z.astype(np.float32)


@pytest.fixture(scope="module")
def gathered(animals, one_batch, batches_of):
    """(z, labels) -> (batch, accumulators) after a pass in batches of `size`."""

    def gather(z, labels, size=1000, **facts):
        batch = one_batch(z, labels)
        context = EvaluationContext(animals, len(z), 5, z.shape[1], **facts)
        kinds = (
            (ClassCounts, {}),
            (FiringHistogram, {"survival": SURVIVAL}),
            (TopImages, {"k": 4}),
            (FiringRate, {}),
        )
        shared = [context.share(cls, **kwargs) for cls, kwargs in kinds]
        fit = batches_of(batch, int(batch.is_fit.sum()))[0]
        stream(context, {}, batches_of(batch, size), calibration=lambda: fit)
        return batch, shared

    return gather


def state(accumulators) -> list[np.ndarray]:
    classes, histogram, top, rate = accumulators
    return [
        classes.counts,
        histogram.both().toarray(),
        histogram.halves(True).fit.toarray(),
        histogram.fired(),
        top.values,
        top.index,
        top.labels(),
        top.labels(True),
        rate.fired,
        rate.largest,
    ]


@few
@given(seed=seeds)
def test_against_loops(gathered, seed):
    rng = np.random.default_rng(seed)
    n, m = 60, 7
    z, labels = sparse_latents(rng, n, m), rng.integers(0, 12, n)
    batch, (classes, histogram, top, rate) = gathered(z, labels)
    z, is_fit = batch.z.numpy(), batch.is_fit.numpy()
    thresholds = histogram.thresholds.values
    for shuffled in (False, True):
        labels = batch.labels_of(shuffled).numpy()
        for c in range(12):
            assert classes.fit(shuffled)[c] == ((labels == c) & is_fit).sum()
            assert classes.all(shuffled)[c] == (labels == c).sum()
            for j in range(m):
                fired = (z[:, j] > 0) & (labels == c)
                assert histogram.fired(shuffled)[j, c] == fired.sum()
                for t in range(len(SURVIVAL)):
                    reached = fired & (z[:, j] >= thresholds[j, t])
                    fit = histogram.fit(shuffled).toarray().reshape(m, -1, 12)[:, ::-1]
                    halves = (fit, histogram.score(shuffled).numpy())
                    assert [half[j, t:, c].sum() for half in halves] == [
                        (reached & is_fit).sum(),
                        (reached & ~is_fit).sum(),
                    ]
    for j in range(m):
        best = np.sort(z[z[:, j] > 0, j])[::-1][:4]
        assert top.values[j].tolist() == [*best, *[0] * (4 - len(best))]
        for value, index, label in zip(top.values[j], top.index[j], top.labels()[j]):
            if index >= 0:
                row = int(np.flatnonzero(batch.index.numpy() == index)[0])
                assert z[row, j] == value and batch.labels[row] == label
            else:
                assert value == 0 and label == -1
        assert len(set(top.index[j][top.index[j] >= 0])) == len(best)
    assert rate.fired.tolist() == (z > 0).sum(0).tolist() and rate.n == n
    assert rate.mean_l0 == pytest.approx((z != 0).sum() / n)
    assert rate.largest.tolist() == np.maximum(z.max(0), 0).tolist()
    np.testing.assert_allclose(rate.total, np.maximum(z, 0).sum(0), rtol=1e-5)


@few
@given(seed=seeds)
def test_thresholds_are_quantiles_of_the_firings(gathered, seed):
    rng = np.random.default_rng(seed)
    z, labels = sparse_latents(rng, 60, 7), rng.integers(0, 12, 60)
    batch, (_, histogram, _, _) = gathered(z, labels)
    values = histogram.thresholds.values
    assert (values[:, 0] == 0).all() and (np.diff(values, axis=1) >= 0).all()
    fit = batch.z[batch.is_fit].numpy()
    for j in range(7):
        fired = fit[fit[:, j] > 0, j]
        for share, threshold in zip(SURVIVAL[1:], values[j, 1:]):
            if len(fired):  # at least the share reaches it; without its ties, no more than that
                assert (fired >= threshold).mean() >= share - 1e-9
                assert (fired > threshold).sum() < share * len(fired) + 1 - 1e-9
                assert (fired == threshold).sum() != 1, "rounding would decide"
    pooled = fit[fit > 0]
    if len(pooled):  # latent 0 never fires
        assert (pooled > values[0, 2]).sum() < 0.2 * len(pooled) + 1 - 1e-9


@few
@given(seed=seeds, size=st.integers(1, 20))
def test_small_batches_equal_one(gathered, seed, size):
    rng = np.random.default_rng(seed)
    z, labels = sparse_latents(rng, 50, 6), rng.integers(0, 12, 50)
    whole, parts = gathered(z, labels)[1], gathered(z, labels, size)[1]
    for one, other in zip(state(whole), state(parts)):
        np.testing.assert_array_equal(one, other)


def test_the_buffer_of_candidates_is_merged_and_bounded(gathered):
    z = np.arange(1, 2001, dtype=np.float32)[:, None].repeat(2, 1)  # every image enters
    labels = np.zeros(2000, dtype=np.int64)
    _, (_, _, top, _) = gathered(z, labels, 10)
    assert top.values[0].tolist() == [2000, 1999, 1998, 1997]
    top._waiting = []
    for part in range(100):
        top.update(gathered_part(part))
        assert sum(len(entry[0]) for entry in top._waiting) <= top.values.size


def gathered_part(part: int) -> EvaluationBatch:
    index = torch.arange(10) + 10_000 + 10 * part
    labels = torch.zeros(10, dtype=torch.int64)
    z = index[:, None].float().repeat(1, 2)
    return EvaluationBatch(torch.zeros(10, 5), z, labels, labels, index, labels == 0)


def test_memory_does_not_grow_with_images(gathered):
    def size(n):
        rng = np.random.default_rng(0)
        z, labels = sparse_latents(rng, n, 6), np.arange(n) % 12
        return [a.nbytes for a in state(gathered(z, labels, class_counts=np.full(12, 200))[1])]

    assert size(60) == size(600)


@pytest.mark.parametrize("size", [3, 70, 600])
def test_equal_activations_are_drawn_at_random(gathered, size):
    labels = np.repeat(np.arange(12), 50)
    z = np.ones((600, 2), dtype=np.float32)
    z[417, 1] = 2
    batch, (_, _, top, _) = gathered(z, labels, size)
    assert len(set(top.labels()[0])) > 1  # the first images are all of class 0
    order = batch.index.numpy()[np.argsort(batch.priority)]
    assert top.index[0].tolist() == order[:4].tolist()
    assert top.index[1].tolist() == [417, *order[order != 417][:3]]


def test_what_is_read_on_the_way_is_not_what_comes_in_the_end(animals, one_batch, batches_of):
    """Results are kept once they are computed, until more images come."""
    rng = np.random.default_rng(0)
    batch = one_batch(sparse_latents(rng, 80, 6), rng.integers(0, 12, 80))
    parts = batches_of(batch, 20)
    fit = batches_of(batch, int(batch.is_fit.sum()))[0]

    def gather(batches, reads):
        context = EvaluationContext(animals, 80, 5, 6)
        shared = [
            context.share(FiringHistogram, survival=SURVIVAL),
            context.share(TopImages, k=4),
            context.share(NegativeCounts),
            context.share(ClassCounts),
            context.share(FiringRate),
        ]
        context.calibrate(fit)
        for part in batches:
            context.update(part)
            if reads:
                results(shared)
        return context, shared

    def results(shared):
        histogram, top, negative, classes, rate = shared
        assert classes.counts.dtype == rate.fired.dtype == np.int64
        found = [classes.counts, rate.fired, rate.total, rate.largest, rate.rate]
        found.append(np.array([rate.mean_l0]))
        for shuffled in (False, True):
            pairs = top.pairs(shuffled)
            found += [histogram.both(shuffled).toarray(), histogram.halves(shuffled).fit.toarray()]
            found += [top.labels(shuffled), pairs.depth(), pairs.same_class]
            found.append(negative.of(shuffled).toarray())
        return found

    wanted = results(gather(parts, False)[1])
    assert float(wanted[5][0]) == pytest.approx(float((batch.z != 0).sum()) / 80)
    assert wanted[11].sum() == float((batch.z < 0).sum()) > 0
    (_, one), (_, other) = gather(parts[:2], True), gather(parts[2:], True)
    for mine, more in zip(one, other):
        mine.merge(more)
    for found in (results(gather(parts, True)[1]), results(one)):
        for array, expected in zip(found, wanted):
            np.testing.assert_allclose(array, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("most", "dtype"), [(255, torch.uint8), (256, torch.int16), (40_000, torch.int32)]
)
def test_counts_take_the_narrowest_integer(animals, most, dtype):
    context = EvaluationContext(animals, 10**6, 5, 3, class_counts=np.array([most, 3]))
    assert context.share(FiringHistogram).score().dtype == dtype


def test_counts_of_shuffled_labels_only_where_they_are_wanted(animals):
    for shuffled, labellings in ((True, 2), (False, 1)):
        context = EvaluationContext(animals, 10, 5, 3, shuffled=shuffled)
        histogram = context.share(FiringHistogram, survival=SURVIVAL)
        assert len(histogram._counts) == labellings
        assert histogram.score().shape == (3, 3, 12)


def test_the_first_image_stays_among_the_best(gathered):
    """Image 0 is met first and kept while later ones are merged in."""
    z = np.linspace(9, 1, 300, dtype=np.float32)[:, None]
    labels = np.arange(300) % 12
    batch, (_, _, top, _) = gathered(z, labels, 7)
    assert top.index[0].tolist() == [0, 1, 2, 3]
    assert top.labels()[0].tolist() == labels[:4].tolist()
    by_index = dict(zip(batch.index.tolist(), batch.shuffled_labels.tolist()))
    assert top.labels(True)[0].tolist() == [by_index[i] for i in range(4)]


def test_a_large_class_does_not_overflow(gathered):
    z, labels = np.ones((700, 1), dtype=np.float32), np.zeros(700, dtype=np.int64)
    _, (_, histogram, _, _) = gathered(z, labels)
    assert histogram.fired()[0, 0] == 700


def test_shared_once_and_updated_in_order_of_need(animals):
    context = EvaluationContext(animals, 10, 5, 3)
    histogram = context.share(FiringHistogram)
    assert context.share(FiringHistogram) is histogram
    assert context.share(FiringHistogram, survival=(1.0,)) is not histogram
    assert context.share(Thresholds) is histogram.thresholds
    order = list(context._shared.values())
    assert order.index(histogram.thresholds) < order.index(histogram)


@pytest.mark.parametrize(
    "survival", [(0.5,), (1.0, 0.2, 0.5), (1.0, 0.5, 0.5), (1.0, float("nan"))]
)
def test_the_grid_must_fall_from_one(animals, survival):
    with pytest.raises(
        TaxolensError,
        match=r"ConfigError: survival: not possible; given .*numbers that fall strictly from 1",
    ):
        EvaluationContext(animals, 10, 5, 3).share(FiringHistogram, survival=survival)


def test_a_batch_of_unequal_lengths_is_refused():
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"fields differ in length: .*'index': 2"):
        EvaluationBatch(torch.zeros(1, 5), torch.zeros(1, 3), one, one, two, one == 0)


def test_nan_never_fires():
    one = torch.zeros(1, dtype=torch.int64)
    z = torch.tensor([[float("nan"), 2.0, -1.0]])
    firings = EvaluationBatch(torch.zeros(1, 5), z, one, one, one, one == 0).firings
    assert [t.tolist() for t in firings] == [[0], [1], [2.0]]


def test_latents_below_0_in_one_part_alone_are_counted(animals, one_batch):
    parts = []
    for sign in (1, -1):
        context = EvaluationContext(animals, 24, 5, 2)
        parts.append(context.share(NegativeCounts))
        context.update(one_batch(np.full((12, 2), sign, dtype=np.float32), np.arange(12)))
    assert parts[0].of() is None
    parts[0].merge(parts[1])
    assert parts[0].of().toarray().tolist() == [[1] * 12] * 2


@pytest.mark.parametrize("sizes", [(0, 9), (9, 0), (9, 12), (9, 400), (400, 9), (400, 500)])
@pytest.mark.parametrize("small", [0, cells_module.SMALL])
def test_merged_cells_are_the_sum(
    sizes: tuple[int, int], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few cells of a large array are kept as they are, and many as the array."""
    monkeypatch.setattr(cells_module, "SMALL", small)
    rng = np.random.default_rng(0)
    added = [torch.from_numpy(rng.integers(0, 1000, size)) for size in sizes]
    counts = [CellCounts(1000, torch.int16) for _ in added]
    for each, cells in zip(counts, added, strict=True):
        for part in cells.split(7):
            each.add(part)
    counts[0].merge(counts[1])
    counts[0].add(torch.tensor([3, 3, 999]))
    every = torch.cat([*added, torch.tensor([3, 3, 999])])
    cells, found = counts[0].read()
    expected = torch.bincount(every, minlength=1000).numpy()
    assert cells.tolist() == np.flatnonzero(expected).tolist()
    assert found.tolist() == expected[cells].tolist()


@pytest.mark.parametrize(
    ("distinct", "size", "buffer", "held"),
    [(50, 100, 1000, 20), (50, 100, 2**22, 20), (50, 2000, 1000, 20), (9000, 2000, 1000, 4)],
)
def test_cells_take_little_memory(
    distinct: int, size: int, buffer: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 or 4 bytes a cell at most, of those that wait or are known; few of them, or nearly all."""
    monkeypatch.setattr(cells_module, "SMALL", 0)
    monkeypatch.setattr(cells_module, "BUFFER", buffer)
    rng = np.random.default_rng(0)
    counts = CellCounts(10_000, torch.int16)
    total = np.zeros(10_000, dtype=int)
    assert [v.dtype.kind for v in counts.read()] == ["i", "i"] and len(counts.read()[0]) == 0
    for _ in range(104):
        cells = rng.integers(0, distinct, size)
        counts.add(torch.from_numpy(cells))
        np.add.at(total, cells, 1)
    most = 10_000 if distinct > 50 else min(buffer, 10_000 // 8) + distinct
    assert len(pickle.dumps(counts)) < held * most + 4000
    fresh = CellCounts(10_000, torch.int16)
    counts.merge(CellCounts(10_000, torch.int16))  # to which nothing was added
    fresh.merge(counts)
    counts = fresh
    cells, found = counts.read()
    assert cells.tolist() == np.flatnonzero(total).tolist()
    assert found.tolist() == total[cells].tolist()


def test_a_small_array_is_kept_in_full() -> None:
    counts = CellCounts(10_000, torch.int16)
    counts.add(torch.tensor([3]))
    assert len(pickle.dumps(counts)) > 2 * 10_000
