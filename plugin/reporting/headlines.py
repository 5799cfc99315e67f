"""The metrics that summaries show, and their verdicts adjusted over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...registry.nulls import DECISIVE
from ...registry.presentation import Headline, shown_metrics
from .results import MetricResult, NullResult, Results, SAEResult


@dataclass(frozen=True)
class ShownMetric:
    """A metric that summaries show, with its title."""

    evaluator: str
    metric: str
    title: str
    meaning: str = ""

    def of(self, sae: SAEResult) -> MetricResult | None:
        """Its number for one SAE."""
        found = sae.evaluators.get(self.evaluator)
        return found.metrics.get(self.metric) if found else None


def headlines(results: Results) -> list[ShownMetric]:
    """The headline metrics that the evaluators declare and some SAE has, by priority.

    The default for an evaluator is its first metric with a direction, else its first metric.
    """
    present = set(results.metric_names())
    found = []
    for evaluator, info in results.evaluators.items():
        metrics = [metric for metric in info.directions if (evaluator, metric) in present]
        declared = {headline.metric: headline for headline in info.headlines}
        for metric in shown_metrics(declared, info.directions, metrics):
            names = dict.fromkeys([evaluator, results.label(evaluator, metric)])
            default = Headline(metric, ": ".join(names).replace("_", " "))
            headline = declared.get(metric, default)
            meaning = headline.meaning or info.description
            shown = ShownMetric(evaluator, headline.metric, headline.title, meaning)
            found.append((headline.priority, shown))
    return [shown for _, shown in sorted(found, key=lambda item: item[0])]


def with_q(results: Results) -> Results:
    """The results with `q` of the permuted classes: Benjamini–Hochberg over headlines and SAEs.

    Metrics that are not judged (`MetricResult.undecided`) take no part.
    """
    shown = {(metric.evaluator, metric.metric) for metric in headlines(results)}
    family = {
        (sae.id, evaluator, metric): p
        for sae, evaluator, metric, number in results.rows()
        if (evaluator, metric) in shown
        and number.undecided is None
        and math.isfinite(p := number.nulls.get(DECISIVE, _NONE).p)
    }
    if not family:
        return results
    from scipy.stats import false_discovery_control  # slow to import; reports do not need it

    adjusted = dict(zip(family, false_discovery_control(list(family.values())), strict=True))

    def number_of(key: tuple[str, str, str], number: MetricResult) -> MetricResult:
        null = number.nulls.get(DECISIVE)
        if null is None:
            return number
        q = float(adjusted.get(key, math.nan))
        return replace(number, nulls={**number.nulls, DECISIVE: replace(null, q=q)})

    return replace(
        results,
        saes=[
            replace(
                sae,
                evaluators={
                    name: replace(
                        found,
                        metrics={
                            metric: number_of((sae.id, name, metric), number)
                            for metric, number in found.metrics.items()
                        },
                    )
                    for name, found in sae.evaluators.items()
                },
            )
            for sae in results.saes
        ],
    )


_NONE = NullResult()
