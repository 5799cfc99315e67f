"""Results on a terminal: one table, each number beside its null controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from ...registry.nulls import NULLS
from .results import MetricResult, Results, SAEResult
from .series import all_series


@dataclass(frozen=True)
class Headline:
    """A metric that summaries show, under the name that a reader should call it."""

    evaluator: str
    metric: str
    title: str
    meaning: str = ""


HEADLINES = (
    Headline(
        "ontological_coverage",
        "internal_f1",
        "node coverage",
        "mean F1 of the best latent for each internal node of the tree",
    ),
    Headline(
        "pair_depth",
        "pair_depth",
        "pair depth",
        "how deep the classes of a latent's top images meet, pairs of one class left out",
    ),
    Headline(
        "lch_height",
        "height_gap",
        "LCH height",
        "how much lower the classes of a latent meet than random sets of as many classes",
    ),
    Headline(
        "lch_height",
        "generality_gap",
        "LCH generality",
        "the same in bits of classes below the node",
    ),
    Headline(
        "level_information",
        "x_probe_level_accuracy",
        "level accuracy",
        "a linear probe on the activations, scored at the levels of the tree",
    ),
    Headline(
        "level_information",
        "x_probe_right_group",
        "right group",
        "of the images whose class that probe misses, the share put into the right group",
    ),
)
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


def summary_table(results: Results, headlines: Sequence[Headline] = HEADLINES) -> Table:
    """One table of the headline metrics: a section per metric, a row per SAE in order of depth.

    Metrics that no SAE has are left out.
    """
    headlines = [headline for headline in headlines if _rows(results, headline)]
    series = all_series(results)
    title = series[0].label if len(series) == 1 else ""
    table = Table(
        title=title,
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
    table.add_column("not above", style="yellow")
    for headline in headlines:
        name = headline.title
        for sae, number in _rows(results, headline):
            table.add_row(name, _label(results, sae), *_cells(number))
            name = ""
        table.add_section()
    return table


def summary_rows(
    results: Results, headlines: Sequence[Headline] = HEADLINES
) -> list[dict[str, Any]]:
    """The same as flat records, for `--json`."""
    return [
        {
            "sae": sae.id,
            "hook_name": sae.hook_name,
            "layer": sae.layer,
            "evaluator": headline.evaluator,
            "metric": headline.metric,
            "value": number.value,
            **{name: null.mean for name, null in number.nulls.items()},
            "not_left_behind": number.missed,
        }
        for headline in headlines
        for sae, number in _rows(results, headline)
    ]


def verdict(results: Results, headlines: Sequence[Headline] = HEADLINES) -> str:
    """At how many SAEs each headline number leaves its nulls behind, in one sentence."""
    told = []
    for headline in headlines:
        numbers = [number for _, number in _rows(results, headline)]
        judged = [n for n in numbers if any(v.left_behind is not None for v in n.nulls.values())]
        if judged:
            past_permuted = sum("permuted_classes" not in n.missed for n in judged)
            past_all = sum(not n.missed for n in judged)
            told.append(f"{headline.title} {past_permuted} and {past_all}")
    if not told:
        return "No number here has a null to be compared with."
    return (
        f"Of {len(results.saes)} SAEs, so many are above the permuted classes, and above all "
        f"nulls: {'; '.join(told)}."
    )


def legend(results: Results, headlines: Sequence[Headline] = HEADLINES) -> str:
    """What the metrics and the columns of the table mean."""
    headlines = [headline for headline in headlines if _rows(results, headline)]
    metrics = "; ".join(f"{headline.title}: {headline.meaning}" for headline in headlines)
    return (
        f"{metrics}.\n"
        "Beside each value the same number under null controls: classes permuted over the tree "
        "(mean and best draw; the null that matters), labels shuffled over images, a random SAE, "
        "the neurons. A dash: that null has no meaning there."
    )


def _rows(results: Results, headline: Headline) -> list[tuple[SAEResult, MetricResult]]:
    found = []
    for series in all_series(results):
        for sae in series:
            evaluator = sae.evaluators.get(headline.evaluator)
            if evaluator and headline.metric in evaluator.metrics:
                found.append((sae, evaluator.metrics[headline.metric]))
    return found


def _layers(results: Results) -> bool:
    """Whether the layer alone tells the SAEs apart."""
    layers = [sae.layer for sae in results.saes]
    return None not in layers and len(set(layers)) == len(layers) > 1


def _label(results: Results, sae: SAEResult) -> str:
    return str(sae.layer) if _layers(results) else sae.id


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
