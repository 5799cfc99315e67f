"""Explanations against brute force, and steering of latents whose effect is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.detection import Detection, find_explanations
from taxolens.registry.evaluators.parts.node_f1 import Halves
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.readout import kl_divergence
from taxolens.registry.evaluators.parts.steering import STEPS, find_strength
from taxolens.registry.taxonomies import Taxonomy

LABELS = np.repeat(np.arange(12), 20)


@pytest.fixture
def planted(animals, one_batch, measured) -> Any:
    """Indicators z of all nodes but the root, one latent each, and x = z @ orthonormal rows."""

    def run(shuffle: bool = False, model: Any = None, **options: Any) -> Detection:
        source = PlantedLatents(
            animals, recall=1.0, false_alarm=0.0, binary=True, shuffle_nodes=shuffle
        )
        z = source.encode(labels=torch.from_numpy(LABELS), index=torch.arange(len(LABELS)))
        z = z[:, 1:]
        rows = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)))[0]
        rows = rows[: z.shape[1]]
        batch = one_batch(z, LABELS, x=z @ rows)
        intervene = None if model is None else model((z @ rows)[:, None], rows)
        (evaluator,) = measured(
            animals, batch, [Detection], options=options, W_dec=3 * rows, intervene=intervene
        )
        return evaluator

    return run


@pytest.fixture
def knows_the_tree(animals, toy_model) -> Any:
    """A model whose output for a class is the sum of the directions of all nodes above it."""

    def make(x: torch.Tensor, rows: torch.Tensor) -> Any:
        members = animals.membership[:, animals.distinct_nodes[1:]].T.astype(np.float32)
        return toy_model(x, rows.T, torch.from_numpy(members), np.arange(12))

    return make


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_explanations_by_brute_force(seed: int, random_dag, one_batch, measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(taxonomy.classes), 60)
    z = np.where(rng.random((60, 6)) < rng.random(6), rng.random((60, 6)), 0).astype(np.float32)
    batch = one_batch(z, labels)
    (evaluator,) = measured(taxonomy, batch, [Detection], options={"min_fired": 3})
    found = evaluator.explain(evaluator.nodes)
    fit = batch.is_fit.numpy()
    below = taxonomy.membership[batch.labels.numpy()]
    fires = batch.z.numpy() > 0
    for j in range(6):
        if fires[fit, j].sum() < 3 or not len(evaluator.nodes):
            assert found.node[j] == -1 and math.isnan(found.f1[j])
            continue

        def f1(v: int, half: np.ndarray, j: int = j) -> float:
            hits = (fires[half, j] & below[half, v]).sum()
            return 2 * hits / (fires[half, j].sum() + below[half, v].sum())

        scores = {v: f1(v, fit) for v in evaluator.nodes}
        best = max(scores.values())
        ties = [v for v, score in scores.items() if score == best]
        v = found.node[j]
        assert v in ties and found.fit_f1[j] == pytest.approx(best)
        assert taxonomy.n_leaves[v] == taxonomy.n_leaves[ties].min()
        inside, outside = below[~fit, v], ~below[~fit, v]
        if inside.any():
            recall = fires[~fit, j][inside].mean()
            assert found.recall[j] == pytest.approx(recall)
            assert found.f1[j] == pytest.approx(f1(v, ~fit))
            alarms = fires[~fit, j][outside].mean()
            expected = (recall + 1 - alarms) / 2
            assert found.balanced_accuracy[j] == pytest.approx(expected, nan_ok=True)


def test_a_balanced_accuracy_that_is_met_exactly_counts(one_batch: Any, measured: Any) -> None:
    """On the score half it fires on 2 of 3 images of a and on 1 of 6 others: ½(2/3 + 1 − 1/6)."""
    taxonomy = Taxonomy.from_edges([("r", "a"), ("r", "b")])
    labels = np.array([0] * 6 + [1] * 12)
    z = np.zeros((18, 1), dtype=np.float32)
    z[[0, 2, 4, 1, 3, 7]] = 1  # every other image of a class is of the fit half
    options = {"min_fired": 1}
    (evaluator,) = measured(taxonomy, one_batch(z, labels), [Detection], options=options)
    numbers = evaluator.compute()
    assert numbers["balanced_accuracy"] == pytest.approx(0.75) and numbers["detected_share"] == 1
    options["detected"] = 0.751
    (evaluator,) = measured(taxonomy, one_batch(z, labels), [Detection], options=options)
    assert evaluator.compute()["detected_share"] == 0


def test_node_indicators_are_explained_perfectly(planted, animals) -> None:
    evaluator = planted()
    found = evaluator.compute()
    for name in ("balanced_accuracy", "f1", "detected_share"):
        assert found[name] == 1.0, name
    explained = evaluator.explain(evaluator.nodes).node
    assert np.array_equal(explained, animals.distinct_nodes[1:])
    # the best group of a leaf's latent is its genus, half of which it misses
    assert found["group_balanced_accuracy"] > 0.8
    moved = [evaluator.compute(permutation=animals.permutation(s)) for s in range(5)]
    assert found["group_balanced_accuracy"] > max(m["group_balanced_accuracy"] for m in moved)
    assert found["group_f1"] > max(m["group_f1"] for m in moved)


def test_the_root_explains_nothing(animals, one_batch, measured) -> None:
    """A latent that fires on every image: the root would have an F1 of 1 and say nothing."""
    batch = one_batch(np.ones((len(LABELS), 1), dtype=np.float32), LABELS)
    (evaluator,) = measured(animals, batch, [Detection])
    for nodes in (evaluator.nodes, evaluator.groups):
        found = evaluator.explain(nodes)
        assert animals.root not in nodes
        assert animals.parents[found.node[0]] == (animals.root,)
        assert found.fit_f1[0] == pytest.approx(2 / 3)  # a family has half of the images
        assert found.balanced_accuracy[0] == 0.5


def test_a_flat_tree_has_no_group_to_explain_by(one_batch, measured) -> None:
    flat = Taxonomy.from_edges([("r", c) for c in "abcd"])
    labels = np.repeat(np.arange(4), 12)
    (evaluator,) = measured(
        flat, one_batch(np.eye(4, dtype=np.float32)[labels], labels), [Detection]
    )
    found = evaluator.explain(evaluator.groups)
    assert found.node.tolist() == [-1] * 4
    assert all(np.isnan(rate).all() for rate in (*found[1:], found.balanced_accuracy))
    assert evaluator.compute()["balanced_accuracy"] == 1.0


def test_explanations_of_counts_written_down() -> None:
    """Nodes 0 and 7 hold classes 0 and 1; the score half has 1 image of the first, 0 of the second."""
    fit = sparse.csr_array(np.array([[4, 0, 0], [0, 4, 0], [1, 0, 0]], dtype=np.float32))
    score = np.array([[1, 0, 1], [0, 0, 2], [1, 0, 0]])
    members = np.array([[True, False], [False, True], [False, False]])
    images = np.array([5, 5, 5]), np.array([1, 0, 4])
    halves = Halves(fit, sparse.csr_array(score), 1)
    found = find_explanations(halves, members, *images, np.array([0, 7]), 3)
    assert found.node.tolist() == [0, 7, -1]  # the last fires too rarely
    nan = np.nan
    for name, wanted in {
        "fit_f1": [8 / 9, 8 / 9, nan],
        "recall": [1, nan, nan],
        "false_alarms": [1 / 4, 2 / 5, nan],
        "f1": [2 / 3, nan, nan],
        "balanced_accuracy": [7 / 8, nan, nan],
    }.items():
        assert getattr(found, name) == pytest.approx(wanted, nan_ok=True), name


def test_latents_of_random_classes_are_explained_no_better_than_by_another_tree(planted, animals):
    evaluator = planted(shuffle=True)
    found = evaluator.compute()["group_balanced_accuracy"]
    moved = [
        evaluator.compute(permutation=animals.permutation(s))["group_balanced_accuracy"]
        for s in range(5)
    ]
    assert min(moved) - 0.03 < found < max(moved) + 0.03
    shuffled = planted().compute(shuffled=True)["balanced_accuracy"]
    assert shuffled == pytest.approx(0.5, abs=0.12)


def test_a_latent_of_a_node_steers_that_node(planted, animals, knows_the_tree) -> None:
    evaluator = planted(model=knows_the_tree, n_latents=100)
    found = evaluator.compute()
    steered, random = evaluator.steered()
    assert found["steered"] == len(steered.kl) == animals.distinct_nodes.size - 1
    for kl in (steered.kl, random.kl[np.isfinite(random.kl)]):
        assert kl == pytest.approx(0.1, rel=0.051)
    assert found["steering"] > 0.05 and found["steering_excess"] > 0.05
    assert abs(found["steering_direction"]) < 0.02
    assert found["group_steering_rank"] > 0.8 and found["steering_rank"] > 0.85
    moved = [evaluator.compute(permutation=animals.permutation(s)) for s in range(4)]
    for name in ("group_steering", "group_steering_rank"):
        assert found[name] > max(m[name] for m in moved), name


def test_effects_by_hand(planted, animals, knows_the_tree) -> None:
    evaluator = planted(model=knows_the_tree, n_latents=5, n_directions=2, max_images=9)
    steered, random = evaluator.steered()
    model = evaluator.context.intervene
    index = torch.from_numpy(evaluator._images.index(fit=False))
    assert len(index) == 9 and len(random.kl) == 2
    rows = torch.nn.functional.normalize(evaluator.context.W_dec, dim=1)

    def p(strength: float, j: int) -> torch.Tensor:
        return model(index, lambda x: x + strength * rows[j]).logits.double().softmax(1)

    node = evaluator.explain(evaluator.nodes).node
    rises: list[list[float]] = []
    for j, strength in zip(evaluator.sample(), steered.strength):
        moved = p(strength, j) - p(0.0, j)
        rises.append(
            [float(moved[:, animals.leaves(node[i])].sum(1).mean()) for i in evaluator.sample()]
        )
    table = np.array(rises)
    own, others, _, rank = evaluator.effects(node)
    assert np.allclose(own, np.diagonal(table), atol=1e-5)
    apart = ~np.eye(5, dtype=bool)
    assert np.allclose(others, [table[apart[:, i], i].mean() for i in range(5)], atol=1e-5)
    less = [np.mean(table[apart[:, i], i] < table[i, i]) for i in range(5)]
    assert np.allclose(rank, less)


def test_without_a_head_a_probe_reads_the_embedding(planted, animals, toy_model) -> None:
    evaluator = planted(model=lambda x, rows: toy_model(x, rows.T), n_latents=100)
    found = evaluator.compute()
    assert evaluator._readout(evaluator.context.intervene).name == "probe"
    assert found["steering_rank"] > 0.8 and found["steering_excess"] > 0.02
    assert evaluator.tables()["steering"]["kl"].to_numpy() == pytest.approx(0.1, rel=0.051)
    assert set(evaluator.figures()) == {"balanced_accuracy", "steering"}


def test_what_is_not_steered_has_a_reason(planted, knows_the_tree) -> None:
    def reason(**given: Any) -> str:
        evaluator = planted(**given)
        found = evaluator.compute()
        assert math.isnan(found["steering"]) and found["steered"] == 0
        assert found["balanced_accuracy"] == 1.0
        return evaluator.tables()["steering"]["reason"].item()

    assert reason() == "no model is available"
    assert reason(model=knows_the_tree, n_latents=0) == "n_latents is 0"
    assert reason(model=knows_the_tree, kl=1e9) == "no direction reaches a KL of 1e+09"


def test_the_strength_of_a_kl() -> None:
    clean = torch.zeros(3, 4).log_softmax(1)
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    calls: list[float] = []

    def outputs(strength: float) -> torch.Tensor:
        calls.append(strength)
        return (strength * direction).log_softmax(1)

    for start in (1e-4, 1.0, 1e4):
        calls.clear()
        strength, steered = find_strength(outputs, clean, 0.1, start)
        assert steered is not None and len(calls) <= STEPS
        assert torch.equal(steered, outputs(strength))
        assert float(kl_divergence(clean, steered).mean()) == pytest.approx(0.1, rel=0.051)
    strength, steered = find_strength(lambda s: clean, clean, 0.1, 1.0)
    assert math.isnan(strength) and steered is None


def test_a_step_is_found_by_halving() -> None:
    """KL that jumps from 0 past the goal and back down to it has no square law to follow."""
    clean = torch.zeros(1, 2).log_softmax(1)

    def outputs(strength: float) -> torch.Tensor:
        return torch.tensor([[0.0, 0.9 + 0.1 * strength if strength > 0.5 else 0.0]]).log_softmax(1)

    strength, steered = find_strength(outputs, clean, 0.11, 1e-3)
    assert steered is not None and strength > 0.5


def test_options_are_checked() -> None:
    for options in (
        {"min_fired": 0},
        {"detected": 0.4},
        {"n_latents": -1},
        {"max_images": 0},
        {"kl": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Detection.Options(**options)
