"""Latents that may be below 0 count in all that rests on all of z; z that is not finite is refused.

Architectures such as `abstopk` and `qlae` have negative activations. Only what is said of classes and
nodes rests on firings, z > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, stream
from taxolens.registry.evaluators.infomec import InfoMEC
from taxolens.registry.evaluators.monosemanticity import Monosemanticity
from taxolens.registry.evaluators.parts.accumulators import FiringRate, NegativeCounts
from taxolens.registry.evaluators.parts.samples import FiringSample, fires
from taxolens.registry.evaluators.parts.sums import LatentSums
from taxolens.registry.evaluators.quasi_orthogonality import QuasiOrthogonality
from taxolens.registry.evaluators.reconstruction import Reconstruction
from taxolens.registry.evaluators.stability import Stability, most_firing
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
NAN, INF = float("nan"), float("inf")
LABELS = np.repeat(np.arange(12), 10)


def signed(n: int, m: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, m)) + rng.normal(size=(12, m))[LABELS[:n]]
    return (z * (rng.random((n, m)) < 0.4)).astype(np.float32)


def gathered(animals: Taxonomy, batch: EvaluationBatch, *classes: Any, **facts: Any) -> list[Any]:
    context = EvaluationContext(animals, len(batch), 5, batch.z.shape[1], **facts)
    found = [context.share(cls) for cls in classes]
    fields = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    for rows in torch.arange(len(batch)).split(17):
        context.update(replace(batch, **{k: v[rows] for k, v in fields.items()}))
    assert not context.failures
    return found


def test_a_latent_below_0_is_part_of_norms_and_of_l0(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """x = z and W_dec = I: the norms are equal, and both latents are active on every image."""
    x = torch.tensor([[3.0, -4.0], [6.0, -8.0], [9.0, -12.0], [12.0, -16.0]])
    eye = torch.eye(2)
    facts = {"W_dec": eye, "b_dec": torch.zeros(2), "reconstruct": lambda x: (x, x)}
    batch = one_batch(x, np.arange(4), x=x)
    orthogonality, reconstruction = measured(
        animals, batch, [QuasiOrthogonality, Reconstruction], **facts
    )
    numbers = orthogonality.compute()
    assert numbers["epsilon_lbo"] == numbers["epsilon_lbo_l0"] == 0
    assert numbers["norm_ratio"] == numbers["within_quarter"] == 1
    numbers = reconstruction.compute()
    assert numbers["l0"] == numbers["l0_image"] == 2
    assert numbers["dead_share"] == numbers["mse"] == 0 and numbers["dense_share"] == 1


def test_l0_of_an_image_counts_latents_that_are_below_0_on_a_token(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """The largest activation over tokens is 0 where a latent is below 0 on one and 0 on the other."""
    tokens = torch.tensor([[[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]]).repeat(12, 1, 1)
    batch = one_batch(tokens.amax(1), np.arange(12), x=tokens.mean(1))
    batch = replace(batch, tokens=tokens)
    (evaluator,) = measured(animals, batch, [Reconstruction], reconstruct=lambda x: (x, x))
    numbers = evaluator.compute()
    assert numbers["l0"] == 1 and numbers["l0_image"] == 2
    assert numbers["dead_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_sums_samples_and_counts_hold_all_that_is_not_0(
    animals: Taxonomy, one_batch: Measured, shuffled: bool
) -> None:
    z = signed(120, 6)
    batch = one_batch(z, LABELS)
    sums, sample, rate, negative = gathered(
        animals, batch, LatentSums, FiringSample, FiringRate, NegativeCounts
    )
    labels, z = batch.labels_of(shuffled).numpy(), batch.z.numpy()
    means = [[z[labels == c, j].mean() for c in range(12)] for j in range(6)]
    np.testing.assert_allclose(sums.means(shuffled), means, atol=1e-5)
    below = [[(z[labels == c, j] < 0).sum() for c in range(12)] for j in range(6)]
    assert negative.counts[int(shuffled)].tolist() == below
    np.testing.assert_array_equal(sample.z.toarray(), z)
    np.testing.assert_array_equal(fires(sample.z).toarray(), z > 0)
    assert rate.fired.tolist() == (z > 0).sum(0).tolist()
    assert rate.mean_l0 == pytest.approx((z != 0).sum(1).mean())


def test_without_a_latent_below_0_none_is_counted(animals: Taxonomy, one_batch: Measured) -> None:
    batch = one_batch(np.abs(signed(120, 6)), LABELS)
    assert gathered(animals, batch, NegativeCounts)[0].counts is None
    one_labelling = gathered(
        animals, one_batch(signed(120, 6), LABELS), NegativeCounts, shuffled=False
    )
    assert one_labelling[0].counts.shape == (1, 6, 12)


def test_entries_are_ordered_and_nan_is_none_of_them() -> None:
    one = torch.zeros(2, dtype=torch.int64)
    z = torch.tensor([[NAN, 2.0, -1.0], [0.0, -3.0, 4.0]])
    batch = EvaluationBatch(torch.zeros(2, 5), z, one, one, one, one == 0)
    assert [t.tolist() for t in batch.active] == [[0, 0, 1, 1], [1, 2, 1, 2], [2, -1, -3, 4]]
    assert [t.tolist() for t in batch.firings] == [[0, 1], [1, 2], [2, 4]]


MIRRORED = {
    "quasi_orthogonality": None,
    "taxonomic_autocorrelation": None,
    "reconstruction": None,
    "tree_probe": ("z_",),
    "hyperbolicity": ("latent_", "decoder_"),
    "level_information": ("z_",),
    "feature_geometry": ("effective_rank", "coactive_babel", "babel", "coherence"),
    "stability": ("decoder_same", "activation_", "one_to", "relative_"),
}
"""Metrics that are equal where latents and decoder rows both have the other sign."""


@pytest.mark.parametrize("name", MIRRORED)
def test_the_sign_of_a_latent_is_a_convention(
    name: str, animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z, rng = signed(120, 8), np.random.default_rng(1)
    rows = torch.from_numpy(rng.normal(size=(8, 5)).astype(np.float32))
    x = torch.from_numpy(z) @ rows + 0.1

    class SamePeer:
        name, relation, same_space = "other", "seed", True

        def __init__(self, z: np.ndarray, W_dec: torch.Tensor) -> None:
            self.z, self.W_dec = z, W_dec

        def latents(self, index: np.ndarray) -> sparse.csr_array:
            return sparse.csr_array(self.z[index])

    found = []
    for sign in (1, -1):
        facts = {"W_dec": sign * rows, "b_dec": torch.full((5,), 0.1)}
        facts["reconstruct"] = lambda x, sign=sign: (sign * x @ rows.T, x)
        facts["peers"] = [SamePeer(sign * z, sign * rows)]
        batch = one_batch(sign * z, LABELS, x=x)
        (evaluator,) = measured(animals, batch, [taxolens.EVALUATORS[name]], **facts)
        found.append(evaluator.compute())
    chosen = [k for k in found[0] if MIRRORED[name] is None or k.startswith(MIRRORED[name])]
    assert sum(math.isfinite(found[0][k]) for k in chosen) >= 2
    for metric in chosen:
        same = pytest.approx(found[0][metric], abs=1e-4, nan_ok=True)
        assert found[1][metric] == same, metric


def test_monosemanticity_is_scaled_from_the_least_activation(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z, rng = signed(60, 5), np.random.default_rng(0)
    z[:, 0] = -np.abs(rng.normal(size=60)) - 1  # below 0 on every image
    z[:, 1] = 0
    z[7, 1] = -1.0  # its other images are all above the least
    embedding = rng.normal(size=(60, 6)).astype(np.float32)
    batch = one_batch(z, LABELS[:60])
    batch = replace(batch, embedding=torch.from_numpy(embedding)[batch.index])
    (evaluator,) = measured(animals, batch, [Monosemanticity], size=13)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    first, second = np.triu_indices(60, 1)
    cosine = (unit[first] * unit[second]).sum(1)
    for a, score in zip(z.T.astype(float), evaluator.scores()):
        a = (a - a.min()) / (a.max() - a.min())
        weight = a[first] * a[second]
        assert score == pytest.approx((weight * cosine).sum() / weight.sum(), abs=1e-5)


def test_what_a_latent_tells_below_0_is_information(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """1 on a family, −1 on the other half of the images: it tells both families apart from 0."""
    family = animals.cut(1)[LABELS]
    first, half = family == family[0], np.arange(len(LABELS)) % 2 == 0
    z = np.stack([np.where(first, 1.0, 0.0), np.where(first, -1.0, 0.0)], 1).astype(np.float32)
    z = np.concatenate([z, np.where(half, 1.0, -1.0)[:, None].astype(np.float32)], axis=1)
    (evaluator,) = measured(animals, one_batch(z, LABELS), [InfoMEC], size=31)
    nested = evaluator.information().nested
    assert nested[0, 0] == pytest.approx(1) and nested[0, 1] == pytest.approx(1)
    # Of a latent of two signs each sign is a level.
    signs = np.where(first, -1.0, 1.0)[:, None].astype(np.float32)
    (evaluator,) = measured(animals, one_batch(signs, LABELS), [InfoMEC])
    assert evaluator.information().nested[0, 0] == pytest.approx(1)


def test_latents_below_0_are_matched_too() -> None:
    z = sparse.csr_array(np.array([[-1, 0, 2.0, 1], [-1, 0, 0, 3], [-2, 0, 0, 0]]))
    assert most_firing(z, 1).tolist() == [0] and most_firing(z, 9).tolist() == [0, 2, 3]


# Not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["x", "z"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e20])
def test_what_is_not_finite_is_refused_by_every_evaluator(
    animals: Taxonomy, one_batch: Measured, field: str, value: float
) -> None:
    batch = one_batch(np.abs(signed(120, 6)), LABELS)
    getattr(batch, field)[70, 3] = value
    context = EvaluationContext(animals, 120, 5, 6, W_dec=torch.randn(6, 5))
    chosen = {name: (cls, None) for name, cls in taxolens.EVALUATORS.items()}
    done = stream(context, chosen, [batch], calibration=lambda: replace(batch, z=batch.z.abs()))
    assert not done.evaluators and set(done.errors) == set(chosen)
    for error in done.errors.values():
        assert error.startswith(
            f"ConfigError: {field}: NaN, infinite or too large to compute with;"
        )
        assert error.endswith("allowed: finite numbers up to 1e+12 in absolute value.")


def test_one_bad_batch_is_enough(animals: Taxonomy, one_batch: Measured, batches_of: Any) -> None:
    batch = one_batch(np.abs(signed(120, 6)), LABELS)
    batch.z[100, 2] = INF
    context = EvaluationContext(animals, 120, 5, 6)
    chosen = {"lch_height": (taxolens.EVALUATORS["lch_height"], None)}
    done = stream(context, chosen, batches_of(batch, 60))
    assert "given '0 to inf'" in done.errors["lch_height"]
    assert done.compute("lch_height") is None


@pytest.mark.parametrize("field", ["x", "z"])
def test_what_is_too_small_is_refused_by_every_evaluator(
    animals: Taxonomy, one_batch: Measured, field: str
) -> None:
    batch = one_batch(np.abs(signed(120, 6)), LABELS)
    batch = replace(batch, **{field: getattr(batch, field) * 1e-13})
    context = EvaluationContext(animals, 120, 5, 6, W_dec=torch.randn(6, 5))
    chosen = {name: (cls, None) for name, cls in taxolens.EVALUATORS.items()}
    done = stream(context, chosen, [batch])
    assert not done.evaluators and set(done.errors) == set(chosen)
    for error in done.errors.values():
        assert error.startswith(f"ConfigError: {field}: too small to compute with;")
        assert error.endswith("the largest is at least 1e-09 in absolute value.")


def test_latents_that_never_fire_are_not_too_small(animals: Taxonomy, one_batch: Measured) -> None:
    batch = one_batch(np.zeros((120, 6), np.float32), LABELS)
    context = EvaluationContext(animals, 120, 5, 6)
    done = stream(context, {"lch_height": (taxolens.EVALUATORS["lch_height"], None)}, [batch])
    assert not done.errors


def test_numbers_do_not_depend_on_the_unit(animals: Taxonomy, one_batch: Measured) -> None:
    z = np.abs(signed(120, 6))
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    names = ("level_information", "absorption", "feature_geometry", "tree_probe", "infomec")
    found = []
    for unit in (1.0, 1e9, 4e-9):
        batch = one_batch(z * unit, LABELS, x=(torch.from_numpy(z) @ rows + 0.1) * unit)
        context = EvaluationContext(animals, 120, 5, 6, W_dec=rows)
        done = stream(context, {n: (taxolens.EVALUATORS[n], None) for n in names}, [batch])
        assert not done.errors
        found.append({n: done.compute(n) for n in names})
    for name in names:
        for other in found[1:]:
            assert other[name] == pytest.approx(found[0][name], rel=1e-2, abs=1e-2, nan_ok=True)


def test_latents_of_a_peer_that_are_not_finite_are_refused(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z = np.abs(signed(120, 6))
    worse = z.copy()
    worse[5, 2] = INF

    class Peer:
        name, relation, same_space, W_dec = "two", "seed", True, None

        def latents(self, index: np.ndarray) -> sparse.csr_array:
            return sparse.csr_array(worse[index])

    (evaluator,) = measured(animals, one_batch(z, LABELS), [Stability], peers=[Peer()])
    with pytest.raises(ConfigError, match="latents of the peer two: NaN, infinite or too"):
        evaluator.compute()


# Undefined, not 0 --------------------------------------------------------------------------------


def test_latents_that_are_all_0_have_no_spanning_tree_and_no_representation(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z = np.zeros((120, 6), dtype=np.float32)

    class Peer:
        name, relation, same_space, W_dec = "two", "seed", True, None

        def latents(self, index: np.ndarray) -> sparse.csr_array:
            return sparse.csr_array(np.abs(signed(120, 6))[index])

    probe, stability = measured(
        animals,
        one_batch(z, LABELS),
        [taxolens.EVALUATORS["tree_probe"], Stability],
        peers=[Peer()],
    )
    numbers = probe.compute() | stability.compute()
    for metric in ("z_uuas", "z_euclidean_uuas", "z_spearman", "relative_cosine", "relative_mrr"):
        assert math.isnan(numbers[metric]), metric
    assert math.isfinite(numbers["x_uuas"]) and math.isfinite(numbers["x_euclidean_uuas"])
