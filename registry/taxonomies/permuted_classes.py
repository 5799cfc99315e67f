"""The draws of the `permuted_classes` null: the same tree with its classes exchanged.

Classes are exchangeable only where they have about as many images: the number of images of a class
determines how large its group of firings can be. Only the classes present are permuted, within
strata of like size (our own definition).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .taxonomy import IntArray, Taxonomy

SIZE_FACTOR = 1.25
"""The largest class of a stratum has fewer than this many times the images of its smallest."""


@dataclass(frozen=True)
class PermutedClasses:
    """Draws of distinct trees, and what could be permuted.

    Args:
        draws: each (C,), class c takes the position of class draw[c].
        present: number of classes with images.
        movable: of them, those that are not alone in their stratum.
        strata: number of strata of like size, those of one class included.
        same_tree: random permutations left out because they give the tree itself (its symmetries).
        repeated: random permutations left out because they give the tree of an earlier draw.
    """

    draws: tuple[IntArray, ...]
    present: int
    movable: int
    strata: int
    same_tree: int
    repeated: int

    @property
    def reason(self) -> str | None:
        """Why there is no draw; None where there is one."""
        if self.draws:
            return None
        if self.movable < 2:
            return (
                f"no two of the {self.present} classes present have a like number of images "
                f"(within a factor of {SIZE_FACTOR}), so none can be exchanged"
            )
        return f"every exchange of the {self.movable} classes that can move gives the same tree"


def permuted_classes(
    taxonomy: Taxonomy, counts: IntArray | None = None, *, n: int, seed: int = 0
) -> PermutedClasses:
    """Draw `n` distinct trees other than the taxonomy, at random by `seed`; fewer if there are fewer.

    Under the hypothesis that classes of like size are exchangeable, every distinct tree is equally
    likely, so that the rank of the taxonomy among the draws gives an exact p-value.

    Args:
        taxonomy: the class tree.
        counts: (C,) images of each class; None: all classes are present and alike.
        n: number of draws.
        seed: seed of the draws.
    """
    n_classes = len(taxonomy.classes)
    sizes = np.ones(n_classes, dtype=np.int64) if counts is None else np.asarray(counts)
    groups = strata(sizes)
    movable = [group for group in groups if len(group) > 1]
    generator = np.random.default_rng(seed)
    image = _Image(taxonomy, sizes > 0)
    identity = np.arange(n_classes)
    tree = image(identity)
    seen, draws, same_tree, repeated, in_vain = {tree}, [], 0, 0, 0
    # A tree that is not yet drawn is missed this often in a row with probability < exp(-20).
    while movable and len(draws) < n and in_vain < 20 * (len(seen) + 1):
        draw = identity.copy()
        for group in movable:
            draw[group] = generator.permutation(group)
        found = image(draw)
        in_vain += 1
        if found == tree:
            same_tree += 1
        elif found in seen:
            repeated += 1
        else:
            seen.add(found)
            draws.append(draw)
            in_vain = 0
    return PermutedClasses(
        draws=tuple(draws),
        present=int((sizes > 0).sum()),
        movable=sum(map(len, movable)),
        strata=len(groups),
        same_tree=same_tree,
        repeated=repeated,
    )


def strata(counts: IntArray, factor: float = SIZE_FACTOR) -> list[IntArray]:
    """The classes with images in groups of like size, each (n,) ascending by size.

    From the smallest class on, a group takes classes as long as they have fewer than `factor` times
    the images of its smallest.

    Args:
        counts: (C,) images of each class; classes with 0 are in no group.
        factor: see `SIZE_FACTOR`.
    """
    present = np.flatnonzero(counts)
    present = present[np.argsort(counts[present], kind="stable")]
    groups: list[IntArray] = []
    while len(present):
        end = int(np.searchsorted(counts[present], factor * counts[present[0]]))
        groups.append(present[:end])
        present = present[end:]
    return groups


class _Image:
    """A key of the tree after a permutation: equal for two permutations that give the same tree.

    Two trees are the same where they have the same sets of classes at the same depths; a set is
    represented by the sum of random 64-bit numbers of its classes.
    """

    def __init__(self, taxonomy: Taxonomy, present: np.ndarray) -> None:
        by_node = taxonomy.sparse_membership.tocsc()
        self.classes, self.starts = by_node.indices, by_node.indptr[:-1]
        self.depth = taxonomy.depth
        numbers = np.random.default_rng(0).integers(2**63, size=len(present), dtype=np.uint64)
        self.numbers = np.where(present, numbers, np.uint64(0))

    def __call__(self, permutation: IntArray) -> bytes:
        holder = np.argsort(permutation)  # the class that takes each position
        sums = np.add.reduceat(self.numbers[holder][self.classes], self.starts)
        return np.stack(
            [self.depth[order := np.lexsort((sums, self.depth))], sums[order].view(np.int64)]
        ).tobytes()
