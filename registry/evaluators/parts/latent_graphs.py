"""The graph of latents of arXiv 2606.22994: edges, reduction, removals, and measures on other images.

The full text could not be read. What its abstract and the protocol as cited leave open is our own definition:
the weight by activations, the order that removes cycles, and ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from . import summary
from .implication import Pairs
from .ranks import spearman
from .samples import fires, joint_sums, shape

WEIGHTINGS = {"firings": 0.9, "activations": 0.9, "cosine": 0.8}
"""Weighting of edges -> the published threshold; for `activations` that of the firings."""
BLOCK = 256
"""Latents whose joint sums with all others are in memory at a time."""
ENTRIES = 2**22
"""Nonzeros in memory at a time while edges are measured."""
ROUNDING = 1e-9
"""Relative difference up to which two weights are equal."""


class Graph(NamedTuple):
    """Edges from parents to children, each (E,)."""

    parent: np.ndarray
    child: np.ndarray
    weight: np.ndarray

    def where(self, kept: np.ndarray) -> Graph:
        """The edges at `kept` (E,) bool, or (k,) positions."""
        return Graph(*(column[kept] for column in self))


def firing_values(z: sparse.csr_array) -> sparse.csr_array:
    """(n, m) z where it is above 0, as float64."""
    return sparse.csr_array(fires(z).multiply(z).astype(np.float64))


def weigh_edges(
    z: sparse.csr_array, latents: np.ndarray, weighting: str, threshold: float, block: int = BLOCK
) -> Graph:
    """All edges p → c among `latents` (l,) with w(p|c) above and w(c|p) below the threshold.

    - `firings`: w(p|c) = P(z_p > 0 | z_c > 0).
    - `activations`: Σ z_c over the images where p fires too, over Σ z_c.
    - `cosine`: the cosine of z_p and z_c over the images where c fires.

    Args:
        z: (n, m), no entry below 0; see `firing_values`.
        weighting: one of `WEIGHTINGS`.
        threshold: bound of both weights.
        block: latents processed at a time.
    """
    z = sparse.csr_array(z[:, latents])
    fired, square = fires(z), z.multiply(z).tocsr()
    total = {"firings": fired, "activations": z, "cosine": square}[weighting].sum(0)
    found = []
    for start in range(0, len(latents), block):
        here = slice(start, start + block)
        of, on, of_square = (sparse.csr_array(a[:, here]) for a in (z, fired, square))
        products = {
            "firings": [(on, fired)],
            "activations": [(of, fired), (on, z)],
            "cosine": [(of, z), (on, square), (of_square, fired)],
        }[weighting]
        child, parent, sums = joint_sums(products)
        child = child + start
        if weighting == "cosine":
            both, of_parent, of_child = sums
            forward = summary.ratio(both, np.sqrt(total[child] * of_parent))
            reverse = summary.ratio(both, np.sqrt(total[parent] * of_child))
        else:
            forward = summary.ratio(sums[0], total[child])
            reverse = summary.ratio(sums[-1], total[parent])
        kept = (forward > threshold) & (reverse < threshold)
        found.append((latents[parent[kept]], latents[child[kept]], forward[kept]))
    if not found:
        return Graph(np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    return Graph(*(np.concatenate(column) for column in zip(*found)))


def without_cycles(graph: Graph, fired: np.ndarray) -> Graph:
    """The graph without the edges inside a strongly connected component whose parent fires on no
    more images than the child; fired (m,)."""
    m = len(fired)
    ones = np.ones(len(graph.child), dtype=np.int8)
    edges = sparse.csr_array((ones, (graph.parent, graph.child)), shape=(m, m))
    part = connected_components(edges, connection="strong")[1]
    across = part[graph.parent] != part[graph.child]
    return graph.where(across | (fired[graph.parent] > fired[graph.child]))


def strongest_parents(graph: Graph, fired: np.ndarray) -> Graph:
    """Each child's parent of largest weight (ties: the one that fires least, then smallest index).

    Weights that are equal up to rounding are ties, as those of parents that are constant on the
    child's images.
    """
    largest = np.zeros(len(fired))
    np.maximum.at(largest, graph.child, graph.weight)
    weaker = graph.weight < largest[graph.child] * (1 - ROUNDING)
    order = np.lexsort((graph.parent, fired[graph.parent], weaker, graph.child))
    _, first = np.unique(graph.child[order], return_index=True)
    return graph.where(order[first])


def levels(graph: Graph, m: int) -> np.ndarray:
    """(m,) edges on the longest path from a root of the graph, which has no cycle, to each latent."""
    level = np.zeros(m, dtype=np.int64)
    for _ in range(m):
        longer = level.copy()
        np.maximum.at(longer, graph.child, level[graph.parent] + 1)
        if (longer == level).all():
            break
        level = longer
    return level


class Reach(NamedTuple):
    """What the latents of a graph lead to."""

    nodes: np.ndarray  # (k,) the latents with an edge
    below: list[int]  # for each of them, the set of the nodes at or below it: bit i is node i
    implied: np.ndarray  # (E,) whether another path leads from the parent to the child


def reach(graph: Graph, m: int) -> Reach:
    """Transitive closure of a graph without cycles, with one bit for each pair of latents."""
    nodes, ends = np.unique(np.stack([graph.parent, graph.child]), return_inverse=True)
    parent, child = ends.reshape(2, -1)
    level = levels(graph, m)[nodes]
    # Parents from the deepest up; of one parent, children from the highest down: whatever leads to a
    # child comes before it.
    order = np.lexsort((level[child], parent, -level[parent]))
    below = [1 << i for i in range(len(nodes))]
    implied = np.zeros(len(child), dtype=bool)
    for e, p, c in zip(order.tolist(), parent[order].tolist(), child[order].tolist()):
        if below[p] >> c & 1:
            implied[e] = True
        else:
            below[p] |= below[c]
    return Reach(nodes, below, implied)


def build_graph(
    edges: Graph,
    fired: np.ndarray,
    *,
    tree: bool = False,
    max_children: float = np.inf,
    min_descendants: int = 0,
) -> Graph:
    """The graph of the protocol, from all weighted edges.

    In turn: cycles are removed; for a tree each child keeps its strongest parent; edges that longer
    paths imply are removed; then latents with more than `max_children` children; then, until there
    are none, roots with fewer than `min_descendants` descendants.

    Args:
        edges: see `weigh_edges`.
        fired: (m,) images on which each latent fires.
        tree: one parent for each child.
        max_children: most children of a latent.
        min_descendants: least descendants of a root.
    """
    m = len(fired)
    graph = without_cycles(edges, fired)
    graph = strongest_parents(graph, fired) if tree else graph
    graph = graph.where(~reach(graph, m).implied)
    many = np.bincount(graph.parent, minlength=m) > max_children
    graph = graph.where(~many[graph.parent] & ~many[graph.child])
    found = reach(graph, m)
    is_root = ~np.isin(found.nodes, graph.child)
    kept = 0
    for root in np.flatnonzero(is_root).tolist():
        if found.below[root].bit_count() - 1 >= min_descendants:
            kept |= found.below[root]
    inside = np.zeros(m, dtype=bool)
    inside[found.nodes] = [bool(kept >> i & 1) for i in range(len(found.nodes))]
    return graph.where(inside[graph.parent])


def permute_activations(z: sparse.csr_array, generator: np.random.Generator) -> sparse.csr_array:
    """(n, m) each latent's activations on other images, drawn at random: firing rates are kept."""
    n = shape(z)[0]
    columns = sparse.csc_array(z)
    counts = np.diff(columns.indptr)
    rows = [generator.choice(n, count, replace=False) for count in counts.tolist() if count]
    if rows:
        columns.indices = np.concatenate(rows).astype(columns.indices.dtype)
        columns.has_sorted_indices = False
    return sparse.csr_array(columns)


class EdgeCounts(NamedTuple):
    """Images of each edge, each (E,)."""

    both: np.ndarray  # parent and child fire
    stronger: np.ndarray  # of these, with the larger activation in the parent
    child: np.ndarray  # the child fires


def count_edges(z: sparse.csr_array, pairs: Pairs | Graph) -> EdgeCounts:
    """Count the images of each edge; z (n, m) without entries below 0."""
    columns = sparse.csc_array(z)
    fired = np.diff(columns.indptr)
    both, stronger = np.zeros((2, len(pairs.child)), dtype=np.int64)
    for here in _chunks(fired[pairs.parent] + fired[pairs.child]):
        above, below = columns[:, pairs.parent[here]], columns[:, pairs.child[here]]
        common = fires(above.tocsr()).multiply(fires(below.tocsr())).tocsc()
        both[here] = np.diff(common.indptr)
        more = (above - below).multiply(common).tocsc()
        column = np.repeat(np.arange(len(here)), np.diff(more.indptr))
        stronger[here] = np.bincount(column, more.data > 0, minlength=len(here))
    return EdgeCounts(both, stronger, fired[pairs.child])


def _chunks(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Positions in `sizes` (E,), in runs whose sizes sum to about ENTRIES."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // ENTRIES)) + 1
    yield from np.split(np.arange(len(sizes)), cuts)


class Parents(NamedTuple):
    """The parents of a graph, each (P,); NaN where undefined."""

    latent: np.ndarray
    children: np.ndarray
    both: np.ndarray  # images on which the parent and any child fire
    refinement: np.ndarray  # P(any child | parent)
    correlation: np.ndarray


def measure_parents(z: sparse.csr_array, pairs: Pairs | Graph) -> Parents:
    """Refinement, and the rank correlation of a parent's activation with its children's largest.

    The correlation is over the images on which any child fires. z (n, m) without entries below 0.
    """
    columns = sparse.csc_array(z)
    order = np.argsort(pairs.parent, kind="stable")
    parents, first = np.unique(pairs.parent[order], return_index=True)
    rows = []
    own = np.zeros(shape(z)[0])
    for parent, children in zip(parents, np.split(pairs.child[order], first[1:])):
        of_parent, of_children = columns[:, [parent]], columns[:, children]
        image, at = np.unique(of_children.indices, return_inverse=True)
        largest = np.zeros(len(image))
        np.maximum.at(largest, at, of_children.data)
        own[of_parent.indices] = of_parent.data
        activation = own[image]
        own[of_parent.indices] = 0.0
        both = int((activation > 0).sum())
        refinement = float(summary.ratio(both, of_parent.nnz))
        rows.append((len(children), both, refinement, spearman(activation, largest)))
    children, both, refinement, correlation = np.array(rows).reshape(-1, 4).T
    return Parents(parents, children.astype(int), both.astype(int), refinement, correlation)


class Similarity(NamedTuple):
    """Similarity of top images, each less that of random images; NaN where undefined."""

    siblings: np.ndarray  # (P,) mean over the pairs of children of each parent
    own: np.ndarray  # (c,) of the top images of each child among themselves


def similarities(z: sparse.csr_array, unit: np.ndarray, pairs: Pairs | Graph, k: int) -> Similarity:
    """Mean cosine of the embeddings of two children's top images, over pairs of different images.

    The top images of a child are the `k` with the largest activations (ties: the first, so images
    are given in random order); a child that fires on fewer has none.

    Args:
        z: (n, m) without entries below 0.
        unit: (n, e) embeddings of length 1.
        pairs: the edges of a graph.
        k: images of a latent.
    """
    n = len(unit)
    columns = sparse.csc_array(z)
    children = np.unique(pairs.child)
    children = children[np.diff(columns.indptr)[children] >= k]
    top = np.zeros((len(children), k), dtype=np.int64)
    for row, child in enumerate(children):
        here = slice(columns.indptr[child], columns.indptr[child + 1])
        best = np.lexsort((columns.indices[here], np.negative(columns.data[here])))[:k]
        top[row] = columns.indices[here][best]
    pointers = np.arange(len(children) + 1) * k
    chosen = sparse.csr_array((np.ones(top.size), top.ravel(), pointers), shape=(len(children), n))
    summed = np.asarray(chosen @ unit)
    baseline = mean_cosine(unit)
    own = summary.ratio((summed**2).sum(1) - k, k * k - k) - baseline

    place = np.full(shape(z)[1], -1)
    place[children] = np.arange(len(children))
    order = np.argsort(pairs.parent, kind="stable")
    _, first = np.unique(pairs.parent[order], return_index=True)
    siblings = np.full(len(first), np.nan)
    for i, family in enumerate(
        np.split(place[pairs.child[order]], first[1:]) if len(first) else []
    ):
        family = family[family >= 0]
        if len(family) > 1:
            pair = np.triu_indices(len(family), 1)
            shared = (chosen[family] @ chosen[family].T).toarray()[pair]
            cosine = (summed[family] @ summed[family].T)[pair]
            siblings[i] = summary.ratio(cosine - shared, k * k - shared).mean() - baseline
    return Similarity(siblings, own)


def mean_cosine(unit: np.ndarray) -> float:
    """The mean cosine over the pairs of rows of `unit` (n, e), which have length 1 (scalar)."""
    n = len(unit)
    return float(summary.ratio((unit.sum(0) ** 2).sum() - n, n * n - n))


def mono_scores(z: sparse.csr_array, unit: np.ndarray) -> np.ndarray:
    """(m,) MonoScore (arXiv 2504.02821, §3.2) of each latent, as `monosemanticity` defines it.

    Args:
        z: (n, m) without entries below 0.
        unit: (n, e) embeddings of length 1.
    """
    columns = sparse.csc_array(z).copy()
    always = np.flatnonzero(np.diff(columns.indptr) == len(unit)) if len(unit) else []
    for latent in always:  # the least activation counts as 0
        here = slice(columns.indptr[latent], columns.indptr[latent + 1])
        columns.data[here] -= columns.data[here].min()
    total, squares = (np.asarray(a.sum(0)) for a in (columns, columns.multiply(columns)))
    length = np.square(np.asarray(columns.T @ unit)).sum(1)
    pairs = total**2 - squares
    return np.where(pairs > 1e-9 * total**2, summary.ratio(length - squares, pairs), np.nan)
