"""`lch_height` against sets of classes, and on detectors of its nodes."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.lch_height import (
    LCHHeight,
    RandomSets,
    frequent_classes,
    random_class_sets,
    random_sets,
    smallest_holding,
    top_labels,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.stratified_sets import StratifiedSets
from taxolens.registry.evaluators.taxonomic_autocorrelation import TaxonomicAutocorrelation
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
    labels = rng.permutation(np.repeat(np.arange(n_classes), 6))
    z = (rng.random((len(labels), 6)) < rng.random((n_classes, 6))[labels]).astype(np.float32)
    batch = one_batch(z, labels)
    (evaluator,) = measured(taxonomy, batch, [LCHHeight], options={"rule": rule})
    permutation = rng.permutation(n_classes)
    for shuffled in (False, True):
        labels = batch.labels_of(shuffled).numpy()
        for place in (np.arange(n_classes), permutation):
            node, size = evaluator.assign(place, shuffled)
            present = tuple(sorted(place[np.unique(labels)].tolist()))
            heights, random_height = [], random_class_sets(taxonomy, 1999, 0, present).height
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
    assert numbers.pop("defined") == numbers.pop("n_latents") == 0
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


def test_the_strict_rule_is_the_lch(one_batch, measured):
    """P has fewer classes, C is deeper: the LCH of x and y is C."""
    edges = [("r", "A"), ("A", "B"), ("B", "C"), *(("C", c) for c in "xyw")]
    edges += [("r", "P"), ("P", "x"), ("P", "y"), ("r", "q")]
    taxonomy = Taxonomy.from_edges(edges)
    labels = np.repeat(np.arange(4), 20)
    z = np.array([0.0, 0, 1, 1])[labels] if taxonomy.classes == ("q", "w", "x", "y") else None
    batch = one_batch(z[:, None].astype(np.float32), labels)
    options = {"rule": "topk_strict"}
    (evaluator,) = measured(taxonomy, batch, [LCHHeight], options=options)
    node, size = evaluator.assign()
    assert taxonomy.nodes[node[0]] == "C" and size.tolist() == [2]
    assert taxonomy.nodes[evaluator.assign(rule="topk").node[0]] == "P"
    # With q in the place of x and the other way round the two meet at the root.
    assert evaluator.assign(np.array([2, 1, 0, 3])).node.tolist() == [0]


@few
@given(seed=st.integers(0, 10**6))
def test_the_strict_rule_against_loops(random_dag, one_batch, measured, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    labels = np.repeat(np.arange(n_classes), 12)
    z = rng.random((len(labels), 5)).astype(np.float32) * (rng.random((len(labels), 5)) < 0.6)
    batch = one_batch(z, labels)
    options = {"rule": "topk_strict", "k": 3}
    (evaluator,) = measured(taxonomy, batch, [LCHHeight], options=options)
    place = rng.permutation(n_classes)
    node, size = evaluator.assign(place)
    for j in range(5):
        top = batch.labels.numpy()[np.argsort(-batch.z.numpy()[:, j])[:3]]
        assert node[j] == taxonomy.lch(place[top]) and size[j] == len(set(top.tolist()))


def test_a_share_that_is_met_exactly_counts():
    """.07 · 100 is above 7 in double precision."""
    fired, images = np.array([[7, 6, 0], [0, 14, 1]]), np.array([100, 100, 14])
    found = frequent_classes(sparse.csr_array(fired), images, 0.07).toarray().tolist()
    assert found == [[True, False, False], [False, True, True]]


@pytest.mark.parametrize("n_images", [3, 6])
def test_a_small_class_is_named_where_it_decides(animals, one_batch, measured, n_images):
    labels = np.append(np.repeat(np.arange(11), 40), [11] * n_images)
    _, z = planted(animals, labels)
    batch, name = one_batch(z, labels), animals.classes[11]
    for rule in ("topk", "topk_strict"):
        (evaluator,) = measured(animals, batch, [LCHHeight], options={"rule": rule})
        numbers, (note,) = evaluator.compute(), evaluator.notes()
        what = "are undefined" if n_images == 3 else "use k = 3"
        assert note.startswith(
            f"The rules `topk` and `topk_strict` {what}, since k is at most half"
        )
        assert note.endswith(f"{name!r} has {n_images} images.")
        assert (numbers["defined"] == 0) == (n_images == 3) == np.isnan(numbers["height"])
    (evaluator,) = measured(animals, batch, [LCHHeight])
    assert len(evaluator.notes()) == (2 if n_images == 3 else 0)


def test_few_images_of_a_class_are_said_to_raise_the_nodes(animals, one_batch, measured):
    for n_images, rule, expected in ((4, "frequency", 1), (5, "frequency", 0), (4, "any", 0)):
        labels = np.repeat(np.arange(12), n_images)
        batch = one_batch(planted(animals, labels)[1], labels)
        (evaluator,) = measured(animals, batch, [LCHHeight], options={"rule": rule, "k": 2})
        notes = [note for note in evaluator.notes() if "frequency" in note]
        assert len(notes) == expected
        assert all(n.startswith("12 of 12 classes have fewer than 5 images: ") for n in notes)
    (evaluator,) = measured(animals, batch, [LCHHeight], options={"rule": "topk", "k": 2})
    assert evaluator.notes() == []


def test_random_sets_against_the_mean_over_all_sets(animals):
    height, generality = random_sets(animals, 3000, 0)
    assert np.isnan(height[0]) and height[1] == 0 and generality[1] == 0
    pairs = np.array([animals.leaf_lch[a, b] for a in range(12) for b in range(12) if a != b])
    assert height[2] == pytest.approx(animals.height[pairs].mean(), abs=0.05)
    assert generality[2] == pytest.approx(animals.generality[pairs].mean(), abs=0.05)
    assert height[12] == pytest.approx(animals.height[0])


@few
@given(seed=st.integers(0, 10**6))
def test_random_sets_against_all_sets_of_the_present_classes(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    places = np.sort(rng.permutation(len(taxonomy.classes))[: rng.integers(2, 8)])
    found = random_class_sets(taxonomy, 1500, seed, tuple(places.tolist()))
    assert np.isnan(found.height[0]) and np.isnan(found.height[len(places) + 1 :]).all()
    assert found.height.shape == found.generality.shape == (len(taxonomy.classes) + 1,)
    assert found.pairs[-1] == len(places) * (len(places) - 1) / 2
    for size in range(2, len(places) + 1):
        nodes = [taxonomy.lch(chosen) for chosen in combinations(places, size)]
        heights = taxonomy.height[nodes]
        exact = size == 2
        assert found.height[size] == pytest.approx(heights.mean(), abs=1e-9 if exact else 0.3)
        wanted = taxonomy.generality[nodes].mean()
        assert found.generality[size] == pytest.approx(wanted, abs=1e-9 if exact else 0.3)
        for height in np.unique(heights):
            (p,) = found.p_lower(np.array([size]), np.array([height]))
            assert p == pytest.approx((heights <= height).mean(), abs=1e-9 if exact else 0.08)


@few
@given(seed=st.integers(0, 10**6))
def test_stratified_sets_against_all_sets_of_a_composition(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(taxonomy.classes))[: rng.integers(2, 8)]
    groups = [np.sort(group) for group in np.array_split(places, min(len(places), 3))]
    sets = StratifiedSets(taxonomy, 1500, seed, tuple(tuple(g.tolist()) for g in groups))
    for parts in product(*(range(len(group) + 1) for group in groups)):
        if sum(parts) == 0:
            continue
        if all(k in (0, len(group)) for group, k in zip(groups, parts)) and sum(parts) < len(
            places
        ):
            alone = sets.of(np.array([parts]), np.array([0]))
            assert np.isnan(np.concatenate(alone)).all()  # it is the only set like it
            continue
        each = product(*(combinations(group, k) for group, k in zip(groups, parts)))
        nodes = [taxonomy.lch([c for chosen in some for c in chosen]) for some in each]
        heights = taxonomy.height[nodes]
        exact = sum(parts) == 2
        levels = np.unique(heights)
        found = sets.of(np.tile(parts, (len(levels), 1)), levels)
        wanted = taxonomy.generality[nodes].mean()
        assert found.height == pytest.approx(heights.mean(), abs=1e-9 if exact else 0.3)
        assert found.generality == pytest.approx(wanted, abs=1e-9 if exact else 0.3)
        for height, lower in zip(levels, found.lower):
            share = (heights <= height).mean()
            assert lower == pytest.approx(share, abs=1e-9 if exact else 0.08)


def test_stratified_sets_of_many_classes():
    """100 large classes below one node of two: any number of them meet there, one more at the root."""
    edges = [("r", "a"), ("r", "b"), *(("a", f"a{i:03d}") for i in range(100))]
    tree = Taxonomy.from_edges([*edges, *(("b", f"b{i}") for i in range(3)), ("a000", "a000x")])
    groups = tuple(np.flatnonzero(tree.cut(1) == tree.index(v)).tolist() for v in "ab")
    sets = StratifiedSets(tree, 19, 0, tuple(map(tuple, groups)))
    found = sets.of(np.array([[100, 0], [70, 0], [100, 1], [0, 3]]), np.array([2, 2, 2, 1]))
    nan = float("nan")  # all classes of a stratum: no other set is like it
    assert found.height == pytest.approx([nan, 2, 3, nan], nan_ok=True)
    assert found.generality == pytest.approx([nan, *np.log2([100, 103]), nan], nan_ok=True)
    assert found.lower == pytest.approx([nan, 1, 1 / 20, nan], nan_ok=True)


def test_what_no_random_set_is_like_is_not_compared(one_batch, measured):
    """Perfect latents of 6 branches of 4 classes: half of the classes are alike, of the others no two."""
    edges = [("r", f"b{i}") for i in range(6)]
    edges += [(f"b{i}", f"b{i}c{j}") for i in range(6) for j in range(4)]
    tree = Taxonomy.from_edges(edges)
    images = np.array([30] * 12 + [round(40 * 1.3**i) for i in range(12)])
    labels = np.repeat(np.arange(24), images)
    z = torch.tensor((labels[:, None] // 4 == np.arange(6)).astype(np.float32))
    lch, moran = measured(tree, one_batch(z, labels), [LCHHeight, TaxonomicAutocorrelation])
    found = lch.compute()
    assert found["lower_share"] == 1 and found["n_latents"] == 3 and found["defined"] == 6
    assert found["height_gap"] > 0.9
    assert "3 of 6 latents of several classes are not among the `n_latents`" in lch.notes()[-1]
    assert lch.tables()["latents"]["random_height"].isna().sum() == 3
    found = moran.compute()
    assert found["significant_share"] == 1 and found["tested"] == 3 and found["defined"] == 6
    assert "3 of 6 latents have no p-value" in moran.notes()[0]


def test_a_drawn_p_value_counts_the_set_itself():
    heights = np.array([[0, 0, 0], [1, 2, 2], [1, 2, 3]])  # of sets of 1, 2 and 3 classes
    pairs = np.array([0, 2, 3, 4])  # of heights 1, 1, 2 and 3
    found = RandomSets(np.zeros(4), np.zeros(4), heights, pairs)
    p = found.p_lower(np.array([2, 3, 3, 2, 3]), np.array([1, 0, 2, 3, 3]))
    assert p.tolist() == [2 / 4, 1 / 4, 3 / 4, 1.0, 1.0]


def wide_tree() -> Taxonomy:
    edges = [("r", f"o{o}") for o in range(4)]
    edges += [(f"o{o}", f"o{o}f{f}") for o in range(4) for f in range(4)]
    return Taxonomy.from_edges(
        [*edges, *((f"o{o}f{f}", f"o{o}f{f}s{s}") for o, f, s in np.ndindex(4, 4, 4))]
    )


def test_random_class_sets_do_not_meet_lower(one_batch, measured):
    """Over 40 worlds of latents that know two to five random classes each, 3 % at most meet lower."""
    tree, rng = wide_tree(), np.random.default_rng(0)
    labels, found = np.repeat(np.arange(64), 6), []
    for _ in range(40):
        size = rng.integers(2, 6, 60)
        member = np.argsort(np.argsort(rng.random((64, 60)), axis=0), axis=0) < size
        batch = one_batch(member[labels].astype(np.float32), labels)
        (evaluator,) = measured(tree, batch, [LCHHeight])
        numbers = evaluator.compute()
        assert numbers["n_latents"] == 60
        found.append(numbers["lower_share"])
    assert np.mean(found) < 0.03 and np.mean(np.array(found) > 0) < 0.1


def test_noise_on_classes_of_different_size_does_not_meet_lower(one_batch, measured):
    """It fires on half of the images of small classes more often, and these lie below one node."""
    tree, rng = wide_tree(), np.random.default_rng(0)
    labels = np.repeat(np.arange(64), np.where(tree.cut(1) == tree.cut(1)[0], 6, 60))
    z = (rng.random((len(labels), 100)) < 0.4).astype(np.float32)
    (evaluator,) = measured(tree, one_batch(z, labels), [LCHHeight])
    numbers = evaluator.compute()
    assert numbers["n_latents"] > 80 and numbers["lower_share"] == 0
    assert numbers["height_gap"] == pytest.approx(0, abs=0.05)
    assert numbers["generality_gap"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("rule", ["frequency", "topk", "topk_strict", "any"])
def test_classes_are_counted_by_stratum(animals, one_batch, measured, rule):
    labels = np.repeat(np.arange(12), np.where(np.arange(12) % 3 == 0, 60, 20))
    _, z = planted(animals, labels, recall=0.8, false_alarm=0.02)
    (evaluator,) = measured(animals, one_batch(z, labels), [LCHHeight], options={"rule": rule})
    draw = evaluator.context.permutations[0]
    for place in (None, draw):
        node, size = evaluator.assign(place)
        parts = evaluator._parts(place, False, rule)
        assert parts.shape == (len(node), 2) and (parts.sum(1) == size).all()
        of_leaf = np.flatnonzero(size == 1)
        small = node[of_leaf][:, None] == animals.class_nodes[np.flatnonzero(np.arange(12) % 3)]
        assert len(of_leaf) or rule != "frequency"
        assert (parts[of_leaf, 0] == small.any(1)).all()  # strata ascend by size; so does the draw
    moved = evaluator.compute(permutation=draw)
    assert moved["n_latents"] == evaluator.compute()["n_latents"]
    assert len(evaluator.tables()["latents"]) == evaluator.compute()["defined"]
    evaluator.figures()


def test_detectors_of_nodes_meet_lower_in_their_tree_alone(one_batch, measured):
    tree = wide_tree()
    labels = np.repeat(np.arange(64), 12)
    _, z = planted(tree, labels, recall=0.8, false_alarm=0.001)
    (evaluator,) = measured(tree, one_batch(z, labels), [LCHHeight])
    numbers = evaluator.compute()
    assert numbers["n_latents"] == 1 + 4 + 16
    assert numbers["lower_share"] == pytest.approx(20 / 21)  # all but the root's
    for p in evaluator.context.permutations:
        assert evaluator.compute(permutation=p)["lower_share"] < 0.15
    assert not evaluator.compute(shuffled=True)["lower_share"] > 0


def test_absent_classes_are_in_no_random_set(one_batch, measured):
    """One order alone is present: latents of random pairs of it are not lower than random pairs."""
    tree = wide_tree()
    order = np.flatnonzero(tree.cut(1) == tree.cut(1)[0])
    pairs = np.array(list(combinations(order, 2)))
    labels = np.repeat(order, 6)
    z = (labels[:, None, None] == pairs).any(2).astype(np.float32)
    (evaluator,) = measured(tree, one_batch(z, labels), [LCHHeight])
    numbers = evaluator.compute()
    assert numbers["n_latents"] == len(pairs) and numbers["lower_share"] == 0
    assert numbers["height_gap"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": "most"},
            "rule: not known; given 'most'; allowed: one of frequency, topk, topk_strict, any",
        ),
        ({"tau": 0}, r"tau: out of range; given 0(.0)?; allowed: a number in \(0, 1\]"),
        ({"k": 0}, "k: out of range; given 0(.0)?; allowed: 1 or more"),
        ({"level": 1.0}, r"level: out of range; given 1.0; allowed: a number in \(0, 1\)"),
        ({"ruel": "any"}, "option of lch_height: not known .did you mean 'rule'"),
    ],
)
def test_options_are_checked(animals, one_batch, measured, options, message):
    batch = one_batch(np.ones((24, 2), np.float32), np.repeat(np.arange(12), 2))
    with pytest.raises(ConfigError, match=message):
        measured(animals, batch, [LCHHeight], options=options)
