"""The draws of the permuted-classes null: strata of like size, distinct trees, exact p-values."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens import Taxonomy
from taxolens.registry.taxonomies.permuted_classes import permuted_classes, strata


def grid(*widths: int) -> Taxonomy:
    """A complete tree of these numbers of children."""
    level, edges = ["r"], []
    for width in widths:
        below = [f"{v}.{i}" for v in level for i in range(width)]
        edges += [(child.rpartition(".")[0], child) for child in below]
        level = below
    return Taxonomy.from_edges(edges)


def tree_of(taxonomy: Taxonomy, permutation: np.ndarray, present: np.ndarray) -> frozenset:
    """The sets of present classes at every depth after a permutation, read off class by class."""
    sets = []
    for v in range(len(taxonomy.nodes)):
        below = set(taxonomy.leaves(v))
        moved = {c for c in range(len(permutation)) if permutation[c] in below and present[c]}
        sets.append((int(taxonomy.depth[v]), frozenset(moved)))
    return frozenset((key, sets.count(key)) for key in sets)


@pytest.mark.parametrize("widths", [(2, 2), (2, 3), (3, 2), (4,), (2, 2, 2)])
def test_all_distinct_trees_but_the_tree_itself_are_drawn(widths: tuple[int, ...]) -> None:
    taxonomy = grid(*widths)
    n_classes = len(taxonomy.classes)
    everywhere = np.ones(n_classes, dtype=bool)
    if n_classes <= 6:
        every = {
            tree_of(taxonomy, np.array(p), everywhere)
            for p in itertools.permutations(range(n_classes))
        }
        n_trees = len(every)
    else:  # 8! / (2! 2! 2!⁴) trees of three levels of two
        n_trees = math.factorial(8) // 2**7
    found = permuted_classes(taxonomy, n=400)
    drawn = {tree_of(taxonomy, p, everywhere) for p in found.draws}
    assert len(drawn) == len(found.draws) == n_trees - 1
    assert tree_of(taxonomy, np.arange(n_classes), everywhere) not in drawn
    assert found.same_tree > 0 or n_trees > 100


def test_distinct_trees_are_equally_frequent() -> None:
    taxonomy = grid(2, 2)
    everywhere = np.ones(4, dtype=bool)
    first = [
        tree_of(taxonomy, permuted_classes(taxonomy, n=1, seed=seed).draws[0], everywhere)
        for seed in range(400)
    ]
    counts = [first.count(key) for key in set(first)]
    assert len(counts) == 2 and min(counts) > 160


def test_only_classes_of_like_size_change_places() -> None:
    taxonomy = grid(3, 3)
    counts = np.array([10, 12, 15, 100, 100, 101, 0, 0, 18])
    groups = [sorted(group.tolist()) for group in strata(counts)]
    assert groups == [[0, 1], [2, 8], [3, 4, 5]]
    found = permuted_classes(taxonomy, counts, n=50)
    assert (found.present, found.movable, found.strata) == (7, 7, 3)
    for draw in found.draws:
        for group in groups:
            assert sorted(draw[group]) == group
        assert draw[6] == 6 and draw[7] == 7


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_strata_are_a_partition_of_the_classes_present(counts: list[int]) -> None:
    sizes = np.array(counts)
    groups = strata(sizes)
    assert sorted(c for group in groups for c in group) == np.flatnonzero(sizes).tolist()
    for group in groups:
        assert sizes[group].max() < 1.25 * sizes[group].min() or len(set(sizes[group])) == 1
    for one, other in itertools.pairwise(groups):
        assert sizes[other].min() >= 1.25 * sizes[one].min()


def test_absent_classes_do_not_make_trees_distinct() -> None:
    """One class present under each group: every exchange gives the same tree."""
    taxonomy = grid(3, 2)
    found = permuted_classes(taxonomy, np.array([5, 0, 5, 0, 5, 0]), n=10)
    assert not found.draws and found.same_tree > 0
    assert found.reason == "every exchange of the 3 classes that can move gives the same tree"


def test_without_classes_of_like_size_there_is_no_null() -> None:
    found = permuted_classes(grid(2, 2), np.array([1, 10, 100, 1000]), n=10)
    assert found.reason == (
        "no two of the 4 classes present have a like number of images (within a factor of 1.25), "
        "so none can be exchanged"
    )


def test_classes_above_classes_are_told_apart() -> None:
    """A class that is an inner node and one of its leaves can change places: another tree."""
    taxonomy = Taxonomy.from_edges([("r", "a"), ("r", "b"), ("a", "c")], classes=["a", "b", "c"])
    assert len(permuted_classes(taxonomy, n=50).draws) == 5


def test_draws_are_reproducible() -> None:
    taxonomy = grid(3, 3)
    one, other = (permuted_classes(taxonomy, n=5, seed=3) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one.draws, other.draws, strict=True))
    assert any((a != b).any() for a, b in zip(one.draws, permuted_classes(taxonomy, n=5).draws))
