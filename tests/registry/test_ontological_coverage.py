"""`ontological_coverage` against loops over nodes, latents and thresholds, and on known truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.ontological_coverage import OntologicalCoverage
from taxolens.registry.evaluators.parts import node_f1
from taxolens.registry.evaluators.parts.planted import PlantedLatents

few = settings(max_examples=10, deadline=None)


def f1_of(fires, belongs):
    hits = (fires & belongs).sum()
    return 2 * hits / max(fires.sum() + belongs.sum(), 1)


@few
@given(seed=st.integers(0, 10**6), block=st.sampled_from([1, 50, 2**22]))
def test_against_loops(random_dag, one_batch, measured, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_f1, "BLOCK", block)
        check_against_loops(random_dag, one_batch, measured, seed)


def check_against_loops(random_dag, one_batch, measured, seed):
    taxonomy = random_dag(seed, 10).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes, m = len(taxonomy.classes), 5
    labels = rng.integers(0, n_classes, 50)
    likes = rng.random((n_classes, m))[labels]
    z = (rng.random((50, m)) * likes * (rng.random((50, m)) < likes)).astype(np.float32)
    z[:, 1] = 0
    batch = one_batch(z, labels)
    options = {"survival": (1.0, 0.6, 0.3)}
    (evaluator,) = measured(taxonomy, batch, [OntologicalCoverage], options=options)
    z, is_fit = batch.z.numpy(), batch.is_fit.numpy()
    thresholds = np.maximum(evaluator._histogram.thresholds.values, 1e-12)
    for shuffled in (False, True):
        truth = batch.labels_of(shuffled).numpy()
        for place in (np.arange(n_classes), rng.permutation(n_classes)):
            nodes = np.arange(len(taxonomy.nodes))
            found = evaluator.detectors(nodes, place, shuffled)
            for v in nodes:
                belongs = taxonomy.membership[place[truth], v]
                best = max(
                    f1_of(z[is_fit, j] >= thresholds[j, t], belongs[is_fit])
                    for j in range(m)
                    for t in range(3)
                )
                assert found.fit_f1[v] == pytest.approx(best)
                prevalence = belongs[~is_fit].mean()
                out = not belongs[is_fit].any() or not belongs[~is_fit].any()
                if out or 2 * prevalence / (1 + prevalence) >= 0.5:
                    assert np.isnan(found.f1[v]) and np.isnan(found.recall[v])
                    continue
                j, t = found.latent[v], found.bin[v]
                fires = (z[:, j] >= thresholds[j, t]) & (j >= 0)
                assert j < 0 or f1_of(fires[is_fit], belongs[is_fit]) == pytest.approx(best)
                hits = (fires & belongs)[~is_fit].sum()
                assert found.f1[v] == pytest.approx(f1_of(fires[~is_fit], belongs[~is_fit]))
                assert found.recall[v] == pytest.approx(hits / belongs[~is_fit].sum())
                fired = fires[~is_fit].sum()
                expected = hits / fired if fired else np.nan
                assert found.precision[v] == pytest.approx(expected, nan_ok=True)
                assert found.fires_on[v] == pytest.approx(fires[~is_fit].mean())


def indicators(taxonomy, labels, **kwargs):
    latents = PlantedLatents(taxonomy, **{"recall": 1.0, "false_alarm": 0.0, **kwargs})
    labels = torch.from_numpy(labels)
    return latents, latents.encode(labels=labels, index=torch.arange(len(labels)))


@pytest.mark.parametrize("binary", [True, False])
def test_node_indicators_cover_everything(animals, one_batch, measured, binary):
    labels = np.repeat(np.arange(12), 10)
    latents, z = indicators(animals, labels, binary=binary)
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    numbers = evaluator.compute()
    assert numbers["internal_f1"] == numbers["internal_covered_share"] == 1
    assert numbers["leaf_f1"] == numbers["leaf_covered_share"] == 1
    # Always yes reaches F1 .67 on each of the families and 1 on the root: left out.
    assert numbers["internal_nodes"] == 6 and numbers["leaf_nodes"] == 12
    table = evaluator.tables()["nodes"]
    assert [animals.nodes[latents.node[j]] for j in table["latent"]] == table["node"].tolist()
    assert (table[["precision", "recall", "f1", "fit_f1"]] == 1).all(axis=None)
    assert (table["excess"][table["kind"] == "internal"] > 0).all()


def test_planted_detectors_score_what_their_errors_leave(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 200)
    _, z = indicators(animals, labels, recall=0.8, false_alarm=0.01)
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    expected = 2 * 0.8 / (0.8 + 0.01 * 5 + 1)  # a genus: two classes of twelve, 5 times others
    assert evaluator.compute()["internal_f1"] == pytest.approx(expected, abs=0.02)


def test_leaves_alone_cover_no_internal_node(animals, one_batch, measured):
    """A flat classifier: F1 of a genus by one of its two classes is 2/3, no more than permuted."""
    labels = np.repeat(np.arange(12), 10)
    z = np.eye(12, dtype=np.float32)[labels]
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    numbers = evaluator.compute()
    assert numbers["leaf_f1"] == 1
    assert numbers["internal_f1"] == pytest.approx(2 / 3)
    for permutation in evaluator.context.permutations:
        assert evaluator.compute(permutation=permutation) == pytest.approx(numbers)
    assert evaluator.tables()["nodes"]["excess"].dropna().abs().max() < 1e-9


def test_nulls_of_the_indicators(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 40)
    _, z = indicators(animals, labels)
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(8)]
    assert max(p["internal_f1"] for p in permuted) < value["internal_f1"]
    assert all(p["leaf_f1"] == value["leaf_f1"] for p in permuted)
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["internal_f1"] < 0.4 and shuffled["leaf_f1"] < 0.25


def test_the_choice_is_not_scored_on_its_own_images(animals, one_batch, measured):
    """Many latents of pure noise: the best of them looks good only where it was chosen."""
    labels = np.repeat(np.arange(12), 8)
    z = np.random.default_rng(0).random((96, 300)).astype(np.float32)
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    found = evaluator.detectors(evaluator.leaves)
    assert found.fit_f1.mean() > 0.45 and found.f1.mean() < 0.25


def test_a_node_for_which_nothing_fires_scores_zero(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 4)
    batch = one_batch(np.zeros((48, 3), np.float32), labels)
    (evaluator,) = measured(animals, batch, [OntologicalCoverage])
    assert evaluator.compute()["internal_f1"] == 0 and evaluator.compute()["leaf_nodes"] == 12
    assert (evaluator.tables()["nodes"]["latent"] == -1).all()


def test_a_class_without_images_in_a_half_is_left_out(animals, one_batch, measured):
    labels = np.append(np.repeat(np.arange(11), 4), 11)  # class 11 has one image, on the fit half
    z = np.eye(12, dtype=np.float32)[labels]
    (evaluator,) = measured(animals, one_batch(z, labels), [OntologicalCoverage])
    assert evaluator.compute()["leaf_nodes"] == 11


def test_more_images_do_not_leave_the_memo_stale(animals, one_batch, measured):
    labels = np.repeat(np.arange(12), 4)
    batch = one_batch(np.eye(12, dtype=np.float32)[labels], labels)
    (evaluator,) = measured(animals, batch, [OntologicalCoverage])
    assert evaluator.compute()["leaf_f1"] == 1
    batch = one_batch(np.zeros((48, 12), np.float32), labels)
    evaluator.context.update(batch)
    evaluator.update(batch)
    assert evaluator.compute()["leaf_f1"] == pytest.approx(2 / 3)


def test_options_are_checked(animals, one_batch, measured):
    batch = one_batch(np.ones((24, 2), np.float32), np.repeat(np.arange(12), 2))
    with pytest.raises(
        ConfigError, match=r"covered: out of range; given 2(.0)?; allowed: a number in \(0, 1\]"
    ):
        measured(animals, batch, [OntologicalCoverage], options={"covered": 2})
    with pytest.raises(
        ConfigError, match=r"survival: not possible; given .*numbers that fall strictly from 1"
    ):
        OntologicalCoverage.Options(survival=(1.0, 0.2, 0.5))
