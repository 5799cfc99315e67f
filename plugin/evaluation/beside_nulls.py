"""Compares a metric with its null controls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ..reporting.results import MetricResult, NullResult

Numbers = Mapping[str, float]

ROUNDING = 1e-9


def beats(value: float, null: float, higher_is_better: bool | None) -> bool | None:
    """Whether `value` is better than `null` by more than rounding; None where that is undefined."""
    if higher_is_better is None or not (math.isfinite(value) and math.isfinite(null)):
        return None
    if math.isclose(value, null, rel_tol=ROUNDING, abs_tol=ROUNDING):
        return False
    return value > null if higher_is_better else value < null


def null_result(value: float, draws: Sequence[float], higher_is_better: bool | None) -> NullResult:
    """One null from its draws, without undefined ones. The value is compared with the best draw."""
    defined = [float(draw) for draw in draws if math.isfinite(draw)]
    if not defined:
        return NullResult(reason="undefined under this null")
    best = min(defined) if higher_is_better is False else max(defined)
    return NullResult(
        mean=math.fsum(defined) / len(defined),
        best=best,
        n=len(defined),
        left_behind=beats(value, best, higher_is_better),
    )


def with_nulls(
    values: Numbers,
    draws: Mapping[str, Sequence[Numbers] | str],
    directions: Mapping[str, bool | None],
    controls: Mapping[str, Numbers] = {},
    invariant: Collection[str] = (),
    label_free: Collection[str] = (),
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
    """

    def null(null_name: str, metric: str, found: Sequence[Numbers] | str) -> NullResult:
        if null_name == "permuted_classes" and metric in invariant:
            return NullResult(reason="does not depend on the position of a class in the tree")
        if null_name == "shuffled" and metric in label_free:
            return NullResult(reason="no label is used")
        if isinstance(found, str):
            return NullResult(reason=found)
        numbers = [draw[metric] for draw in found if metric in draw]
        return null_result(values[metric], numbers, directions.get(metric))

    return {
        metric: MetricResult(
            value=float(value),
            nulls={name: null(name, metric, found) for name, found in draws.items()},
            controls={n: float(seen[metric]) for n, seen in controls.items() if metric in seen},
        )
        for metric, value in values.items()
    }
