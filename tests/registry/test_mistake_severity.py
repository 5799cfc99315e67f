"""`mistake_severity` against sums over single images, on random trees; what no tree explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.mistake_severity import (
    Counts,
    MistakeSeverity,
    common_ancestors,
    heights,
    mean_height,
    read_predictions,
)
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


def ancestors(taxonomy: Taxonomy, c: int) -> set[int]:
    """The nodes at or above a class, without the root, by climbing."""
    found, waiting = set(), [int(taxonomy.class_nodes[c])]
    while waiting:
        v = waiting.pop()
        found.add(v)
        waiting += taxonomy.parents[v]
    return found - {taxonomy.root}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_measures_of_a_confusion_matrix_against_single_images(
    seed: int, random_dag: Measured
) -> None:
    taxonomy = random_dag(seed).taxonomy()
    n = len(taxonomy.classes)
    assume(n > 2)
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, n, (2, 40))
    confusion = np.zeros((n, n), dtype=np.int32)
    np.add.at(confusion, (truth, guess), 1)
    permutation = rng.permutation(n)
    counts = Counts.of(confusion).at(permutation)
    found = read_predictions(counts, heights(taxonomy), common_ancestors(taxonomy))
    truth, guess = permutation[truth], permutation[guess]

    distance = [
        0 if t == g else int(taxonomy.height[taxonomy.lch([t, g])]) for t, g in zip(truth, guess)
    ]
    wrong = truth != guess
    assert found["n_errors"] == wrong.sum()
    assert found["distance_1"] == pytest.approx(np.mean(distance))
    severity = np.mean(np.array(distance)[wrong]) if wrong.any() else np.nan
    assert found["mistake_severity"] == pytest.approx(severity, nan_ok=True)

    above = [ancestors(taxonomy, c) for c in range(n)]
    shared = sum(len(above[t] & above[g]) for t, g in zip(truth, guess))
    predicted, true = (sum(len(above[c]) for c in classes) for classes in (guess, truth))
    precision = shared / predicted if predicted else np.nan
    recall = shared / true if true else np.nan
    assert found["hierarchical_precision"] == pytest.approx(precision, nan_ok=True)
    assert found["hierarchical_recall"] == pytest.approx(recall, nan_ok=True)
    if predicted and true and shared:
        f1 = 2 * precision * recall / (precision + recall)
        assert found["hierarchical_f1"] == pytest.approx(f1)


def embedded(taxonomy: Taxonomy, labels: np.ndarray, noise: float) -> torch.Tensor:
    """x as the sum of a random direction for each node at or above the class, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(taxonomy.nodes), 64, generator=generator)
    members = torch.from_numpy(taxonomy.membership[labels].astype(np.float32))
    return members @ directions + noise * torch.randn(len(labels), 64, generator=generator)


def test_errors_in_a_hierarchical_embedding_are_mild(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 60)
    x = embedded(animals, labels, noise=6)
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [MistakeSeverity])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(8)]
    shuffled = evaluator.compute(shuffled=True)
    for probe in ("probe", "knn"):
        name = f"x_{probe}_mistake_severity"
        assert value[name] < min(p[name] for p in permuted) - 0.1
        assert value[name] < shuffled[name] - 0.1
        assert value[f"n_x_{probe}_errors"] > 50
        assert {p[f"n_x_{probe}_errors"] for p in permuted} == {value[f"n_x_{probe}_errors"]}
        name = f"x_{probe}_hierarchical_f1"
        assert value[name] > max(p[name] for p in permuted)
    assert value["x_probe_distance_5"] < min(p["x_probe_distance_5"] for p in permuted)
    assert np.isnan(value["x_probe_distance_20"])  # of 12 classes


def test_distances_of_the_five_most_probable_classes(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """The linear probe of each image by itself."""
    labels = np.repeat(np.arange(12), 20)
    x = embedded(animals, labels, noise=4)
    batch = one_batch(x.relu(), labels, x=x)
    (evaluator,) = measured(animals, batch, [MistakeSeverity])
    probe = evaluator._probes.features["x"].ridge
    held_out = batch.x[~batch.is_fit]
    found = []
    for row, truth in zip(held_out, batch.labels[~batch.is_fit].tolist()):
        (scores,) = probe.scores(row[None])[:1]
        best = scores[0].argsort(descending=True)[:5].tolist()
        found += [0 if c == truth else animals.height[animals.lch([truth, c])] for c in best]
    assert evaluator.compute()["x_probe_distance_5"] == pytest.approx(np.mean(found))


@pytest.mark.parametrize("flat", [False, True], ids=["noise", "flat classes"])
def test_without_a_hierarchy_it_stays_inside_its_null(
    animals: Taxonomy, one_batch: Measured, measured: Measured, flat: bool
) -> None:
    labels = np.repeat(np.arange(12), 40)
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(len(labels), 24, generator=generator)
    if flat:
        x += torch.randn(12, 24, generator=generator)[torch.from_numpy(labels)]
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [MistakeSeverity])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(40)]
    for name in ("x_probe_mistake_severity", "z_probe_mistake_severity", "x_probe_distance_5"):
        draws = [p[name] for p in permuted]
        assert np.quantile(draws, 0.02) - 1e-9 <= value[name] <= np.quantile(draws, 0.98) + 1e-9


def test_without_an_error_severity_is_undefined(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 10)
    z = np.eye(12, dtype=np.float32)[labels]
    (evaluator,) = measured(animals, one_batch(z, labels, x=z), [MistakeSeverity])
    numbers = evaluator.compute()
    assert np.isnan(numbers["x_probe_mistake_severity"]) and numbers["n_x_probe_errors"] == 0
    assert numbers["n_images"] == 60
    assert numbers["x_probe_distance_1"] == 0 and numbers["x_probe_hierarchical_f1"] == 1
    assert "errors" not in evaluator.tables()


def test_fewer_classes_with_images_than_the_top_k(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """A class without images is none of the five most probable ones."""
    labels = np.repeat(np.arange(4), 20)
    x = embedded(animals, labels, noise=2)
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [MistakeSeverity])
    near = evaluator._probes.features["x"].near[5][0]
    assert near[:, 4:].sum() == 0 and near.sum() == 40 * 4
    numbers = evaluator.compute()
    assert np.isnan(numbers["x_probe_distance_5"]) and np.isfinite(numbers["x_probe_distance_1"])


def test_mean_height_of_no_image_is_undefined() -> None:
    assert np.isnan(mean_height(Counts.of(np.zeros((2, 2))), np.ones((2, 2))))


def test_the_table_of_errors_sums_to_one(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 30)
    x = embedded(animals, labels, noise=6)
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [MistakeSeverity])
    table = evaluator.tables()["errors"]
    assert table["share"].sum() == pytest.approx(1) and table["permuted"].sum() == pytest.approx(1)
    severity = (table["height"] * table["share"]).sum()
    assert severity == pytest.approx(evaluator.compute()["x_probe_mistake_severity"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0}, "ridge: out of range; given 0; allowed: above 0"),
        ({"neighbours": 0}, "neighbours: out of range; given 0; allowed: 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MistakeSeverity.Options(**options)
