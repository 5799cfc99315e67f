"""A taxonomy: a rooted DAG whose leaves are the classes of a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..coerce import MisfitError, coerce
from ..errors import ConfigError
from ..files import UnreadableError, parse_json
from ..names import unknown_name_message
from . import graph

FORMAT = "taxolens.taxonomy/1"
MAX_LEVELS = 1000
MAX_CELLS = 900_000_000  # of `membership`, of which two copies of a byte each are made

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
A = TypeVar("A", bound=NDArray[Any])


@dataclass(frozen=True)
class Taxonomy:
    """A rooted DAG over classes; immutable. Build one with `from_edges` or `load_taxonomy`.

    Nodes are ordered by depth and then by id, so the root is 0 and parents precede children. The
    root is the lowest common hypernym (LCH) of the classes. Nodes above it, and nodes with no class
    at or below them, are left out. A class may be above another one; its node then has height > 0.

    C classes, V nodes. Every array is read-only.

    Args:
        nodes: ids, each after its parents.
        parents: for each node the positions of its parents.
        classes: ids of the classes in the order of the labels.
        names: human names by id, where there are any.

    Raises:
        ConfigError: the graph is not of this form; with the nodes in the message.
    """

    nodes: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(set(self.nodes)) != len(self.nodes):
            problem = f"given twice: {graph.listed(_repeated(self.nodes))}"
            raise ConfigError("nodes", problem, allowed="each node once")
        if not self.classes:
            raise ConfigError("classes", "none given", allowed="at least one")
        _check_classes(self.classes, self.nodes)
        if len(self.parents) != len(self.nodes):
            problem = f"{len(self.parents)} given for {len(self.nodes)} nodes"
            raise ConfigError("parents", problem, allowed="one tuple for each node")
        for v, above in enumerate(self.parents):
            if any(p >= v or p < 0 for p in above) or (not above) != (v == 0):
                raise ConfigError(
                    "parents",
                    f"node {self.nodes[v]!r} must follow its parents, and only the first has none",
                    given=above,
                    allowed=f"positions before {v}" if v else "none for the first",
                )
        _check_size(len(self.nodes), len(self.classes))
        if self.max_depth > MAX_LEVELS:
            problem = f"{self.max_depth} levels deep"
            raise ConfigError("taxonomy", problem, allowed=f"at most {MAX_LEVELS} levels")
        if not self.membership.any(0).all():
            barren = [self.nodes[v] for v in np.flatnonzero(~self.membership.any(0))]
            problem = f"without any class below: {graph.listed(barren)}"
            raise ConfigError("nodes", problem, allowed="nodes with a class at or below them")
        if self.lch(range(len(self.classes))) != 0:
            problem = f"root {self.nodes[0]!r} is not the LCH of the classes"
            raise ConfigError("nodes", problem, allowed="a tree whose root is")

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[str, str]],
        classes: Sequence[str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Taxonomy:
        """Build from (parent, child) pairs.

        Args:
            edges: the graph, with one root and without cycles.
            classes: nodes that are classes, in the order of the labels; None takes the nodes
                without children, sorted by id.
            names: human names by id.

        Raises:
            ConfigError: cycles, several roots, unknown or repeated classes; with their names.
        """
        parents = graph.parents_of(edges)
        if not parents and classes is not None and len(classes) == 1:
            parents = {classes[0]: []}  # a single class without edges
        if classes is None:
            above = {p for ps in parents.values() for p in ps}
            classes = sorted(set(parents) - above)
        graph.check_one_rooted(parents)
        return cls._rooted(parents, classes, names or {})

    @classmethod
    def _rooted(
        cls, parents: graph.Parents, classes: Sequence[str], names: Mapping[str, str]
    ) -> Taxonomy:
        """Keep the nodes between the classes and their LCH."""
        if not classes:
            raise ConfigError("classes", "none given", allowed="at least one")
        if not parents.keys() >= set(classes):  # macOS names folders in another form of Unicode
            composed = {normalize("NFC", v): v for v in parents}
            classes = [c if c in parents else composed.get(normalize("NFC", c), c) for c in classes]
        _check_classes(classes, parents)
        _check_size(len(parents), len(classes))
        depth = graph.depths(parents)
        below = graph.classes_below(parents, depth, classes)
        every_class = (1 << len(classes)) - 1
        common = [v for v, held in below.items() if held == every_class]
        if not common:
            problem = f"no common ancestor of {graph.listed(classes)}"
            raise ConfigError("classes", problem, allowed="classes with one")
        root = min(common, key=lambda v: (-depth[v], v))
        kept: dict[str, list[str]] = {root: []}
        for v in sorted(parents, key=depth.__getitem__):  # parents first
            if v != root and below[v] and (own := [p for p in parents[v] if p in kept]):
                kept[v] = own
        depth = graph.depths(kept)
        nodes = sorted(kept, key=lambda v: (depth[v], v))
        position = {v: i for i, v in enumerate(nodes)}
        return cls(
            nodes=tuple(nodes),
            parents=tuple(tuple(sorted(position[p] for p in kept[v])) for v in nodes),
            classes=tuple(classes),
            names={v: names[v] for v in nodes if v in names},
        )

    # Nodes ------------------------------------------------------------------------------------

    @property
    def root(self) -> int:
        """Position of the root: 0."""
        return 0

    @cached_property
    def _position(self) -> dict[str, int]:
        return {v: i for i, v in enumerate(self.nodes)}

    def index(self, node: str) -> int:
        """The position of a node id.

        Raises:
            ConfigError: there is no such node; the message lists similar ids.
        """
        if node not in self._position:
            raise ConfigError(unknown_name_message("taxonomy node", node, list(self.nodes)))
        return self._position[node]

    def label(self, v: int) -> str:
        """The human name of node v; its id if it has none."""
        return self.names.get(self.nodes[v], self.nodes[v])

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the children of each node."""
        below: list[list[int]] = [[] for _ in self.nodes]
        for v, above in enumerate(self.parents):
            for p in above:
                below[p].append(v)
        return tuple(map(tuple, below))

    @cached_property
    def class_nodes(self) -> IntArray:
        """(C,) the node of each class."""
        return _frozen(np.array([self._position[c] for c in self.classes], dtype=np.int64))

    @cached_property
    def depth(self) -> IntArray:
        """(V,) longest path from the root, in edges."""
        depth = np.zeros(len(self.nodes), dtype=np.int64)
        for v, above in enumerate(self.parents):
            depth[v] = max((depth[p] + 1 for p in above), default=0)
        return _frozen(depth)

    @cached_property
    def height(self) -> IntArray:
        """(V,) longest path down, in edges; 0 for nodes without children."""
        height = np.zeros(len(self.nodes), dtype=np.int64)
        for v in reversed(range(len(self.nodes))):
            height[v] = max((height[c] + 1 for c in self.children[v]), default=0)
        return _frozen(height)

    @cached_property
    def n_leaves(self) -> IntArray:
        """(V,) classes at or below each node."""
        return _frozen(self.membership.sum(0))

    @cached_property
    def generality(self) -> NDArray[np.float64]:
        """(V,) log₂ of `n_leaves`."""
        return _frozen(np.log2(self.n_leaves))

    @property
    def max_depth(self) -> int:
        """The largest depth of a node (scalar)."""
        return int(self.depth.max())

    # Membership and common ancestors ------------------------------------------------------------

    @cached_property
    def membership(self) -> BoolArray:
        """(C, V) whether class c is at or below node v."""
        below = np.zeros((len(self.nodes), len(self.classes)), dtype=bool)
        below[self.class_nodes, np.arange(len(self.classes))] = True
        for v in reversed(range(len(self.nodes))):
            for p in self.parents[v]:
                below[p] |= below[v]
        return _frozen(np.ascontiguousarray(below.T))

    @cached_property
    def sparse_membership(self) -> sparse.csr_array:
        """(C, V) `membership` as sparse float32, for fast products."""
        return sparse.csr_array(self.membership, dtype=np.float32)

    def leaves(self, v: int) -> IntArray:
        """(n,) the classes at or below node v."""
        return np.flatnonzero(self.membership[:, v])

    @cached_property
    def by_preference(self) -> IntArray:
        """(V,) nodes by increasing preference as LCH: depth, then few leaves, then small id."""
        number = np.arange(len(self.nodes))
        return np.lexsort((-number, -self.n_leaves, self.depth))

    def lch(self, class_ids: Iterable[int]) -> int:
        """The lowest common hypernym: the deepest node above all these classes.

        Ties: the node with the fewest classes, then the smallest id. It is the deepest node of the
        intersection of ancestor sets; on a DAG, LCHs of pairs can give another node.

        Raises:
            ConfigError: there are no classes.
        """
        below = list(class_ids)
        if not below:
            raise ConfigError("class_ids", "none given", allowed="at least one")
        best_first = self.by_preference[::-1]
        above_all = np.all(self.membership[below], axis=0)
        return int(best_first[np.argmax(above_all[best_first])])

    def lch_many(
        self, sets: BoolArray | sparse.csr_array, permutation: IntArray | None = None
    ) -> IntArray:
        """(m,) the LCH of each row of a boolean (m, C), dense or sparse; −1 for empty rows.

        With a `permutation` (C,), class c takes the position of class permutation[c].
        """
        sets = sparse.csr_array(sets, dtype=np.float32)
        place = np.arange(len(self.classes)) if permutation is None else permutation
        best_first, ancestors = self._best_first
        size = np.diff(sets.indptr)
        found = np.full(len(size), -1, dtype=np.int64)
        few = np.flatnonzero((size == 1) | (size == 2))
        one, other = (place[sets.indices[sets.indptr[few + end] - end]] for end in (0, 1))
        found[few] = self.leaf_lch[one, other]
        many = np.flatnonzero(size > 2)
        if len(many):
            ancestors = ancestors[place]
        for rows in np.array_split(many, -(-int(size[many].sum()) // 2**18) or 1):
            held = sparse.csr_array(sets[rows] @ ancestors)
            holds_all = held.data == np.repeat(size[rows], np.diff(held.indptr))
            found[rows] = best_first[first_columns(held, holds_all)]
        return found

    @cached_property
    def _best_first(self) -> tuple[IntArray, sparse.csr_array]:
        """(V,) nodes by decreasing preference as LCH, and (C, V) `sparse_membership` in this order."""
        best_first = self.by_preference[::-1]
        return best_first, self.sparse_membership[:, best_first]

    @cached_property
    def leaf_lch(self) -> NDArray[np.int32]:
        """(C, C) LCH of every pair of classes; on the diagonal the node of the class."""
        lch = np.zeros((len(self.classes), len(self.classes)), dtype=np.int32)
        for v in self.by_preference:  # preferred nodes overwrite others
            below = self.leaves(v)
            lch[np.ix_(below, below)] = v
        return _frozen(lch)

    @cached_property
    def leaf_lca_depth(self) -> NDArray[np.int16]:
        """(C, C) depth of the LCH of every pair of classes."""
        return _frozen(self.depth.astype(np.int16)[self.leaf_lch])

    # The primary tree ---------------------------------------------------------------------------

    @cached_property
    def primary_parent(self) -> IntArray:
        """(V,) the deepest parent (ties: fewest classes, then id), −1 at the root.

        Depth is the longest path, so the primary parent is exactly one level above.
        """
        rank = np.argsort(self.by_preference)
        return _frozen(
            np.array([max(ps, key=lambda p: rank[p], default=-1) for ps in self.parents])
        )

    def path_to_root(self, v: int) -> tuple[int, ...]:
        """Node v and its primary ancestors, the root last."""
        path = [v]
        while path[-1] != self.root:
            path.append(int(self.primary_parent[path[-1]]))
        return tuple(path)

    def cut(self, t: int) -> IntArray:
        """(C,) the primary ancestor of each class at depth min(t, depth): nested groups.

        Raises:
            ConfigError: t is negative.
        """
        if t < 0:
            raise ConfigError("t", "too small", given=t, allowed="0 or more")
        group = self.class_nodes.copy()
        while (deep := self.depth[group] > t).any():
            group[deep] = self.primary_parent[group[deep]]
        return group

    @cached_property
    def tree_distance(self) -> NDArray[np.int16]:
        """(C, C) edges between two classes on the primary tree (a metric, unlike on the DAG)."""
        own = self.depth[self.class_nodes].astype(np.int16)
        shared = np.zeros((len(own), len(own)), dtype=np.int16)
        group = self.class_nodes.copy()
        for t in range(self.max_depth, 0, -1):
            deep = self.depth[group] > t
            group[deep] = self.primary_parent[group[deep]]
            shared += group[:, None] == group
        np.fill_diagonal(shared, own)
        return _frozen(own[:, None] + own - 2 * shared)

    # Other taxonomies ---------------------------------------------------------------------------

    @property
    def distinct_nodes(self) -> IntArray:
        """(n,) the deepest node of each distinct set of classes (ties: smallest id), ascending."""
        return self.distinct_among(np.ones(len(self.classes), dtype=bool))[0]

    def distinct_among(self, present: BoolArray) -> tuple[IntArray, IntArray]:
        """The deepest node of each distinct set of the classes `present` (C,), ascending.

        Returns:
            the nodes (n,), without those that have none of these classes, and how many each has (n,).
        """
        key = present.tobytes()
        if key not in self._distinct:
            sets = self._sets(present)
            best = {sets[v]: int(v) for v in self.by_preference}
            nodes = np.sort(np.fromiter(best.values(), dtype=np.int64))
            size = (present.astype(np.float32) @ self.sparse_membership)[nodes].astype(np.int64)
            self._distinct[key] = _frozen(nodes[size > 0]), _frozen(size[size > 0])
        return self._distinct[key]

    @cached_property
    def _distinct(self) -> dict[bytes, tuple[IntArray, IntArray]]:
        """Classes -> `distinct_among` of them: every evaluator of every pass needs the same."""
        return {}

    def _sets(self, present: BoolArray) -> list[bytes]:
        """(V,) the set of the classes `present` (C,) at or below each node."""
        members = self.membership if present.all() else self.membership[present]
        return [row.tobytes() for row in np.packbits(members, axis=0).T]

    def edges_among(self, nodes: IntArray, present: BoolArray) -> IntArray:
        """(E, 2) parent and child, as positions in `nodes` (N,), of the edges between nodes that differ
        in the classes `present` (C,); each node stands for all with its set of these classes."""
        sets = self._sets(present)
        position = {sets[v]: i for i, v in enumerate(nodes)}
        place = [position.get(key, -1) for key in sets]
        edges = {(place[p], place[v]) for v, above in enumerate(self.parents) for p in above}
        kept = sorted((p, c) for p, c in edges if p != c and min(p, c) >= 0)
        return np.array(kept, dtype=np.int64).reshape(-1, 2)

    def collapsed(self, present: BoolArray | None = None) -> Taxonomy:
        """One node per distinct set of classes: chains of single children are merged.

        Args:
            present: (C,) bool, the classes to keep, in this order: nodes that differ in none of them
                are one, the deepest. None: all.

        Raises:
            ConfigError: none is kept.
        """
        counted = np.ones(len(self.classes), dtype=bool) if present is None else present
        keys = self._sets(counted)
        kept = {keys[v]: self.nodes[v] for v in self.distinct_among(counted)[0]}
        merged = [kept.get(key) for key in keys]  # None: without any of these classes
        edges = [(merged[p], merged[v]) for v, ps in enumerate(self.parents) for p in ps]
        edges = [(p, c) for p, c in edges if p is not None and c is not None and p != c]
        classes = [self.classes[c] for c in np.flatnonzero(counted)]
        return Taxonomy.from_edges(edges, classes, self.names)

    def restrict(self, classes: Sequence[str]) -> Taxonomy:
        """The taxonomy with these nodes as classes, in this order, rooted at their LCH by the
        depths of this taxonomy.

        Raises:
            ConfigError: a class is unknown or repeated.
        """
        parents = {v: [self.nodes[p] for p in ps] for v, ps in zip(self.nodes, self.parents)}
        return Taxonomy._rooted(parents, classes, self.names)

    def permutation(self, seed: int) -> IntArray:
        """(C,) a random permutation: class c takes the position of class permutation[c]."""
        return np.random.default_rng(seed).permutation(len(self.classes))

    # Files --------------------------------------------------------------------------------------

    def edges(self) -> list[tuple[str, str]]:
        """All (parent, child) pairs."""
        return [(self.nodes[p], v) for v, ps in zip(self.nodes, self.parents) for p in ps]

    def to_json(self) -> str:
        """A JSON document from which `from_json` restores an equal taxonomy."""
        data = {
            "format": FORMAT,
            "classes": self.classes,
            "edges": self.edges(),
            "names": dict(self.names),
        }
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Taxonomy:
        """Restore a taxonomy from the output of `to_json`.

        Raises:
            ConfigError: the document has another form.
        """
        try:
            data = parse_json(text)
        except UnreadableError as error:
            raise ConfigError("taxonomy", error, allowed="the output of to_json") from None
        return cls.from_edges(*document(data, "taxonomy"))

    def __repr__(self) -> str:
        return (
            f"Taxonomy(root={self.label(0)!r}, classes={len(self.classes)}, "
            f"nodes={len(self.nodes)}, max_depth={self.max_depth})"
        )


def document(data: Any, where: str) -> tuple[list[tuple[str, str]], list[str], dict[str, str]]:
    """(edges, classes, names) in the content of a taxonomy document.

    Raises:
        ConfigError: it has another form.
    """
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ConfigError(where, "format: not known", given=found, allowed=repr(FORMAT))
    try:
        edges = coerce(data.get("edges"), list[list[str]], "edges")
        classes = coerce(data.get("classes"), list[str], "classes")
        names = coerce(data.get("names") or {}, dict[str, str], "names")
    except MisfitError as error:
        raise ConfigError(where, error, allowed="the output of Taxonomy.to_json") from None
    for edge in edges:
        if len(edge) != 2:
            raise ConfigError(where, "not a pair", given=edge, allowed="[parent, child]")
    return [(parent, child) for parent, child in edges], classes, names


def _check_size(n_nodes: int, n_classes: int) -> None:
    if n_nodes * n_classes > MAX_CELLS:
        problem = f"{n_nodes:,} nodes times {n_classes:,} classes"
        raise ConfigError("taxonomy", problem, allowed=f"a product of at most {MAX_CELLS:,}")


def _check_classes(classes: Sequence[str], nodes: Iterable[str]) -> None:
    if repeated := _repeated(classes):
        problem = f"given twice: {graph.listed(repeated)}"
        raise ConfigError("classes", problem, allowed="each class once")
    known = set(nodes)
    unknown = [c for c in classes if c not in known]
    if unknown:
        first = unknown_name_message("class", unknown[0], sorted(known))
        several = f" {len(unknown)} of {len(classes)} classes are unknown: {graph.listed(unknown)}."
        rest = several if len(unknown) > 1 else ""
        raise ConfigError("taxonomy", f"{first}{rest}")


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, times in Counter(names).items() if times > 1)


def first_columns(matrix: sparse.csr_array, where: BoolArray) -> IntArray:
    """(n,) the first column of each row (n, k) among the nonzeros (nnz,) that are true in `where`;
    −1 where none is."""
    sizes = np.diff(matrix.indptr)
    none = np.iinfo(np.int64).max
    found = np.full(len(sizes), none)
    if len(where):
        columns = np.where(where, matrix.indices.astype(np.int64), none)
        found[sizes > 0] = np.minimum.reduceat(columns, matrix.indptr[:-1][sizes > 0])
    return np.where(found < none, found, -1)


def _frozen(array: A) -> A:
    array.setflags(write=False)
    return array
