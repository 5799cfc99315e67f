"""The split of the evaluation images into a fit half and a score half, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...registry.errors import DataError
from ...registry.evaluators.parts.null_latents import shuffle_labels


@dataclass(frozen=True)
class Split:
    """A stratified, seeded halving of the evaluation set.

    Args:
        labels: (n,) class of each image.
        shuffled: (n,) the labels permuted over the images of each half.
        order: (n,) positions, the whole fit half first; classes are mixed within a half.
        n_fit: images in the fit half.
    """

    labels: np.ndarray
    shuffled: np.ndarray
    order: np.ndarray
    n_fit: int

    @classmethod
    def halves(cls, labels: np.ndarray, n_classes: int, seed: int = 0) -> Split:
        """Halve every class, at random by `seed`.

        Of a class with an odd number of images, the larger part goes to the half that has fewer
        images so far. Classes are taken in random order: in the order of the tree, siblings would
        differ in their parts, which permuted classes do not.

        The shuffled labels stay within the halves: a class then has as many images in each of them
        as it truly has. Permuted over both, classes would differ in frequency between the halves,
        which costs a prior or threshold of the fit half on the score half, and true labels nothing.

        Raises:
            DataError: no image, or a label outside 0 … n_classes−1.
        """
        labels = np.asarray(labels, dtype=np.int64)
        if not len(labels):
            raise DataError("images", "the evaluation set has no image left")
        outside = np.unique(labels[(labels < 0) | (labels >= n_classes)])
        if len(outside):
            raise DataError(
                "labels",
                "not classes of the taxonomy",
                given=outside[:10].tolist(),
                allowed=f"0 … {n_classes - 1}",
            )
        generator = np.random.default_rng(seed)
        fit, score = [], []
        n_fit = n_score = 0
        for label in generator.permutation(n_classes):
            members = generator.permutation(np.flatnonzero(labels == label))
            half = (len(members) + (n_fit <= n_score)) // 2
            fit.append(members[:half])
            score.append(members[half:])
            n_fit, n_score = n_fit + half, n_score + len(members) - half
        order = [generator.permutation(np.concatenate(part)) for part in (fit, score)]
        shuffled = labels.copy()
        for half, part in enumerate(order):
            shuffled[part] = shuffle_labels(labels[part], (seed, half))
        return cls(labels, shuffled, np.concatenate(order), n_fit)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def n_score(self) -> int:
        """Images in the score half."""
        return len(self) - self.n_fit

    def without(self, group: int, groups: int) -> Split:
        """The split without one of `groups` parts of like size, each with its share of every class.

        Within each half, the images of a class are dealt to the parts in turn.
        """
        kept = np.ones(len(self.order), dtype=bool)
        for half in (slice(0, self.n_fit), slice(self.n_fit, None)):
            by_class = np.argsort(self.labels[self.order[half]], kind="stable")
            kept[half][by_class] = np.arange(len(by_class)) % groups != group
        return replace(self, order=self.order[kept], n_fit=int(kept[: self.n_fit].sum()))

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, bool]]:
        """(positions (b,), whether they are of the fit half); no batch mixes the halves."""
        for is_fit, half in ((True, self.order[: self.n_fit]), (False, self.order[self.n_fit :])):
            for start in range(0, len(half), size):
                yield half[start : start + size], is_fit

    def sample(self, size: int) -> np.ndarray:
        """(n,) positions of up to `size` fit images."""
        return self.order[: min(size, self.n_fit)]
