"""`parent_child` on the synthetic hierarchy of the MP-SAE benchmark, whose pairs are known.

Twenty features: three parents (0, 4, 8) with three exclusive children each (1–3, 5–7, 9–11) and
eight features without children (12–19), all mutually exclusive at the top (Costa et al. 2025, arXiv
2506.03093, §5). SAELens draws the parents' hierarchy; what a mutually exclusive root adds is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.synthetic import HierarchyNode, hierarchy_modifier
from taxolens.registry.evaluators.parent_child import ParentChild
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]

PARENTS = {0: (1, 2, 3), 4: (5, 6, 7), 8: (9, 10, 11)}
PAIRS = {(p, c) for p, children in PARENTS.items() for c in children}
N_FEATURES, N_IMAGES = 20, 8000
ANGLES = {0.0: (0.0, 0.0), 0.4: (0.2820, 0.5940), 0.8: (0.4820, 0.7739)}
"""ε of children and of parents for a target correlation inside a group."""


def tree() -> Taxonomy:
    """The features as nodes; an image of a parent without a child is of the class `<parent>_only`."""
    edges = [("root", f"f{i}") for i in (*PARENTS, *range(12, N_FEATURES))]
    edges += [(f"f{p}", f"f{c}") for p, c in PAIRS]
    edges += [(f"f{p}", f"f{p}_only") for p in PARENTS]
    return Taxonomy.from_edges([*edges, ("root", "none")])


def draw(taxonomy: Taxonomy, spread: float) -> tuple[torch.Tensor, np.ndarray]:
    """Feature activations (n, 20), magnitude 1.5 + spread·randn, and the class of each image."""
    generator = torch.Generator().manual_seed(0)
    top = [*PARENTS, *range(12, N_FEATURES)]
    odds = torch.tensor([0.2] * 3 + [0.05] * 8 + [0.0])
    odds[-1] = 1 - odds.sum()
    root = torch.multinomial(odds.clamp(min=0), N_IMAGES, replacement=True, generator=generator)
    child = torch.multinomial(
        torch.tensor([0.2, 0.2, 0.2, 0.4]), N_IMAGES, replacement=True, generator=generator
    )
    fires = torch.zeros(N_IMAGES, N_FEATURES)
    for place, feature in enumerate(top):
        fires[root == place, feature] = 1.0
    for children in PARENTS.values():
        for place, c in enumerate(children):
            fires[:, c] = (child == place).float()  # gated by the parent below
    nodes = [
        HierarchyNode(p, [HierarchyNode(c) for c in cs], mutually_exclusive_children=True)
        for p, cs in PARENTS.items()
    ]
    fires = hierarchy_modifier(nodes)(fires)
    magnitude = 1.5 + spread * torch.randn(fires.shape, generator=generator)
    labels = []
    for row in fires.bool().tolist():
        on = {i for i, fired in enumerate(row) if fired}
        deepest = [i for i in on if not on & set(PARENTS.get(i, ()))]
        name = f"f{deepest[0]}" if deepest else "none"
        labels.append(f"{name}_only" if deepest and deepest[0] in PARENTS else name)
    position = {name: i for i, name in enumerate(taxonomy.classes)}
    return fires * magnitude.clamp(min=0.1), np.array([position[name] for name in labels])


def dictionary(correlation: float) -> torch.Tensor:
    """(20, 20) unit rows: an orthonormal basis, leant towards the others of its group."""
    of_child, of_parent = ANGLES[correlation]
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))[0]
    leant = basis.clone()
    for group, epsilon in [
        (tuple(PARENTS), of_parent),
        *((cs, of_child) for cs in PARENTS.values()),
    ]:
        for i in group:
            others = basis[[j for j in group if j != i]].mean(0)
            leant[i] = (1 - epsilon) * basis[i] + epsilon * others
    return torch.nn.functional.normalize(leant, dim=1)


@pytest.mark.parametrize("spread", [1 / 400, 0.25])
@pytest.mark.parametrize("correlation", list(ANGLES))
def test_the_known_pairs_are_found_and_no_other(
    spread: float, correlation: float, one_batch: Measured, measured: Measured
) -> None:
    taxonomy = tree()
    z, labels = draw(taxonomy, spread)
    rows = dictionary(correlation)
    batch = one_batch(z, labels, x=z @ rows)
    (evaluator,) = measured(taxonomy, batch, [ParentChild], W_dec=rows, size=1000)
    assert set(zip(*(side.tolist() for side in evaluator.pairs))) == PAIRS
    assert set(zip(*(side.tolist() for side in evaluator.forest))) == PAIRS
    numbers = evaluator.compute()
    assert numbers["implication"] == numbers["holds_share"] == 1.0
    assert numbers["edge_precision"] == 1.0
    # The tree has an edge to each `<parent>_only` too, for which there is no feature.
    assert numbers["edge_recall"] == len(PAIRS) / (len(PAIRS) + len(PARENTS))
    # A parent's own .4 of images without a child are all that its children leave out.
    assert numbers["hamming_relative"] == pytest.approx(0.4, abs=0.05)
    assert numbers["lift"] == pytest.approx(5.0, rel=0.1)
    permuted = [evaluator.compute(permutation=p) for p in evaluator.context.permutations]
    assert max(n["edge_precision"] for n in permuted) < 0.8
    assert evaluator.compute(shuffled=True)["edge_precision"] < 0.8


def test_parents_that_went_silent_are_no_parents(one_batch: Measured, measured: Measured) -> None:
    """Absorption: each child fires in place of its parent, which fires only where no child does."""
    taxonomy = tree()
    z, labels = draw(taxonomy, 0.25)
    for p, children in PARENTS.items():
        z[(z[:, children] > 0).any(1), p] = 0.0
    (evaluator,) = measured(taxonomy, one_batch(z, labels), [ParentChild])
    assert len(evaluator.forest.child) == 0
    numbers = evaluator.compute()
    assert numbers["edges"] == numbers["edge_recall"] == 0.0
    assert np.isnan(numbers["edge_precision"])
