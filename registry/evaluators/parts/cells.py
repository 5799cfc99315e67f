"""Counts of the cells of an array that is mostly empty, on the device of the firings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
            cells, counts = _unique(new)
            counts = counts.int()
        else:
            cells, place = torch.cat([self._cells, new]).unique(return_inverse=True)
            ones = torch.ones(len(new), dtype=torch.int32, device=new.device)
            counts = torch.zeros(len(cells), dtype=torch.int32, device=new.device)
            counts.index_add_(0, place, torch.cat([self._counts, ones]))
        if len(cells) <= DENSE * self.n_cells:
            self._cells, self._counts = cells, counts
            return
        self._array = torch.zeros(self.n_cells, dtype=self.dtype, device=new.device)
        self._array[cells] = counts.to(self.dtype)
        self._cells = self._counts = None

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The cells with a count in ascending order (u,) int64, and their counts (u,)."""
        self._merge()
        if self._array is not None:
            array = self._array.cpu().numpy()
            cells = np.flatnonzero(array)
            return cells, array[cells]
        if self._cells is None or self._counts is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
        return self._cells.cpu().numpy(), self._counts.cpu().numpy()


def _unique(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct cells in ascending order, and how often each occurs."""
    if cells.device.type != "cpu":
        return cells.unique(return_counts=True)
    found, counts = np.unique(cells.numpy(), return_counts=True)  # four times as fast there
    return torch.from_numpy(found), torch.from_numpy(counts)
