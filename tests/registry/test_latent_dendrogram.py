"""`latent_dendrogram` against loops over pairs of latents; planted trees, and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.latent_dendrogram import (
    LatentDendrogram,
    grow,
    node_groups,
    purity,
)
from taxolens.registry.evaluators.parts.latent_nodes import shared_depth
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
seeds = given(seed=st.integers(0, 10**6))


def average_linkage(similarity: np.ndarray) -> list[tuple[float, frozenset[int]]]:
    """Height and latents of each merge, by the definition."""
    clusters = [frozenset([i]) for i in range(len(similarity))]
    merges = []
    while len(clusters) > 1:
        pairs = [
            (np.mean([1 - similarity[i, j] for i in a for j in b]), a, b)
            for n, a in enumerate(clusters)
            for b in clusters[:n]
        ]
        height, a, b = min(pairs, key=lambda pair: pair[0])
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
        merges.append((height, a | b))
    return merges


def random_similarity(seed: int, size: int = 8) -> np.ndarray:
    unit = np.random.default_rng(seed).normal(size=(size, 5))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


@seeds
@settings(max_examples=20, deadline=None)
def test_the_dendrogram_and_its_purity_against_loops(seed: int) -> None:
    similarity = random_similarity(seed)
    found, merges = grow(similarity), average_linkage(similarity)
    assert found.leaves.shape == (7, 8)
    rng = np.random.default_rng(seed)
    groups, counted = rng.integers(-1, 3, (2, 8)), rng.random(28) < 0.7
    shares = []
    for n, (i, j) in enumerate(zip(*np.triu_indices(8, 1))):
        stage = next(s for s, (_, below) in enumerate(merges) if {i, j} <= below)
        height, below = merges[stage]
        assert found.stage[n] == stage
        assert found.height[n] == pytest.approx(height, abs=1e-5)
        assert set(np.flatnonzero(found.leaves[stage])) == below
        for group in groups:
            if counted[n] and group[i] == group[j] >= 0:
                shares.append(np.mean([group[k] == group[i] for k in below]))
    expected = np.mean(shares) if shares else np.nan
    assert purity(found, groups, counted) == pytest.approx(expected, nan_ok=True)


@seeds
@settings(max_examples=20, deadline=None)
def test_places_of_nodes_in_the_primary_tree(seed: int, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    nodes = np.random.default_rng(seed).integers(0, len(taxonomy.nodes), 6)
    shared, groups = shared_depth(taxonomy, nodes), node_groups(taxonomy, nodes)
    assert groups.shape == (taxonomy.max_depth, 6)
    for i, v in enumerate(nodes):
        for j, w in enumerate(nodes):
            common = set(taxonomy.path_to_root(v)) & set(taxonomy.path_to_root(w))
            assert shared[i, j] == max(taxonomy.depth[u] for u in common)
        for t in range(1, taxonomy.max_depth + 1):
            at = [u for u in taxonomy.path_to_root(v) if taxonomy.depth[u] == t]
            assert groups[t - 1, i] == (at[0] if at else -1)


def planted(
    taxonomy: Taxonomy, one_batch: Measured, seed: int = 0, **kwargs: Any
) -> tuple[Any, torch.Tensor]:
    """A batch of 40 images a class, and a decoder: each row the sum of its node's ancestors."""
    labels = np.repeat(np.arange(len(taxonomy.classes)), 40)
    latents = PlantedLatents(
        taxonomy, **{"recall": 0.9, "false_alarm": 0.01, "seed": seed, **kwargs}
    )
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(taxonomy.nodes), 200, generator=generator)
    above = torch.zeros(len(latents.node), len(taxonomy.nodes))
    for row, v in zip(above, latents.node):
        row[list(taxonomy.path_to_root(v))] = 1
    return one_batch(z, labels), above @ directions


@seeds
@settings(max_examples=10, deadline=None)
def test_against_loops_over_pairs_of_latents(
    seed: int, random_dag: Measured, one_batch: Measured, measured: Measured
) -> None:
    taxonomy = random_dag(seed).taxonomy()
    assume(len(taxonomy.distinct_nodes) > 4)
    batch, decoder = planted(taxonomy, one_batch, seed)
    options = {"max_images": 10**6}
    (evaluator,) = measured(taxonomy, batch, [LatentDendrogram], W_dec=decoder, options=options)
    permutation = np.random.default_rng(seed).permutation(len(taxonomy.classes))
    fired = (batch.z > 0).numpy()
    fit = batch.is_fit.numpy()
    for place in (None, permutation):
        numbers = evaluator.compute(permutation=place)
        labels = batch.labels.numpy() if place is None else place[batch.labels.numpy()]
        latents = evaluator.latents
        nodes = []
        for j in latents:
            scores = {
                int(v): 2
                * (fired[fit, j] & taxonomy.membership[labels[fit], v]).sum()
                / (fired[fit, j].sum() + taxonomy.membership[labels[fit], v].sum())
                for v in taxonomy.distinct_nodes
                if v != taxonomy.root
            }
            nodes.append(max(scores, key=lambda v: (round(scores[v], 9), -v)))
        assert evaluator.nodes(place).tolist() == nodes
        correlation = np.corrcoef(fired[~fit][:, latents].T)
        rows = torch.nn.functional.normalize(decoder[latents], dim=1)
        for name, similarity in (("firing", correlation), ("decoder", (rows @ rows.T).numpy())):
            found = grow(similarity)
            tree, order, height = [], [], []
            for n, (i, j) in enumerate(zip(*np.triu_indices(len(nodes), 1))):
                paths = [set(taxonomy.path_to_root(nodes[k])) for k in (i, j)]
                if nodes[i] != nodes[j]:
                    tree.append(len(paths[0] ^ paths[1]))
                    order.append(-len(paths[0] & paths[1]))
                    height.append(found.height[n])
            assert numbers["n_pairs"] == len(tree)
            if len(set(tree)) > 1 and len(set(order)) > 1:
                expected = pearsonr(tree, height).statistic
                assert numbers[f"{name}_cophenetic"] == pytest.approx(expected, abs=1e-4)
                expected = spearmanr(order, height).statistic
                assert numbers[f"{name}_gamma"] == pytest.approx(expected, abs=1e-4)
        assert numbers["n_latents"] == len(latents)
        assert numbers["n_nodes"] == len(set(nodes))


@pytest.mark.parametrize("similarity", ["decoder", "firing"])
def test_planted_nodes_agree_with_the_tree(
    animals: Taxonomy, one_batch: Measured, measured: Measured, similarity: str
) -> None:
    batch, decoder = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    (evaluator,) = measured(animals, batch, [LatentDendrogram], W_dec=decoder)
    numbers = evaluator.compute()
    assert numbers["n_latents"] == numbers["n_nodes"] == 20  # without the root, always on
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(20)]
    for measure, least in (("cophenetic", 0.65), ("gamma", 0.75), ("purity", 0.85)):
        name = f"{similarity}_{measure}"
        assert numbers[name] > least, name
        assert numbers[name] > max(p[name] for p in permuted) + 0.1, name
    assert numbers[f"{similarity}_gamma"] > evaluator.compute(shuffled=True)[f"{similarity}_gamma"]
    table = evaluator.tables()["latents"]
    assert sorted(table[f"{similarity}_place"]) == list(range(20))
    # In the order of the dendrogram the latents of a family are together.
    family = table.sort_values(f"{similarity}_place")["name"].str.startswith("bird")
    assert (np.diff(family.astype(int)) != 0).sum() == 1


@pytest.mark.parametrize("world", ["noise", "flat classes"])
def test_without_a_hierarchy_it_stays_inside_its_null(
    animals: Taxonomy, one_batch: Measured, measured: Measured, world: str
) -> None:
    labels = np.repeat(np.arange(12), 40)
    generator = np.random.default_rng(5)
    z = generator.random((len(labels), 40)) < 0.1
    if world == "flat classes":
        known = np.array([np.isin(np.arange(12), generator.permutation(12)[:2]) for _ in range(40)])
        z |= known.T[labels] & (generator.random(z.shape) < 0.7)
    decoder = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    (evaluator,) = measured(
        animals, one_batch(z.astype(np.float32), labels), [LatentDendrogram], W_dec=decoder
    )
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(60)]
    for name, better in evaluator.higher_is_better.items():
        if better:
            draws = [p[name] for p in permuted]
            assert value[name] <= np.quantile(draws, 0.98), name


def test_without_a_decoder_and_with_equal_rows_its_numbers_are_undefined(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, _ = planted(animals, one_batch)
    orthogonal = torch.linalg.qr(torch.randn(21, 21))[0]
    for decoder in (None, orthogonal):
        (evaluator,) = measured(animals, batch, [LatentDendrogram], W_dec=decoder)
        numbers = evaluator.compute()
        assert np.isnan(numbers["decoder_cophenetic"]) and np.isnan(numbers["decoder_gamma"])
        assert np.isfinite(numbers["firing_cophenetic"])


def test_merges_of_equal_height_are_one() -> None:
    """Whatever order they come in: three latents at one distance, and a fourth farther away."""
    similarity = np.eye(4) + 0.5 * (1 - np.eye(4))
    similarity[3, :3] = similarity[:3, 3] = 0.1
    for order in ([0, 1, 2, 3], [2, 0, 1, 3]):
        found = grow(similarity[np.ix_(order, order)])
        group = np.array([[0, 0, 1, 1]])[:, order]
        first = [found.stage[n] for n in (0, 1, 3)]  # pairs of the first three
        assert len(set(first)) == 1
        assert purity(found, group, np.ones(6, dtype=bool)) == pytest.approx((2 / 3 + 1 / 2) / 2)
    equal = grow(np.eye(5))
    assert set(equal.stage) == {3} and set(equal.height) == {1.0}
    assert set(grow(np.full((3, 3), 1 + 2e-6)).height) == {0.0}  # a cosine is at most 1


def test_the_most_frequent_latents_are_compared(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, _ = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    (evaluator,) = measured(animals, batch, [LatentDendrogram], options={"max_latents": 8})
    fired = (batch.z[batch.is_fit] > 0).sum(0).numpy()
    assert set(fired[evaluator.latents]) == {120, 40}  # families and genera; the root always fires
    (evaluator,) = measured(animals, batch, [LatentDendrogram], options={"min_fired": 121})
    assert evaluator.compute()["n_latents"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_latents": 2}, "max_latents: out of range; given 2; allowed: 3 or more"),
        ({"min_fired": 0}, "min_fired: out of range; given 0; allowed: 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentDendrogram.Options(**options)
