"""`quasi_orthogonality`: whether the norm of the latents predicts the norm of the activation.

ε_LBO and the ZF plot of Lee et al. 2025, "Evaluating and designing sparse autoencoders by
approximating quasi-orthogonality" (arXiv 2503.24277, §3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure

from .. import hashing
from ..presentation import Support, support_of_all
from .base import ALL_NULLS, EvaluationBatch, Evaluator, require_at_least
from .parts import summary

BANDS = {"quarter": 0.25, "half": 0.5, "one": 1.0}
"""The c of the bands y = x·√(1/(1 ∓ c))."""
SALT = 102


@dataclass(frozen=True)
class QuasiOrthogonalityOptions:
    """plot_images: approximate number of points in the ZF plot."""

    plot_images: int = 1000

    def __post_init__(self) -> None:
        require_at_least(1, self, "plot_images")


class QuasiOrthogonality(Evaluator[QuasiOrthogonalityOptions]):
    """Difference of ‖f̃‖ and ‖x‖, f̃ = [z_i‖D_i‖ …, ‖b_dec‖].

    They are equal if the active decoder rows are orthogonal and the reconstruction is exact.
    `epsilon_lbo` = |‖x‖² − ‖f̃‖²| / ((m − 1)‖f̃‖²), mean over images: a lower bound on the
    deviation of the rows from orthogonality; `epsilon_lbo_l0` uses the latents that are not 0 in
    place of all m (own definition). `within_*`: images with |‖x‖² − ‖f̃‖²| ≤ c‖f̃‖². `norm_ratio`: mean
    ‖f̃‖/‖x‖; `norm_correlation`: of the two norms over images, not meaningful where a norm layer
    makes ‖x‖ nearly constant (`norm_spread`: standard deviation of ‖x‖ over its mean). A poor
    reconstruction increases all differences. NaN without a decoder, and where an image's f̃ is 0.
    """

    name = "quasi_orthogonality"
    description = "whether the norm of the latents predicts the norm of the activation"
    higher_is_better = {
        "epsilon_lbo": False,
        "epsilon_lbo_l0": False,
        **{f"within_{band}": True for band in BANDS},
        "norm_ratio": None,
        "norm_correlation": True,
        "norm_spread": None,
        "images": None,
    }
    ranges = {
        **dict.fromkeys((f"within_{band}" for band in BANDS), summary.SHARE),
        **dict.fromkeys(
            ("epsilon_lbo", "epsilon_lbo_l0", "norm_ratio", "norm_spread"), summary.POSITIVE
        ),
        "norm_correlation": summary.COSINE,
    }
    nulls = {
        **ALL_NULLS,
        "permuted_classes": "norms are compared with each other, with no tree",
        "shuffled": "no label is used",
    }
    support = support_of_all(higher_is_better, Support("images", "images"))
    invariant = label_free = frozenset(higher_is_better)
    Options = QuasiOrthogonalityOptions

    def prepare(self) -> None:
        decoder, offset = self.context.W_dec, self.context.b_dec
        self._row_norm = None if decoder is None else decoder.detach().double().norm(dim=1).cpu()
        self._offset = 0.0 if offset is None else float(offset.detach().double().square().sum())
        self._sums: dict[str, list[float]] = {}  # metric -> [sum, images]
        self._moments = np.zeros((6,))  # n, Σx, Σf, Σx², Σf², Σxf
        self._points: list[np.ndarray] = []

    def update(self, batch: EvaluationBatch) -> None:
        if self._row_norm is None:
            return
        rows, latents, values = batch.active
        n = len(batch)
        square = (values.double() * self._row_norm.to(latents.device)[latents]).square()
        f2 = torch.bincount(rows, weights=square, minlength=n).cpu().numpy() + self._offset
        x2 = self.context.as_decoded(batch.x).double().square().sum(1).cpu().numpy()
        l0 = torch.bincount(rows, minlength=n).cpu().numpy()
        gap = summary.ratio(np.abs(x2 - f2), f2)
        x, f = np.sqrt(x2), np.sqrt(f2)
        self._add("epsilon_lbo", summary.ratio(gap, self.context.d_sae - 1))
        self._add("epsilon_lbo_l0", summary.ratio(gap, np.where(l0 > 1, l0 - 1, 0)))
        for band, c in BANDS.items():
            self._add(f"within_{band}", np.where(np.isfinite(gap), gap <= c, np.nan))
        self._add("norm_ratio", summary.ratio(f, x))
        self._moments += [n, x.sum(), f.sum(), x2.sum(), f2.sum(), (x * f).sum()]
        odds = self.options.plot_images / max(self.context.n_images, 1)
        kept = hashing.uniform(batch.index.cpu().numpy(), SALT) < odds
        self._points.append(np.stack([x[kept], f[kept]], axis=1))

    def merge(self, other: QuasiOrthogonality) -> None:
        for metric, (total, images) in other._sums.items():
            self._add_sum(metric, total, images)
        self._moments += other._moments
        self._points += other._points

    def _add(self, metric: str, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)]
        self._add_sum(metric, float(finite.sum()), len(finite))

    def _add_sum(self, metric: str, of_values: float, images: float) -> None:
        total = self._sums.setdefault(metric, [0.0, 0])
        total[0] += of_values
        total[1] += images

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        for metric, (total, images) in self._sums.items():
            if images:
                numbers[metric] = total / images
        n, x, f, x2, f2, xf = self._moments
        if n:
            x_var, f_var = (max(s2 / n - (s / n) ** 2, 0.0) for s, s2 in ((x, x2), (f, f2)))
            # Smaller variation is rounding error.
            if min(x_var / max(x2 / n, 1e-30), f_var / max(f2 / n, 1e-30)) > 1e-12:
                covariance = xf / n - x * f / n**2
                numbers["norm_correlation"] = float(covariance / np.sqrt(x_var * f_var))
            if x:
                numbers["norm_spread"] = float(np.sqrt(x_var) / (x / n))
        numbers["images"] = float(n)
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`bands`: the share of images within each band."""
        numbers = self.compute()
        rows = [(c, numbers[f"within_{band}"]) for band, c in BANDS.items()]
        return {"bands": pd.DataFrame(rows, columns=["c", "share"])}

    def figures(self) -> dict[str, Figure]:
        """`zf`: ‖f̃‖ against ‖x‖ for some images, with the bands."""
        points = np.concatenate([*self._points, np.zeros((0, 2))])
        drawing = summary.figure("ZF plot", "‖x‖", "‖f̃‖")
        drawing.add_scatter(
            x=points[:, 0],
            y=points[:, 1],
            name="images",
            mode="markers",
            marker={"color": summary.VALUE, "size": 4, "opacity": 0.5},
        )
        ends = np.array([points[:, 0].min(), points[:, 0].max()]) if len(points) else np.zeros(2)
        drawing.add_scatter(x=ends, y=ends, name="equal", mode="lines", line={"color": "#444444"})
        for c in BANDS.values():
            for sign in (-1, 1):
                if 1 + sign * c > 0:
                    drawing.add_scatter(
                        x=ends,
                        y=ends * np.sqrt(1 / (1 + sign * c)),
                        name=f"c = {c:g}",
                        mode="lines",
                        line={"color": summary.NULL, "dash": "dot", "width": 1},
                        showlegend=sign > 0,
                    )
        return {"zf": drawing}
