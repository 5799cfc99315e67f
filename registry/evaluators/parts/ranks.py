"""Rank correlation, and which of many p-values are significant."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from . import summary


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,), ties sharing their mean rank; NaN where either is constant."""
    if len(a) < 2:
        return float("nan")
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    return float(summary.ratio((a * b).sum(), np.sqrt((a**2).sum() * (b**2).sum())))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """(n,) the false discovery rate at which each would be significant; NaN stays NaN.

    Benjamini and Hochberg 1995: q_(i) = min over j ≥ i of p_(j)·n/j.
    """
    q = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known])]
    raised = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(raised[::-1])[::-1].clip(max=1)
    return q
