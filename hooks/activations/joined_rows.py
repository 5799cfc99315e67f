"""Rows of several tensors, one after the other, read as one array without joining them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

BEHIND = (int, np.integer, slice, type(...), type(None))  # what may follow an index of rows


class JoinedRows:
    """The rows of several tensors as one array of shape (n, ...).

    Indexing follows NumPy, and what comes out is an array of its own: ``rows[3]``, ``rows[2:9:2]``,
    ``rows[places]``, ``rows[mask]``, each also with more numbers or slices behind. ``rows[:, 0]``, with all rows,
    gives `JoinedRows` and reads nothing. `numpy.asarray` reads everything.

    Args:
        parts: one or more tensors (n_i, ...), equal in all but their number of rows.

    Attributes:
        shape: (n, ...).
        dtype: NumPy's type of the elements.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        first = self._parts[0]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *first.shape[1:])
        self.dtype: np.dtype[Any] = first[:0].numpy().dtype

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        rows, *behind = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(each, BEHIND) for each in behind):
            raise IndexError(f"{behind!r} behind the rows: numbers and slices alone are possible")
        if isinstance(rows, slice) and rows == slice(None):
            return JoinedRows([part[(rows, *behind)] for part in self._parts])
        numbers = self._numbers(rows)
        order = np.argsort(numbers, axis=None, kind="stable")
        found = self.gather(torch.from_numpy(numbers.ravel()[order])).numpy()
        in_order = np.empty_like(found)
        in_order[order] = found
        shaped = in_order.reshape(*numbers.shape, *found.shape[1:])
        return shaped[(*[slice(None)] * numbers.ndim, *behind)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows of several tensors cannot become one array without a copy")
        return torch.cat(self._parts).numpy().astype(dtype or self.dtype, copy=False)

    def flatten(self) -> JoinedRows:
        """(n * k, ...) of rows (n, k, ...); nothing is read."""
        return JoinedRows([part.flatten(0, 1) for part in self._parts])

    def tensor(self) -> Tensor:
        """(n, ...) all rows: the one tensor itself, several in a copy."""
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)

    def gather(self, rows: Tensor) -> Tensor:
        """(b, ...) the rows with these numbers, which ascend, read in the order of the files.

        Args:
            rows: int64 (b,), ascending; a number may come more than once.
        """
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, rows)
        found = self._parts[0].new_empty(len(rows), *self.shape[1:])
        places = torch.searchsorted(rows, torch.from_numpy(self._ends)).tolist()
        start = first = 0
        for part, end, last in zip(self._parts, self._ends.tolist(), places, strict=True):
            if last > first:
                torch.index_select(part, 0, rows[first:last] - start, out=found[first:last])
            start, first = end, last
        return found

    def _numbers(self, rows: Any) -> np.ndarray:
        """The row numbers, from 0 on, that an index of rows means."""
        n = len(self)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(n))
        numbers = np.asarray(rows)
        if numbers.dtype == bool:
            if numbers.shape != (n,):
                raise IndexError(f"a mask of shape {numbers.shape} for {n} rows")
            return np.flatnonzero(numbers)
        if not numbers.size:
            return numbers.astype(np.int64)
        if numbers.dtype.kind not in "iu":
            raise IndexError(f"{numbers.dtype} is no type of a row number")
        numbers = numbers.astype(np.int64)
        if numbers.min() < -n or numbers.max() >= n:
            raise IndexError(f"a row outside of {n} rows")
        return np.where(numbers < 0, numbers + n, numbers)


Rows: TypeAlias = np.ndarray | JoinedRows
"""Rows in one array, memory-mapped or not, or in several."""
