"""A random permutation of any length, computed in parts, without memory for the rest."""

from __future__ import annotations

import numpy as np

from ...registry.hashing import splitmix64

ROUNDS = 8


class LazyPermutation:
    """A permutation of range(n) by `seed`: `permutation[i]` for an array of i.

    A balanced Feistel network over the next power of four, walked until it falls below n (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, cycle walking), with the finaliser
    of splitmix64 as its round function.

    Args:
        n: length, at least 1.
        seed: whole numbers from 0 on.
    """

    def __init__(self, n: int, *seed: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs a length of at least 1, not {n}")
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """int64, same shape: the elements at `places`, which are in range(n)."""
        elements = self._encipher(np.asarray(places).astype(np.uint64))
        outside = elements >= self.n
        while outside.any():
            elements[outside] = self._encipher(elements[outside])
            outside = elements >= self.n
        return elements.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (splitmix64(right ^ key) & self._mask)
        return (left << self._half) | right
