"""Windows of attention, folded back into the images that they were cut from.

As transformers cuts them in Swin, Swin v2, SAM and ViTDet: the grid is padded on the right and at the
bottom, shifted cyclically, and cut row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OWNERS = (
    *("SwinLayer", "Swinv2Layer", "Swin2SRLayer", "DonutSwinLayer", "MaskFormerSwinLayer"),
    *("SamVisionLayer", "SamHQVisionLayer", "VitDetLayer"),
)
"""Blocks of transformers that cut their input into windows of `window_size` for attention."""
CHANNELS_FIRST = ("VitDetLayer",)


@dataclass(frozen=True)
class Cut:
    """How a grid (height, width) is cut into windows of `side`, after a shift by `shift`."""

    grid: tuple[int, int]
    side: int
    shift: int = 0

    @property
    def _windows(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    def fits(self, shape: Sequence[int], n_images: int) -> bool:
        """Whether a tensor of this shape has a row for each window of so many images."""
        rows, columns = self._windows
        window = (self.side**2,) if len(shape) == 3 else (self.side, self.side)
        return (*shape[:-1],) == (n_images * rows * columns, *window)

    def to_tokens(self, value: Tensor) -> Tensor:
        """(B * windows, side * side, d), or the same with two axes of positions -> (B, T, d)."""
        height, width = self.grid
        return self._whole(value)[:, :height, :width].flatten(1, 2).contiguous()

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """(B, T, d) in the shape of `like`, with the padding that it has."""
        (height, width), (rows, columns), side = self.grid, self._windows, self.side
        whole = self._whole(like).clone()
        whole[:, :height, :width] = tokens.unflatten(1, (height, width)).to(like)
        whole = whole.roll((-self.shift, -self.shift), (1, 2))
        cut = whole.unflatten(2, (columns, side)).unflatten(1, (rows, side))
        return cut.transpose(2, 3).reshape(like.shape)

    def _whole(self, value: Tensor) -> Tensor:
        (rows, columns), side = self._windows, self.side
        windows = value.reshape(-1, rows, columns, side, side, value.shape[-1]).transpose(2, 3)
        return windows.flatten(3, 4).flatten(1, 2).roll((self.shift, self.shift), (1, 2))


class WindowOwner:
    """A block that cuts its input into windows, and the grid of the input that it has now."""

    def __init__(self, block: nn.Module) -> None:
        self.block: Any = block
        self.grid: tuple[int, int] | None = None

    @property
    def cut(self) -> Cut | None:
        """How it cuts this input; None where it does not."""
        side = int(self.block.window_size)
        if self.grid is None or side < 1:
            return None
        return Cut(self.grid, side, int(getattr(self.block, "shift_size", 0)))

    def look(self, block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Torch's forward pre-hook: note the grid of the input."""
        hidden = arguments[0] if arguments else options.get("hidden_states")
        given = options.get("input_dimensions", arguments[1] if len(arguments) > 1 else None)
        self.grid = None
        if isinstance(hidden, Tensor) and hidden.ndim == 4:
            first = type(block).__name__ in CHANNELS_FIRST
            height, width = hidden.shape[2:] if first else hidden.shape[1:3]
            self.grid = height, width
        elif isinstance(given, tuple | list | torch.Size) and len(given) == 2:
            self.grid = int(given[0]), int(given[1])


def window_owner(module: nn.Module) -> WindowOwner | None:
    """The owner of the windows inside a module of transformers that cuts its input so."""
    kind = type(module)
    known = kind.__name__ in OWNERS and kind.__module__.startswith("transformers.")
    return WindowOwner(module) if known and isinstance(module.window_size, int) else None
