"""`latent_graph` against loops over dense latents; planted trees, absorption, and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import spearmanr
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import EvaluationContext
from taxolens.registry.evaluators.latent_graph import QUALITIES, LatentGraph
from taxolens.registry.evaluators.monosemanticity import Monosemanticity
from taxolens.registry.evaluators.parts import samples
from taxolens.registry.evaluators.parts.latent_graphs import (
    WEIGHTINGS,
    Graph,
    build_graph,
    count_edges,
    firing_values,
    levels,
    mean_cosine,
    measure_parents,
    mono_scores,
    permute_activations,
    reach,
    similarities,
    strongest_parents,
    weigh_edges,
    without_cycles,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.samples import FiringStore
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
Edges = set[tuple[int, int]]
seeds = given(seed=st.integers(0, 10**6))


def random_z(seed: int, n: int = 40, m: int = 9) -> np.ndarray:
    """Latents of which some fire only where another one does."""
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((n, m)) < rng.uniform(0.1, 0.9, m), rng.random((n, m)) + 0.1, 0)
    for child in range(1, m):
        if rng.random() < 0.6:
            z[:, child] *= z[:, rng.integers(child)] > 0
    return z.astype(np.float32)


def csr(z: np.ndarray) -> sparse.csr_array:
    return firing_values(sparse.csr_array(z))


def pairs_of(graph: Graph) -> Edges:
    return set(zip(graph.parent.tolist(), graph.child.tolist()))


def make_graph(edges: Edges, weight: dict[tuple[int, int], float] | None = None) -> Graph:
    ordered = sorted(edges)
    ends = np.array(ordered, dtype=np.int64).reshape(-1, 2).T
    return Graph(*ends, np.array([(weight or {}).get(edge, 1.0) for edge in ordered]))


def weight_of(z: np.ndarray, p: int, c: int, weighting: str) -> float:
    """w(p | c) by its definition."""
    here = z[:, c] > 0
    if weighting == "firings":
        return float((z[here, p] > 0).mean())
    if weighting == "activations":
        return float(z[here & (z[:, p] > 0), c].sum() / z[here, c].sum())
    lengths = np.linalg.norm(z[here, p]) * np.linalg.norm(z[here, c])
    return float(z[here, p] @ z[here, c] / lengths) if lengths else 0.0


@pytest.mark.parametrize("dense", [0.0, 1.0], ids=["dense products", "sparse products"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@seeds
@settings(max_examples=15, deadline=None)
def test_weights_against_the_definition(weighting: str, dense: float, seed: int) -> None:
    z = random_z(seed).astype(np.float64)
    latents = np.flatnonzero((z > 0).sum(0) >= 3)
    expected = {
        (p, c): weight_of(z, p, c, weighting)
        for p in latents.tolist()
        for c in latents.tolist()
        if weight_of(z, p, c, weighting) > 0.7 > weight_of(z, c, p, weighting)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "DENSE", dense)
        patch.setattr(samples, "ROWS", 7)
        found = weigh_edges(csr(z), latents, weighting, 0.7, block=4)
    assert pairs_of(found) == set(expected)
    for p, c, w in zip(*found):
        assert w == pytest.approx(expected[p, c])


def test_a_weight_equal_to_the_threshold_is_no_edge() -> None:
    z = np.zeros((40, 2), dtype=np.float32)
    z[:20, 0] = z[1:11, 1] = 1
    z[[1, 21], 1] = [0, 1]  # P(p|c) = .9
    latents = np.arange(2)
    assert pairs_of(weigh_edges(csr(z), latents, "firings", 0.9)) == set()
    assert pairs_of(weigh_edges(csr(z), latents, "firings", 0.89)) == {(0, 1)}
    # P(c|p) = 9/20: at this threshold the reverse is not below it.
    assert pairs_of(weigh_edges(csr(z), latents, "firings", 0.45)) == set()


def descendants(edges: Edges) -> dict[int, set[int]]:
    below: dict[int, set[int]] = {v: set() for edge in edges for v in edge}
    for _ in below:
        for p, c in edges:
            below[p] |= {c} | below[c]
    return below


def random_dag_edges(seed: int, n: int = 12) -> Edges:
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    return {
        (int(order[a]), int(order[b])) for b in range(n) for a in range(b) if rng.random() < 0.3
    }


@seeds
@settings(max_examples=40, deadline=None)
def test_the_transitive_reduction_against_paths(seed: int) -> None:
    edges = random_dag_edges(seed)
    graph, below = make_graph(edges), descendants(edges)
    found = reach(graph, 12)
    direct = {(p, c) for p, c in edges if not any(c in below[q] for x, q in edges if x == p)}
    assert pairs_of(graph.where(~found.implied)) == direct
    for i, bits in enumerate(found.below):
        at_or_below = {int(found.nodes[j]) for j in range(len(found.nodes)) if bits >> j & 1}
        assert at_or_below == below[int(found.nodes[i])] | {int(found.nodes[i])}
    longest = levels(graph, 12)
    for p, c in edges:
        assert longest[c] > longest[p]
    for c in range(12):
        above = [longest[p] for p, child in edges if child == c]
        assert longest[c] == (max(above) + 1 if above else 0)


@seeds
@settings(max_examples=40, deadline=None)
def test_the_graph_against_the_protocol_step_by_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fired = rng.integers(1, 6, 12)
    weight = {(p, c): rng.integers(1, 4) / 4 for p in range(12) for c in range(12) if p != c}
    edges = {edge for edge in weight if rng.random() < 0.15}
    tree, most, least = bool(rng.integers(2)), int(rng.integers(1, 5)), int(rng.integers(0, 5))
    found = build_graph(
        make_graph(edges, weight), fired, tree=tree, max_children=most, min_descendants=least
    )

    below = descendants(edges)
    kept = {(p, c) for p, c in edges if p not in below[c] or fired[p] > fired[c]}
    if tree:
        best = {
            c: min((p for p, x in kept if x == c), key=lambda p: (-weight[p, c], fired[p], p))
            for _, c in kept
        }
        kept = {(p, c) for c, p in best.items()}
    below = descendants(kept)
    kept = {(p, c) for p, c in kept if not any(c in below[q] for x, q in kept if x == p)}
    many = {v for v in range(12) if sum(p == v for p, _ in kept) > most}
    kept = {(p, c) for p, c in kept if p not in many and c not in many}
    while True:
        below, inner = descendants(kept), {c for _, c in kept}
        few = {v for v in below if v not in inner and len(below[v]) < least and below[v]}
        if not few:
            break
        kept = {(p, c) for p, c in kept if p not in few}
    assert pairs_of(found) == kept


@seeds
@settings(max_examples=30, deadline=None)
def test_no_cycle_is_left_and_nothing_else_is_removed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = {(a, b) for a in range(8) for b in range(8) if a != b and rng.random() < 0.2}
    fired = rng.integers(1, 5, 8)
    kept = pairs_of(without_cycles(make_graph(edges), fired))
    assert all(v not in below for v, below in descendants(kept).items())
    below = descendants(edges)
    for p, c in edges - kept:
        assert p in below[c] and fired[p] <= fired[c]


def test_of_equal_parents_the_one_that_fires_least_is_kept() -> None:
    graph = Graph(np.array([0, 1, 2, 3]), np.array([4, 4, 4, 4]), np.array([1.0, 1.0, 1.0, 0.9]))
    assert pairs_of(strongest_parents(graph, np.array([9, 5, 5, 1, 1]))) == {(1, 4)}


@seeds
@settings(max_examples=25, deadline=None)
def test_parents_that_are_constant_on_a_child_are_equally_strong(seed: int) -> None:
    # Their cosines are equal, but for rounding: that of a child's activations with a constant.
    rng = np.random.default_rng(seed)
    fires = rng.random((60, 5)) < 0.9
    child = np.where(rng.random(60) < 0.5, rng.uniform(0.5, 1.5, 60), 0)
    z = np.where(fires | (child[:, None] > 0), rng.uniform(0.1, 9, 5), 0)
    z = np.column_stack([z, child]).astype(np.float32)
    fired = (z > 0).sum(0)
    edges = weigh_edges(csr(z), np.arange(6), "cosine", 0.8)
    edges = edges.where(edges.child == 5)
    least = min(edges.parent, key=lambda p: (fired[p], p), default=None)
    kept = pairs_of(strongest_parents(edges, fired))
    assert kept == ({(least, 5)} if least is not None else set())


@seeds
@settings(max_examples=25, deadline=None)
def test_measures_against_loops(seed: int) -> None:
    z = random_z(seed).astype(np.float64)
    edges = random_dag_edges(seed, 9)
    graph = make_graph(edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taxolens.registry.evaluators.parts.latent_graphs.ENTRIES", 50)
        counts = count_edges(csr(z), graph)
    for e, (p, c) in enumerate(zip(graph.parent, graph.child)):
        both = (z[:, p] > 0) & (z[:, c] > 0)
        assert counts.both[e] == both.sum()
        assert counts.stronger[e] == (z[both, p] > z[both, c]).sum()
        assert counts.child[e] == (z[:, c] > 0).sum()

    parents = measure_parents(csr(z), graph)
    assert parents.latent.tolist() == sorted({p for p, _ in edges})
    for i, p in enumerate(parents.latent):
        children = [c for q, c in edges if q == p]
        largest = z[:, children].max(1)
        either, own = largest > 0, z[:, p] > 0
        assert parents.children[i] == len(children)
        assert parents.both[i] == (either & own).sum()
        share = (either & own).sum() / own.sum() if own.any() else np.nan
        assert parents.refinement[i] == pytest.approx(share, nan_ok=True)
        a, b = z[either, p], largest[either]
        constant = len(a) < 2 or not np.ptp(a) or not np.ptp(b)
        rank = np.nan if constant else spearmanr(a, b).statistic
        assert parents.correlation[i] == pytest.approx(rank, nan_ok=True)


@seeds
@settings(max_examples=25, deadline=None)
def test_similarities_against_pairs_of_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, k = random_z(seed).astype(np.float64), 4
    unit = rng.normal(size=(len(z), 5)) + 1
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    baseline = cosine[np.triu_indices(len(z), 1)].mean()
    assert mean_cosine(unit) == pytest.approx(baseline)
    edges = random_dag_edges(seed, 9)
    found = similarities(csr(z), unit, make_graph(edges), k)

    top = {c: np.argsort(-z[:, c], kind="stable")[:k] for c in range(9) if (z[:, c] > 0).sum() >= k}
    own = [
        np.mean([cosine[i, j] for i in top[c] for j in top[c] if i != j]) - baseline
        for c in sorted({c for _, c in edges})
        if c in top
    ]
    assert found.own == pytest.approx(own)
    for value, p in zip(found.siblings, sorted({p for p, _ in edges})):
        children = [c for q, c in sorted(edges) if q == p and c in top]
        each = [
            np.mean([cosine[i, j] for i in top[a] for j in top[b] if i != j])
            for n, a in enumerate(children)
            for b in children[:n]
        ]
        expected = np.mean(each) - baseline if each else np.nan
        assert value == pytest.approx(expected, nan_ok=True)


def test_mono_scores_are_those_of_monosemanticity(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z = random_z(5, 60)
    z[:, 0] = 0.5 + np.random.default_rng(0).random(60)  # fires everywhere
    z[:, 1] = 2.0  # is constant
    z[:, 2] = 0.0
    z[7, 2] = 1.0  # one image
    x = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)
    batch = one_batch(z, np.arange(60) % 12, x=x)
    (reference,) = measured(animals, batch, [Monosemanticity])
    unit = torch.nn.functional.normalize(batch.x, dim=1).double().numpy()
    found = mono_scores(csr(batch.z.numpy()), unit)
    assert np.isnan(found[[1, 2]]).all()
    np.testing.assert_allclose(found, reference.scores(), atol=1e-5)


@seeds
@settings(max_examples=20, deadline=None)
def test_a_permutation_of_activations_keeps_rates_and_activations(seed: int) -> None:
    z = random_z(seed)
    moved = permute_activations(csr(z), np.random.default_rng(seed)).toarray()
    np.testing.assert_allclose(np.sort(moved, axis=0), np.sort(z, axis=0), rtol=1e-6)


def planted(taxonomy: Taxonomy, one_batch: Measured, **kwargs: Any) -> tuple[np.ndarray, Any]:
    """Nodes of the latents, and a batch of 60 images a class; embeddings follow the tree."""
    labels = np.repeat(np.arange(len(taxonomy.classes)), 60)
    latents = PlantedLatents(taxonomy, recall=1.0, false_alarm=0.0, **kwargs)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    batch = one_batch(z, labels)
    embedding = torch.from_numpy(taxonomy.membership[batch.labels.numpy()].astype(np.float32))
    return latents.node, replace(batch, embedding=embedding)


@pytest.mark.parametrize("shape", ["dag", "tree"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_node_indicators_give_the_tree_back(
    animals: Taxonomy, one_batch: Measured, measured: Measured, weighting: str, shape: str
) -> None:
    # Of activations drawn at random the cosine is largest with a latent that always fires.
    node, batch = planted(animals, one_batch, binary=(weighting, shape) == ("cosine", "tree"))
    options = {"weighting": weighting, "shape": shape}
    (evaluator,) = measured(animals, batch, [LatentGraph], size=100, options=options)
    numbers = evaluator.compute()
    graph = evaluator.measured.graph
    named = {(int(node[p]), int(node[c])) for p, c in zip(graph.parent, graph.child)}
    true = {(p, v) for v, parents in enumerate(animals.parents) for p in parents}
    assert named == true
    assert numbers["n_edges"] == numbers["n_measured_edges"] == 2 + 6 + 12
    assert numbers["n_parents"] == numbers["n_measured_parents"] == 1 + 2 + 6
    assert numbers["n_roots"] == 1 and numbers["n_latents"] == 21
    assert numbers["n_pairs"] == 2 * 1 + 6 * 2 + 12 * 3  # each with all that are above it
    assert numbers["implication"] == numbers["refinement"] == 1.0
    assert numbers["children"] == pytest.approx(20 / 9)
    assert numbers["depth"] == numbers["max_depth"] == 3
    # Species are more alike than genera. A latent of equal images has the best similarity.
    assert 0 < numbers["sibling_similarity"] < numbers["sibling_bound"]
    assert numbers["abstractness"] == 1.0

    # The root's latent, which fires everywhere, is by chance the parent of all; no other one is.
    without = replace(batch, z=batch.z[:, 1:])
    (evaluator,) = measured(animals, without, [LatentGraph], options=options)
    numbers = evaluator.compute()
    assert (numbers["n_edges"], numbers["n_roots"]) == (6 + 12, 2)
    if weighting != "cosine":
        assert numbers["chance_n_edges"] == 0


def test_of_equal_activations_the_top_images_are_not_those_of_the_first_classes(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 60)  # sorted by class, as folders of images are
    parent = rng.random(720) < 0.8
    children = parent[:, None] & (rng.random((720, 6)) < 0.4)
    batch = one_batch(np.column_stack([parent, children]).astype(np.float32), labels)
    batch = replace(batch, embedding=torch.eye(12)[batch.labels])
    (evaluator,) = measured(animals, batch, [LatentGraph])
    numbers = evaluator.compute()
    assert numbers["n_edges"] == 6
    # Firings that are independent of the class: as random images.
    assert abs(numbers["sibling_bound"]) < 0.06
    assert abs(numbers["sibling_similarity"]) < 0.06


def test_the_table_has_every_weighting_and_shape(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch)
    (evaluator,) = measured(animals, batch, [LatentGraph])
    tables = evaluator.tables()
    assert len(tables["graphs"]) == 6 and set(tables["graphs"]["n_edges"]) == {20.0}
    assert len(tables["edges"]) == 20 and len(tables["parents"]) == 9
    assert evaluator.notes() == []


def test_dominance_and_soft_absorption(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """A child that takes over its parent's activation: their ranks are opposed."""
    labels = np.repeat(np.arange(12), 60)
    rng = np.random.default_rng(0)
    share = rng.random((len(labels), 1)).astype(np.float32)
    on = np.eye(12, dtype=np.float32)[labels]
    opposed = np.concatenate([on * (1 + share), 5 - share], axis=1)
    shared = np.concatenate([on * (1 + share), share + 0.5], axis=1)
    found = []
    for z in (opposed, shared):
        (evaluator,) = measured(animals, one_batch(z, labels), [LatentGraph])
        numbers = evaluator.compute()
        assert numbers["n_edges"] == 12
        found.append((numbers["conditional_correlation"], numbers["dominance"]))
    assert found[0] == pytest.approx((-1.0, 1.0)) and found[1] == pytest.approx((1.0, 0.0))


def test_hard_absorption_lowers_implication(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """Where the parent is silent on a part of a child's images, as hard absorption has it."""
    labels = np.repeat(np.arange(12), 100)
    on = np.eye(12, dtype=np.float32)[labels]
    parent = (np.arange(len(labels)) % 100 // 2 % 15 > 0).astype(np.float32)[:, None]
    (evaluator,) = measured(
        animals, one_batch(np.concatenate([on, parent], axis=1), labels), [LatentGraph]
    )
    numbers = evaluator.compute()
    assert numbers["implication"] == pytest.approx(0.92) and numbers["n_edges"] == 12
    assert numbers["refinement"] == 1.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_noise_is_what_permuted_activations_are(
    animals: Taxonomy, one_batch: Measured, measured: Measured, weighting: str
) -> None:
    """Independent latents, a few of which fire nearly always, so that there are edges by chance."""
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(12), 100)
    rate = np.append(np.full(10, 0.95), rng.uniform(0.05, 0.5, 50))
    z = np.where(rng.random((len(labels), 60)) < rate, rng.random((len(labels), 60)) + 0.5, 0)
    options = {"weighting": weighting, "max_children": 1.0, "draws": 5}
    batch = one_batch(z.astype(np.float32), labels)
    (evaluator,) = measured(animals, batch, [LatentGraph], options=options)
    numbers = evaluator.compute()
    assert numbers["n_edges"] > 100
    assert numbers["n_edges"] == pytest.approx(numbers["chance_n_edges"], rel=0.15)
    for name in ("implication", "refinement", "dominance", "conditional_correlation"):
        assert numbers[name] == pytest.approx(numbers[f"chance_{name}"], abs=0.05), name


def test_sparse_noise_has_no_edge(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(12), 100)
    z = (rng.random((len(labels), 60)) < 0.05).astype(np.float32)
    (evaluator,) = measured(animals, one_batch(z, labels), [LatentGraph])
    numbers = evaluator.compute()
    assert numbers["n_edges"] == numbers["chance_n_edges"] == 0
    assert all(np.isnan(numbers[name]) for name in QUALITIES)
    assert evaluator.notes()[0].startswith(
        "No edge is left of the 0 pairs within the bounds, among 60"
    )


def test_rare_latents_and_rare_edges_are_left_out(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch)
    for least, expected in ((30, 20), (31, 8)):  # species fire on 30 images of the fit half
        options = {"min_fired": least}
        (evaluator,) = measured(animals, batch, [LatentGraph], options=options)
        assert evaluator.compute()["n_edges"] == expected
    (evaluator,) = measured(animals, batch, [LatentGraph], options={"min_rate": 0.1})
    assert evaluator.compute()["n_edges"] == 8  # species fire on a twelfth
    (evaluator,) = measured(animals, batch, [LatentGraph], options={"min_joint": 31})
    numbers = evaluator.compute()
    assert (numbers["n_edges"], numbers["n_measured_edges"]) == (20, 8)
    assert numbers["n_measured_parents"] == 9


def test_a_latent_with_too_many_children_is_removed(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 100)
    z = np.ones((len(labels), 26), dtype=np.float32)
    parts = np.arange(len(labels)) // 2 % 25
    z[:, 1:] = np.eye(25)[parts]
    batch = one_batch(z, labels)
    (evaluator,) = measured(animals, batch, [LatentGraph])
    assert evaluator.compute()["n_edges"] == 0  # 25 children: more than 20
    (evaluator,) = measured(animals, batch, [LatentGraph], options={"max_children": 1.0})
    assert evaluator.compute()["n_edges"] == 25


def test_negative_latents_do_not_fire(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch)
    (plain,) = measured(animals, batch, [LatentGraph])
    below = replace(batch, z=torch.where(batch.z > 0, batch.z, -1.0))
    (other,) = measured(animals, below, [LatentGraph])
    assert other.compute() == pytest.approx(plain.compute(), nan_ok=True)


def test_where_many_latents_fire_fewer_images_are_kept(
    animals: Taxonomy, one_batch: Measured, batches_of: Measured
) -> None:
    batch = one_batch(np.ones((1200, 10), np.float32), np.repeat(np.arange(12), 100))
    for most, expected in ((2**20, 1200), (4000, 400)):
        store = FiringStore(EvaluationContext(animals, 1200, 5, 10), 5000, most)
        store.calibrate(batches_of(batch, 100)[0])
        for part in batches_of(batch, 300):
            store.update(part)
        assert store.z.shape[0] == pytest.approx(expected, rel=0.2)


def test_the_embedding_of_the_batch_is_used_where_there_is_one(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch)
    (given_,) = measured(animals, batch, [LatentGraph])
    (own,) = measured(animals, replace(batch, embedding=None), [LatentGraph])
    assert given_.compute()["own_layer"] == 0 and own.compute()["own_layer"] == 1
    assert given_.compute()["sibling_bound"] > own.compute()["sibling_bound"] + 0.1
    assert "No independent embedding" in own.notes()[0]


def test_equal_seeds_give_equal_draws(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    z, labels = random_z(4, 1200, 30), np.repeat(np.arange(12), 100)
    runs = [
        measured(animals, one_batch(z, labels), [LatentGraph], seed=seed)[0].compute()
        for seed in (0, 0, 1)
    ]
    same = [one == pytest.approx(other, nan_ok=True) for one, other in pairwise(runs)]
    assert same == [True, False]


def test_the_defaults_are_those_of_the_protocol() -> None:
    assert WEIGHTINGS == {"firings": 0.9, "activations": 0.9, "cosine": 0.8}
    options = LatentGraph.Options()
    assert (options.min_rate, options.max_children) == (40e-6, 0.05)
    assert (options.min_descendants, options.min_joint) == (5, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "lift"}, "weighting: not known; given 'lift'; allowed: one of firings"),
        ({"shape": "forest"}, "shape: not known; given 'forest'; allowed: one of dag, tree"),
        ({"threshold": 0.0}, r"threshold: out of range; given 0.0; allowed: a number in \(0, 1\]"),
        ({"min_rate": -1.0}, r"min_rate: out of range; given -1.0; allowed: a number in \[0, 1\]"),
        ({"max_children": 2.0}, "max_children: out of range; given 2.0"),
        ({"min_joint": 0}, "min_joint: out of range; given 0; allowed: 1 or more"),
        ({"draws": -1}, "draws: out of range; given -1; allowed: 0 or more"),
        ({"k": 1}, "k: out of range; given 1; allowed: 2 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentGraph.Options(**options)
