"""Rank correlation and false discovery rate."""

from __future__ import annotations

import numpy as np
from scipy.stats import false_discovery_control, rankdata


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (n,); NaN if either is constant but for rounding."""
    if not len(a) or any(np.ptp(v) <= 1e-9 * np.abs(v).max() for v in (a, b)):
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,), ties with their mean rank; NaN if either is constant."""
    return pearson(rankdata(a), rankdata(b))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """(n,) the least false discovery rate at which each of p (n,) is significant.

    Benjamini and Hochberg 1995: q_(i) = min over j ≥ i of p_(j)·n/j, n the number of
    defined p-values. NaN stays NaN.
    """
    q = np.full(len(p), np.nan)
    defined = np.isfinite(p)
    if defined.any():
        q[defined] = false_discovery_control(p[defined])
    return q
