"""Results as one table for the terminal, each number beside its null controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ...registry.nulls import NULLS
from ...registry.presentation import Headline
from .results import MetricResult, NullResult, Results, SAEResult
from .series import all_series

FIRST_COLUMN = 20  # characters; longer titles are wrapped


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


COLUMNS = {
    "permuted_classes": "permuted classes",
    "shuffled": "shuffled labels",
    "random": "random SAE",
    "neurons": "neurons",
}
# Narrow enough for 80 columns.
HEADINGS = {
    "permuted_classes": "perm. (best)",
    "shuffled": "shuffled",
    "random": "random",
    "neurons": "neurons",
}


def headlines(results: Results) -> list[ShownMetric]:
    """The headline metrics that the evaluators declare and some SAE has, by priority.

    The default for an evaluator is its first metric with a direction, else its first metric.
    """
    present = set(results.metric_names())
    found = []
    for evaluator, info in results.evaluators.items():
        metrics = [metric for metric in info.directions if (evaluator, metric) in present]
        declared = [headline for headline in info.headlines if headline.metric in metrics]
        for headline in declared or _default_headlines(results, evaluator, metrics):
            meaning = headline.meaning or info.description
            shown = ShownMetric(evaluator, headline.metric, headline.title, meaning)
            found.append((headline.priority, shown))
    return [shown for _, shown in sorted(found, key=lambda item: item[0])]


def _default_headlines(results: Results, evaluator: str, metrics: list[str]) -> list[Headline]:
    directions = results.evaluators[evaluator].directions
    directed = [metric for metric in metrics if directions[metric] is not None]
    return [
        Headline(
            metric,
            ": ".join(dict.fromkeys([evaluator, results.label(evaluator, metric)])).replace(
                "_", " "
            ),
        )
        for metric in (directed or metrics)[:1]
    ]


def summary_table(results: Results, shown: Sequence[ShownMetric] | None = None) -> Table:
    """One table of the headline metrics: a section per metric, a row per SAE in order of depth.

    Metrics that no SAE has are left out.
    """
    table = Table(
        title=_title(results),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("layer" if _layers(results) else "SAE", justify="right", no_wrap=True)
    table.add_column("value", justify="right", style="bold", no_wrap=True)
    for null in NULLS:
        table.add_column(HEADINGS[null], justify="right", no_wrap=True)
    table.add_column("not past", style="yellow")
    for metric in headlines(results) if shown is None else shown:
        rows = _rows(results, metric)
        names = wrap(metric.title, FIRST_COLUMN)
        names += [""] * (len(rows) - len(names))
        for i, (sae, number) in enumerate(rows):
            name = "\n".join(names[i:] if i == len(rows) - 1 else names[i : i + 1])
            table.add_row(escape(name), escape(_label(results, sae)), *_cells(number))
        table.add_section()
    return table


def summary_rows(
    results: Results, shown: Sequence[ShownMetric] | None = None
) -> list[dict[str, Any]]:
    """The same as flat records, for `--json`."""
    return [
        {
            "sae": sae.id,
            "hook_name": sae.hook_name,
            "layer": sae.layer,
            "architecture": sae.trained_as,
            "evaluator": metric.evaluator,
            "metric": metric.metric,
            "title": metric.title,
            "value": number.value,
            **{name: null.mean for name, null in number.nulls.items()},
            "not_left_behind": number.missed,
        }
        for metric in (headlines(results) if shown is None else shown)
        for sae, number in _rows(results, metric)
    ]


def verdict(results: Results, shown: Sequence[ShownMetric] | None = None) -> str:
    """The number of SAEs at which each headline metric beats its nulls, in one sentence."""
    counts = []
    for metric in headlines(results) if shown is None else shown:
        numbers = [number for _, number in _rows(results, metric)]
        judged = [n for n in numbers if any(v.left_behind is not None for v in n.nulls.values())]
        if judged:
            permuted = [n.nulls.get("permuted_classes", NullResult()).left_behind for n in judged]
            compared = [past for past in permuted if past is not None]
            past_permuted = sum(compared) if compared else "–"
            past_all = sum(not n.missed for n in judged)
            counts.append(f"{metric.title} {past_permuted} and {past_all}")
    if not counts:
        return "No number here has a null to be compared with."
    return (
        f"Of {len(results.saes)} SAEs, so many are past the permuted classes, and past all "
        f"nulls: {'; '.join(counts)}."
    )


def legend(results: Results, shown: Sequence[ShownMetric] | None = None) -> str:
    """The meaning of the metrics and of the columns of the table."""
    found = [m for m in (headlines(results) if shown is None else shown) if _rows(results, m)]
    metrics = (f"{m.title}: {m.meaning}{_direction(results, m)}." for m in found)
    return "\n".join(
        [
            *metrics,
            "Beside each value the same number under null controls: classes permuted over the tree "
            "(mean and best draw; the main null), labels shuffled over images, a random SAE, "
            "the neurons. A dash: that null is not defined there.",
        ]
    )


def _direction(results: Results, metric: ShownMetric) -> str:
    """The direction of a metric where it is not "higher is better"."""
    better = results.direction(metric.evaluator, metric.metric)
    return {True: "", False: " (lower is better)", None: " (descriptive)"}[better]


def _title(results: Results) -> str:
    """What all SAEs share: their series, where there is one, and their architecture."""
    series = all_series(results)
    kinds = {sae.trained_as for sae in results.saes}
    shared = [*(s.label for s in series if len(series) == 1), *(kinds if len(kinds) == 1 else ())]
    return escape(" · ".join(filter(None, shared)))


def _rows(results: Results, shown: ShownMetric) -> list[tuple[SAEResult, MetricResult]]:
    saes = (sae for series in all_series(results) for sae in series)
    return [(sae, number) for sae in saes if (number := shown.of(sae))]


def _layers(results: Results) -> bool:
    """Whether the layer alone identifies an SAE."""
    layers = [sae.layer for sae in results.saes]
    return None not in layers and len(set(layers)) == len(layers) > 1


def _label(results: Results, sae: SAEResult) -> str:
    if _layers(results):
        return str(sae.layer)
    several = len({other.trained_as for other in results.saes}) > 1
    return f"{sae.id} ({sae.trained_as})" if several and sae.trained_as not in sae.id else sae.id


def _cells(number: MetricResult) -> list[str]:
    cells = [_number(number.value)]
    for name in NULLS:
        null = number.nulls.get(name)
        if null is None or null.n == 0:
            cells.append("[dim]–[/]")
        elif null.n > 1:
            cells.append(f"{_number(null.mean)} ({_number(null.best)})")
        else:
            cells.append(_number(null.mean))
    return [*cells, ", ".join(COLUMNS[name].partition(" ")[0] for name in number.missed)]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
