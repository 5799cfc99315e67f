"""`infomec` against tables of counts, and on latents informative about one depth each."""

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
from taxolens.registry.evaluators.infomec import (
    InfoMEC,
    Information,
    class_log_odds,
    compactness,
    explained,
    factor_depths,
    modularity,
    mutual_information,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


def test_latents_without_information_and_factors_without_a_value_count_for_nothing() -> None:
    information = np.array([[3.0, 1.0, 0.5], [0.0, 2.0, 0.1]])
    wider = np.insert(information, 1, 0.0, axis=1)
    wider = np.insert(wider, 1, [np.nan, 1.0, 2.0, 9.0], axis=0)
    for share in (modularity, compactness):
        assert share(wider) == pytest.approx(share(information))
    assert np.isnan(compactness(information * [0, 1, 0]))  # one active latent


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.2, 1.0]))
@settings(max_examples=30, deadline=None)
def test_information_is_that_of_the_table_of_counts(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    n, n_classes, m, n_levels = 60, 5, 3, 2
    labels = rng.integers(0, n_classes, n)
    group = rng.integers(0, 3, n_classes)
    level = rng.integers(0, n_levels + 1, (n, m)) * (rng.random((n, m)) < density)
    counts = np.zeros((m, n_levels, n_classes))
    for i in range(n):
        for j in range(m):
            if level[i, j]:
                counts[j, level[i, j] - 1, labels[i]] += 1
    found, found_entropy = mutual_information(
        sparse.csr_array(counts.reshape(-1, n_classes)),
        n_levels,
        np.bincount(labels, minlength=n_classes),
        np.unique(group, return_inverse=True)[1],
    )
    s = group[labels]
    p_s = np.array([(s == g).mean() for g in set(s)])
    entropy = -(p_s * np.log(p_s)).sum()
    for j in range(m):
        wanted = 0.0
        for g in set(s):
            for v in set(level[:, j]):
                p = ((s == g) & (level[:, j] == v)).mean()
                if p:
                    wanted += p * np.log(p / (s == g).mean() / (level[:, j] == v).mean())
        assert found[j] == pytest.approx(wanted, abs=1e-6)
    assert found_entropy == pytest.approx(entropy, abs=1e-9)


def test_one_latent_for_each_factor_is_the_ideal() -> None:
    assert modularity(np.eye(3)) == compactness(np.eye(3)) == 1.0
    assert modularity(np.ones((3, 4))) == pytest.approx(0)
    assert compactness(np.ones((3, 4))) == pytest.approx(0)
    two_for_each = np.repeat(np.eye(3), 2, axis=1)
    assert modularity(two_for_each) == 1.0
    assert compactness(two_for_each) == pytest.approx((1 / 2 - 1 / 6) / (1 - 1 / 6))
    with_dead = np.concatenate([np.eye(3), np.zeros((3, 5))], axis=1)
    assert modularity(with_dead) == compactness(with_dead) == 1.0
    unknown = np.array([[0.4, 0.0], [0.0, 0.0], [0.0, 0.2]])  # nothing tells the second factor
    assert modularity(unknown) == compactness(unknown) == 1.0
    undefined = np.array([[0.4, 0.0], [np.nan, np.nan], [0.0, 0.2]])
    assert modularity(undefined) == compactness(undefined) == 1.0
    assert np.isnan(modularity(np.ones((1, 4)))) and np.isnan(compactness(np.zeros((2, 4))))


def test_a_cut_is_credited_with_what_it_adds() -> None:
    """A latent of the coarse factor is as informative about the fine one, and adds nothing."""
    nested, added = Information.of(np.array([[0.7, 0.0], [0.7, 0.4]]), np.array([0.7, 1.1]))
    np.testing.assert_allclose(nested, [[1, 0], [0.7 / 1.1, 0.4 / 1.1]])
    np.testing.assert_allclose(added, [[1, 0], [0, 1]])
    one_group = Information.of(np.zeros((2, 1)), np.array([0.0, 0.5]))
    assert np.isnan(one_group.added[0, 0]) and one_group.added[1, 0] == 0


def test_rounding_of_an_entropy_is_no_growth() -> None:
    mutual = np.array([[0.5, 0.0], [0.5 + 1e-12, 0.0]])
    found = Information.of(mutual, np.array([0.7, 0.7 + 1e-12]))
    assert np.isnan(found.added[1]).all() and found.nested[1, 0] == pytest.approx(0.5 / 0.7)
    # And what grows is information of rounding alone: none.
    found = Information.of(mutual, np.array([0.7, 0.9]))
    assert found.added[1].tolist() == [0, 0]
    assert Information.of(-mutual, np.array([0.7, 0.9])).added.tolist() == [[0, 0], [0, 0]]


def test_information_without_classes_or_images() -> None:
    none = sparse.csr_array((4, 3), dtype=np.float32)
    mutual, entropy = mutual_information(none, 2, np.zeros(3), np.array([0, 1, 2]))
    assert mutual.tolist() == [0, 0] and entropy == 0
    mutual, entropy = mutual_information(none, 2, np.full(3, 5), np.zeros(3, dtype=int))
    assert mutual.tolist() == [0, 0] and entropy == 0


def test_the_factors_are_the_cuts_that_differ(animals: Taxonomy) -> None:
    assert factor_depths(animals) == [1, 2, 3]
    chain = Taxonomy.from_edges([("r", "a"), ("r", "b"), ("b", "c"), ("c", "d"), ("c", "e")])
    assert factor_depths(chain) == [1, 3]
    assert factor_depths(animals, np.arange(12) < 6) == [2, 3]
    assert factor_depths(animals, np.arange(12) % 6 == 0) == [1]


def planted(animals: Taxonomy, one_batch: Measured) -> Any:
    labels = np.repeat(np.arange(12), 40)
    latents = PlantedLatents(animals, recall=1.0, false_alarm=0.0, binary=True)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    return one_batch(z, labels)


def test_node_indicators_explain_every_depth(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    (evaluator,) = measured(animals, planted(animals, one_batch), [InfoMEC], size=100)
    numbers = evaluator.compute()
    assert set(numbers) == set(InfoMEC.higher_is_better)
    assert numbers["infoe"] > 0.9 and numbers["factors"] == 3
    assert numbers["active"] == 20  # all but the root, which fires on every image
    assert numbers["infom"] > 0.3
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["infom"] for n in permuted) < numbers["infom"]
    # Why the published form has no direction on nested factors:
    assert max(n["nested_infom"] for n in permuted) > numbers["nested_infom"]
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["infoe"] == pytest.approx(0, abs=0.1)
    assert evaluator.information(shuffled=True).nested.max() < 0.2
    # Families are informative about one depth; a genus about the family too, and so on down.
    share = evaluator.tables()["latents"]["share"].to_numpy()
    np.testing.assert_allclose(share[:2], 1)
    assert (np.diff(share[[0, 2, 8]]) < 0).all()
    table = evaluator.tables()["factors"]
    assert table["groups"].tolist() == [2, 6, 12]
    family = table["best_latent"][0]
    assert table["best_information"][0] == pytest.approx(1, abs=1e-6)
    assert evaluator.tables()["latents"].set_index("latent")["depth"][family] == 1
    assert len(evaluator.figures()["explicitness"].data) == 2


def test_levels_of_activation_count_beside_firing(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """One latent that fires everywhere, twice as strongly on one family: all of it in the level."""
    labels = np.repeat(np.arange(12), 20)
    z = (1.0 + (labels < 6)[:, None]).astype(np.float32)
    z += 0.01 * np.random.default_rng(0).random(z.shape).astype(np.float32)
    (evaluator,) = measured(animals, one_batch(z, labels), [InfoMEC])
    assert evaluator.information().nested[0, 0] > 0.9
    (blind,) = measured(animals, one_batch(z, labels), [InfoMEC], options={"levels": (1.0,)})
    assert blind.information().nested[0, 0] == 0.0


def test_probabilities_of_groups_are_sums_over_classes() -> None:
    odds = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    group = np.array([0, 0, 1])
    cross_entropy = -(np.log(0.75) + np.log(0.7)) / 2
    wanted = (np.log(2) - cross_entropy) / np.log(2)
    assert explained(odds, np.array([1, 2]), group) == pytest.approx(wanted)
    assert np.isnan(explained(odds, np.array([0, 1]), group))


def test_the_regression_learns_and_does_not_overfit() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    z = torch.nn.functional.one_hot(labels, 4) + 0.3 * torch.rand(400, 4, generator=generator)
    odds = class_log_odds(z[:300], labels[:300], z[300:], 4)
    torch.testing.assert_close(odds.exp().sum(1), torch.ones(100))
    assert (odds.argmax(1) == labels[300:]).all()
    noise = torch.rand(400, 200, generator=generator)
    odds = class_log_odds(noise[:300], labels[:300], noise[300:], 4)
    loss = torch.nn.functional.nll_loss(odds, labels[300:])
    assert loss < 1.45  # log 4 = 1.386


@pytest.mark.parametrize("levels", [(), (0.5,), (1.0, 0.3), (1.0, 0.5, 0.75)])
def test_levels_must_be_of_the_grid(levels: tuple[float, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"levels: not possible; given .*numbers that fall from 1\.0"
    ):
        InfoMEC.Options(levels=levels)
