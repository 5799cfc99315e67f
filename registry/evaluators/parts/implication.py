"""Forests of latents: by implication, and as recorded by an SAE; measures of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from . import summary
from .samples import fires, shape, together

BLOCK = 1024
"""Latents processed at a time."""


class Pairs(NamedTuple):
    """Parents and children, each (P,)."""

    parent: np.ndarray
    child: np.ndarray


class Edges(NamedTuple):
    """The forest on the images of the score half; each (E,), NaN where undefined."""

    implication: np.ndarray  # P(p | c)
    reverse: np.ndarray  # P(c | p)
    lift: np.ndarray


def recorded_parents(sae: Any, m: int) -> np.ndarray:
    """(m,) the parent of each latent in the SAE's own forest, −1 where none.

    Read from the forest that gates the SAE's firing, where it has one, else from its config.
    """
    own: Any = getattr(getattr(sae, "forest", None), "parents", None)
    parents = own if own is not None else getattr(getattr(sae, "cfg", None), "parents", None)
    if parents is None or len(parents) != m:
        return np.full(m, -1)
    return np.array([int(parent) for parent in parents], dtype=np.int64)


def depths(parents: np.ndarray) -> np.ndarray:
    """(m,) the number of ancestors of each latent; `parents` (m,) is −1 at a root."""
    depth, above = np.zeros_like(parents), parents
    for _ in range(len(parents)):  # ends at the longest chain, and for cycles
        inner = above >= 0
        if not inner.any():
            break
        depth = depth + inner
        above = np.where(inner, parents[above], -1)
    return depth


def rewire(forest: Pairs, depth: np.ndarray, generator: np.random.Generator) -> Pairs:
    """The forest with parents permuted at random among children of equal `depth` (E,)."""
    parent = forest.parent.copy()
    for level in np.unique(depth):
        here = np.flatnonzero(depth == level)
        parent[here] = parent[generator.permutation(here)]
    return Pairs(parent, forest.child)


def implied_pairs(
    firings: sparse.csr_array,
    *,
    implication: float = 0.9,
    ratio: float = 2.0,
    lift: float = 1.0,
    min_fired: int = 1,
    block: int = BLOCK,
) -> Pairs:
    """All pairs of latents within the bounds, ordered by child and then parent.

    Args:
        firings: (n, m) of zeros and ones.
    """
    n, m = shape(firings)
    fired = np.bincount(firings.indices, minlength=m)
    children = np.flatnonzero(fired >= max(min_fired, 1))
    found = []
    for start in range(0, len(children), block):
        child = children[start : start + block]
        at, parent, both = together(firings, child)
        own, above = fired[child[at]], fired[parent]
        # A tolerance for the rounding of bounds like 0.9 · 10.
        holds = (both >= implication * own - 1e-9) & (above >= ratio * own - 1e-9)
        holds &= both * n >= lift * own * above - 1e-9
        found.append(np.stack([parent[holds], child[at[holds]]]))
    parent, child = np.concatenate([*found, np.zeros((2, 0), dtype=np.int64)], axis=1)
    return Pairs(parent, child)


def nearest_parents(pairs: Pairs, fired: np.ndarray) -> Pairs:
    """For each child the parent that fires least (ties: smallest index), ordered by child."""
    order = np.lexsort((pairs.parent, fired[pairs.parent], pairs.child))
    child, first = np.unique(pairs.child[order], return_index=True)
    return Pairs(pairs.parent[order][first], child)


def measure_edges(firings: sparse.csr_array, forest: Pairs) -> Edges:
    """P(p|c), P(c|p) and lift of each edge; firings (n, m) of zeros and ones."""
    columns = sparse.csc_array(firings)
    fired = np.diff(columns.indptr)
    both = columns[:, forest.parent].multiply(columns[:, forest.child]).sum(0)
    own, above = fired[forest.child], fired[forest.parent]
    lift = summary.ratio(both * shape(firings)[0], own.astype(float) * above)
    return Edges(summary.ratio(both, own), summary.ratio(both, above), lift)


def hamming(firings: sparse.csr_array, forest: Pairs) -> pd.DataFrame:
    """Hamming distance of each parent's firing from the OR of its children's.

    Returns:
        one row for each parent: its number of `children`; `hamming`, the share of images on which
        they differ; `hamming_relative`, the same of the images on which either fires.
    """
    n, m = shape(firings)
    parents, group = np.unique(forest.parent, return_inverse=True)
    size = (m, len(parents))
    belongs = sparse.csr_array((np.ones(len(group)), (forest.child, group)), shape=size)
    either = fires(sparse.csr_array(firings @ belongs))
    own = sparse.csr_array(sparse.csc_array(firings)[:, parents])
    both = own.multiply(either).sum(0)
    total = own.sum(0) + either.sum(0)
    return pd.DataFrame(
        {
            "parent": parents,
            "children": np.bincount(group, minlength=len(parents)),
            "hamming": summary.ratio(total - 2 * both, n),
            "hamming_relative": summary.ratio(total - 2 * both, total - both),
        }
    )


def near_probe(
    decoder: torch.Tensor, direction: torch.Tensor, latents: np.ndarray, nearest: int
) -> np.ndarray:
    """(E,) whether all of an edge's latents are among the nearest decoder rows by cosine.

    Args:
        decoder: (m, d).
        direction: (E, d) weights of the probes.
        latents: (2, E) parent and child of each edge.
    """
    rows = torch.nn.functional.normalize(decoder, dim=1)
    cosine = torch.nn.functional.normalize(direction, dim=1) @ rows.T
    top = cosine.topk(min(nearest, len(decoder)), dim=1).indices.numpy()
    return (top[None] == latents[:, :, None]).any(2).all(0)


def recall_of(wanted: np.ndarray, found: np.ndarray) -> float:
    """The share of the rows of `wanted` (W, 2) that are among those of `found` (F, 2)."""
    if not len(wanted):
        return float("nan")
    have = set(map(tuple, found.tolist()))
    return float(np.mean([tuple(row) in have for row in wanted.tolist()]))
