"""Every derived array of a Taxonomy against the definition, spelt out on small random DAGs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import Taxonomy

seeds = st.integers(0, 10**6)
few = settings(max_examples=20, deadline=None)


class Oracle:
    """The definitions of methods, one Python set at a time."""

    def __init__(self, edges, classes):
        self.nodes = sorted({v for edge in edges for v in edge} | set(classes))
        self.parents = {v: [p for p, c in edges if c == v] for v in self.nodes}
        self.children = {v: [c for p, c in edges if p == v] for v in self.nodes}
        self.classes = list(classes)
        self.depth = functools.cache(self._depth)
        self.height = functools.cache(self._height)
        self.above = functools.cache(self._above)
        self.leaves = functools.cache(self._leaves)

    def _depth(self, v):
        return max((self.depth(p) + 1 for p in self.parents[v]), default=0)

    def _height(self, v):
        return max((self.height(c) + 1 for c in self.children[v]), default=0)

    def _above(self, v):
        return {v}.union(*(self.above(p) for p in self.parents[v]))

    def _leaves(self, v):
        return {c for c in self.classes if v in self.above(c)}

    def lch(self, classes):
        common = set.intersection(*(self.above(c) for c in classes))
        return min(common, key=lambda v: (-self.depth(v), len(self.leaves(v)), v))

    def primary_path(self, v):
        """From the root down to v."""
        if not self.parents[v]:
            return [v]
        up = min(self.parents[v], key=lambda p: (-self.depth(p), len(self.leaves(p)), p))
        return [*self.primary_path(up), v]


def oracle_of(taxonomy: Taxonomy) -> Oracle:
    return Oracle(taxonomy.edges(), taxonomy.classes)


@few
@given(seed=seeds)
def test_nodes_are_ordered_and_rooted_at_the_lch(random_dag, seed):
    dag = random_dag(seed)
    whole, taxonomy = Oracle(dag.edges, dag.classes), dag.taxonomy()
    root = whole.lch(dag.classes)
    between = {v for c in dag.classes for v in whole.above(c) if root in whole.above(v)}
    assert set(taxonomy.nodes) == between
    assert taxonomy.nodes[taxonomy.root] == root
    assert taxonomy.classes == tuple(dag.classes)
    own = oracle_of(taxonomy)
    assert list(taxonomy.nodes) == sorted(between, key=lambda v: (own.depth(v), v))
    assert all(p < v for v, ps in enumerate(taxonomy.parents) for p in ps)


@few
@given(seed=seeds)
def test_depth_height_leaves_and_generality(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    oracle = oracle_of(taxonomy)
    for v, node in enumerate(taxonomy.nodes):
        below = oracle.leaves(node)
        assert taxonomy.depth[v] == oracle.depth(node)
        assert taxonomy.height[v] == oracle.height(node)
        assert {taxonomy.classes[c] for c in taxonomy.leaves(v)} == below
        assert taxonomy.n_leaves[v] == len(below)
        assert taxonomy.generality[v] == pytest.approx(np.log2(len(below)))
        assert [taxonomy.nodes[c] for c in taxonomy.children[v]] == [
            u for u in taxonomy.nodes if u in oracle.children[node]
        ]
    assert (taxonomy.sparse_membership.toarray() == taxonomy.membership).all()


@few
@given(seed=seeds)
def test_lch_of_sets_and_pairs(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    oracle, n = oracle_of(taxonomy), len(taxonomy.classes)
    rng = np.random.default_rng(seed)
    sets = rng.random((10, n)) < rng.random((10, 1))
    sets[0] = False
    permutation = rng.permutation(n)
    placed = np.zeros_like(sets)
    placed[:, permutation] = sets
    for rows, got in (
        (sets, taxonomy.lch_many(sets)),
        (placed, taxonomy.lch_many(sets, permutation)),
    ):
        for row, found in zip(rows, got):
            names = [taxonomy.classes[c] for c in np.flatnonzero(row)]
            assert found == (taxonomy.index(oracle.lch(names)) if names else -1)
            if names:
                assert found == taxonomy.lch(np.flatnonzero(row))
    for a in range(n):
        for b in range(n):
            pair = oracle.lch({taxonomy.classes[a], taxonomy.classes[b]})
            assert taxonomy.nodes[taxonomy.leaf_lch[a, b]] == pair
            assert taxonomy.leaf_lca_depth[a, b] == oracle.depth(pair)


@few
@given(seed=seeds)
def test_primary_tree_cuts_and_distances(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    oracle = oracle_of(taxonomy)
    paths = [oracle.primary_path(c) for c in taxonomy.classes]
    for c, path in enumerate(paths):
        nodes = [taxonomy.nodes[v] for v in taxonomy.path_to_root(taxonomy.class_nodes[c])]
        assert nodes == path[::-1]
        assert len(path) == taxonomy.depth[taxonomy.class_nodes[c]] + 1
    for t in range(taxonomy.max_depth + 2):
        got = [taxonomy.nodes[v] for v in taxonomy.cut(t)]
        assert got == [path[min(t, len(path) - 1)] for path in paths]
    for a, first in enumerate(paths):
        for b, second in enumerate(paths):
            shared = sum(u == v for u, v in zip(first, second))
            assert taxonomy.tree_distance[a, b] == len(first) + len(second) - 2 * shared


@few
@given(seed=seeds)
def test_tree_distance_is_a_metric_and_cuts_are_nested(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    d = taxonomy.tree_distance.astype(int)
    assert (d == d.T).all() and ((d == 0) == np.eye(len(d), dtype=bool)).all()
    assert (d[:, :, None] <= d[:, None, :] + d.T[None]).all()
    for t in range(taxonomy.max_depth):
        coarse, fine = taxonomy.cut(t), taxonomy.cut(t + 1)
        assert len(set(zip(coarse, fine))) == len(set(fine))


@few
@given(seed=seeds)
def test_collapsed_has_one_node_for_each_distinct_set(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    collapsed = taxonomy.collapsed()
    sets = [frozenset(taxonomy.leaves(v)) for v in range(len(taxonomy.nodes))]
    kept = [frozenset(collapsed.leaves(v)) for v in range(len(collapsed.nodes))]
    assert len(kept) == len(set(kept)) and set(kept) == set(sets)
    assert collapsed.classes == taxonomy.classes
    assert {collapsed.nodes[v] for v in range(len(kept))} == {
        taxonomy.nodes[v] for v in taxonomy.distinct_nodes
    }
    for v in taxonomy.distinct_nodes:  # the deepest of those with the same classes
        same = [u for u, leaves in enumerate(sets) if leaves == sets[v]]
        assert taxonomy.depth[v] == max(taxonomy.depth[u] for u in same)


@few
@given(seed=seeds)
def test_nodes_and_edges_among_some_classes_by_their_sets(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    present = rng.random(len(taxonomy.classes)) < 0.6
    sets = [
        frozenset(c for c in taxonomy.leaves(v) if present[c]) for v in range(len(taxonomy.nodes))
    ]
    nodes, size = taxonomy.distinct_among(present)
    assert [sets[v] for v in nodes] == list(dict.fromkeys(sets[v] for v in nodes))
    assert {sets[v] for v in nodes} == set(sets) - {frozenset()}
    assert size.tolist() == [len(sets[v]) for v in nodes]
    for v in nodes:
        assert taxonomy.depth[v] == max(
            taxonomy.depth[u] for u, own in enumerate(sets) if own == sets[v]
        )
    edges = {(sets[p], sets[v]) for v, above in enumerate(taxonomy.parents) for p in above}
    expected = {(p, c) for p, c in edges if p != c and c}
    found = taxonomy.edges_among(nodes, present)
    assert {(sets[nodes[p]], sets[nodes[c]]) for p, c in found} == expected
    assert len(found) == len(expected)
    if present.any():  # and as a taxonomy of its own
        tree = taxonomy.collapsed(present)
        assert tree.classes == tuple(taxonomy.classes[c] for c in np.flatnonzero(present))
        assert set(tree.nodes) == {taxonomy.nodes[v] for v in nodes}
        at = {v: sets[taxonomy.index(v)] for v in tree.nodes}
        assert {(at[p], at[c]) for p, c in tree.edges()} == expected


@few
@given(seed=seeds)
@example(seed=105)  # its root is not that of the edges it was built from: depths are its own
def test_restricting_equals_building_from_the_same_edges(random_dag, seed):
    dag = random_dag(seed)
    rng = np.random.default_rng(seed)
    some = [str(c) for c in rng.permutation(dag.classes)[: rng.integers(1, len(dag.classes) + 1)]]
    taxonomy = dag.taxonomy()
    restricted = taxonomy.restrict(some)
    assert restricted == Taxonomy.from_edges(taxonomy.edges(), some)
    assert restricted.classes == tuple(some)
    oracle, root = oracle_of(taxonomy), restricted.nodes[0]
    common = set.intersection(*(oracle.above(c) for c in some))
    assert root in common and oracle.depth(root) == max(map(oracle.depth, common))
    kept = {v for c in some for v in oracle.above(c) if root in oracle.above(v)}
    assert set(restricted.nodes) == kept
    assert set(restricted.edges()) == {
        (p, c) for p, c in taxonomy.edges() if {p, c} <= kept and c != root
    }
    assert Taxonomy.from_json(restricted.to_json()) == restricted


@few
@given(seed=seeds)
def test_permutation_is_seeded(random_dag, seed):
    taxonomy = random_dag(seed).taxonomy()
    assert sorted(taxonomy.permutation(seed)) == list(range(len(taxonomy.classes)))
    assert (taxonomy.permutation(seed) == taxonomy.permutation(seed)).all()


def test_lch_is_no_fold_of_pairs():
    """{a, b, c} meet in `shallow`; folding goes through `deep`, which `shallow` does not hold."""
    edges = [
        ("root", "shallow"),
        ("root", "step"),
        ("step", "deep"),
        *(("shallow", c) for c in "abc"),
        *(("deep", c) for c in "ab"),
        ("root", "d"),
    ]
    taxonomy = Taxonomy.from_edges(edges, ["a", "b", "c", "d"])
    a_b = taxonomy.lch([0, 1])
    assert taxonomy.nodes[a_b] == "deep"
    above = {v: set(np.flatnonzero(taxonomy.membership[v])) for v in range(4)}
    folded = (above[0] & above[1] & set(taxonomy.path_to_root(a_b))) & above[2]
    assert {taxonomy.nodes[v] for v in folded} == {"root"}
    assert taxonomy.nodes[taxonomy.lch([0, 1, 2])] == "shallow"


def test_ties_go_to_fewer_classes_then_to_the_smaller_id():
    edges = [
        ("root", "wide"),
        ("root", "alike"),
        ("root", "also"),
        ("root", "d"),
        *((p, c) for p in ("wide", "alike", "also") for c in "ab"),
        ("wide", "c"),
    ]
    taxonomy = Taxonomy.from_edges(edges, list("abcd"))
    assert taxonomy.nodes[taxonomy.lch([0, 1])] == "alike"
    assert taxonomy.nodes[taxonomy.primary_parent[taxonomy.index("a")]] == "alike"


def test_a_class_above_another_keeps_its_node():
    edges = [("animal", "dog"), ("animal", "cat"), ("dog", "pug"), ("dog", "husky")]
    taxonomy = Taxonomy.from_edges(edges, ["dog", "pug", "cat"])
    dog, pug, cat = range(3)
    assert taxonomy.nodes == ("animal", "cat", "dog", "pug")  # husky is no class: left out
    assert taxonomy.lch([dog]) == taxonomy.lch([dog, pug]) == taxonomy.index("dog")
    assert list(taxonomy.leaves(taxonomy.index("dog"))) == [dog, pug]
    assert taxonomy.height[taxonomy.index("dog")] == 1
    assert taxonomy.tree_distance[dog, pug] == 1 and taxonomy.tree_distance[pug, cat] == 3
    assert len(taxonomy.distinct_nodes) == 4


def test_one_class_alone():
    taxonomy = Taxonomy.from_edges([("a", "b"), ("a", "c")], ["c"])
    assert taxonomy.nodes == ("c",) and taxonomy.max_depth == 0
    assert taxonomy == Taxonomy.from_edges([], ["c"])
    assert taxonomy.cut(3).tolist() == [0] and taxonomy.tree_distance.tolist() == [[0]]


def test_arrays_are_read_only():
    taxonomy = Taxonomy.from_edges([("a", "b"), ("a", "c")])
    for array in (taxonomy.depth, taxonomy.membership, taxonomy.leaf_lch, taxonomy.class_nodes):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        taxonomy.nodes = ()  # type: ignore[misc]


def test_undefined_questions_are_errors():
    taxonomy = Taxonomy.from_edges([("a", "b"), ("a", "c")])
    with pytest.raises(ConfigError, match="class_ids: none given"):
        taxonomy.lch([])
    with pytest.raises(ConfigError, match="t: too small; given -1; allowed: 0 or more"):
        taxonomy.cut(-1)
    with pytest.raises(ConfigError, match=r"taxonomy node: not known .did you mean 'b'"):
        taxonomy.index("bb")
