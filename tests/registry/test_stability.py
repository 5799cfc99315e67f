"""`stability`: its parts against plain computation, and peers that are known."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.stability import (
    RIDGE,
    Stability,
    correlations,
    match,
    most_firing,
    of_pairs,
    regression_r2,
    relative,
    relative_agreement,
    standard,
)
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
SEEDS = st.integers(0, 10**6)


@dataclass
class KnownPeer:
    """A peer whose latents of every image are written down."""

    z: np.ndarray  # (images, m')
    W_dec: torch.Tensor | None = None
    same_space: bool = True
    name: str = "other"
    relation: str = "seed"

    def latents(self, index: np.ndarray) -> sparse.csr_array:
        return sparse.csr_array(self.z[index])


# The parts ---------------------------------------------------------------------------------------


@given(seed=SEEDS, a=st.integers(1, 5), b=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_the_matching_is_the_best_of_all(seed: int, a: int, b: int) -> None:
    likeness = np.random.default_rng(seed).normal(size=(a, b))
    few, many = sorted((a, b))
    wide = likeness if a <= b else likeness.T
    best = max(
        sum(wide[i, j] for i, j in zip(range(few), order))
        for order in itertools.permutations(range(many), few)
    )
    column = match(likeness)
    rows = np.flatnonzero(column >= 0)
    assert len(rows) == few and len(set(column[rows])) == few
    assert likeness[rows, column[rows]].sum() == pytest.approx(best)


def test_the_likeness_of_each_row_with_its_column() -> None:
    likeness = np.arange(8.0).reshape(4, 2)
    found = of_pairs(likeness, np.array([0, 1, -1, 0]))
    assert found.tolist() == pytest.approx([0, 3, np.nan, 6], nan_ok=True)


def test_nothing_is_matched_by_what_is_undefined() -> None:
    assert match(np.full((3, 2), np.nan)).tolist() == [-1, -1, -1]
    assert match(np.zeros((2, 0))).tolist() == [-1, -1]


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_correlations_are_those_of_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(9, 3)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    found = correlations(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found, np.corrcoef(x.T, y.T)[:3, 3:], atol=1e-5)
    x[:, 1], y[:, 3] = 2.5, -1.0
    found = correlations(torch.from_numpy(x), torch.from_numpy(y), constant=math.nan)
    assert np.isnan(found[1]).all() and np.isnan(found[:, 3]).all()
    assert np.isfinite(found[[0, 2], :3]).all()
    assert correlations(torch.from_numpy(x), torch.from_numpy(y))[1].tolist() == [0, 0, 0, 0]


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_regression_is_a_pursuit_done_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, held_y = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
    mixing = rng.normal(size=(6, 3))
    x, held_x = (v @ mixing + 0.3 * rng.normal(size=(len(v), 3)) for v in (y, held_y))
    found = regression_r2(*(torch.from_numpy(v).float() for v in (x, y, held_x, held_y)), 3)
    scale = y.std(0)
    source, held = (y - y.mean(0)) / scale, (held_y - y.mean(0)) / scale
    for t in range(3):
        target = x[:, t] - x[:, t].mean()
        rest, chosen = target.copy(), []
        for size in range(3):
            inner = source.T @ rest / 40
            inner[chosen] = 0
            chosen.append(int(np.abs(inner).argmax()))
            part = source[:, chosen]
            weight = np.linalg.solve(
                part.T @ part / 40 + RIDGE * np.eye(size + 1), part.T @ target / 40
            )
            rest = target - part @ weight
            error = held_x[:, t] - x[:, t].mean() - held[:, chosen] @ weight
            r2 = 1 - (error**2).sum() / ((held_x[:, t] - held_x[:, t].mean()) ** 2).sum()
            assert found[size, t] == pytest.approx(max(r2, 0), abs=1e-3)


def test_a_split_latent_is_predicted_by_its_halves_jointly() -> None:
    rng = np.random.default_rng(0)
    y = np.abs(rng.normal(size=(400, 8))) * (rng.random((400, 8)) < 0.2)
    x = y[:, :2].sum(1, keepdims=True)
    halves = [torch.from_numpy(v).float() for v in (x[:200], y[:200], x[200:], y[200:])]
    r2 = regression_r2(*halves, 4)[:, 0]
    assert r2[0] < 0.75 and r2[1] > 0.999 and r2[3] > 0.999


def test_a_constant_source_predicts_nothing() -> None:
    y = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y[:, 1] = 2.0
    r2 = regression_r2(y[:30, :1], y[:30, [1, 0]], y[30:, :1], y[30:, [1, 0]], 2)
    assert r2[:, 0] == pytest.approx([1, 1], abs=1e-5)


def test_as_many_regressors_as_there_are() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    r2 = regression_r2(x, x[:, :1], x, x[:, :1], 4)
    assert r2[:, 0] == pytest.approx([1] * 4, abs=1e-5)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_relative_representations_are_cosines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.random((6, 5)) * (rng.random((6, 5)) < 0.6)
    anchors = rng.random((3, 5)) + 0.1
    z[0] = 0
    found = relative(sparse.csr_array(z), sparse.csr_array(anchors))
    for i, j in itertools.product(range(6), range(3)):
        length = np.linalg.norm(z[i]) * np.linalg.norm(anchors[j])
        assert found[i, j] == pytest.approx(z[i] @ anchors[j] / length if length else 0)


def test_single_precision_latents_are_compared_in_double() -> None:
    z = np.array([[0.1, 0.3], [0.7, 0.2]], dtype=np.float32)
    found = relative(sparse.csr_array(z), sparse.csr_array(z))
    assert found.dtype == np.float64
    exact = z.astype(np.float64)
    wanted = exact @ exact.T / np.outer(*[np.linalg.norm(exact, axis=1)] * 2)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_one_image_alone_has_no_rank() -> None:
    assert np.isnan(relative_agreement(np.ones((1, 3)), np.ones((1, 3)))).all()


def test_a_column_that_varies_by_rounding_alone_is_constant() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([5 + 1e-12 * rng.normal(size=8), rng.normal(size=8)], axis=1)
    found = standard(torch.from_numpy(x)).double().numpy()
    assert found[:, 0].tolist() == [0] * 8
    assert found[:, 1] == pytest.approx((x[:, 1] - x[:, 1].mean()) / x[:, 1].std(), abs=1e-6)
    assert standard(torch.zeros(0, 2)).shape == (0, 2)


def test_the_rank_of_the_same_image_by_hand() -> None:
    own = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    other = own[[1, 0, 2]]  # the first two have changed places: each is second but for itself
    cosine, mrr = relative_agreement(own, other)
    expected = [own[0] @ own[1], own[1] @ own[0], own[2] @ own[2] / 2]
    assert cosine == pytest.approx(np.mean(expected))
    assert mrr == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert relative_agreement(own, own) == pytest.approx((1, 1))


def test_an_image_at_the_mean_has_no_cosine() -> None:
    """The third of `own`; about their mean (0, 1) the others are (±1, −1) and (0, 2)."""
    own = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    other = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    for pair in ((own, other), (other, own)):
        assert relative_agreement(*pair)[0] == pytest.approx(np.sqrt(0.5))


def test_images_that_cannot_be_told_apart_share_a_rank() -> None:
    """Three of four images are described alike: each is 1st, 2nd or 3rd among them, so 2nd."""
    own = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    assert relative_agreement(own, own) == pytest.approx((1, (3 / 2 + 1) / 4))
    # With one more that is nearer to none of them nothing changes for these three.
    wide = np.concatenate([own, [[0.0, 9.0]]])
    _, mrr = relative_agreement(wide, wide)
    assert mrr == pytest.approx((3 / 2 + 2) / 5)
    # All alike, or all at the mean: everyone has the mean rank.
    assert relative_agreement(own[:3], own[:3])[1] == pytest.approx(1 / 2)


def test_the_most_firing_latents() -> None:
    z = sparse.csr_array(np.array([[1, 0, 2, 1], [1, 0, 0, 3], [2, 0, 0, 0]]))
    assert most_firing(z, 2).tolist() == [0, 3] and most_firing(z, 9).tolist() == [0, 2, 3]


# Planted peers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(one_batch: Measured) -> dict[str, Any]:
    """600 images of a sparse SAE with 30 latents in 16 dimensions."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 50)
    z = (np.abs(rng.normal(size=(600, 30))) * (rng.random((600, 30)) < 0.2)).astype(np.float32)
    W_dec = torch.from_numpy(rng.normal(size=(30, 16)).astype(np.float32))
    return {"labels": labels, "z": z, "W_dec": W_dec, "batch": one_batch(z, labels)}


@pytest.fixture
def beside(world: dict[str, Any], animals: Any, measured: Measured) -> Measured:
    """The evaluator of that SAE beside given peers."""

    def call(*peers: KnownPeer, options: Any = None, batch: Any = None, **facts: Any) -> Stability:
        facts = {"W_dec": world["W_dec"], "peers": peers, **facts}
        batch = world["batch"] if batch is None else batch
        (evaluator,) = measured(animals, batch, [Stability], options=options, **facts)
        return evaluator

    return call


def test_the_same_sae_in_another_order_is_recovered(world: Any, beside: Measured) -> None:
    order = np.random.default_rng(1).permutation(30)
    # Scales of latents and rows do not matter either.
    peer = KnownPeer(3 * world["z"][:, order], world["W_dec"][order] / 3)
    evaluator = beside(peer)
    numbers = evaluator.compute()
    for metric, value in numbers.items():
        if metric not in ("latents", "decoder_pairs", "activation_pairs", "peers"):
            # Images with but one latent, the same one, share a rank.
            assert value == pytest.approx(1, abs=0.01 if metric == "relative_mrr" else 1e-4), metric
    assert (numbers["latents"], numbers["peers"]) == (30, 1)
    table = evaluator.tables()["latents"]
    for column in ("decoder_partner", "activation_partner"):
        assert order[table[column]].tolist() == table["latent"].tolist() == list(range(30))


def test_latents_without_a_partner_are_not_counted(world: Any, beside: Measured) -> None:
    evaluator = beside(KnownPeer(world["z"][:, :12], world["W_dec"][:12]))
    numbers = evaluator.compute()
    assert numbers["decoder_cosine"] == pytest.approx(1, abs=1e-4)
    assert (numbers["latents"], numbers["decoder_pairs"], numbers["activation_pairs"]) == (
        30,
        12,
        12,
    )
    counts = {metric: of.count for metric, of in evaluator.support.items()}
    assert counts["decoder_cosine"] == counts["decoder_same_share"] == "decoder_pairs"
    elsewhere = beside(KnownPeer(world["z"], world["W_dec"], same_space=False)).compute()
    assert (elsewhere["decoder_pairs"], elsewhere["activation_pairs"]) == (0, 30)


def test_a_copy_falls_short_of_1_where_images_have_equal_latents(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """15 images of a class on the score half share the ranks 1 to 15: the mean rank is 8."""
    labels = np.repeat(np.arange(12), 30)
    z = np.eye(12, dtype=np.float32)[labels]
    (evaluator,) = measured(
        animals, one_batch(z, labels), [Stability], peers=[KnownPeer(z, torch.zeros(12, 5))]
    )
    numbers = evaluator.compute()
    assert numbers["relative_mrr"] == pytest.approx(1 / 8)
    assert numbers["relative_cosine"] == pytest.approx(1)


def test_independent_saes_are_at_the_null(world: Any, beside: Measured) -> None:
    rng = np.random.default_rng(2)
    z = np.abs(rng.normal(size=(600, 30))) * (rng.random((600, 30)) < 0.2)
    numbers = beside(KnownPeer(z, torch.from_numpy(rng.normal(size=(30, 16))))).compute()
    # Random rows in 16 dimensions: matched cosines are far from 0, which is why the null is needed.
    draws = [rng.normal(size=(2, 30, 16)) for _ in range(20)]
    null = []
    for rows in draws:
        a, b = rows / np.linalg.norm(rows, axis=2, keepdims=True)
        null.append((a @ b.T)[np.arange(30), match(a @ b.T)].mean())
    assert min(null) < numbers["decoder_cosine"] < max(null) and min(null) > 0.3
    assert abs(numbers["activation_correlation"]) < 0.05
    assert numbers["activation_same_share"] == 0 and numbers["one_to_many_r2"] < 0.05
    assert abs(numbers["relative_cosine"]) < 0.1
    chance = (1 / np.arange(1, 301)).mean()
    assert numbers["relative_mrr"] == pytest.approx(chance, abs=0.02)


def test_another_width_and_another_model(world: Any, beside: Measured) -> None:
    rng = np.random.default_rng(3)
    wide = np.concatenate([world["z"], np.zeros((600, 7), dtype=np.float32)], axis=1)
    peer = KnownPeer(wide, torch.from_numpy(rng.normal(size=(37, 40))), same_space=False)
    evaluator = beside(peer)
    numbers = evaluator.compute()
    assert math.isnan(numbers["decoder_cosine"]) and math.isnan(numbers["agreement"])
    for metric in ("activation_correlation", "relative_cosine", "relative_mrr"):
        assert numbers[metric] == pytest.approx(1, abs=0.01)
    assert any("no common space" in note for note in evaluator.notes())


def test_several_peers_are_averaged(world: Any, beside: Measured) -> None:
    same = KnownPeer(world["z"], world["W_dec"], name="same")
    mirrored = KnownPeer(world["z"], -world["W_dec"], name="mirrored")
    evaluator = beside(same, mirrored)
    single = [beside(peer).compute()["decoder_cosine"] for peer in (same, mirrored)]
    numbers = evaluator.compute()
    assert numbers["decoder_cosine"] == pytest.approx(np.mean(single)) and numbers["peers"] == 2
    peers = evaluator.tables()["peers"]
    assert peers["peer"].tolist() == ["same", "mirrored"]
    assert peers["decoder_cosine"].tolist() == pytest.approx(single)
    assert "same (seed), mirrored (seed)" in evaluator.notes()[0]
    assert evaluator.figures()["matches"].data


def test_only_the_most_firing_are_matched(world: Any, beside: Measured) -> None:
    evaluator = beside(KnownPeer(world["z"], world["W_dec"]), options={"max_latents": 10})
    fit = evaluator._sample.is_fit
    fired = (evaluator._sample.z.toarray()[fit] > 0).sum(0)
    table = evaluator.tables()["latents"]
    for metric in ("decoder_cosine", "activation_correlation", "one_to_one_r2", "one_to_many_r2"):
        assert table[metric].mean() == pytest.approx(evaluator.compute()[metric]), metric
    assert len(table) == 10 and evaluator.compute()["latents"] == 10
    assert fired[table["latent"]].min() >= np.sort(fired)[-10]
    assert evaluator.compute()["decoder_cosine"] == pytest.approx(1)


def test_a_sample_of_the_images_is_enough(world: Any, beside: Measured) -> None:
    evaluator = beside(KnownPeer(world["z"], world["W_dec"]), options={"max_images": 150})
    assert 100 < len(evaluator._sample.index) < 200
    assert evaluator.compute()["activation_correlation"] == pytest.approx(1)


def test_no_peer_is_said_and_not_a_crash(beside: Measured) -> None:
    evaluator = beside()
    numbers = evaluator.compute()
    assert numbers.pop("peers") == 0 and all(map(math.isnan, numbers.values()))
    assert "no other SAE to compare with" in evaluator.notes()[0]
    assert evaluator.tables() == evaluator.figures() == {}


@pytest.mark.parametrize(
    "case", ["dead here", "dead there", "no latents", "no decoder", "constant"]
)
def test_undefined_beside_a_peer(
    case: str, world: Any, beside: Measured, one_batch: Measured
) -> None:
    z, labels = world["z"], world["labels"]
    own = {"dead here": 0 * z, "no latents": z[:, :0], "constant": z * 0 + 1}.get(case, z)
    W_dec = None if case == "no decoder" else world["W_dec"][: own.shape[1]]
    peer = KnownPeer(0 * z if case == "dead there" else z, world["W_dec"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator = beside(peer, batch=one_batch(own, labels), W_dec=W_dec)
        numbers = evaluator.compute()
        evaluator.tables()
        assert evaluator.figures()["matches"].data
    assert math.isnan(numbers["decoder_cosine"]) == (case != "constant")
    assert math.isnan(numbers["activation_correlation"]) == (case != "no decoder")
    assert not any(map(math.isinf, numbers.values()))


def test_options_are_checked() -> None:
    for field in ("max_images", "max_latents", "regressors", "anchors"):
        with pytest.raises(
            ConfigError, match=f"{field}: out of range; given 0; allowed: 1 or more"
        ):
            Stability.Options(**{field: 0})
    with pytest.raises(ConfigError, match="same: out of range; given 0; allowed: a number in"):
        Stability.Options(same=0)
