"""The parts that evaluators share, against plain computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from far_device import FAR_DEVICES, on
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry import hashing
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import (
    EvaluationBatch,
    EvaluationContext,
    InterventionResult,
)
from taxolens.registry.evaluators.parts import moments as moments_module
from taxolens.registry.evaluators.parts import summary
from taxolens.registry.evaluators.parts.class_probes import FeatureProbes
from taxolens.registry.evaluators.parts.embedded import EmbeddedImages
from taxolens.registry.evaluators.parts.image_positions import SALT, ImagePositions
from taxolens.registry.evaluators.parts.latent_nodes import LatentNodes
from taxolens.registry.evaluators.parts.moments import ClassMoments
from taxolens.registry.evaluators.parts.null_latents import NeuronLatents
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.probes import RidgeProbe
from taxolens.registry.evaluators.parts.readout import HeadReadout
from taxolens.registry.evaluators.parts.samples import SALT as SAMPLES
from taxolens.registry.evaluators.parts.samples import (
    FiringSample,
    FiringStore,
    ImageSample,
    fires,
    together,
)
from taxolens.registry.evaluators.parts.steering import effects, find_strength, steer
from taxolens.registry.evaluators.parts.sums import ActivationSums, LatentSums
from taxolens.registry.taxonomies import Taxonomy

SEEDS = st.integers(0, 10**6)


# summary -----------------------------------------------------------------------------------------


def test_means_and_ratios_are_in_double_precision() -> None:
    third = np.array([1, 2, 2], dtype=np.float16)
    assert summary.mean(third) == pytest.approx(5 / 3, rel=1e-12)
    assert summary.ratio(third, np.float16(3)) == pytest.approx([1 / 3, 2 / 3, 2 / 3], rel=1e-12)
    assert summary.ratio(1, np.array([3], dtype=np.float16)) == pytest.approx([1 / 3], rel=1e-12)


def test_a_mean_is_over_what_is_finite_and_asked_for() -> None:
    values = [1.0, np.nan, 3.0, np.inf, 8.0]
    assert summary.mean(values) == 4
    assert summary.mean(values, [True, True, True, True, False]) == 2
    assert np.isnan(summary.mean([])) and np.isnan(summary.mean([1.0], [False]))


def test_a_ratio_to_nothing_is_undefined() -> None:
    found = summary.ratio([[1.0], [0.0]], [2.0, 0.0, -1.0])
    np.testing.assert_array_equal(found, [[0.5, np.nan, -1.0], [0.0, np.nan, 0.0]])


def test_histograms_show_shares_of_the_finite_values() -> None:
    drawing = summary.histograms(
        "", "", {"a": np.array([0, 0, 1, np.nan]), "b": np.ones(2)}, bins=2
    )
    first, second = drawing.data
    assert np.allclose(first.x, [0, 0, 0.5, 1]) and np.allclose(first.y, [0, 2 / 3, 1 / 3, 0])
    assert np.allclose(second.y, [0, 0, 1, 0]) and (first.name, second.name) == ("a", "b")
    assert not summary.histograms("", "", {"a": np.full(2, np.nan)}).data


# sums and samples --------------------------------------------------------------------------------


@pytest.fixture(params=[1000, 7])
def seen(request: Any, animals: Any, one_batch: Any, batches_of: Any) -> Any:
    """(accumulator class, options) -> (batch, accumulator) after a pass over uneven classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), rng.integers(2, 9, 12))
    z = (rng.random((len(labels), 4)) * (rng.random((len(labels), 4)) < 0.6)).astype(np.float32)
    x = rng.normal(size=(len(labels), 3)).astype(np.float32) + 50
    batch = one_batch(z, labels, x=x)

    def run(cls: Any, shuffled: bool = True, counts: bool = True, **options: Any) -> Any:
        context = EvaluationContext(animals, len(batch), 3, 4, shuffled=shuffled)
        context.class_counts = np.bincount(labels, minlength=12) if counts else None
        accumulator = context.share(cls, **options)
        for part in batches_of(batch, request.param):
            context.update(part)
        return batch, accumulator

    return run


@pytest.mark.parametrize("shuffled", [False, True])
def test_class_means_are_those_of_the_images(seen: Any, shuffled: bool) -> None:
    batch, latents = seen(LatentSums)
    _, activations = seen(ActivationSums)
    labels = batch.labels_of(shuffled).numpy()
    for c in range(12):
        own = labels == c
        assert latents.means(shuffled)[:, c] == pytest.approx(batch.z[own].numpy().mean(0))
        wanted = batch.x[own].double().numpy().mean(0)
        offset = activations.offset.numpy()
        assert activations.means(shuffled)[c] + offset == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("cls", [LatentSums, ActivationSums])
def test_shuffled_labels_take_memory_only_where_they_are_wanted(seen: Any, cls: Any) -> None:
    assert len(seen(cls)[1].sums) == 2 and len(seen(cls, shuffled=False)[1].sums) == 1


def test_a_sample_holds_the_images_that_were_drawn(seen: Any) -> None:
    batch, sample = seen(FiringSample, max_images=20)
    kept = hashing.uniform(batch.index.numpy(), 101) < 20 / len(batch)
    assert 5 < kept.sum() < 40
    assert np.array_equal(sample.index, batch.index.numpy()[kept])
    assert np.array_equal(sample.is_fit, batch.is_fit.numpy()[kept])
    for shuffled in (False, True):
        wanted = batch.labels_of(shuffled).numpy()[kept]
        assert np.array_equal(sample.labels(shuffled), wanted)
    assert np.array_equal(sample.z.toarray(), batch.z.numpy()[kept])


@pytest.mark.parametrize("counts", [False, True])
def test_a_sample_of_activations_has_the_same_share_of_each_class(seen: Any, counts: bool) -> None:
    """Of each true class, and for the shuffled labels of each shuffled one."""
    batch, sample = seen(ImageSample, max_images=24, counts=counts)
    for shuffled in (False, True):
        labels, found = batch.labels_of(shuffled).numpy(), sample.drawn(shuffled)
        share = 24 / 12 / np.bincount(labels)[labels] if counts else 24 / len(batch)
        kept = hashing.uniform(batch.index.numpy(), 101) < share
        assert np.array_equal(found.index, batch.index.numpy()[kept])
        assert np.array_equal(found.labels, labels[kept])
        assert np.array_equal(found.is_fit, batch.is_fit.numpy()[kept])
        assert torch.equal(found.x, batch.x[torch.from_numpy(kept)])
        assert np.array_equal(found.z.toarray(), batch.z.numpy()[kept])
    assert sample.draws_differ() == counts


def test_a_sample_for_true_labels_alone_holds_no_other_images(seen: Any) -> None:
    batch, sample = seen(ImageSample, max_images=24, counts=True, shuffled=False)
    labels = batch.labels.numpy()
    drawn = hashing.uniform(batch.index.numpy(), 101) < 2 / np.bincount(labels)[labels]
    assert len(sample._column(3)) == len(sample.drawn().index) == drawn.sum()


def test_a_sample_of_nothing_has_the_right_widths(animals: Any) -> None:
    sample = ImageSample(EvaluationContext(animals, 0, 3, 4)).drawn()
    assert sample.x.shape == (0, 3) and sample.z.shape == (0, 4)
    assert sample.labels.dtype == np.int64 and sample.is_fit.dtype == bool


@given(seed=SEEDS, density=st.sampled_from([0.015, 0.5]))
@settings(max_examples=20, deadline=None)
def test_pairs_that_fire_together_one_by_one(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    fired = rng.random((400, 30)) < density
    fired[:3] = rng.random((3, 30)) < 0.3
    latents = rng.permutation(30)[:5]
    found = together(sparse.csr_array(fired.astype(np.float32)), latents)
    both = [
        (i, j, int((fired[:, latents[i]] & fired[:, j]).sum())) for i in range(5) for j in range(30)
    ]
    assert list(zip(*(v.tolist() for v in found))) == [pair for pair in both if pair[2]]


def test_firings_are_ones() -> None:
    z = sparse.csr_array(np.array([[0.0, 2.5], [0.1, 0.0]]))
    assert fires(z).toarray().tolist() == [[0, 1], [1, 0]]
    z = sparse.csr_array(np.array([[0.0, 2.5, -1.0], [0.1, -2.0, 0.0], [0.0, 0.0, -3.0]]))
    assert fires(z).toarray().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("most", "images"), [(1, 1), (8, 2), (9, 2), (40, 10), (400, 10)])
def test_of_latents_that_fire_often_fewer_images_are_kept(
    animals: Any, one_batch: Any, most: int, images: int
) -> None:
    """Four firings an image; ten images at most."""
    store = FiringStore(EvaluationContext(animals, 30, 5, 4), max_images=10, max_firings=most)
    store.calibrate(one_batch(np.ones((30, 4), dtype=np.float32), np.arange(30) % 12))
    assert store.max_images == images


def test_positions_are_those_of_the_smallest_hash(animals: Any, one_batch: Any) -> None:
    labels = np.arange(40) % 12
    batch = one_batch(np.zeros((40, 2), dtype=np.float32), labels)
    sample = ImagePositions(EvaluationContext(animals, 40, 5, 2), max_images=6)
    sample.update(batch)
    for fit in (False, True):
        index = batch.index[batch.is_fit == fit].numpy()
        assert np.array_equal(
            sample.index(fit), index[np.argsort(hashing.uniform(index, SALT))][:6]
        )


@pytest.mark.parametrize("own_layer", [True, False])
def test_embeddings_of_a_sample_of_the_score_half(
    animals: Any, one_batch: Any, batches_of: Any, own_layer: bool
) -> None:
    rng = np.random.default_rng(0)
    batch = one_batch(np.zeros((90, 2), dtype=np.float32), np.arange(90) % 12)
    rows = batch.x if own_layer else torch.from_numpy(rng.normal(size=(90, 7)))
    batch = replace(batch, embedding=None if own_layer else rows)
    context = EvaluationContext(animals, 90, 5, 2)
    empty, one, other = (EmbeddedImages(context, max_images=20) for _ in range(3))
    for n, part in enumerate(batches_of(batch, 20)):
        (one if n < 3 else other).update(part)
    assert empty.unit.shape == (0, 0) and empty.unit.dtype == np.float32
    assert empty.index.shape == (0,) and empty.index.dtype == np.int64
    empty.merge(one)
    empty.merge(other)
    half = 90 / 2
    kept = hashing.uniform(batch.index.numpy(), SAMPLES) < 20 / half
    kept &= ~batch.is_fit.numpy()
    assert 10 < kept.sum() < 30
    assert empty.index.tolist() == batch.index.numpy()[kept].tolist()
    wanted = rows.numpy()[kept] / np.linalg.norm(rows.numpy()[kept], axis=1, keepdims=True)
    np.testing.assert_allclose(empty.unit, wanted, rtol=1e-5)
    assert empty.own_layer == own_layer
    nothing = EmbeddedImages(EvaluationContext(animals, 0, 5, 2))
    nothing.update(
        replace(batch, **{k: v[:0] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})
    )
    assert nothing.index.tolist() == [] and nothing.unit.shape == (0, rows.shape[1])


# moments and probes ------------------------------------------------------------------------------


def some_images(x: torch.Tensor, labels: torch.Tensor, fit: bool) -> EvaluationBatch:
    n = len(x)
    return EvaluationBatch(x, x, labels, labels, torch.arange(n), torch.full((n,), fit))


def fitted(x: torch.Tensor, *parts: EvaluationBatch) -> FeatureProbes:
    probes = FeatureProbes(4, 1, 0.01, 3, 5)
    probes.calibrate(x, x)
    for part in parts:
        probes.update(part, part.x, part.x)
    return probes


def test_probes_of_two_parts_of_the_fit_half_are_those_of_all() -> None:
    rng = np.random.default_rng(0)
    x, asked = (torch.from_numpy(rng.normal(size=(60, 3)).astype(np.float32)) for _ in range(2))
    labels = torch.arange(60) % 4
    first, second = some_images(x[:25], labels[:25], True), some_images(x[25:], labels[25:], True)
    second = replace(second, index=torch.arange(25, 60))
    whole, parts, rest = fitted(x, first, second), fitted(x, first), fitted(x, second)
    assert parts.moments is not None and whole.moments is not None
    groups = np.array([[0, 0, 1, 1]])
    parts.moments.variance_share(groups, 0)  # asked on the way, it is not what comes in the end
    parts.merge(rest)
    torch.testing.assert_close(parts.ridge.scores(asked)[0], whole.ridge.scores(asked)[0])
    assert parts.knn.predict(asked)[0].tolist() == whole.knn.predict(asked)[0].tolist()
    found, wanted = (p.moments.variance_share(groups, 0) for p in (parts, whole))
    assert found == pytest.approx(wanted)


def test_sums_about_other_means_are_refused(animals: Any, one_batch: Any) -> None:
    x, labels = torch.randn(40, 3) + 5, torch.arange(40) % 4

    def moments(sample: torch.Tensor) -> ClassMoments:
        found = ClassMoments(4, 1, sample)
        found.update(x, [labels])
        return found

    def ridge(sample: torch.Tensor) -> RidgeProbe:
        found = RidgeProbe(4)
        found.centre(sample)
        found.fit(x, [labels])
        return found

    groups = np.array([[0, 0, 1, 1]])
    for about, name in ((moments, "mean of a feature"), (ridge, "mean of a feature")):
        one, twice = about(x), about(x)
        twice.merge(about(x))
        with pytest.raises(ConfigError, match=name):
            one.merge(about(x[:20]))
        if isinstance(one, ClassMoments):  # the same images twice have the same shares
            assert twice.variance_share(groups, 0) == pytest.approx(one.variance_share(groups, 0))
        else:
            torch.testing.assert_close(twice.scores(x), one.scores(x))
    context = EvaluationContext(animals, 40, 5, 2)
    with pytest.raises(ConfigError, match="max_images"):
        FiringSample(context, max_images=3).merge(FiringSample(context, max_images=4))
    sums = [ActivationSums(context) for _ in range(2)]
    for each, classes in zip(sums, (4, 3)):
        each.update(one_batch(np.zeros((40, 2)), np.arange(40) % classes, seed=classes))
    with pytest.raises(ConfigError, match="mean of x"):
        sums[0].merge(sums[1])


def test_the_node_of_a_latent_and_none_without_nodes(animals: Any, one_batch: Any) -> None:
    labels = np.arange(24) % 12
    z = np.stack([labels < 6, labels == 7], axis=1).astype(np.float32)  # two images a class
    for taxonomy, nodes in (
        (animals, [animals.lch(np.arange(6)), animals.class_nodes[7]]),
        (Taxonomy.from_edges([("root", "a")]), [0, 0]),
    ):
        own = labels * (len(taxonomy.classes) > 1)
        context = EvaluationContext(taxonomy, 24, 5, 2)
        found = LatentNodes(context)
        batch = one_batch(z, own)
        context.update(batch)
        node, f1 = found.of(np.arange(2))
        assert node.tolist() == nodes and node.dtype.kind == "i"
        np.testing.assert_array_equal(f1, [1, 1] if len(taxonomy.classes) > 1 else [np.nan] * 2)
        assert found.fired.tolist() == (batch.z[batch.is_fit] > 0).sum(0).tolist()
        assert found.fired.dtype == np.int64


def test_predictions_of_other_probes_are_refused() -> None:
    x, labels = torch.randn(40, 3), torch.arange(40) % 4
    fit, score = some_images(x[:30], labels[:30], True), some_images(x[30:], labels[30:], False)
    one, other = fitted(x, fit, score), fitted(x, fit, score)
    one.merge(other)
    assert one.confusion.sum() == 2 * 2 * 10 and one.confusion.dtype == np.int32
    with pytest.raises(ConfigError, match="probes of the fit half"):
        one.merge(fitted(x, some_images(x[5:30], labels[5:30], True)))


@pytest.mark.parametrize(("n_classes", "counted"), [(4, []), (5, [5]), (19, [5]), (20, [5, 20])])
def test_the_most_probable_classes_are_counted_where_there_are_so_many(
    n_classes: int, counted: list[int]
) -> None:
    assert list(FeatureProbes(n_classes, 1, 0.01, 3, 5).near) == counted


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("size", [40, 11])
def test_the_share_of_variance_between_groups(offset: float, size: int) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(40, 3)).astype(np.float32)) + offset
    if not offset:
        x = x.relu() * (x > 1)  # mostly zeros, which are kept
    labels = torch.from_numpy(rng.integers(0, 5, 40))
    labels[labels == 4] = 3
    labels[7] = 4  # a class of one image
    moments = ClassMoments(5, 1, x[:size])
    assert (moments.offset is None) == (offset == 0)
    groups = np.array([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [3, 1, 3, 1, 3], [0, 1, 2, 3, 4]])
    for part, of in zip(x.split(size), labels.split(size)):
        moments.update(part, [of])
        moments.variance_share(groups, 0)  # asked on the way, it is not what comes in the end
    for group, found in zip(groups, moments.variance_share(groups, 0)):
        own = group[labels.numpy()]
        values = x.double().numpy()
        means = np.stack([values[own == g].mean(0) for g in own])
        between = np.square(means - values.mean(0)).sum()
        whole = np.square(values - values.mean(0)).sum()
        assert found == pytest.approx(between / whole, abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", *FAR_DEVICES])
def test_the_share_of_variance_between_large_and_small_groups(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Large groups are summed by products, some at a time, and small ones by pairs; on a device all by pairs."""
    monkeypatch.setattr(moments_module, "BLOCK", 150)
    monkeypatch.setattr(moments_module, "CELLS", 2 * 60**2)
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(300, 4)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 50, 300))  # 10 of 60 classes have no image
    with on(device):
        moments = ClassMoments(60, 1, x.to(device))
        moments.update(x.to(device), [labels])
    sizes = ([30, 30], [20, 1, 1, 8, 25, 5], [6] * 10, [7, 5, 6, 6, 6] * 2, [2] * 30, [1] * 60)
    groups = [rng.permutation(np.repeat(np.arange(len(k)) * 2, k)) for k in sizes]
    groups.append(np.repeat([0, 1], [50, 10]))  # a group without an image
    with on(device):
        sums = moments.sums[0].cpu().double().numpy()
        shares = moments.variance_share(np.array(groups), 0)
    for group, found in zip(groups, shares):
        between = 0.0
        for g in set(group[:50]):
            images = moments.counts[0][group == g].sum()
            between += np.square(sums[group == g].sum(0)).sum() / images
        whole = np.square(sums.sum(0)).sum() / 300
        assert found == pytest.approx((between - whole) / (moments.squares - whole), abs=1e-6)


def test_moments_without_an_image() -> None:
    moments = ClassMoments(3, 1, torch.zeros(2, 4))
    assert np.isnan(moments.variance_share(np.array([[0, 1, 1]]), 0)).all()
    # Half of the numbers are 0: they are taken about their mean.
    assert ClassMoments(3, 1, torch.tensor([[0.0, 2.0]])).offset is not None


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_ridge_probe_does_not_depend_on_the_unit(scale: float) -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, 200))
    x = torch.nn.functional.one_hot(labels, 6).float()
    x += 0.3 * torch.from_numpy(rng.normal(size=(200, 6)).astype(np.float32))
    x[:, 5] = 1.0  # constant: it carries no information
    probe = RidgeProbe(4)
    probe.fit(scale * x[:150], [labels[:150]])
    (guess,) = probe.predict(scale * x[150:])
    assert (guess == labels[150:]).float().mean() > 0.9
    assert torch.isinf(probe._scale[5]) and torch.isfinite(probe._scale[:5]).all()


# null latents ------------------------------------------------------------------------------------


def test_planted_probabilities_are_from_0_to_1(animals: Any) -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=f"recall.*{value}"):
            PlantedLatents(animals, recall=value)


@pytest.mark.parametrize("seed", range(4))
def test_how_strongly_a_planted_latent_fires_says_nothing(animals: Any, seed: int) -> None:
    labels = torch.arange(12).repeat_interleave(400)
    index = torch.arange(len(labels))
    z = PlantedLatents(animals, recall=0.5, seed=seed).encode(labels=labels, index=index)
    strength = z[z > 0] - 1
    assert strength.mean() == pytest.approx(0.5, abs=0.01)
    assert strength.min() < 0.01 and strength.max() > 0.99
    binary = PlantedLatents(animals, recall=0.5, seed=seed, binary=True)
    assert torch.equal(binary.encode(labels=labels, index=index), (z > 0).float())


def test_neurons_of_a_sample() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    latents = NeuronLatents.fit(x)
    assert latents.b_dec.tolist() == [2.0, 1.0]
    assert latents.encode(x).tolist() == [[0, 0, 1, 3], [1, 3, 0, 0]]
    assert latents.W_dec.tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]


# steering ----------------------------------------------------------------------------------------


@given(power=st.sampled_from([1, 2, 4, 8]), at=st.floats(0.01, 50), start=st.floats(0.01, 50))
@settings(max_examples=60, deadline=None)
def test_a_strength_is_looked_for_inside_what_is_known_of_it(
    power: int, at: float, start: float
) -> None:
    """Outputs whose KL from the untouched ones is about (strength/at)^power · 0.1 nats."""
    clean = torch.zeros(1, 2).log_softmax(1)
    tried: list[tuple[float, float]] = []

    def outputs(strength: float) -> torch.Tensor:
        wanted = 0.1 * (strength / at) ** power
        # KL(½, ½ ‖ q, 1 − q) = −½ log(4 q (1 − q))
        p = (1 + np.sqrt(1 - np.exp(-2 * min(wanted, 30)))) / 2
        tried.append((strength, min(wanted, 30)))
        return torch.tensor([[p, 1 - p]]).log()

    strength, steered = find_strength(outputs, clean, 0.1, start)
    low, high = 0.0, np.inf
    assert tried[0][0] == start and len(tried) <= 12
    for i, (value, kl) in enumerate(tried):
        assert low < value < high
        low, high = (value, high) if kl < 0.1 else (low, value)
        if i:  # within the search each step changes the strength by a factor of 8 at most
            assert 1 / 8.001 <= value / tried[i - 1][0] <= 8.001
    if steered is None:
        assert len(tried) == 12 and np.isnan(strength)
    else:
        assert strength == tried[-1][0] and tried[-1][1] == pytest.approx(0.1, rel=0.0501)
    if power == 2 and 1 / 64 < at / start < 64:  # where the square law holds it is followed
        assert steered is not None and len(tried) <= 4


def test_a_strength_far_too_large_falls_by_eight() -> None:
    clean = torch.zeros(1, 2).log_softmax(1)
    tried: list[float] = []

    def outputs(strength: float) -> torch.Tensor:
        tried.append(strength)
        return (strength * torch.tensor([[1.0, -1.0]])).log_softmax(1)

    find_strength(outputs, clean, 0.1, 2000.0)
    assert tried[:3] == [2000, 250, 31.25]
    tried.clear()
    find_strength(outputs, clean, 0.1, 1e-5)
    assert tried[:3] == pytest.approx([1e-5, 8e-5, 6.4e-4])


class TwoClasses:
    """A model that says how much the first of two numbers exceeds the second."""

    logit_classes = np.array([0, 1])

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, index: torch.Tensor, edit: Any = None) -> InterventionResult:
        self.runs += 1
        x = torch.zeros(len(index), 1, 2)
        x = (x if edit is None else edit(x)).mean(1)
        return InterventionResult(x, x)


def test_steering_along_several_directions() -> None:
    model = TwoClasses()
    directions = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.02]])
    found = steer(
        model,
        HeadReadout(model.logit_classes),
        torch.arange(3),
        directions,
        kl=0.1,
        start=1.0,
        n_classes=2,
    )
    # No strength is looked for along 0; none is found where both outputs rise alike.
    assert found.reached.tolist() == [True, False, False, True]
    assert found.kl[[0, 3]] == pytest.approx(0.1, rel=0.05)
    # KL(½, ½ ‖ q, 1 − q) = .1 nats at q = .713: the same for both, whatever their length.
    assert found.strength[0] == pytest.approx(found.strength[3], rel=0.05)
    assert found.change[0] == pytest.approx([0.213, -0.213], abs=0.01)
    assert found.change[3] == pytest.approx([-0.213, 0.213], abs=0.01)
    assert np.isnan(found.change[[1, 2]]).all() and np.isnan(found.kl[[1, 2]]).all()
    assert model.runs <= 1 + 4 + 0 + 1 + 12  # the second search begins where the first ended


def test_effects_of_steering_by_hand() -> None:
    by_latents = np.array([[0.4, -0.1, 0.0], [0.1, 0.2, 0.0], [0.4, 0.2, -0.2]])
    by_directions = np.array([[0.1, 0.0, 0.0], [0.0, 0.3, 0.0]])
    members = np.array([[True, False, False], [False, True, True], [False, False, True]])
    found = effects(by_latents, by_directions, members)
    assert found.own == pytest.approx([0.4, 0.2, 0.0])
    assert found.others == pytest.approx([0.25, 0.05, (-0.1 + 0.2) / 2])
    assert found.random == pytest.approx([0.05, 0.15, 0.15])
    # Of the other two: one raises node 0 as much and one less; and so on.
    assert found.rank == pytest.approx([0.75, 0.75, 0.5])
    alone = effects(by_latents[:1], by_directions[:0], members[:, :1])
    assert np.isnan([alone.others[0], alone.rank[0], alone.random[0]]).all()


def test_a_strength_is_found_from_no_first_guess() -> None:
    clean = torch.zeros(1, 2).log_softmax(1)
    direction = torch.tensor([[1.0, -1.0]])
    tried: list[float] = []

    def outputs(strength: float) -> torch.Tensor:
        tried.append(strength)
        return (strength * direction).log_softmax(1)

    strength, steered = find_strength(outputs, clean, 0.1, 0.0)
    assert steered is not None and strength > 0 and tried[0] == 1.0
