"""Planted truth: on latents that are exactly the tree's nodes every evaluator reaches its ideal.

The tree is balanced: 4 families of 3 genera of 3 species. The latents fire exactly on the images of
their node, x is the sum of their directions (orthonormal, and the rows of the decoder), and the
dictionary is ordered from the root down. `IDEAL` names what each evaluator must then give; `WORSE`
what must fall behind by at least so much (below 0: what must lie above) where the classes are permuted
or the labels shuffled.

A metric in neither table only describes, or has no ideal that node indicators reach:

- `right_group`: nobody errs here; below, latents of genera alone have the probes err.
- `infom`, `infoc`: below 1 for any set of node indicators (docs/evaluators.md).
- gaps, depths of pairs, monosemanticity of a group: what the tree allows, checked latent by latent.
- `norm_correlation`: four latents of height 1 on every image, so no norm varies.
- `parent_length`: x is all but determined by its class, so whitening makes a regular simplex of the class
  means, in which every tree is as good; test_feature_geometry.py has classes that overlap.
- `moran_i`: what the weights allow; against the double sum in test_taxonomic_autocorrelation.py.
- `uuas`: an inner node stands at the mean of its species, so even here some edge is longer than a
  short cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from taxolens.registry.evaluators.base import EvaluationBatch, Evaluator
from taxolens.registry.evaluators.lch_height import random_sets
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
Bounds = tuple[float, float]

FAMILIES, GENERA, SPECIES, IMAGES = 4, 3, 3, 24
N_CLASSES = FAMILIES * GENERA * SPECIES
N_NODES = 1 + FAMILIES + FAMILIES * GENERA + N_CLASSES
N_INNER = N_NODES - N_CLASSES

ONE, ZERO = (1.0, 1.0), (0.0, 0.0)
NEAR_ONE, NEAR_ZERO = (0.97, 1.03), (-1e-3, 0.03)
"""Bounds for what is estimated from images."""


def exactly(value: float) -> Bounds:
    return (value, value)


IDEAL: dict[str, dict[str, Bounds]] = {
    "lch_height": {
        "defined": exactly(N_NODES),
        "single_class_share": exactly(N_CLASSES / N_NODES),
        # Root 3, families 2, genera 1, species 0.
        "height": exactly((3 + 2 * FAMILIES + FAMILIES * GENERA) / N_NODES),
        "multi_class_height": exactly((3 + 2 * FAMILIES + FAMILIES * GENERA) / N_INNER),
    },
    "ontological_coverage": {
        "internal_f1": ONE,
        "internal_covered_share": ONE,
        "internal_nodes": exactly(N_INNER - 1),  # the root is on every image
        "leaf_f1": ONE,
        "leaf_covered_share": ONE,
        "leaf_nodes": exactly(N_CLASSES),
    },
    "pair_depth": {"defined": exactly(N_INNER)},
    "level_information": {
        f"{feature}_{probe}_{kind}": ONE
        for feature in ("x", "mean_patch", "z")
        for probe in ("probe", "knn")
        for kind in ("accuracy", "level_accuracy")
    },
    "parent_child": {
        "edges": exactly(N_NODES - 1 - FAMILIES),  # a root that always fires is no one's parent
        "implication": ONE,
        "holds_share": ONE,
        "hamming": ZERO,
        "hamming_relative": ZERO,
        "edge_precision": ONE,
        "edge_recall": ONE,
    },
    "matryoshka_depth": {
        "groups": exactly(4),
        "by_rate": ZERO,
        "last_depth": exactly(3),  # all images of a species' latent are of that species
        "trend": (0.9, 1.0),
    },
    "monosemanticity": {"own_layer": ZERO},
    "quasi_orthogonality": {
        "epsilon_lbo": NEAR_ZERO,
        "epsilon_lbo_l0": NEAR_ZERO,
        "within_quarter": ONE,
        "within_half": ONE,
        "within_one": ONE,
        "norm_ratio": NEAR_ONE,
    },
    "taxonomic_autocorrelation": {"defined": exactly(N_NODES - 1)},
    "hyperbolicity": {
        "tree_delta": NEAR_ZERO,
        # Species are equally deep, so even Euclidean distances are those of an ultrametric tree.
        "class_means_delta": (0.0, 0.1),
        "latent_means_delta": (0.0, 0.1),
        "decoder_delta": NEAR_ZERO,
    },
    "absorption": {
        "full_absorption": ZERO,
        # Not 0: the probe for a genus reads the directions of its species too.
        "fraction_absorption": (0.0, 0.2),
        "reconstructed_share": NEAR_ONE,
        "probe_f1": NEAR_ONE,
        "main_f1": NEAR_ONE,
        "main_latents": ONE,
    },
    "feature_geometry": {
        "hierarchy_cosine": (0.0, 0.1),
        "projection_own": NEAR_ONE,
        # About the mean of x, so −p/(1 − p) for a node on a share p of the images.
        "projection_other": exactly(np.mean([-1 / 3] * FAMILIES + [-1 / 11] * FAMILIES * GENERA)),
        "parent_cosine": NEAR_ZERO,
        "sibling_cosine": NEAR_ZERO,
        "coherence": NEAR_ZERO,
        "babel": NEAR_ZERO,
        "coactive_babel": NEAR_ZERO,
    },
    "infomec": {"infoe": (0.9, 1.0), "factors": exactly(3)},
    "tree_probe": {"x_excess": (-0.05, 0.05)},  # plain distances are ideal here
    "latent_graph": {
        "n_edges": exactly(N_NODES - 1),
        "n_roots": ONE,  # the root's latent, which always fires
        "implication": ONE,
        "refinement": ONE,
        "depth": exactly(3),
    },
    # Nobody errs; of the classes after the true one two are of its genus, two of its family.
    "mistake_severity": {
        "z_probe_distance_5": exactly((0 + 1 + 1 + 2 + 2) / 5),
        **{
            f"{feature}_{probe}_{measure}": bounds
            for feature in ("x", "z")
            for probe in ("probe", "knn")
            for measure, bounds in (
                ("hierarchical_f1", ONE),
                ("distance_1", ZERO),
            )
        },
    },
    # Tree distances are squared distances here, so that the correlation is not quite 1.
    "cpcc": {"x_cpcc": (0.98, 1.0), "z_cpcc": (0.98, 1.0), "n_classes": exactly(N_CLASSES)},
    "latent_dendrogram": {
        "firing_purity": (0.9, 1.0),
        "firing_gamma": (0.6, 1.0),
        "n_nodes": exactly(N_NODES - 1),
    },
}

WORSE: dict[str, dict[str, dict[str, float]]] = {
    "permuted_classes": {
        "lch_height": {"height_gap": 0.3, "generality_gap": 1.0},
        "ontological_coverage": {"internal_f1": 0.3, "internal_covered_share": 0.1},
        "pair_depth": {"pair_depth": 0.8, "pair_depth_normalized": 0.2},
        "level_information": {"x_variance_share": 0.1, "z_variance_share": 0.1},
        "parent_child": {"edge_precision": 0.3, "edge_recall": 0.5},
        "matryoshka_depth": {"different_depth": 0.8, "different_trend": 0.3},
        "taxonomic_autocorrelation": {"moran_i": 0.05, "significant_share": 0.1},
        # The species of a node of random classes fire in its place, and none is silent.
        "absorption": {},
        "feature_geometry": {},
        "infomec": {"infom": 0.02},
        "tree_probe": {"x_spearman": 0.5, "z_spearman": 0.5},
        "mistake_severity": {"z_probe_distance_5": -0.5},
        "cpcc": {"x_cpcc": 0.5, "z_cpcc": 0.5},
        "latent_dendrogram": {"firing_cophenetic": 0.3, "firing_purity": 0.3},
    },
    "shuffled": {
        "lch_height": {"defined": 30},  # no class is frequent any more but for the root's
        "ontological_coverage": {"internal_f1": 0.5, "leaf_f1": 0.8},
        "pair_depth": {"pair_depth": 0.8},
        "level_information": {"x_probe_accuracy": 0.8, "z_knn_accuracy": 0.8},
        "parent_child": {"edge_precision": 0.3, "edge_recall": 0.5},
        "matryoshka_depth": {"depth": 1.0, "last_depth": 2.0, "trend": 0.5},
        "taxonomic_autocorrelation": {"significant_share": 0.1},
        "hyperbolicity": {"class_means_delta": -0.1},
        "absorption": {"nodes": FAMILIES * GENERA, "probe_f1": 0.5},
        "feature_geometry": {"projection_own": 0.3},
        "infomec": {"infoe": 0.8},
        "tree_probe": {"x_spearman": 0.5, "z_spearman": 0.5},
        "mistake_severity": {"x_probe_hierarchical_f1": 0.5, "z_knn_distance_1": -1.0},
        "cpcc": {"x_cpcc": 0.5, "z_cpcc": 0.5},
        "latent_dendrogram": {"firing_cophenetic": 0.3, "firing_purity": 0.3},
    },
}

ELSEWHERE = {
    "reconstruction": "measures the error of x̂ and its effect on the model, with no tree",
    "supervised_dictionary": "is itself the planted dictionary, and edits the model",
    "stability": "compares two SAEs with each other, with no tree",
    "detection": "explains latents by nodes and may edit the model",
    "meta_sae": "trains an SAE on the decoder rows, of which these share no direction",
}
"""Built-in evaluators whose planted truth needs more than latents: it is in a test of their own."""


@pytest.fixture(scope="module")
def tree() -> Taxonomy:
    edges = []
    for f in range(FAMILIES):
        edges.append(("life", f"f{f}"))
        for g in range(GENERA):
            edges.append((f"f{f}", f"f{f}g{g}"))
            edges += [(f"f{f}g{g}", f"f{f}g{g}s{s}") for s in range(SPECIES)]
    return Taxonomy.from_edges(edges)


def plant(tree: Taxonomy, one_batch: Measured, **kwargs: Any) -> tuple[EvaluationBatch, Any]:
    """All images, and the decoder: orthonormal rows, of which x is the sum."""
    labels = np.repeat(np.arange(N_CLASSES), IMAGES)
    latents = PlantedLatents(tree, **{"recall": 1.0, "false_alarm": 0.0, "binary": True, **kwargs})
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    z = z[:, np.argsort(-tree.n_leaves[latents.node], kind="stable")]
    rows = torch.linalg.qr(
        torch.randn(N_NODES, N_NODES, generator=torch.Generator().manual_seed(0))
    )[0]
    noise = 0.02 * torch.randn(len(z), N_NODES, generator=torch.Generator().manual_seed(1))
    x = z @ rows + noise
    batch = one_batch(z, labels, x=x, mean_patch=x)
    return replace(batch, embedding=torch.eye(N_CLASSES)[batch.labels]), rows


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    widths = np.cumsum([1, FAMILIES, FAMILIES * GENERA, N_CLASSES]).tolist()
    return {"sae": type("Prefixed", (), {"cfg": {"matryoshka_widths": widths}})()}


@pytest.fixture(params=sorted(IDEAL))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def planted(tree: Taxonomy, one_batch: Measured, measured: Measured, facts: dict) -> Any:
    """name -> the evaluator, after a pass over the node indicators."""
    batch, rows = plant(tree, one_batch)
    kept: dict[str, Evaluator] = {}

    def of(name: str) -> Evaluator:
        if name not in kept:
            (kept[name],) = measured(
                tree, batch, [taxolens.EVALUATORS[name]], W_dec=rows, b_dec=rows[0] * 0, **facts
            )
        return kept[name]

    return of


def test_it_reaches_its_ideal(name: str, planted: Any) -> None:
    numbers = planted(name).compute()
    missed = {
        metric: (numbers[metric], bounds)
        for metric, bounds in IDEAL[name].items()
        if not bounds[0] - 1e-4 <= numbers[metric] <= bounds[1] + 1e-4
    }
    assert not missed


@pytest.mark.parametrize("null", list(WORSE))
def test_its_null_is_worse(name: str, null: str, planted: Any) -> None:
    evaluator = planted(name)
    if evaluator.nulls[null] is not None:
        assert name not in WORSE[null]
        return
    value = evaluator.compute()
    if null == "shuffled":
        draws = [evaluator.compute(shuffled=True)]
    else:
        draws = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    short = {}
    for metric, least in WORSE[null][name].items():
        nulls = [d[metric] for d in draws]
        finite = [v for v in nulls if np.isfinite(v)]  # undefined is as bad as it gets
        behind = [np.sign(least) * (value[metric] - v) for v in finite]
        if behind and min(behind) < abs(least):
            short[metric] = (value[metric], nulls)
    assert not short


def test_every_built_in_evaluator_is_asked() -> None:
    built_in = {
        name
        for name, cls in taxolens.EVALUATORS.items()
        if cls.__module__.startswith("taxolens.registry.")
    }
    assert built_in - set(ELSEWHERE) == set(IDEAL)
    for null, table in WORSE.items():
        assert set(table) == {n for n in IDEAL if taxolens.EVALUATORS[n].nulls[null] is None}


def test_each_latent_is_put_at_its_node(tree: Taxonomy, planted: Any) -> None:
    order = np.argsort(-tree.n_leaves[tree.distinct_nodes], kind="stable")
    node = tree.distinct_nodes[order]
    heights = planted("lch_height")
    assert heights.assign().node.tolist() == node.tolist()
    several = tree.n_leaves[node] > 1
    height, generality = random_sets(tree, heights.options.repeats, 0)
    size = tree.n_leaves[node][several]
    numbers = heights.compute()
    gaps = (height[size] - tree.height[node][several]).mean()
    assert numbers["height_gap"] == pytest.approx(gaps)
    gaps = (generality[size] - np.log2(size)).mean()
    assert numbers["generality_gap"] == pytest.approx(gaps)

    depth = planted("pair_depth").depth()
    inner = np.flatnonzero(several)
    assert (depth[inner] >= tree.depth[node[inner]]).all()
    assert np.isnan(depth[~several]).all()
    genera = np.flatnonzero(tree.n_leaves[node] == SPECIES)
    assert depth[genera].tolist() == [2.0] * len(genera)

    table = planted("ontological_coverage").tables()["nodes"]
    assert {tree.nodes[v]: j for j, v in enumerate(node) if v != tree.root} == dict(
        zip(table["node"], table["latent"])
    )
    forest = planted("parent_child").forest
    for parent, child in zip(*forest):
        assert node[parent] in tree.parents[node[child]]

    # Images of one class have the same embedding, those of two are orthogonal.
    scores = planted("monosemanticity").scores()
    images = tree.n_leaves[node] * IMAGES
    alike = (IMAGES - 1) / (images - 1)
    assert np.isnan(scores[0])  # constant
    np.testing.assert_allclose(scores[1:], alike[1:], rtol=1e-4)


def test_the_tree_probe_reaches_its_ceiling(planted: Any) -> None:
    numbers = planted("tree_probe").compute()
    for feature in ("x", "z"):
        assert numbers[f"{feature}_spearman"] == pytest.approx(numbers["ceiling"], abs=0.03)


def test_errors_of_probes_on_genera_stay_in_the_genus(
    tree: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, _ = plant(tree, one_batch)
    known = batch.z[:, :N_INNER]
    known = known + 0.02 * torch.randn(known.shape, generator=torch.Generator().manual_seed(2))
    (evaluator,) = measured(
        tree, replace(batch, z=known), [taxolens.EVALUATORS["level_information"]]
    )
    numbers = evaluator.compute()
    assert numbers["z_probe_accuracy"] < 0.6
    assert numbers["z_probe_right_group"] == numbers["z_knn_right_group"] == 1.0
    for p in evaluator.context.permutations:
        assert evaluator.compute(permutation=p)["z_probe_right_group"] < 0.6


def test_latents_of_random_class_sets_are_no_hierarchy(
    tree: Taxonomy, one_batch: Measured, measured: Measured, facts: dict[str, Any]
) -> None:
    """As many classes to each latent as the nodes have, but drawn at random."""
    batch, rows = plant(tree, one_batch, shuffle_nodes=True)
    names = ("lch_height", "ontological_coverage", "pair_depth", "parent_child", "tree_probe")
    evaluators = measured(tree, batch, [taxolens.EVALUATORS[n] for n in names], W_dec=rows, **facts)
    numbers = {k: v for e in evaluators for k, v in e.compute().items()}
    assert abs(numbers["height_gap"]) < 0.15
    assert numbers["internal_f1"] < 0.75
    permuted = [
        evaluators[2].compute(permutation=p)["pair_depth"]
        for p in evaluators[2].context.permutations
    ]
    assert numbers["pair_depth"] == pytest.approx(np.mean(permuted), abs=0.25)
    assert not numbers["edge_recall"] > 0.2
    assert numbers["z_spearman"] < 0.4
