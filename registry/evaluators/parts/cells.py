"""Counts of the cells of an array that is mostly empty, on the device of the firings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import nonzero

BUFFER = 2**22
"""Most cells that are kept as they come, where fewer are known; else as many as are known."""
SMALL = 2**26
"""Bytes up to which the array is kept in full in any case."""
DENSE = 1 / 16
"""Share of the cells with a count from which on the array is kept in full."""


class CellCounts:
    """How often each of `n_cells` cells was added.

    Cells with a count are kept in ascending order, and new ones in a buffer of bounded size; the
    array itself where it is small or many cells have one. Memory O(cells with a count), on the
    device of the cells.

    Args:
        n_cells: number of cells.
        dtype: integer type of the counts in the array.
    """

    def __init__(self, n_cells: int, dtype: torch.dtype) -> None:
        self.n_cells = n_cells
        self.dtype = dtype
        self._array: Tensor | None = None
        self._cells: Tensor | None = None  # (u,) int64, ascending
        self._counts: Tensor | None = None  # (u,) int32
        self._waiting: list[Tensor] = []

    def add(self, cells: Tensor) -> None:
        """Count each of `cells` (k,) int64 once more."""
        if self._array is None and self.n_cells * self.dtype.itemsize <= SMALL:
            self._array = torch.zeros(self.n_cells, dtype=self.dtype, device=cells.device)
        if self._array is not None:
            ones = torch.ones(len(cells), dtype=self.dtype, device=cells.device)
            self._array.scatter_add_(0, cells, ones)
            return
        self._waiting.append(cells)
        known = 0 if self._cells is None else len(self._cells)
        if sum(map(len, self._waiting)) > max(known, min(BUFFER, self.n_cells // 8)):
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        new = torch.cat(self._waiting)
        self._waiting = []
        if self._cells is None or self._counts is None:
            self._cells, counts = _unique(new)
            self._counts = counts.int()
        else:
            self._include(new, torch.ones(len(new), dtype=torch.int32, device=new.device))
        self._fill()

    def _include(self, cells: Tensor, counts: Tensor) -> None:
        """Add counts (k,) int32 of cells (k,) to those that are known."""
        assert self._cells is not None and self._counts is not None
        both, place = torch.cat([self._cells, cells]).unique(return_inverse=True)
        total = torch.zeros(len(both), dtype=torch.int32, device=both.device)
        self._counts = total.index_add_(0, place, torch.cat([self._counts, counts]))
        self._cells = both

    def _fill(self) -> None:
        """Keep the array itself, where many cells have a count."""
        if self._cells is None or self._counts is None:
            return
        if len(self._cells) > DENSE * self.n_cells:
            array = torch.zeros(self.n_cells, dtype=self.dtype, device=self._cells.device)
            array[self._cells] = self._counts.to(self.dtype)
            self._array, self._cells, self._counts = array, None, None

    def merge(self, other: CellCounts) -> None:
        """Add the counts of `other`, which is not used afterwards."""
        self._merge()
        other._merge()
        if self._array is None and (self._cells is None or other._array is not None):
            self.__dict__, other.__dict__ = other.__dict__, self.__dict__
        if self._array is not None:
            cells, counts = (torch.from_numpy(v).to(self._array.device) for v in other.read())
            self._array[cells] += counts.to(self.dtype)
        elif self._cells is not None and other._cells is not None and other._counts is not None:
            device = self._cells.device
            self._include(other._cells.to(device), other._counts.to(device))
            self._fill()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The cells with a count in ascending order (u,) int64, and their counts (u,)."""
        self._merge()
        if self._array is not None:
            cells = nonzero(self._array)
            return cells.cpu().numpy(), self._array[cells].cpu().numpy()
        if self._cells is None or self._counts is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
        return self._cells.cpu().numpy(), self._counts.cpu().numpy()


def _unique(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct cells in ascending order, and how often each occurs."""
    if cells.device.type != "cpu":
        return cells.unique(return_counts=True)
    found, counts = np.unique(cells.numpy(), return_counts=True)  # four times as fast there
    return torch.from_numpy(found), torch.from_numpy(counts)
