"""Rank correlation and false discovery rate."""

from __future__ import annotations

import numpy as np
from scipy.stats import false_discovery_control, rankdata

from . import summary


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,), ties with their mean rank; NaN if either is constant."""
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    return float(summary.ratio((a * b).sum(), np.sqrt((a**2).sum() * (b**2).sum())))


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
