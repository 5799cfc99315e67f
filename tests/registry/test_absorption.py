"""`absorption` against the definition image by image, and on dictionaries that absorb by design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.absorption import (
    Absorption,
    absorbed,
    active_part,
    main_latents,
    order_latents,
)
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
FAMILIES, SPECIES = 5, 4
TREE = Taxonomy.from_edges(
    [("root", f"f{f}") for f in range(FAMILIES)]
    + [(f"f{f}", f"f{f}s{s}") for f in range(FAMILIES) for s in range(SPECIES)]
)


@given(seed=st.integers(0, 10**6), n_latents=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_equals_the_definition_image_by_image(seed: int, n_latents: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.random((9, n_latents)) * (rng.random((9, n_latents)) < 0.5)
    cosine = rng.normal(size=n_latents)
    gain = cosine * (rng.random(n_latents) + 0.5)
    main = rng.random(n_latents) < 0.3
    target = rng.random(9) + 0.1
    found = absorbed(z, gain, cosine, main, target)
    for i in range(9):
        projection = [z[i, j] * gain[j] for j in range(n_latents)]
        top = max(range(n_latents), key=lambda j: projection[j])
        silent = all(z[i, j] == 0 for j in range(n_latents) if main[j])
        full = silent and cosine[top] >= 0.025 and projection[top] / target[i] >= 0.4
        assert found.full[i] == full
        others = [p for j, p in enumerate(projection) if not main[j] and cosine[j] >= 0.1]
        a = sum(sorted(others)[-3:])
        m = sum(p for j, p in enumerate(projection) if main[j])
        if m >= target[i] or a / target[i] < 0.4:
            fraction = 0.0
        elif m <= 0:
            fraction = 1.0
        else:
            fraction = min(a, target[i] - m) / (min(a, target[i] - m) + m)
        assert found.fraction[i] == pytest.approx(fraction)


def test_bounds_that_are_met_exactly_count() -> None:
    """One latent that is no main one: cos .025 and .4 of P; and cos .1 for the fraction."""
    z, target, main = np.ones((1, 1)), np.array([1.0]), np.zeros(1, dtype=bool)
    for gain, cosine, full, fraction in (
        (0.4, 0.025, True, 0),
        (0.4, 0.024, False, 0),
        (0.39, 0.1, False, 0),
        (0.4, 0.1, True, 1),
        (0.4, 0.099, True, 0),
    ):
        found = absorbed(z, np.array([gain]), np.array([cosine]), main, target)
        assert (bool(found.full[0]), found.fraction[0]) == (full, fraction), (gain, cosine)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_latents_in_order_of_their_standardised_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.random((30, 5)) * (rng.random((30, 5)) < 0.5)).astype(np.float32)
    z[:, 2] = 0
    truth = rng.random((30, 2)) < 0.5
    truth[0], truth[1] = True, False
    for order, inside in zip(order_latents(sparse.csr_array(z), truth), truth.T):
        gap = z[inside].mean(0) - z[~inside].mean(0)
        score = [gap[j] / z[:, j].std() if z[:, j].any() else -np.inf for j in range(5)]
        assert order.tolist() == np.argsort(-np.array(score), kind="stable").tolist()


def test_latents_that_do_not_vary_come_last_and_divide_by_nothing() -> None:
    """Of 40 equal values, mean² can exceed the mean of squares by rounding."""
    rng = np.random.default_rng(0)
    truth = np.arange(40)[:, None] % 2 == 0
    z = np.tile(rng.random(30), (40, 1)).astype(np.float32)
    z[:, 7] = truth[:, 0]
    with np.errstate(all="raise"):
        order = order_latents(sparse.csr_array(z), truth)[0]
        found = absorbed(z, np.ones(30), np.ones(30), np.arange(30) == 7, np.ones(40))
    assert order[0] == 7
    assert found.fraction[truth[:, 0]].tolist() == [0.0] * 20  # P is all by the main latent
    assert found.fraction[~truth[:, 0]].tolist() == [1.0] * 20


def test_equal_latents_are_all_taken_where_no_rise_is_asked_for() -> None:
    """Eight latents, and fewer images than that."""
    truth = np.array([[True], [False], [True], [False], [True], [False]])
    z = sparse.csr_array(np.tile(truth, 8).astype(np.float32))
    for most, taken in ((10, 8), (3, 3)):
        mains, f1 = main_latents(z, z, truth, truth, rise=0.0, most=most)
        assert mains[0].tolist() == list(range(taken)) and f1.tolist() == [1.0]


def test_the_part_of_z_that_is_active() -> None:
    z = np.array([[0, 2, 0, 0], [0, 0, 0, 3]])
    columns, dense = active_part(sparse.csr_array(z), np.array([2, 3]))
    assert columns.tolist() == [1, 2, 3] and dense.tolist() == z[:, 1:].tolist()


def world(absorb: bool, one_batch: Measured) -> tuple[Any, torch.Tensor]:
    """x = family + kind of species; latents are these parts, or species 0 replaces its family."""
    labels = np.repeat(np.arange(len(TREE.classes)), 40)
    names = [TREE.classes[c] for c in labels]
    family = np.array([int(n[1]) for n in names])
    species = np.array([int(n[3]) for n in names])
    parts = np.eye(FAMILIES + SPECIES, dtype=np.float32)
    x = parts[family] + parts[FAMILIES + species]
    x += 0.02 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    leaf = FAMILIES + family * SPECIES + species
    z = np.zeros((len(labels), FAMILIES + FAMILIES * SPECIES), dtype=np.float32)
    z[np.arange(len(labels)), leaf] = 1.0
    fires = (species > 0) if absorb else np.ones(len(labels), dtype=bool)
    z[np.arange(len(labels))[fires], family[fires]] = 1.0
    decoder = np.concatenate([parts[:FAMILIES], *[parts[FAMILIES:]] * FAMILIES])
    if absorb:
        for f in range(FAMILIES):
            decoder[FAMILIES + f * SPECIES] += parts[f]
    return one_batch(z, labels, x=x), torch.from_numpy(decoder)


def test_a_dictionary_of_the_true_parts_absorbs_nothing(
    one_batch: Measured, measured: Measured
) -> None:
    batch, decoder = world(False, one_batch)
    (evaluator,) = measured(TREE, batch, [Absorption], W_dec=decoder, size=100)
    numbers = evaluator.compute()
    assert set(numbers) == set(Absorption.higher_is_better)
    assert numbers["nodes"] == numbers["nodes_tried"] == FAMILIES
    assert numbers["full_absorption"] == 0.0
    assert numbers["fraction_absorption"] < 0.01
    assert numbers["probe_f1"] > 0.95 and numbers["main_f1"] == 1.0
    assert numbers["main_latents"] == 1.0
    assert numbers["reconstructed_share"] == pytest.approx(1, abs=0.1)


def test_a_species_that_fires_in_place_of_its_family_is_found(
    one_batch: Measured, measured: Measured
) -> None:
    batch, decoder = world(True, one_batch)
    options = {"main_rise": 0.5}  # else the absorbing latent itself becomes a main one
    (evaluator,) = measured(TREE, batch, [Absorption], W_dec=decoder, options=options)
    numbers = evaluator.compute()
    assert numbers["full_absorption"] == pytest.approx(1 / SPECIES, abs=0.05)
    assert numbers["fraction_absorption"] == pytest.approx(1 / SPECIES, abs=0.08)
    table = evaluator.tables()["nodes"]
    absorbers = {int(name[1]): int(a) for name, a in zip(table["name"], table["absorber"])}
    assert absorbers == {f: FAMILIES + f * SPECIES for f in range(FAMILIES)}
    assert len(evaluator.figures()["fraction"].data) == 2
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["nodes"] == 0 and np.isnan(shuffled["full_absorption"])


def test_a_dead_dictionary_scores_zero_and_shows_why(
    one_batch: Measured, measured: Measured
) -> None:
    batch, decoder = world(False, one_batch)
    dead = replace(batch, z=torch.zeros_like(batch.z))
    (evaluator,) = measured(TREE, dead, [Absorption], W_dec=decoder)
    numbers = evaluator.compute()
    assert numbers["full_absorption"] == numbers["fraction_absorption"] == 0.0
    assert numbers["reconstructed_share"] == 0.0


def test_without_the_offset_of_the_decoder_nothing_projects(
    one_batch: Measured, measured: Measured
) -> None:
    """Shifted activations and an equal b_dec give what unshifted ones give."""
    batch, decoder = world(True, one_batch)
    (plain,) = measured(TREE, batch, [Absorption], W_dec=decoder)
    far = replace(batch, x=batch.x - 3.0)
    offset = torch.full((batch.x.shape[1],), -3.0)
    (shifted,) = measured(TREE, far, [Absorption], W_dec=decoder, b_dec=offset)
    assert shifted.compute() == pytest.approx(plain.compute(), abs=1e-3)


def test_without_a_decoder_only_the_probes_have_values(
    one_batch: Measured, measured: Measured
) -> None:
    batch, _ = world(False, one_batch)
    (evaluator,) = measured(TREE, batch, [Absorption])
    numbers = evaluator.compute()
    assert numbers["nodes"] == FAMILIES and np.isnan(numbers["full_absorption"])


def test_main_latents_are_added_while_they_help() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400)[:, None] % 4 == 0
    z = rng.random((400, 6)) * (rng.random((400, 6)) < 0.2)
    first = np.arange(400) % 16 < 8  # two latents that together hold the truth
    z[:, 3], z[:, 5] = 2 * (truth[:, 0] & first), truth[:, 0] & ~first
    z = sparse.csr_array(z.astype(np.float32))
    mains, f1 = main_latents(z[:300], z[300:], truth[:300], truth[300:])
    assert set(mains[0]) == {3, 5} and f1[0] == 1.0
    mains, _ = main_latents(z[:300], z[300:], truth[:300], truth[300:], rise=0.9)
    assert len(mains[0]) == 1


def test_without_a_positive_to_choose_by_there_is_no_main_latent() -> None:
    z = sparse.csr_array(np.eye(4, dtype=np.float32))
    truth = np.array([[True], [False], [True], [False]])
    mains, f1 = main_latents(z, z, truth, np.zeros_like(truth))
    assert len(mains[0]) == 0 and f1.tolist() == [0]
    columns, _ = active_part(z[:2], mains[0])
    assert columns.tolist() == [0, 1] and columns.dtype.kind == "i"


def test_options_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r"probe_f1: out of range; given 1; allowed: a number in \[0, 1\)"
    ):
        Absorption.Options(probe_f1=1)
    with pytest.raises(ConfigError, match="max_main: out of range; given 0; allowed: 1 or more"):
        Absorption.Options(max_main=0)
