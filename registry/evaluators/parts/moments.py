"""Between-group variance of a feature, from sums per class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import require_same
from . import summary

BLOCK = 2**22
"""Approximate number of cells, or pairs of classes, in memory at a time."""
LARGE = 1 / 10
"""Share of the classes from which on a group is large: its sum is computed by a dense product."""
CELLS = 2**26
"""On a device with many cores, pairs of classes in memory at a time; with more, the CPU computes."""


class ClassMoments:
    """Per-class sums of a feature about a fixed offset, and the total sum of squares.

    Args:
        n_classes: C.
        n_labellings: how many labellings there are.
        feature: (n, d) a sample, which decides the offset.
    """

    def __init__(self, n_classes: int, n_labellings: int, feature: Tensor) -> None:
        # Sparse latents keep their zeros; dense features are centred on their mean in this sample,
        # since a large offset would cancel the precision of the variance.
        self.offset = None if float((feature == 0).float().mean()) > 0.5 else feature.mean(0)
        shape = (n_labellings, n_classes, feature.shape[1])
        self.sums = torch.zeros(shape, dtype=torch.float32, device=feature.device)
        self.counts = np.zeros((n_labellings, n_classes))
        self.squares = 0.0
        self._gram: dict[int, np.ndarray | Tensor] = {}

    def update(self, feature: Tensor, labellings: list[Tensor]) -> None:
        """Add a batch of the feature (n, d) with its labels (n,) under each labelling."""
        if self.offset is not None:
            feature = feature - self.offset
        for sums, counts, labels in zip(self.sums, self.counts, labellings):
            sums.index_add_(0, labels.to(feature.device), feature)
            counts += torch.bincount(labels, minlength=len(counts)).numpy()
        self.squares += float(feature.square().sum(1).cpu().double().sum())
        self._gram.clear()

    def merge(self, other: ClassMoments) -> None:
        """Add the sums of another part of the images, about the same offset."""
        require_same("mean of a feature", self.offset, other.offset)
        self.sums += other.sums
        self.counts += other.counts
        self.squares += other.squares
        self._gram.clear()

    def variance_share(self, groups: np.ndarray, labelling: int) -> np.ndarray:
        """(L,) between-group over total variance, for groups (L, C) of integers from 0.

        Σ_g ‖s_g‖²/n_g − ‖s‖²/n with s the sums; ‖s_g‖² is a sum over the Gram matrix of the
        classes' sums, computed once for all cuts and permutations.
        """
        if labelling not in self._gram:
            sums = self.sums[labelling]
            gram = sums @ sums.T
            near = gram.device.type in ("cpu", "mps") or gram.numel() > CELLS
            self._gram[labelling] = gram.cpu().double().numpy() if near else gram.double()
        gram, counts = self._gram[labelling], self.counts[labelling]
        n = counts.sum()
        whole = float(gram.sum()) / n if n else np.nan
        if isinstance(gram, Tensor):
            between = _between_on_device(gram, counts, groups)
        else:
            between = _between(gram, counts, groups)
        return summary.ratio(between - whole, self.squares - whole)


def _between_on_device(gram: Tensor, counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """As `_between`, from the pairs of classes one by one; gram (C, C) on the device."""
    images_of = torch.from_numpy(counts).to(gram.device)
    found = [np.zeros(0)]
    step = max(1, CELLS // max(gram.numel(), 1))
    for start in range(0, len(groups), step):
        group = torch.from_numpy(groups[start : start + step].astype(np.int64)).to(gram.device)
        size = (len(group), int(groups.max(initial=0)) + 1)
        images = gram.new_zeros(size).scatter_add_(1, group, images_of.expand_as(group))
        same = group[:, :, None] == group[:, None, :]
        squares = torch.where(same, gram, 0.0).sum(2)
        # A group without images has a sum of 0.
        found.append((squares / images.gather(1, group).clamp(min=1)).sum(1).cpu().numpy())
    return np.concatenate(found)


def _between(gram: np.ndarray, counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(L,) Σ_g ‖s_g‖²/n_g for groups (L, C) and images (C,) of each class."""
    between = np.zeros(len(groups))
    large: list[tuple[int, int]] = []  # row and group
    for row, group in enumerate(groups):
        size, images = np.bincount(group), np.bincount(group, counts)
        size[images == 0] = 0
        big = np.flatnonzero(size > LARGE * len(group))
        large += [(row, g) for g in big.tolist()]
        size[big] = 0
        between[row] = (_sums_by_pair(gram, group, size) / images[size > 0]).sum()
    step = max(1, BLOCK // max(len(gram), 1))
    for start in range(0, len(large), step):
        row, group = np.array(large[start : start + step]).T
        members = (groups[row] == group[:, None]).astype(float)
        squares = np.einsum("kc,kc->k", members @ gram, members)
        np.add.at(between, row, squares / (members @ counts))
    return between


def _sums_by_pair(gram: np.ndarray, group: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The sum of `gram` (C, C) over the pairs of classes of each group of `group` (C,), for the
    groups whose `size` (G,) in classes is not 0."""
    classes = group.argsort(kind="stable")
    partners = size[group[classes]]
    classes, partners = classes[partners > 0], partners[partners > 0]
    k = size[size > 0]
    if not len(k):
        return np.zeros(0)
    first = np.repeat(classes * len(gram), partners)
    shift = np.cumsum(partners) - partners - np.repeat(np.cumsum(k) - k, k)
    second = classes[np.arange(len(first)) - np.repeat(shift, partners)]
    return np.add.reduceat(gram.ravel()[first + second], np.cumsum(k**2) - k**2)
