"""Means, ratios and figures used by evaluators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

VALUE, NULL, OTHER = "#1f5f8b", "#9a9a9a", "#c8742c"
"""Colours of the measured value, its null, and a third series."""
FEATURE_NAMES = {"x": "activations", "mean_patch": "mean patch", "z": "latents"}
"""Names of features in figures."""
SHARE, COSINE, POSITIVE, SCORE = (0.0, 1.0), (-1.0, 1.0), (0.0, np.inf), (-np.inf, 1.0)
"""Ranges of metrics: shares, means of them and F1; cosines, correlations and differences of shares;
distances and errors; scores of which 1 is the best and a negative one possible."""


def mean(values: ArrayLike, where: ArrayLike | None = None) -> float:
    """The mean of the finite values (where `where`); NaN, without a warning, if there are none."""
    kept = np.asarray(values, dtype=float)
    if where is not None:
        kept = kept[np.asarray(where)]
    kept = kept[np.isfinite(kept)]
    return float(kept.mean()) if kept.size else float("nan")


def count(values: ArrayLike) -> float:
    """How many of the values (n,) are finite."""
    return float(np.isfinite(np.asarray(values, dtype=float)).sum())


def ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """The quotient part / whole, NaN where whole is 0, in their broadcast shape."""
    part, whole = np.broadcast_arrays(
        np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    )
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure in the style of the report."""
    return go.Figure(
        layout=go.Layout(
            template="none",
            title={"text": title, "font": {"size": 15}, "x": 0, "xref": "paper", "xanchor": "left"},
            xaxis={"title": {"text": x, "standoff": 6}},
            yaxis={"title": y},
            margin={"l": 60, "r": 20, "t": 50, "b": 90},
            # Below the axis, since six entries above it would overlap the title.
            legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
            font={"size": 12},
        )
    )


def histograms(
    title: str, x: str, values: Mapping[str, np.ndarray], *, bins: int = 30
) -> go.Figure:
    """Outlined histograms on one grid: the measured values first, then the nulls."""
    drawing = figure(title, x, "share of latents")
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    joined = np.concatenate([*finite.values(), np.zeros(0)])
    if joined.size:
        edges = np.linspace(joined.min(), max(joined.max(), joined.min() + 1e-9), bins + 1)
        for (name, v), colour in zip(finite.items(), (VALUE, NULL, OTHER)):
            share = np.histogram(v, edges)[0] / max(len(v), 1)
            line: dict[str, Any] = {"color": colour, "shape": "hv", "width": 2}
            ends, height = [edges[0], *edges], [0, *share, 0]
            drawing.add_scatter(x=ends, y=height, name=name, mode="lines", line=line)
    return drawing
