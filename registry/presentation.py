"""Declarations of how an evaluator's results are shown in tables, reports and dashboards.

No imports of ours, so that a report can be written without the evaluators.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """A metric shown in the summaries: terminal table, report and dashboard.

    Args:
        metric: a key of `Evaluator.higher_is_better`.
        title: its name in summaries; up to 20 characters fit on one line of the terminal.
        meaning: what it measures, in one clause; by default the evaluator's description.
        priority: smallest first over all evaluators; equal ones in order of evaluation.
    """

    metric: str
    title: str
    meaning: str = ""
    priority: int = 100


@dataclass(frozen=True)
class Support:
    """What a metric is computed from: nodes, latents, edges, errors.

    Args:
        count: the key of `Evaluator.higher_is_better` that is their number.
        unit: what they are, in the plural.
        least: with fewer of them, the metric is not judged against its nulls.
    """

    count: str
    unit: str
    least: int = 10


def support_of_all(directions: Mapping[str, bool | None], support: Support) -> dict[str, Support]:
    """Every metric that has a direction -> `support`."""
    return {metric: support for metric, better in directions.items() if better is not None}


@dataclass(frozen=True)
class NodeTable:
    """The table of an evaluator that assigns latents to nodes of the taxonomy.

    The latent cards of a report come from the table of smallest priority that has a `latent`
    column, its tree chart from the one of smallest priority that has an `f1` column.

    Args:
        name: its key in `Evaluator.tables()`.
        node: the column of node ids, from `Taxonomy.nodes`.
        latent: the column of latents, below 0 where a row has none; None without such a column.
        f1: the column of F1, how well the latent detects the node on held-out images, NaN where
            undefined; None without such a column.
        meaning: what `f1` is, as a clause after "coloured by".
        priority: among the evaluators of one evaluation.
        fires_on: the column of the share of the images on which the latent reaches the threshold at
            which `f1` is measured; None where that is 0, or without such a column.
    """

    name: str
    node: str = "node"
    latent: str | None = "latent"
    f1: str | None = "f1"
    meaning: str = "the F1 of the best latent for it"
    priority: int = 100
    fires_on: str | None = None


def shown_metrics(
    declared: Iterable[str],
    directions: Mapping[str, bool | None],
    present: Collection[str] | None = None,
) -> list[str]:
    """The metrics of an evaluator that summaries show.

    Those declared; where there are none, the first with a direction, else the first.

    Args:
        declared: the metrics of `Evaluator.headlines`.
        directions: metric -> whether higher is better, None for a descriptive one.
        present: of these alone; None: of all.
    """
    there = [metric for metric in directions if present is None or metric in present]
    directed = [metric for metric in there if directions[metric] is not None]
    shown = [metric for metric in declared if present is None or metric in present]
    return shown or (directed or there)[:1]
