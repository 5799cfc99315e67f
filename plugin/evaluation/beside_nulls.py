"""Compares a metric with its null controls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from scipy.special import stdtrit

from ...registry.nulls import LEAST_DRAWS, significant
from ...registry.presentation import Support
from ..reporting.results import MetricResult, NullResult

Numbers = Mapping[str, float]

ROUNDING = 1e-9


def beats(
    value: float, null: float, higher_is_better: bool | None, scale: float = 1.0
) -> bool | None:
    """Whether `value` is better than `null` by more than rounding; None where that is undefined.

    Near 0 rounding is a part of `scale`, the size of such numbers; above 1 it counts as 1.
    """
    if higher_is_better is None or not (math.isfinite(value) and math.isfinite(null)):
        return None
    if math.isclose(value, null, rel_tol=ROUNDING, abs_tol=ROUNDING * min(1.0, scale)):
        return False
    return value > null if higher_is_better else value < null


def null_result(
    value: float,
    draws: Sequence[float],
    higher_is_better: bool | None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> NullResult:
    """One null from its draws, without undefined ones.

    p = (1 + number of draws at least as good as the value) / (1 + number of draws); equal up to
    rounding is as good. Past the null: p ≤ .05; with fewer draws than allow that, better than all.

    `bounds` are the least and the largest value of the metric. One from 0 without a largest value may be
    in the units of x, such as a squared error, so that its rounding is relative to the largest number
    at hand. Elsewhere 0 can be a difference of numbers near 1, with their rounding.
    """
    defined = [float(draw) for draw in draws if math.isfinite(draw)]
    if not defined:
        return missing(value, "undefined under this null", higher_is_better)
    scale = max(map(abs, [value, *defined])) if bounds == (0.0, math.inf) else 1.0
    beaten = [beats(value, draw, higher_is_better, scale) for draw in defined]
    n, judged = len(defined), None not in beaten
    p = (1 + beaten.count(False)) / (1 + n) if judged else math.nan
    return NullResult(
        mean=math.fsum(defined) / n,
        best=min(defined) if higher_is_better is False else max(defined),
        n=n,
        p=p,
        left_behind=(significant(p) if n >= LEAST_DRAWS else all(beaten)) if judged else None,
    )


def missing(value: float, reason: str, higher_is_better: bool | None) -> NullResult:
    """A null without a draw, which a value with a direction is not judged without."""
    judged = higher_is_better is not None and math.isfinite(value)
    return NullResult(reason=reason, missing=judged)


def jackknife(value: float, left_out: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a value by a delete-a-group jackknife; NaN where it is undefined.

    SE² = (G − 1)/G·Σ (θ_g − mean)² over the G values θ_g without one group of images each; the
    interval is value ± t·SE with t of G − 1 degrees of freedom.

    Args:
        value: the value over all images.
        left_out: (G,) the values without each group.
    """
    groups = len(left_out)
    if groups < 3 or not all(map(math.isfinite, [value, *left_out])):
        return math.nan, math.nan
    mean = math.fsum(left_out) / groups
    variance = (groups - 1) / groups * math.fsum((other - mean) ** 2 for other in left_out)
    half = float(stdtrit(groups - 1, 0.975)) * math.sqrt(variance)
    return value - half, value + half


def with_nulls(
    values: Numbers,
    draws: Mapping[str, Sequence[Numbers] | str],
    directions: Mapping[str, bool | None],
    controls: Mapping[str, Numbers] = {},
    invariant: Collection[str] = (),
    label_free: Collection[str] = (),
    support: Mapping[str, Support] = {},
    left_out: Sequence[Numbers] = (),
    ranges: Mapping[str, tuple[float, float]] = {},
    declared: Mapping[str, str | None] = {},
) -> dict[str, MetricResult]:
    """Compare every metric of `values` with its nulls.

    Args:
        values: metric -> number, from the SAE.
        draws: null -> the same metrics under it, once per draw, or the reason why there are none.
        directions: metric -> whether higher is better. Metrics that are not named have no direction.
        controls: control -> the same metrics under it.
        invariant: metrics that do not depend on the position of a class in the tree, for which
            permuted classes carry no information.
        label_free: metrics that use no label, for which shuffled labels carry no information.
        support: metric -> what it is computed from.
        left_out: the same metrics without each group of images, for the interval. Without the number of
            a group there is none: the formula needs all groups. Nor is there one where all groups give the
            same number, unless no label is used, as by what depends on weights alone.
        ranges: metric -> the least and the largest value that it can have, at which the interval is cut;
            see `null_result`.
        declared: null -> the reason in `draws` for which it has no meaning for any of the metrics.
    """

    def null(null_name: str, metric: str, found: Sequence[Numbers] | str) -> NullResult:
        if null_name == "permuted_classes" and metric in invariant:
            return NullResult(reason="does not depend on the position of a class in the tree")
        if null_name == "shuffled" and metric in label_free:
            return NullResult(reason="no label is used")
        if isinstance(found, str) and found == declared.get(null_name):
            return NullResult(reason=found)
        if isinstance(found, str):
            return missing(values[metric], found, directions.get(metric))
        numbers = [draw[metric] for draw in found if metric in draw]
        bounds = ranges.get(metric, (-math.inf, math.inf))
        return null_result(values[metric], numbers, directions.get(metric), bounds)

    def result(metric: str, value: float) -> MetricResult:
        of = support.get(metric)
        count = math.nan if of is None else values[of.count]
        without = [rest.get(metric, math.nan) for rest in left_out]
        low, high = jackknife(value, without)
        if len(set(without)) == 1 and metric not in label_free:
            low = high = math.nan  # a share of few things, which no group moves: no estimate
        least, most = ranges.get(metric, (-math.inf, math.inf))
        low, high = max(low, min(least, value)), min(high, max(most, value))
        return MetricResult(
            value=float(value),
            low=low,
            high=high,
            nulls={name: null(name, metric, found) for name, found in draws.items()},
            controls={n: float(seen[metric]) for n, seen in controls.items() if metric in seen},
            support=int(count) if math.isfinite(count) else None,
            least=0 if of is None else of.least,
        )

    return {metric: result(metric, value) for metric, value in values.items()}
