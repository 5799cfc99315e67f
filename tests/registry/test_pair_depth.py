"""`pair_depth` against loops over pairs, and on detectors of nodes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.pair_depth import PairDepth
from taxolens.registry.evaluators.parts.planted import PlantedLatents

few = settings(max_examples=10, deadline=None)


@few
@given(seed=st.integers(0, 10**6), k=st.integers(2, 6))
def test_against_loops(random_dag, one_batch, measured, seed, k):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    meet = functools.cache(lambda a, b: taxonomy.depth[taxonomy.lch([a, b])])
    labels = rng.integers(0, n_classes, 40)
    z = rng.random((40, 6)).astype(np.float32) * (rng.random((40, 6)) < rng.random(6) ** 2)
    batch = one_batch(z.astype(np.float32), labels)
    (evaluator,) = measured(taxonomy, batch, [PairDepth], options={"k": k})
    for shuffled in (False, True):
        for place in (np.arange(n_classes), rng.permutation(n_classes)):
            depth, same = evaluator.depth(place, shuffled), evaluator.pairs(shuffled).same_class
            for j, latent in enumerate(batch.z.numpy().T):
                order = np.argsort(-latent)[:k]
                if latent[order[-1]] <= 0:
                    assert np.isnan(depth[j]) and np.isnan(same[j])
                    continue
                top = batch.labels_of(shuffled).numpy()[order]
                pairs = list(itertools.combinations(top, 2))
                depths = [meet(place[a], place[b]) for a, b in pairs if a != b]
                expected = np.mean(depths) if depths else np.nan
                assert depth[j] == pytest.approx(expected, nan_ok=True)
                assert same[j] == pytest.approx(1 - len(depths) / len(pairs))
            numbers = evaluator.compute(permutation=place, shuffled=shuffled)
            defined = depth[np.isfinite(depth)]
            expected = defined.mean() if len(defined) else np.nan
            assert numbers["defined"] == len(defined)
            assert numbers["pair_depth"] == pytest.approx(expected, nan_ok=True)


def indicators(taxonomy, labels, **kwargs):
    latents = PlantedLatents(taxonomy, recall=1.0, false_alarm=0.0, **kwargs)
    labels = torch.from_numpy(labels)
    return latents, latents.encode(labels=labels, index=torch.arange(len(labels)))


def test_node_indicators_reach_the_depth_of_their_node(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 40)
    latents, z = indicators(animals, labels, binary=True)
    (evaluator,) = measured(animals, one_batch(z, labels), [PairDepth])
    depth, same = evaluator.depth(), evaluator.pairs().same_class
    of = {animals.nodes[v]: j for j, v in enumerate(latents.node)}
    assert depth[of["bird_0"]] == 2  # two classes: every pair meets in the genus itself
    pair_in_family = (1 * 2 + 4 * 1) / 5  # of 5 other classes of the family one is of the genus
    assert depth[of["bird"]] == pytest.approx(pair_in_family, abs=0.25)
    for name in ("bird_0_0", "carnivore_2_1"):  # one class: no pair of different classes
        assert np.isnan(depth[of[name]]) and same[of[name]] == 1


def test_class_detectors_do_not_raise_it(animals, one_batch, measured):
    """Latents of two random classes detect classes as well as those of a genus."""
    labels = np.repeat(np.arange(12), 40)
    nulls = []
    for seed in range(10):
        _, z = indicators(animals, labels, shuffle_nodes=True, seed=seed)
        (evaluator,) = measured(animals, one_batch(z, labels), [PairDepth])
        nulls.append(evaluator.compute()["pair_depth"])
    _, z = indicators(animals, labels)
    (evaluator,) = measured(animals, one_batch(z, labels), [PairDepth])
    value = evaluator.compute()["pair_depth"]
    permuted = [
        evaluator.compute(permutation=animals.permutation(s))["pair_depth"] for s in range(10)
    ]
    chance = animals.leaf_lca_depth[~np.eye(12, dtype=bool)].mean()
    for null in (nulls, permuted):
        assert np.mean(null) == pytest.approx(chance, abs=0.15)
        assert max(null) < value
    assert evaluator.compute(shuffled=True)["pair_depth"] == pytest.approx(chance, abs=0.15)
    assert evaluator.compute()["pair_depth_normalized"] == value / 3


def test_a_pair_needs_two_images(animals, one_batch, measured):
    batch = one_batch(np.ones((24, 2), np.float32), np.repeat(np.arange(12), 2))
    with pytest.raises(
        ConfigError, match="k: too small; given 1; allowed: 2 or more, since a pair needs"
    ):
        measured(animals, batch, [PairDepth], options={"k": 1})
