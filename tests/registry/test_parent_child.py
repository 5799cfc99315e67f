"""`parent_child` against counting by hand, and on planted latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from scipy import sparse
from taxolens.registry.architectures.hsae import HSAETrainingSAE, HSAETrainingSAEConfig
from taxolens.registry.architectures.tree import TreeTrainingSAE, TreeTrainingSAEConfig
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parent_child import ParentChild
from taxolens.registry.evaluators.parts.implication import (
    Pairs,
    depths,
    hamming,
    implied_pairs,
    measure_edges,
    near_probe,
    nearest_parents,
    recall_of,
    recorded_parents,
    rewire,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.01, 0.2, 0.6]))
@settings(max_examples=30, deadline=None)
def test_pairs_edges_and_hamming_are_those_counted_one_by_one(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    n, m = 40, 9
    fired = rng.random((n, m)) < density
    fired[:, 1] &= fired[:, 0]  # something to find
    fired[:, 2] &= fired[:, 1]
    firings = sparse.csr_array(fired.astype(np.float32))

    pairs = implied_pairs(firings, implication=0.75, ratio=1.5, lift=1.2, min_fired=2, block=4)
    wanted = []
    for c in range(m):
        for p in range(m):
            both, own, above = (
                (fired[:, p] & fired[:, c]).sum(),
                fired[:, c].sum(),
                fired[:, p].sum(),
            )
            bounds = own >= 2 and both / own >= 0.75 and above >= 1.5 * own
            if bounds and both / own / (above / n) >= 1.2 - 1e-12:
                wanted.append((p, c))
    assert list(zip(*pairs)) == wanted

    forest = nearest_parents(pairs, fired.sum(0))
    by_child: dict[int, list[int]] = {}
    for p, c in wanted:
        by_child.setdefault(c, []).append(p)
    least = {c: min(ps, key=lambda p: (fired[:, p].sum(), p)) for c, ps in by_child.items()}
    assert dict(zip(forest.child, forest.parent)) == least

    edges = measure_edges(firings, forest)
    for i, (p, c) in enumerate(zip(*forest)):
        both = (fired[:, p] & fired[:, c]).mean()
        assert edges.implication[i] == pytest.approx(both / fired[:, c].mean())
        assert edges.reverse[i] == pytest.approx(both / fired[:, p].mean())
        assert edges.lift[i] == pytest.approx(both / fired[:, c].mean() / fired[:, p].mean())

    for row in hamming(firings, forest).itertuples():
        children = forest.child[forest.parent == row.parent]
        own, either = fired[:, row.parent], fired[:, children].any(1)
        assert row.children == len(children)
        assert row.hamming == pytest.approx((own != either).mean())
        assert row.hamming_relative == pytest.approx((own != either).sum() / (own | either).sum())


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_edges_found_against_loops(seed: int, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    assume(len(taxonomy.nodes) > 1)
    rng = np.random.default_rng(seed)
    edges = np.array(taxonomy.edges())
    wanted = np.array([[taxonomy.index(v) for v in edge] for edge in edges.tolist()])
    guessed = rng.integers(0, len(taxonomy.nodes), (20, 2))
    among = [any((row == other).all() for other in guessed) for row in wanted]
    assert recall_of(wanted, guessed) == np.mean(among)
    assert recall_of(wanted, wanted) == 1.0 and np.isnan(recall_of(wanted[:0], guessed))


def test_no_pair_is_no_forest() -> None:
    nothing = implied_pairs(sparse.csr_array(np.zeros((5, 3), dtype=np.float32)))
    assert len(nothing.child) == 0
    assert len(hamming(sparse.csr_array(np.zeros((5, 3))), nothing)) == 0


def planted(taxonomy: Taxonomy, one_batch: Measured, **kwargs: Any) -> tuple[PlantedLatents, Any]:
    labels = np.repeat(np.arange(len(taxonomy.classes)), 40)
    latents = PlantedLatents(taxonomy, **kwargs)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    return latents, one_batch(z, labels)


def test_nodes_are_chosen_on_other_images_than_the_edges(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """In the fit half the latents are the tree; in the score half they fire anywhere, or not at all."""
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    rng = np.random.default_rng(0)
    z = batch.z.numpy().copy()
    score = np.flatnonzero(~batch.is_fit.numpy())
    z[score] = rng.permuted(z[score], axis=0)
    fit_only = batch.z.numpy().copy()
    silent = np.flatnonzero(animals.n_leaves[latents.node] == 1)[:3]
    fit_only[np.ix_(score, silent)] = 0
    changed = (replace(batch, z=torch.from_numpy(v)) for v in (z, fit_only))
    for case, other in zip(("anywhere", "silent"), changed):
        (evaluator,) = measured(animals, other, [ParentChild])
        numbers, place = evaluator.compute(), evaluator.best_nodes(np.arange(latents.d_sae))
        assert numbers["edges"] == 18
        if case == "anywhere":
            assert numbers["edge_precision"] < 0.3 and numbers["n_edges"] == 18
        else:
            assert numbers["edge_precision"] == 1 and numbers["n_edges"] == 15
            assert place[silent].tolist() == [-1] * 3 and (np.delete(place, silent) >= 0).all()
            table = evaluator.tables()["forest"].set_index("child")
            assert table.loc[silent, "child_name"].tolist() == [""] * 3
            assert not table.loc[silent, "agrees"].any() and table["agrees"].sum() == 15


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_edge_precision_and_recall_against_loops(
    seed: int, random_dag: Measured, one_batch: Measured, measured: Measured
) -> None:
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    latents = PlantedLatents(taxonomy, recall=0.9, false_alarm=0.05, seed=seed)
    labels = rng.integers(0, n_classes, 60)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(60))
    batch = one_batch(z, labels)
    options = {"min_fired": 2, "implication": 0.7, "ratio": 1.2, "lift": 1.0}
    (evaluator,) = measured(taxonomy, batch, [ParentChild], options=options, size=17)
    place, numbers = rng.permutation(n_classes), {}
    score = ~batch.is_fit.numpy()
    truth, fired = place[batch.labels.numpy()[score]], batch.z.numpy()[score] > 0
    leaves = {frozenset(taxonomy.leaves(v).tolist()) for v in range(len(taxonomy.nodes))}
    best = []
    for j in range(latents.d_sae):
        f1 = {
            node: 2 * sum(fired[i, j] for i in range(len(truth)) if truth[i] in node)
            / (fired[:, j].sum() + sum(c in node for c in truth))
            for node in leaves
            if fired[:, j].any()
        }  # fmt: skip
        best.append({n for n, value in f1.items() if value > max(f1.values()) - 1e-9})
    numbers = evaluator.compute(permutation=place)
    edges = [(best[p], best[c]) for p, c in zip(*evaluator.forest) if best[p] and best[c]]
    assert numbers["n_edges"] == len(edges)
    everything = frozenset(range(n_classes))
    clear = [(next(iter(p)), next(iter(c))) for p, c in edges if len(p) == len(c) == 1]
    agrees = sum(p > c and p != everything for p, c in clear)
    if len(clear) == len(edges) and edges:
        assert numbers["edge_precision"] == pytest.approx(agrees / len(edges))
    elif edges:
        bounds = agrees / len(edges), (agrees + len(edges) - len(clear)) / len(edges)
        assert bounds[0] - 1e-9 <= numbers["edge_precision"] <= bounds[1] + 1e-9
    else:
        assert np.isnan(numbers["edge_precision"])


def test_node_indicators_give_the_tree_back(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    (evaluator,) = measured(animals, batch, [ParentChild], size=100)
    numbers = evaluator.compute()
    assert set(numbers) == set(ParentChild.higher_is_better)
    assert numbers["implication"] == numbers["holds_share"] == 1.0
    assert numbers["hamming"] == numbers["hamming_relative"] == 0.0
    assert numbers["edge_precision"] == numbers["edge_recall"] == 1.0
    # Species below genus, genus below family; the root fires everywhere, so it is no one's parent.
    assert numbers["edges"] == 12 + 6
    for p, c in zip(*evaluator.forest):
        assert latents.node[p] in animals.parents[latents.node[c]]
    assert np.isnan(numbers["reconstruction_share"])  # no decoder was given

    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["edge_precision"] for n in permuted) < 0.7
    for name in ParentChild.invariant:
        if np.isfinite(numbers[name]):  # no decoder was given, and no forest recorded
            assert {n[name] for n in permuted} == {numbers[name]}
    assert evaluator.compute(shuffled=True)["edge_precision"] < 0.7

    tables = evaluator.tables()
    assert tables["forest"]["agrees"].all()
    assert len(tables["parents"]) == 2 + 6
    assert len(evaluator.figures()["forest"].data) == 1


def test_an_edge_from_the_root_does_not_agree_with_the_tree(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """Every class lies below the root, so such an edge would agree whatever its child is."""
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    options = {"lift": 1.0}  # a latent that fires everywhere may then be a parent
    (evaluator,) = measured(animals, batch, [ParentChild], options=options)
    table = evaluator.tables()["forest"]
    assert len(table) == 12 + 6 + 2
    from_root = latents.node[table["parent"]] == animals.root
    assert from_root.sum() == 2 and not table["agrees"][from_root].any()
    assert table["agrees"][~from_root].all()
    assert evaluator.compute()["edge_precision"] == pytest.approx(18 / 20)


def test_latents_of_random_classes_form_no_tree(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0, shuffle_nodes=True)
    (evaluator,) = measured(animals, batch, [ParentChild])
    assert evaluator.compute()["edge_recall"] < 0.5


def test_the_size_of_a_batch_changes_nothing(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch, recall=0.95, false_alarm=0.01)
    facts = {"W_dec": torch.randn(21, 5), "options": {"max_images": 300, "probe_images": 200}}
    one, many = (measured(animals, batch, [ParentChild], size=s, **facts)[0] for s in (480, 7))
    assert one.compute() == pytest.approx(many.compute(), nan_ok=True)
    assert 200 < one._sample.z.shape[0] < 400  # approximately `max_images`


def test_the_condition_on_the_decoder_detects_shared_directions(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """x is made of the latents' own directions: a parent that its child needs is near its probe."""
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    m = latents.d_sae
    directions = torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(0)))[0]
    noise = 0.3 * torch.randn(len(batch), m, generator=torch.Generator().manual_seed(1))
    x = batch.z @ directions + noise
    batch = replace(batch, x=x)
    (aligned,) = measured(animals, batch, [ParentChild], W_dec=directions)
    (elsewhere,) = measured(animals, batch, [ParentChild], W_dec=directions.roll(7, 0))
    assert aligned.compute()["reconstruction_share"] > 0.6
    assert elsewhere.compute()["reconstruction_share"] < 0.1


def sae_with(parents: list[int]) -> Any:
    return SimpleNamespace(cfg=SimpleNamespace(parents=parents))


def true_parents(taxonomy: Taxonomy, latents: PlantedLatents) -> list[int]:
    """For each planted latent the one of its node's parent; families are roots."""
    at = {node: latent for latent, node in enumerate(latents.node)}
    above = [taxonomy.parents[node] for node in latents.node]
    root = next(latent for latent, nodes in enumerate(above) if not nodes)
    found = [at[nodes[0]] if nodes else -1 for nodes in above]
    return [-1 if parent == root else parent for parent in found]


def test_the_forest_that_an_sae_records_is_measured_beside_the_one_by_implication(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    true = true_parents(animals, latents)
    (evaluator,) = measured(animals, batch, [ParentChild], sae=sae_with(true), size=100)
    numbers = evaluator.compute()
    assert numbers["recorded_edges"] == 12 + 6
    for name in ("found", "implication", "edge_precision", "edge_recall"):
        assert numbers[f"recorded_{name}"] == 1.0, name
    assert numbers["recorded_hamming_relative"] == 0.0
    assert numbers["rewired_implication"] < 0.6
    assert numbers["rewired_edge_precision"] < 0.6
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["recorded_edge_precision"] for n in permuted) < 0.7
    assert {n["recorded_implication"] for n in permuted} == {1.0}
    table = evaluator.tables()["recorded"]
    assert dict(zip(table["child"], table["parent"])) == {
        child: parent for child, parent in enumerate(true) if parent >= 0
    }
    assert table["agrees"].all()


def test_recorded_edges_with_a_silent_latent_are_not_counted_as_support(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    true = np.array(true_parents(animals, latents))
    family = true[np.flatnonzero(depths(true) == 1)[0]]
    batch.z[~batch.is_fit, family] = 0  # the parent of three genera
    (evaluator,) = measured(animals, batch, [ParentChild], sae=sae_with(true.tolist()))
    numbers = evaluator.compute()
    assert (numbers["recorded_edges"], numbers["n_recorded_edges"]) == (18, 15)
    assert numbers["recorded_edge_precision"] == 1.0
    assert ParentChild.support["recorded_edge_precision"].count == "n_recorded_edges"


def test_means_of_edges_and_parents_have_their_counts(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    """Three species are silent on the score half, and with them one genus of two."""
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    true = np.array(true_parents(animals, latents))
    species = np.flatnonzero(depths(true) == 2)
    genus = true[species[0]]
    silent = [*species[true[species] == genus], genus, species[true[species] != genus][0]]
    batch.z[np.ix_(np.flatnonzero(~batch.is_fit), silent)] = 0
    facts = {"sae": sae_with(true.tolist()), "W_dec": torch.randn(21, 5)}
    options = {"probed": 7}
    (evaluator,) = measured(animals, batch, [ParentChild], options=options, **facts)
    numbers = evaluator.compute()
    assert numbers["edges"] == numbers["recorded_edges"] == 12 + 6
    for edges, parents, probed in (
        ("n_measured_edges", "n_parents", "n_probed_edges"),
        ("n_recorded_measured_edges", "n_recorded_parents", "n_recorded_probed_edges"),
    ):
        assert (numbers[edges], numbers[parents], numbers[probed]) == (18 - 4, 2 + 6 - 1, 7)
    assert numbers["n_tree_edges"] == 12 + 6
    table = evaluator.tables()["forest"]
    assert np.isfinite(table["implication"]).sum() == numbers["n_measured_edges"]
    for permutation in evaluator.context.permutations:
        moved = evaluator.compute(permutation=permutation)
        assert all(moved[of.count] == numbers[of.count] for of in ParentChild.support.values())


def test_a_wrong_recorded_forest_does_not_pass_for_the_right_one(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    true = np.array(true_parents(animals, latents))
    genera = np.unique(true[depths(true) == 2])
    wrong = true.copy()
    for here, elsewhere in zip(genera, np.roll(genera, 1)):
        wrong[true == here] = elsewhere  # every species below a genus that is not its own
    (evaluator,) = measured(animals, batch, [ParentChild], sae=sae_with(wrong.tolist()))
    numbers = evaluator.compute()
    assert numbers["implication"] == numbers["edge_precision"] == 1.0
    assert numbers["recorded_edges"] == 12 + 6
    for name in ("found", "implication", "edge_precision"):
        assert numbers[f"recorded_{name}"] == pytest.approx(6 / 18), name  # genera below families
    assert numbers["recorded_edge_recall"] == pytest.approx(6 / 18)


def test_without_a_recorded_forest_its_numbers_are_undefined(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    _, batch = planted(animals, one_batch)
    for sae in (None, sae_with([]), sae_with([-1] * 21), sae_with([-1, 0])):
        (evaluator,) = measured(animals, batch, [ParentChild], sae=sae)
        numbers = evaluator.compute()
        of_its_own = {n: v for n, v in numbers.items() if n.startswith(("recorded", "rewired"))}
        assert len(of_its_own) == 10
        assert np.isnan(list(of_its_own.values())).all()
        assert "recorded" not in evaluator.tables()


def test_the_condition_on_the_decoder_separates_the_recorded_forest_from_a_rewired_one(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents, batch = planted(animals, one_batch, recall=1.0, false_alarm=0.0)
    m = latents.d_sae
    directions = torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(0)))[0]
    noise = 0.3 * torch.randn(len(batch), m, generator=torch.Generator().manual_seed(1))
    batch = replace(batch, x=batch.z @ directions + noise)
    sae = sae_with(true_parents(animals, latents))
    (evaluator,) = measured(animals, batch, [ParentChild], W_dec=directions, sae=sae)
    numbers = evaluator.compute()
    assert numbers["recorded_reconstruction_share"] > 0.6
    assert numbers["rewired_reconstruction_share"] < numbers["recorded_reconstruction_share"] - 0.2


@pytest.mark.parametrize(
    ("training_class", "config_class", "extra"),
    [
        (TreeTrainingSAE, TreeTrainingSAEConfig, {"level_k": [2, 3, 4]}),
        (HSAETrainingSAE, HSAETrainingSAEConfig, {"k": 3}),
    ],
    ids=["tree", "hsae"],
)
def test_it_reads_what_tree_and_hsae_save(
    training_class: Any,
    config_class: Any,
    extra: dict[str, Any],
    tmp_path: Any,
    animals: Taxonomy,
    one_batch: Measured,
    measured: Measured,
) -> None:
    torch.manual_seed(0)
    made = training_class(config_class(d_in=8, d_sae=16, level_widths=[3, 5, 8], **extra))
    if hasattr(made, "reassign"):
        made.reassign()
    made.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    parents = made.forest.parents.numpy()
    assert np.array_equal(recorded_parents(made, 16), parents)
    assert np.array_equal(recorded_parents(sae, 16), parents)
    assert np.array_equal(recorded_parents(sae_with(sae.cfg.parents), 16), parents)

    labels = np.repeat(np.arange(12), 40)
    x = torch.randn(len(labels), 8)
    with torch.no_grad():
        z = sae.encode(x)
    batch = one_batch(z, labels, x=x)
    facts = {"sae": sae, "W_dec": sae.W_dec}
    (evaluator,) = measured(animals, batch, [ParentChild], **facts)
    numbers = evaluator.compute()
    fired = (batch.z[batch.is_fit] > 0).sum(0).numpy()
    assert numbers["recorded_edges"] == ((parents >= 0) & (fired >= 10)).sum() > 0
    if training_class is TreeTrainingSAE:  # a child fires only where its parent does
        assert numbers["recorded_implication"] == 1.0
    else:
        assert numbers["recorded_implication"] < 1.0
    assert numbers["rewired_implication"] < 1.0


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_rewiring_keeps_families_and_depths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, child) if child else -1 for child in range(30)])
    depth = depths(parents)
    for child, parent in enumerate(parents):
        assert depth[child] == (0 if parent < 0 else depth[parent] + 1)
    child = np.flatnonzero(parents >= 0)
    forest = Pairs(parents[child], child)
    other = rewire(forest, depth[child], rng)
    assert np.array_equal(other.child, child)
    assert np.array_equal(np.sort(other.parent), np.sort(forest.parent))
    assert np.array_equal(depth[other.parent], depth[forest.parent])


def test_a_pair_just_below_the_bound_of_the_lift_is_no_pair() -> None:
    """c fires on 3 of n images, p on 7, both on 1: lift = n/21, and 1.5 at n = 31.5."""
    for n, wanted in ((31, []), (32, [(0, 1)])):
        fired = np.zeros((n, 2), dtype=np.float32)
        fired[:7, 0] = fired[6:9, 1] = 1
        pairs = implied_pairs(sparse.csr_array(fired), implication=0.3, ratio=2, lift=1.5)
        assert list(zip(*pairs)) == wanted


def test_bounds_that_are_met_exactly_count() -> None:
    fired = np.zeros((40, 2), dtype=np.float32)
    fired[:20, 0] = fired[1:11, 1] = 1  # P(p|c) = 1, twice as often, lift 2
    fired[[1, 21], 1] = [0, 1]  # P(p|c) = .9, lift 1.8
    firings = sparse.csr_array(fired)
    met = {"implication": 0.9, "ratio": 2.0, "lift": 1.8, "min_fired": 10}
    assert list(zip(*implied_pairs(firings, **met))) == [(0, 1)]
    for name, more in (("implication", 0.91), ("ratio", 2.01), ("lift", 1.81), ("min_fired", 11)):
        assert not len(implied_pairs(firings, **{**met, name: more}).child), name


def test_an_sae_without_a_forest_records_no_parent() -> None:
    for sae in (None, sae_with([]), sae_with([0, 1])):
        assert recorded_parents(sae, 3).tolist() == [-1, -1, -1]
    assert recorded_parents(sae_with([-1, 0, 1]), 3).tolist() == [-1, 0, 1]


def test_depths_of_chains_and_circles() -> None:
    assert depths(np.array([-1, 0, 1, 2, -1])).tolist() == [0, 1, 2, 3, 0]
    assert len(depths(np.array([1, 0]))) == 2  # a circle ends


def test_both_rows_must_be_near() -> None:
    decoder = torch.eye(4)
    direction = torch.tensor([[1.0, 0.9, 0.1, 0.0], [1.0, 0.1, 0.9, 0.0]])
    assert near_probe(decoder, direction, np.array([[0, 0], [1, 1]]), 2).tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implication": 0.0}, "implication: out of range; given 0.0; allowed: a number in"),
        ({"ratio": 1.0}, "ratio: out of range; given 1.0; allowed: above 1"),
        ({"lift": float("nan")}, "lift: out of range; given nan; allowed: 0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParentChild.Options(**options)
