"""Fingerprints of content, and random numbers as functions of an image's position.

Results of a pass do not depend on the batch size: every random choice for an image (tie-breaks,
sampling, planted misses) is a hash of its index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray


def fingerprint(parts: Iterable[str | bytes], *, digits: int = 16) -> str:
    """The first hex digits, 64 at most, of the SHA-256 of all parts joined; text as UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:digits]


def splitmix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix each 64-bit integer by a bijection; same shape.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195).
    """
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(index: ArrayLike, salt: int = 0) -> NDArray[np.float64]:
    """A deterministic number in [0, 1) for each element of `index`; same shape."""
    z = np.asarray(index).astype(np.uint64)
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(salt % 2**64) * np.uint64(0xD1B54A32D192ED03)
    return (splitmix64(z) >> np.uint64(11)).astype(np.float64) / 2.0**53
