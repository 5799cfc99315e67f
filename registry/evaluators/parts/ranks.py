"""Rank correlation, and which of many p-values are significant."""

from __future__ import annotations

import numpy as np
from scipy.stats import false_discovery_control, rankdata

from . import summary


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,), ties sharing their mean rank; NaN where either is constant."""
    if len(a) < 2:
        return float("nan")
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    return float(summary.ratio((a * b).sum(), np.sqrt((a**2).sum() * (b**2).sum())))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """(n,) the false discovery rate at which each of p (n,) would be significant.

    Benjamini and Hochberg 1995: q_(i) = min over j ≥ i of p_(j)·n/j, n the p-values that are
    defined. NaN stays NaN.
    """
    q = np.full(len(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q
