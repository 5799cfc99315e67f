"""Which axes of a submodule's tensors are positions and which are width, by a probe of two sizes.

The axes that move with the size of the image are positions. Neither the class of a submodule nor the
shape of one tensor tells: ConvNeXt's channels-first norm is a `LayerNorm`, and (2, 4, 4, 16) is a grid
of 4 x 4 positions or of 4 x 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .windows import Cut

CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm)  # these classes alone: what inherits from them may differ
UNDECIDED = "which of its axes are positions cannot be decided"


@dataclass(frozen=True)
class Layout:
    """The axes of positions and of width, each in order; the first axis is the images."""

    positions: tuple[int, ...]
    width: tuple[int, ...]

    def to_tokens(self, value: Tensor) -> Tensor:
        """A copy of `value` as (B, T, d); a copy, since models add to their feature maps in place."""
        moved = value.permute(self._order).clone(memory_format=torch.contiguous_format)
        n_positions = prod(value.shape[axis] for axis in self.positions)
        return moved.reshape(len(value), n_positions, -1)

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """(B, T, d) in the shape and memory layout of `like`."""
        order = self._order
        moved = tokens.reshape([like.shape[axis] for axis in order])
        back = [order.index(axis) for axis in range(like.ndim)]
        return torch.empty_like(like).copy_(moved.permute(back))

    @property
    def _order(self) -> tuple[int, ...]:
        return (0, *self.positions, *self.width)


SEQUENCE = Layout((1,), (2,))  # (B, T, d), as every transformer has its tokens


class Probe(NamedTuple):
    """A batch of `images` pictures of `size` (height, width), and the shape that it gave."""

    images: int
    size: tuple[int, int]
    shape: tuple[int, ...]
    cut: Cut | None = None  # of the block around the submodule


def decide(own: Probe, other: Probe | None, module: nn.Module) -> Layout | str:
    """The layout of a submodule's input or output, or why there is none.

    Args:
        own: at the model's own image size.
        other: at a size whose height and width both differ from it, the height less than the width;
            None where the model takes one size alone.
        module: the submodule, whose class decides where the shapes do not.
    """
    for probe in (own, other):
        if probe is not None and (not probe.shape or probe.shape[0] != probe.images):
            return not_one_row(probe.shape, probe.images)
    rank = len(own.shape)
    if rank == 2:
        return Layout((), (1,))
    if rank not in (3, 4):
        return f"its tensors of shape {own.shape} have no tokens"
    rest = tuple(range(1, rank))
    if sum(own.shape[axis] > 1 for axis in rest) <= 1 and not _moving(own, other):
        return Layout((), rest)  # pooled
    if other is None:
        return _by_shape(own, module)
    moving = _moving(own, other)
    if len(moving) == 1 or (len(moving) == 2 and rank == 4 and _grows(own, other, moving)):
        return Layout(moving, tuple(axis for axis in rest if axis not in moving))
    return UNDECIDED if moving else _by_shape(own, module)


def other_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (height, width) at which to probe, beside the model's own; the height is the less."""
    height, width = size
    if max(size) <= 128:
        return [(2 * height, 3 * width), (height // 2, 3 * width // 4)]
    small = max(32, height // 64 * 32), max(64, 3 * width // 128 * 32)
    return [small, (2 * height, 3 * width)] if max(size) <= 256 else [small]


def unmoved(differences: Tensor, tolerance: float) -> tuple[int, ...]:
    """The places of the T tokens that are the same in two images, but for rounding.

    Args:
        differences: (T,) the largest difference of each token.
        tolerance: the part of the largest of all that is rounding.
    """
    same = differences <= tolerance * differences.max()
    return tuple(same.nonzero().flatten().tolist())


def not_one_row(shape: Sequence[int], images: int) -> str:
    """The reason where the first axis is not the batch."""
    rows = shape[0] if shape else "no"
    return (
        f"it gives {rows} rows for {images} images, such as one for each window, not one for each"
    )


def _moving(own: Probe, other: Probe | None) -> tuple[int, ...]:
    if other is None or len(own.shape) != len(other.shape):
        return ()
    return tuple(a for a in range(1, len(own.shape)) if own.shape[a] != other.shape[a])


def _grows(own: Probe, other: Probe, axes: Sequence[int]) -> bool:
    """Whether two axes grow as height and width; those of an attention pattern grow as the area."""
    sides = [(own.shape[axis], other.shape[axis]) for axis in axes]
    in_order = sides[0][1] < sides[1][1]
    return in_order and all(
        abs(side - before * edge / old) <= 1 + edge / old
        for (before, side), old, edge in zip(sides, own.size, other.size)
    )


def _by_shape(own: Probe, module: nn.Module) -> Layout | str:
    """Where no axis moved, or no other size is possible: by the class, or by the only grid."""
    first = isinstance(module, CHANNELS_FIRST)
    if len(own.shape) == 3:  # tokens as every transformer has them
        return Layout((2,), (1,)) if first else Layout((1,), (2,))
    if first:
        return Layout((2, 3), (1,))
    grids = [axes for axes in ((1, 2), (2, 3)) if _is_grid(own, axes)]
    if len(grids) == 2 and type(module) in CHANNELS_LAST:
        del grids[1]
    if len(grids) != 1:
        return UNDECIDED
    return Layout(grids[0], (3,) if grids[0] == (1, 2) else (1,))


def _is_grid(probe: Probe, axes: Sequence[int]) -> bool:
    """Whether two axes are height and width of the image over one stride, rounded up or down."""
    sides = [probe.shape[axis] for axis in axes]
    return any(
        all(side in (edge // stride, -(-edge // stride)) for side, edge in zip(sides, probe.size))
        for stride in range(1, max(probe.size) + 1)
    )
