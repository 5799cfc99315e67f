"""Results on a terminal: one table, each number beside its null controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from .results import NULLS, MetricResult, Results, SAEResult
from .series import all_series


@dataclass(frozen=True)
class Headline:
    """A metric that the summary shows, under the name that a reader should call it."""

    evaluator: str
    metric: str
    title: str


HEADLINES = (
    Headline("ontological_coverage", "internal_f1", "coverage of internal nodes: mean F1 of the best latent"),
    Headline("pair_depth", "pair_depth", "pair depth: where the classes of a latent's top images meet"),
    Headline("lch_height", "height_gap", "LCH height: how far below random class sets"),
    Headline("lch_height", "generality_gap", "LCH generality: how far below random class sets, in bits"),
    Headline("level_information", "x_probe_level_accuracy", "level information: accuracy of a probe at the tree's levels"),
    Headline("level_information", "x_probe_right_group", "level information: right group given wrong leaf"),
)
COLUMNS = {
    "permuted_classes": "permuted classes",
    "shuffled": "shuffled labels",
    "random": "random SAE",
    "neurons": "neurons",
}
LEGEND = (
    "Beside each number the same number under four null controls: classes permuted over the tree "
    "(mean, and the best in brackets: the null that matters), labels shuffled over images, an "
    "untrained SAE, the raw neurons. `not above` names the nulls that a number does not leave "
    "behind; a dash is a null without meaning for that metric."
)


def summary_table(results: Results, headlines: Sequence[Headline] = HEADLINES) -> Table:
    """One table of the headline metrics: a section per metric, a row per SAE in order of depth.

    Metrics that no SAE has are left out.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=LEGEND, caption_justify="left")
    table.add_column("hook point", no_wrap=True)
    table.add_column("value", justify="right", style="bold")
    for null in NULLS:
        table.add_column(COLUMNS[null], justify="right")
    table.add_column("not above", style="yellow")
    for headline in headlines:
        rows = _rows(results, headline)
        if rows:
            table.add_section()
            table.add_row(f"[bold cyan]{headline.title}[/]")
            for sae, number in rows:
                table.add_row(_label(results, sae), *_cells(number))
    return table


def summary_rows(results: Results, headlines: Sequence[Headline] = HEADLINES) -> list[dict]:
    """The same as flat records, for `--json`."""
    return [
        {
            "sae": sae.id,
            "hook_name": sae.hook_name,
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
        judged = [n for n in numbers if any(null.left_behind is not None for null in n.nulls.values())]
        if not judged:
            continue
        permuted = sum(
            "permuted_classes" in n.nulls and n.nulls["permuted_classes"].left_behind is True
            for n in judged
        )
        everything = sum(not n.missed for n in judged)
        told.append(f"{headline.title.partition(':')[0]} {permuted} ({everything})")
    if not told:
        return "No number here has a null to be compared with."
    return (
        f"Of {len(results.saes)} SAEs, so many leave permuted classes (all nulls) behind: "
        f"{', '.join(told)}."
    )


def _rows(results: Results, headline: Headline) -> list[tuple[SAEResult, MetricResult]]:
    found = []
    for series in all_series(results):
        for sae in series:
            evaluator = sae.evaluators.get(headline.evaluator)
            if evaluator and headline.metric in evaluator.metrics:
                found.append((sae, evaluator.metrics[headline.metric]))
    return found


def _label(results: Results, sae: SAEResult) -> str:
    hooks = [other.hook_name for other in results.saes]
    return sae.hook_name if len(set(hooks)) == len(hooks) else sae.id


def _cells(number: MetricResult) -> list[str]:
    cells = [_number(number.value)]
    for name in NULLS:
        null = number.nulls.get(name)
        if null is None or (null.reason and null.n == 0):
            cells.append("[dim]–[/]")
        elif null.n > 1:
            cells.append(f"{_number(null.mean)} ({_number(null.best)})")
        else:
            cells.append(_number(null.mean))
    return [*cells, ", ".join(COLUMNS.get(name, name) for name in number.missed)]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
