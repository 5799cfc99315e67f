"""Activations that a model keeps as rows (B * T, d) in an order of its own, as (B, T, d) at hook points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)

from ...registry.errors import ConfigError


class Rows:
    """The images and places that the rows of a forward pass belong to."""

    def __init__(self) -> None:
        self._make_order: Callable[[], Tensor] | None = None
        self._order: Tensor | None = None
        self._n_images = self._n_rows = 0
        self._one_size = True

    def note(self, grid: Tensor, make_order: Callable[[], Tensor]) -> None:
        """Note what the next rows are.

        Args:
            grid: (images, 3) frames, height and width of each image in patches.
            make_order: gives (T,), the place of each row of an image in the order at hook points.
        """
        self._make_order, self._order, self._n_images = make_order, None, len(grid)
        self._n_rows = int(grid.prod(-1).sum())
        self._one_size = bool((grid == grid[:1]).all())

    @property
    def order(self) -> Tensor:
        """(T,) int64, for images of one size.

        Raises:
            ConfigError: the images have several.
        """
        if not self._one_size:
            raise ConfigError(
                "pixel_values",
                "images of several sizes in one forward pass, whose activations have no common shape",
                allowed="images of one size where hooks or SAEs act on the vision tower",
            )
        if self._order is None:
            assert self._make_order is not None
            self._order = self._make_order()
        return self._order

    def are_in(self, value: Any) -> bool:
        """Whether a tensor has these rows."""
        return isinstance(value, Tensor) and value.ndim == 2 and len(value) == self._n_rows

    def fold(self, value: Any) -> Any:
        """(B * T, d) -> (B, T, d), in order; anything else as it is."""
        if not self.are_in(value):
            return value
        order = self.order.to(value.device)
        return value.unflatten(0, (self._n_images, len(order)))[:, order.argsort()]

    def fold_squares(self, blocks: Sequence[Tensor]) -> Tensor:
        """(1, heads, n, n) of the rows that follow each other -> (B, heads, T, T), in order; zero between the blocks."""
        n_tokens, first = len(self.order), blocks[0]
        whole = first.new_zeros(self._n_images, first.shape[1], n_tokens, n_tokens)
        start = 0
        for block in blocks:
            image, place = divmod(start, n_tokens)
            there = slice(place, place + block.shape[-1])
            whole[image, :, there, there] = block[0]
            start += block.shape[-1]
        places = self.order.to(first.device).argsort()
        return whole[:, :, places][..., places]

    def unfold(self, value: Tensor) -> Tensor:
        """(B, T, d) -> (B * T, d)."""
        if value.ndim != 3 or len(value) * value.shape[1] != self._n_rows:
            return value
        return value[:, self.order.to(value.device)].flatten(0, 1)


class RowsConversion(BaseTensorConversion):
    """The conversion of a hook point: rows to (B, T, d), then what else is done there.

    Args:
        rows: of the model.
        inner: the conversion that the hook point had, such as one that splits heads.
    """

    def __init__(self, rows: Rows, inner: Any = None) -> None:
        super().__init__()
        self.rows, self.inner = rows, inner
        self.splits_attention_heads = getattr(inner, "splits_attention_heads", False)
        self.n_heads = getattr(inner, "n_heads", None)

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """(B * T, d) -> (B, T, d) or (B, T, heads, d_head)."""
        value = self.rows.fold(input_value)
        return value if self.inner is None else self.inner.convert(value, *full_context)

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        """The way back."""
        value = input_value if self.inner is None else self.inner.revert(input_value, *full_context)
        return self.rows.unfold(value)


def rows_of(point: Any) -> Rows | None:
    """The rows of the model at a hook point, or at an SAE that is spliced in there; None where it has none."""
    conversion = getattr(point, "hook_conversion", None)
    return getattr(conversion, "rows", None)
