"""`level_information` and its probes against plain linear algebra, and on known truth."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators import level_information
from taxolens.registry.evaluators.level_information import (
    LevelInformation,
    informative_cuts,
    read_levels,
    read_off,
    right_group_bounds,
)
from taxolens.registry.evaluators.parts.probes import NeighbourProbe, RidgeProbe
from taxolens.registry.taxonomies import Taxonomy

few = settings(max_examples=10, deadline=None)


def embedded(taxonomy: Taxonomy, labels: np.ndarray, noise: float, seed: int = 0) -> torch.Tensor:
    """(n, 64) activations: a random direction for each node above the class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(taxonomy.nodes), 64, generator=generator)
    members = torch.tensor(taxonomy.membership, dtype=torch.float32)
    noise_ = torch.randn(len(labels), 64, generator=generator) * noise
    return (members @ directions)[torch.from_numpy(labels)] + noise_ + 7


@few
@given(seed=st.integers(0, 10**6))
def test_ridge_against_the_normal_equations(seed):
    rng = np.random.default_rng(seed)
    n, d, n_classes, ridge = 80, 6, 4, 0.1
    # Beside 100, a spread much below 1 would be lost in single precision.
    x = rng.normal(size=(n, d)) * rng.uniform(0.5, 5, d) + 100
    labels = rng.integers(0, n_classes - 1, n)  # the last class is never seen
    z = (x - x.mean(0)) / x.std(0)
    onehot = np.eye(n_classes)[labels]
    weights = np.linalg.solve(z.T @ z / n + ridge * np.eye(d), z.T @ onehot / n)
    asked = rng.normal(size=(30, d)) * 5 + 100
    scores = (asked - x.mean(0)) / x.std(0) @ weights + onehot.mean(0)
    scores[:, -1] = -np.inf
    probe = RidgeProbe(n_classes, 1, ridge)
    for part, truth in zip(np.array_split(x, 5), np.array_split(labels, 5)):
        probe.fit(torch.from_numpy(part).float(), [torch.from_numpy(truth)])
    guess = probe.predict(torch.from_numpy(asked).float())[0].numpy()
    best = np.sort(scores)[:, ::-1]
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert (guess == scores.argmax(1))[clear].all() and clear.sum() > 15


@few
@given(seed=st.integers(0, 10**6))
def test_neighbours_against_loops(seed):
    rng = np.random.default_rng(seed)
    x, asked = rng.normal(size=(60, 5)) + 3, rng.normal(size=(20, 5)) + 3
    labels = rng.integers(0, 4, 60)
    probe = NeighbourProbe(4, 1, k=7, per_class=100)
    index = torch.from_numpy(rng.permutation(60))
    for rows in torch.arange(60).split(13):
        probe.fit(torch.from_numpy(x).float()[rows], [torch.from_numpy(labels)[rows]], index[rows])
    guess = probe.predict(torch.from_numpy(asked).float())[0]
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    cosine = unit(asked - x.mean(0)) @ unit(x - x.mean(0)).T
    for row, found in zip(cosine, guess):
        near = np.argsort(-row)[:7]
        votes = np.bincount(labels[near], np.exp(row[near] / 0.07), 4)
        assert votes[found] >= votes.max() * (1 - 1e-3)


def test_the_neighbour_database_is_capped_and_does_not_depend_on_batches():
    x, labels = torch.randn(300, 4), torch.arange(300) % 3
    kept = []
    for size in (300, 17):
        probe = NeighbourProbe(3, 2, k=3, per_class=5)
        for rows in torch.arange(300).split(size):
            probe.fit(x[rows], [labels[rows], labels[299 - rows]], rows)
        for database in probe._databases:
            assert database._features is not None and database._features.shape == (3, 5, 4)
            kept.append({tuple(row) for row in database._features.flatten(0, 1).tolist()})
    assert kept[:2] == kept[2:] and len(kept[0]) == len(kept[1]) == 15


def test_every_labelling_votes_as_if_it_were_the_only_one():
    """Capped by the classes of another labelling, a database would have more images of the large ones."""
    rng = np.random.default_rng(0)
    labellings = [torch.from_numpy(rng.permutation([0] * 240 + [1] * 30 + [2] * 30)) for _ in "ab"]
    x, asked, index = torch.randn(300, 4), torch.randn(50, 4), torch.arange(300)
    probe = NeighbourProbe(3, 2, k=3, per_class=5)
    probe.fit(x, labellings, index)
    for labels, found in zip(labellings, probe.predict(asked)):
        alone = NeighbourProbe(3, 1, k=3, per_class=5)
        alone.fit(x, [labels], index)
        assert torch.equal(found, alone.predict(asked)[0])


def test_probes_without_a_fit_predict_no_class():
    assert RidgeProbe(3).predict(torch.randn(2, 4))[0].tolist() == [-1, -1]
    assert NeighbourProbe(3).predict(torch.randn(2, 4))[0].tolist() == [-1, -1]
    none = torch.zeros(0, dtype=torch.int64)
    for probe in (RidgeProbe(3), NeighbourProbe(3)):
        if isinstance(probe, RidgeProbe):
            probe.fit(torch.zeros(0, 4), [none])
        else:
            probe.fit(torch.zeros(0, 4), [none], none)
        assert probe.predict(torch.randn(2, 4))[0].tolist() == [-1, -1]


@few
@given(seed=st.integers(0, 10**6))
def test_variance_shares_against_loops(random_dag, one_batch, measured, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    labels = rng.integers(0, n_classes, 60)
    x = torch.from_numpy(rng.normal(size=(60, 4)) + rng.normal(size=(n_classes, 4))[labels] + 50)
    z = (x.relu() * (torch.rand(60, 4) < 0.3)).float()
    batch = one_batch(z, labels, x=x.float(), mean_patch=-x.float())
    (evaluator,) = measured(taxonomy, batch, [LevelInformation], size=13)
    place = rng.permutation(n_classes)
    for feature, values in (("x", batch.x), ("z", batch.z), ("mean_patch", batch.mean_patch)):
        for shuffled in (False, True):
            truth = place[batch.labels_of(shuffled).numpy()]
            found = evaluator.levels(feature, place, shuffled)["variance_share"]
            v = values.double().numpy()
            total = ((v - v.mean(0)) ** 2).sum()
            for t, got in zip(informative_cuts(taxonomy), found):
                groups = taxonomy.cut(t)[truth]
                inside = sum(
                    ((v[groups == g] - v[groups == g].mean(0)) ** 2).sum() for g in set(groups)
                )
                assert got == pytest.approx((total - inside) / total, abs=1e-4)


@few
@given(seed=st.integers(0, 10**6))
def test_reading_off_a_confusion_matrix(seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 6, (2, 40))
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (truth, guess), 1)
    groups = rng.integers(0, 3, (4, 6))
    accuracy, at_level, right_group = read_off(confusion, groups)
    wrong = truth != guess
    assert accuracy == pytest.approx((~wrong).mean())
    for g, level, right in zip(groups, at_level, right_group):
        assert level == pytest.approx((g[truth] == g[guess]).mean())
        assert right == pytest.approx((g[truth] == g[guess])[wrong].mean())


def test_nothing_to_read_off_is_undefined():
    accuracy, at_level, right_group = read_off(np.zeros((3, 3), int), np.zeros((1, 3), int))
    assert np.isnan([accuracy, *at_level, *right_group]).all()
    accuracy, at_level, right_group = read_off(np.eye(3, dtype=int), np.zeros((1, 3), int))
    assert accuracy == 1 and at_level[0] == 1 and np.isnan(right_group[0])


def test_the_bounds_of_the_right_group_by_hand():
    """Classes a b | c d | e; each error is as likely a as any other class, so chance is uniform."""
    confusion = np.ones((5, 5), int)
    groups = np.array([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    chance, most = right_group_bounds(confusion, groups)
    assert chance == pytest.approx([4 / 5 * 1 / 4, 1, 0])
    assert most == pytest.approx([4 / 5, 1, 0])  # e has nobody beside it
    # Only a and b are taken for each other: nothing else could be predicted by chance either.
    confusion = np.diag([9, 9, 9, 9, 0])
    confusion[0, 1] = confusion[1, 0] = 3
    assert right_group_bounds(confusion, groups)[0] == pytest.approx([1, 1, 0])
    assert right_group_bounds(np.eye(5, dtype=int), groups)[0].tolist() == [0, 0, 0]
    # So there is nothing that could be gained over chance.
    feature = SimpleNamespace(confusion=np.stack([confusion, confusion])[:, None], moments=None)
    found = read_levels(feature, groups[1:], 0)  # pyright: ignore[reportArgumentType]
    for probe in ("probe", "knn"):
        assert found[f"{probe}_right_group_weight"].tolist() == [0, 0]
        assert np.isnan(found[f"{probe}_right_group"]).all()


def test_where_no_error_can_leave_the_group_nothing_can_be_gained():
    """Chance and the most that is possible are 1, whatever rounding makes of them."""
    rng = np.random.default_rng(0)
    groups = np.array([[0] * 20, [0] * 10 + [1] * 10])
    for _ in range(20):
        confusion = rng.integers(0, 9, (1, 1, 20, 20)).repeat(2, axis=0)
        feature = SimpleNamespace(confusion=confusion, moments=None)
        found = read_levels(feature, groups, 0)  # pyright: ignore[reportArgumentType]
        (chance, _), most = right_group_bounds(confusion[0, 0], groups)
        assert [chance, *most] == pytest.approx([1, 1, 1])
        assert np.isnan(found["knn_right_group"]).tolist() == [True, False]
        assert found["knn_right_group_weight"][0] == 0 < found["knn_right_group_weight"][1]


@pytest.mark.parametrize(
    ("confusion", "reached"),
    [
        ([[0, 2, 2], [0, 0, 0], [0, 0, 4]], 1),  # b has no image, but is predicted
        ([[2, 0, 2], [0, 0, 3], [0, 0, 4]], 1),  # b is never predicted, but has images
        ([[2, 0, 2], [0, 0, 0], [0, 0, 4]], 0),  # b has neither
        ([[2, 1, 0], [0, 2, 0], [0, 0, 4]], 1),  # one error
    ],
)
def test_a_class_that_is_there_can_be_taken_for_its_sibling(confusion, reached):
    """Classes a b | c: the share of the errors that could be in the right group."""
    assert right_group_bounds(np.array(confusion), np.array([[0, 0, 1]]))[1] == reached


@few
@given(seed=st.integers(0, 10**6))
def test_the_chance_of_the_right_group_is_that_of_independent_errors(seed):
    """Expected counts s_a·t_b off the diagonal give back their own share in each group."""
    rng = np.random.default_rng(seed)
    expected = np.outer(rng.uniform(1, 20, 6), rng.uniform(1, 20, 6))
    np.fill_diagonal(expected, 0)
    groups = rng.integers(0, 3, (3, 6))
    chance, most = right_group_bounds(expected, groups)
    for group, found, bound in zip(groups, chance, most):
        same = group[:, None] == group
        assert found == pytest.approx((expected * same).sum() / expected.sum(), abs=1e-6)
        alone = [(group == g).sum() == 1 for g in group]
        assert bound == pytest.approx(1 - expected[alone].sum() / expected.sum())


def two_trees() -> tuple[Taxonomy, Taxonomy]:
    """24 classes in 3 groups of 2 of 4; and in 12 pairs below the root, with a chain above some."""
    deep = [("r", f"o{o}") for o in range(3)] + [(f"o{f // 2}", f"f{f}") for f in range(6)]
    deep += [(f"f{c // 4}", f"c{c:02}") for c in range(24)]
    pairs = [("r", f"p{p}") for p in range(12)]
    pairs += [(f"p{c // 2}", f"c{c:02}") for c in range(2, 24)]
    pairs += [("p0", "q"), ("q", "s"), ("s", "c00"), ("s", "c01")]
    return Taxonomy.from_edges(deep), Taxonomy.from_edges(pairs)


def right_group_of(tree: Taxonomy, confusion: np.ndarray) -> float:
    groups = np.array([tree.cut(t) for t in informative_cuts(tree)])
    right = read_off(confusion, groups)[2]
    chance, most = right_group_bounds(confusion, groups)
    return float((right - chance).sum() / (most - chance).sum())


def test_the_right_group_is_0_by_chance_and_1_at_best_in_any_tree():
    """Also where one group has 12 times as many images, and is predicted so much more often."""
    size = np.where(np.arange(24) < 4, 120, 10)
    rng = np.random.default_rng(0)
    for tree in two_trees():
        by_chance = []
        for _ in range(100):
            truth = np.repeat(np.arange(24), size)
            guess = rng.choice(24, len(truth), p=size / size.sum())
            confusion = np.zeros((24, 24), int)
            np.add.at(confusion, (truth, guess), 1)
            by_chance.append(right_group_of(tree, confusion))
        error = np.std(by_chance) / 10
        assert abs(np.mean(by_chance)) < 3 * error and error < 0.01
        siblings = np.kron(np.eye(12, dtype=int), 1 - np.eye(2, dtype=int)) * 5
        assert right_group_of(tree, siblings) == pytest.approx(1)


def test_right_group_in_the_metrics_is_weighed_by_the_room_of_each_cut(one_batch, measured):
    tree, _ = two_trees()
    labels = np.repeat(np.arange(24), 20)
    x = embedded(tree, labels, noise=7)
    (evaluator,) = measured(tree, one_batch(x.relu(), labels, x=x), [LevelInformation], size=50)
    numbers = evaluator.compute()
    for probe in ("probe", "knn"):
        found = evaluator.levels("x")
        value, weight = (found[f"{probe}_right_group{end}"] for end in ("", "_weight"))
        assert len(value) == 2 and (weight > 0).all()
        wanted = (value * weight).sum() / weight.sum()
        assert numbers[f"x_{probe}_right_group"] == pytest.approx(wanted)
        wrong = (1 - numbers[f"x_{probe}_accuracy"]) * 240
        assert numbers[f"n_x_{probe}_errors"] == pytest.approx(wrong)
        assert numbers[f"x_{probe}_right_group"] > 0.05
        assert numbers["n_images"] == 240
    permuted = [evaluator.compute(permutation=tree.permutation(s)) for s in range(20)]
    chance = [p["x_probe_right_group"] for p in permuted]
    assert abs(np.mean(chance)) < 3 * np.std(chance) / np.sqrt(20)


def test_informative_cuts(animals):
    assert informative_cuts(animals) == [1, 2]
    flat = Taxonomy.from_edges([("r", c) for c in "abc"])
    assert informative_cuts(flat) == []


def test_a_cut_that_tells_all_classes_apart_is_not_informative():
    edges = [("r", "b"), ("r", "c"), ("b", "x"), ("b", "y"), ("c", "z"), ("x", "end")]
    # b and c at depth 1; x, y and z at 2, which are all classes already.
    assert informative_cuts(Taxonomy.from_edges(edges)) == [1]


def test_a_cut_that_equals_the_one_above_is_not_informative():
    edges = [("r", "b"), ("r", "c"), ("b", "d"), ("c", "e"), ("d", "x"), ("d", "y"), ("e", "z")]
    tree = Taxonomy.from_edges(edges)
    assert tree.max_depth == 3 and informative_cuts(tree) == [1]


def test_only_groups_with_images_make_a_cut_informative(animals):
    """Below one family there is one group at depth 1, and at depth 2 a genus is one of three."""
    family = np.arange(12) < 6
    assert informative_cuts(animals, family) == [2]
    one_each = np.arange(12) % 2 == 0  # at depth 2 every class has a group of its own
    assert informative_cuts(animals, one_each) == [1]
    assert informative_cuts(animals, np.zeros(12, dtype=bool)) == []


def test_a_cut_near_the_leaves_counts_little():
    """Below depth 1 of the second tree only two classes of 24 still share a group."""
    _, pairs = two_trees()
    assert informative_cuts(pairs) == [1, 2]
    groups = np.array([pairs.cut(t) for t in (1, 2)])
    chance, most = right_group_bounds(np.ones((24, 24), int), groups)
    assert chance == pytest.approx([1 / 23, 2 / 24 / 23]) and most == pytest.approx([1, 2 / 24])


def test_the_options_reach_the_probes(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 8)
    options = {"ridge": 0.3, "neighbours": 3, "neighbours_per_class": 2, "probe_latents": 4}
    batch = one_batch(np.random.default_rng(0).random((96, 6)).astype(np.float32), labels)
    (evaluator,) = measured(animals, batch, [LevelInformation], options=options)
    found = evaluator._probes.features["z"]
    assert found.ridge.ridge == 0.3
    for database in found.knn._databases:
        assert database.k == 3
        assert np.isfinite(database._priority).sum(1).tolist() == [2] * 12
    assert found.ridge._gram.shape == (4, 4)  # the most variable latents alone
    spread = batch.z[batch.is_fit].var(0, correction=0)
    assert evaluator._probes.latents.tolist() == sorted(spread.topk(4).indices.tolist())


@few
@given(seed=st.integers(0, 10**6))
def test_the_draws_at_once_are_those_one_by_one(random_dag, one_batch, measured, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(taxonomy.classes), 80)
    batch = one_batch(rng.random((80, 6)).astype(np.float32), labels)
    (evaluator,) = measured(taxonomy, batch, [LevelInformation])
    reads = []
    with mock.patch.object(
        level_information, "read_levels", lambda *args: reads.append(1) or read_levels(*args)
    ):
        draws = evaluator.context.permutations
        at_once = [evaluator.compute(permutation=p) for p in draws]
        tables = evaluator.tables()["levels"]
    # Two features: all draws at once, and the levels of the tree itself for the table.
    assert len(reads) == (4 if draws else 2)
    for p, found in zip(draws, at_once):
        assert evaluator.context.draw_of(p) is not None
        alone = evaluator.compute(permutation=p.copy())  # any other array is computed by itself
        assert evaluator.context.draw_of(p.copy()) is None
        assert found == pytest.approx(alone, rel=1e-12, abs=1e-12, nan_ok=True)
    for feature, measure, depth, permuted in tables[
        ["feature", "measure", "depth", "permuted"]
    ].itertuples(index=False):
        at = informative_cuts(taxonomy).index(depth)
        each = np.array([evaluator.levels(feature, p.copy())[measure][at] for p in draws])
        each = each[np.isfinite(each)]
        assert permuted == pytest.approx(each.mean() if len(each) else np.nan, nan_ok=True)


def test_a_hierarchical_embedding_errs_into_the_right_group(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 60)
    x = embedded(animals, labels, noise=6)
    unrelated = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    batch = one_batch(x.relu(), labels, x=x, mean_patch=unrelated)
    (evaluator,) = measured(animals, batch, [LevelInformation])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(8)]
    for name in ("x_probe_right_group", "x_knn_right_group", "z_probe_right_group"):
        assert value[name] > max(p[name] for p in permuted) + 0.05, name
    assert value["x_variance_share"] > max(p["x_variance_share"] for p in permuted)
    assert value["x_probe_level_accuracy"] > max(p["x_probe_level_accuracy"] for p in permuted)
    assert all(p["x_probe_accuracy"] == value["x_probe_accuracy"] for p in permuted)
    chance = np.mean([p["mean_patch_probe_right_group"] for p in permuted])
    assert value["mean_patch_probe_right_group"] == pytest.approx(chance, abs=0.1)
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["x_probe_accuracy"] < 0.16 and shuffled["x_knn_accuracy"] < 0.16


def test_class_detectors_alone_beat_no_null(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 60)
    flat = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))[torch.from_numpy(labels)]
    x = flat * 2 + torch.randn(720, 64, generator=torch.Generator().manual_seed(2)) * 4
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [LevelInformation])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(20)]
    right = [p["x_probe_right_group"] for p in permuted]
    assert value["x_probe_accuracy"] > 0.5
    assert min(right) - 0.02 < value["x_probe_right_group"] < max(right) + 0.02


def test_depths_and_permuted_classes_in_the_table(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 20)
    x = embedded(animals, labels, noise=6)
    (evaluator,) = measured(animals, one_batch(x.relu(), labels, x=x), [LevelInformation])
    table = evaluator.tables()["levels"]
    assert set(table["feature"]) == {"x", "z"} and set(table["depth"]) == {1, 2}
    assert dict(zip(table["depth"], table["groups"])) == {1: 2, 2: 6}
    assert set(table["measure"]) == {
        *(f"{p}_{kind}" for p in ("probe", "knn") for kind in ("level_accuracy", "right_group")),
        "variance_share",
    }
    row = table[(table["feature"] == "x") & (table["measure"] == "probe_level_accuracy")]
    assert row["value"].mean() == pytest.approx(evaluator.compute()["x_probe_level_accuracy"])
    nulls = [
        evaluator.compute(permutation=p)["x_probe_level_accuracy"]
        for p in evaluator.context.permutations
    ]
    assert row["permuted"].mean() == pytest.approx(np.mean(nulls))
    assert (table["permuted_most"] >= table["permuted"]).all()
    np.testing.assert_allclose(table["excess"], table["value"] - table["permuted"])


def test_other_sources_of_latents_measure_z_alone(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 10)
    batch = one_batch(np.random.default_rng(0).random((120, 8), np.float32), labels)
    (evaluator,) = measured(animals, batch, [LevelInformation], source="random")
    numbers = evaluator.compute()
    assert all(np.isnan(numbers[k]) for k in numbers if not k.startswith(("z_", "n_z_", "n_im")))
    assert np.isfinite(numbers["z_probe_accuracy"])


def test_only_the_most_variable_latents_are_probed(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 20)
    z = np.concatenate([np.eye(12)[labels], 0.001 * np.random.rand(240, 50)], 1).astype(np.float32)
    batch = one_batch(z, labels)
    options = {"probe_latents": 12}
    (evaluator,) = measured(animals, batch, [LevelInformation], options=options)
    assert evaluator._probes.latents.tolist() == list(range(12))
    assert evaluator.compute()["z_probe_accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0}, "ridge: out of range; given 0(.0)?; allowed: above 0"),
        ({"neighbours": 0}, "neighbours: out of range; given 0(.0)?; allowed: 1 or more"),
    ],
)
def test_options_are_checked(animals, one_batch, measured, options, message):
    batch = one_batch(np.ones((24, 2), np.float32), np.repeat(np.arange(12), 2))
    with pytest.raises(ConfigError, match=message):
        measured(animals, batch, [LevelInformation], options=options)
