"""`lch_height` against sets of classes, and on detectors of its nodes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.lch_height import (
    LCHHeight,
    random_sets,
    smallest_holding,
    top_labels,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

few = settings(max_examples=10, deadline=None)


def planted(taxonomy, labels, **kwargs):
    latents = PlantedLatents(taxonomy, **{"recall": 1.0, "false_alarm": 0.0, **kwargs})
    labels = torch.from_numpy(labels)
    return latents, latents.encode(labels=labels, index=torch.arange(len(labels)))


@few
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(["frequency", "any"]))
def test_sets_of_classes_against_loops(random_dag, one_batch, measured, seed, rule):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    labels = rng.integers(0, n_classes, 60)
    z = (rng.random((60, 6)) < rng.random((n_classes, 6))[labels]).astype(np.float32)
    batch = one_batch(z, labels)
    (evaluator,) = measured(taxonomy, batch, [LCHHeight], options={"rule": rule})
    permutation = rng.permutation(n_classes)
    for shuffled in (False, True):
        labels = batch.labels_of(shuffled).numpy()
        for place in (np.arange(n_classes), permutation):
            node, size = evaluator.assign(place, shuffled)
            heights, random_height = [], random_sets(taxonomy, 64, 0)[0]
            gaps = []
            for j in range(6):
                fires = {c: batch.z.numpy()[labels == c, j] > 0 for c in set(labels)}
                needed = {"frequency": 0.5, "any": 1e-9}[rule]
                held = [c for c, f in fires.items() if f.mean() >= needed]
                assert size[j] == len(held)
                assert node[j] == (taxonomy.lch(place[held]) if held else -1)
                if held:
                    heights.append(taxonomy.height[node[j]])
                if len(held) > 1:
                    gaps.append(random_height[len(held)] - heights[-1])
            numbers = evaluator.compute(permutation=place, shuffled=shuffled)
            assert numbers["defined"] == len(heights)
            for name, values in (("height", heights), ("height_gap", gaps)):
                expected = np.mean(values) if values else np.nan
                assert numbers[name] == pytest.approx(expected, nan_ok=True)


@few
@given(seed=st.integers(0, 10**6), keep=st.sampled_from([0.5, 0.9, 1.0]))
def test_the_smallest_node_against_loops(random_dag, seed, keep):
    taxonomy = random_dag(seed).taxonomy()
    labels = np.random.default_rng(seed).integers(0, len(taxonomy.classes), (5, 4))
    labels[4] = -1
    found = smallest_holding(taxonomy, labels, keep)
    for row, node, size in zip(labels[:4], found.node, found.size):
        held = {
            v: int(taxonomy.membership[row, v].sum())
            for v in range(len(taxonomy.nodes))
            if taxonomy.membership[row, v].sum() >= keep * 4 - 1e-6
        }
        least = min(held, key=lambda v: (taxonomy.n_leaves[v], -taxonomy.depth[v], v))
        assert node == least
        assert size == len({c for c in row if taxonomy.membership[c, least]})
        if keep == 1.0:
            lch = taxonomy.lch(row)
            assert taxonomy.n_leaves[node] <= taxonomy.n_leaves[lch]
    assert found.node[4] == -1 and found.size[4] == 0


def test_the_tables_compare_all_rules(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 40)
    _, z = planted(animals, labels, recall=0.8, false_alarm=0.01)
    batch = one_batch(z, labels)
    (evaluator,) = measured(animals, batch, [LCHHeight])
    tables = evaluator.tables()
    rules = tables["rules"].set_index("rule")
    names = np.array([animals.label(v) for v in range(len(animals.nodes))])
    for rule in ("frequency", "topk", "topk_strict", "any"):
        (alone,) = measured(animals, batch, [LCHHeight], options={"rule": rule})
        numbers = alone.compute()
        assert rules.loc[rule, list(numbers)].to_dict() == pytest.approx(numbers, nan_ok=True)
        node = alone.assign().node
        assert tables["nodes"][rule].sum() == (node >= 0).sum()
        assert dict(zip(tables["nodes"]["node"], tables["nodes"][rule]))["animal"] == (
            (node == 0).sum()
        )
        if rule != "frequency":
            assert tables["latents"][f"by_{rule}"].tolist() == names[node].tolist()
    assert rules.loc["frequency", "permuted_generality_gap"] < 0.3
    assert rules.loc["frequency", "generality_gap"] > 0.5


@pytest.mark.parametrize("rule", ["frequency", "topk", "topk_strict", "any"])
def test_node_indicators_are_put_at_their_nodes(animals, one_batch, measured, rule):
    labels = np.repeat(np.arange(12), 40)
    latents, z = planted(animals, labels, binary=True)
    (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight], options={"rule": rule})
    node, size = evaluator.assign()
    if rule == "frequency":
        assert (size == animals.n_leaves[latents.node]).all()
    # 16 random images of a genus or a family all but surely show what lies below it
    assert (node == latents.node).all()
    numbers = evaluator.compute()
    assert numbers["height"] == pytest.approx(animals.height[latents.node].mean())
    assert numbers["height_gap"] > 0.5 and numbers["generality_gap"] > 0.5


def test_frequency_bears_false_alarms(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 60)
    latents, z = planted(animals, labels, recall=0.8, false_alarm=0.01)
    right = {}
    for rule in ("frequency", "any"):
        (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight], options={"rule": rule})
        right[rule] = (evaluator.assign().node == latents.node).mean()
    assert right["frequency"] == 1.0 and right["any"] < 0.6


def test_one_outlier_image_moves_only_the_strict_rule_to_the_root(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 40)
    latents, z = planted(animals, labels)
    leaf, family = np.flatnonzero(latents.members.sum(0) == 1), animals.cut(1)
    for j, of_class in zip(leaf, latents.members[:, leaf].argmax(0)):
        outlier = np.flatnonzero(family[labels] != family[of_class])[j]
        z[outlier, j] = 9
    for rule, right in (("topk", latents.node[leaf]), ("topk_strict", animals.root)):
        (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight], options={"rule": rule})
        assert (evaluator.assign().node[leaf] == right).all()


def test_the_gap_vanishes_without_hierarchy(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 20)
    draws = []
    for seed in range(12):
        _, z = planted(animals, labels, shuffle_nodes=True, seed=seed)
        (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight])
        draws.append(evaluator.compute()["generality_gap"])
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws)) + 0.02


def test_shuffled_labels_leave_no_class_frequent(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 40)
    _, z = planted(animals, labels)
    (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight])
    numbers = evaluator.compute(shuffled=True)
    # Only the family and the root latents fire on half of all images.
    assert numbers["defined"] <= 3 and numbers["single_class_share"] == 0
    node, _ = evaluator.assign(shuffled=True)
    assert set(node[node >= 0]) <= {0}


def test_a_dead_latent_is_undefined_not_zero(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 4)
    (evaluator,) = measured(animals, one_batch(np.zeros((48, 3), np.float32), labels), [LCHHeight])
    numbers = evaluator.compute()
    assert numbers.pop("defined") == 0
    assert all(np.isnan(value) for value in numbers.values())
    assert evaluator.tables()["latents"].empty


def test_k_is_at_most_half_of_the_smallest_class(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 6)  # k falls to 3
    latents, z = planted(animals, labels)
    (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight], options={"rule": "topk"})
    leaf = animals.n_leaves[latents.node] == 1
    assert (evaluator.assign().node == latents.node)[leaf].all()


def test_smallest_holding_prefers_few_classes_then_depth_then_id():
    edges = [("r", "up"), ("up", "p"), ("r", "q"), ("r", "c")]
    edges += [(v, c) for v in "pq" for c in "ab"]
    taxonomy = Taxonomy.from_edges(edges, list("abc"))
    labels = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 2, 2], [-1, -1, -1, -1]])
    node, size = smallest_holding(taxonomy, labels, 0.75)
    assert [taxonomy.nodes[v] if v >= 0 else None for v in node] == ["p", "a", "r", None]
    assert size.tolist()[:3] == [2, 1, 3]


def test_a_latent_with_fewer_top_images_has_none():
    labels = np.array([[3, 1, 2], [4, 5, -1], [-1, -1, -1]])
    top = SimpleNamespace(labels=lambda shuffled: labels + shuffled)
    assert top_labels(top, 3, False).tolist() == [[3, 1, 2], [-1] * 3, [-1] * 3]
    assert top_labels(top, 2, False).tolist() == [[3, 1], [4, 5], [-1] * 2]


def test_random_sets_against_the_mean_over_all_sets(animals):
    height, generality = random_sets(animals, 3000, 0)
    assert np.isnan(height[0]) and height[1] == 0 and generality[1] == 0
    pairs = np.array([animals.leaf_lch[a, b] for a in range(12) for b in range(12) if a != b])
    assert height[2] == pytest.approx(animals.height[pairs].mean(), abs=0.05)
    assert generality[2] == pytest.approx(animals.generality[pairs].mean(), abs=0.05)
    assert height[12] == pytest.approx(animals.height[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": "most"},
            "rule: not known; given 'most'; allowed: one of frequency, topk, topk_strict, any",
        ),
        ({"tau": 0}, r"tau: out of range; given 0; allowed: a number in \(0, 1\]"),
        ({"k": 0}, "k: out of range; given 0; allowed: 1 or more"),
        ({"ruel": "any"}, "option of lch_height: not known .did you mean 'rule'"),
    ],
)
def test_options_are_checked(animals, one_batch, measured, options, message):
    batch = one_batch(np.ones((24, 2), np.float32), np.repeat(np.arange(12), 2))
    with pytest.raises(ConfigError, match=message):
        measured(animals, batch, [LCHHeight], options=options)
