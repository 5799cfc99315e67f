"""Notes that say why a headline number is undefined, where its evaluator does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...registry.evaluators.base import Evaluator
from ...registry.presentation import shown_metrics
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.results import MetricResult
from .split import Split


def undefined_notes(
    evaluator: type[Evaluator[Any]],
    metrics: Mapping[str, MetricResult],
    *,
    taxonomy: Taxonomy,
    split: Split,
    l0: float | None,
) -> list[str]:
    """One note for each reason for which headline metrics have no value.

    Args:
        evaluator: its declarations name the headlines, and what each number is computed from.
        metrics: its numbers for one SAE.
        taxonomy: the class tree.
        split: the images measured on.
        l0: mean number of latents above 0 on an image; None where counting them failed.
    """
    declared = [headline.metric for headline in evaluator.headlines]
    reasons: dict[str, list[str]] = {}
    for name in shown_metrics(declared, evaluator.higher_is_better):
        number = metrics.get(name)
        if number is not None and math.isnan(number.value):
            reason = _reason(evaluator, name, number, taxonomy, split, l0)
            reasons.setdefault(reason, []).append(evaluator.labels.get(name, name))
    return [f"{', '.join(names)}: undefined, since {why}." for why, names in reasons.items()]


def _reason(
    evaluator: type[Evaluator[Any]],
    name: str,
    number: MetricResult,
    taxonomy: Taxonomy,
    split: Split,
    l0: float | None,
) -> str:
    n_classes, images = len(taxonomy.classes), split.labels[split.order]
    present = len(np.unique(images))
    halves = (images[: split.n_fit], images[split.n_fit :])
    in_both = len(np.intersect1d(*halves))
    if l0 == 0:
        return "no latent is active on any image"
    missing = ""
    if present < n_classes:
        missing = f"only {present} of {n_classes} classes have images"
    elif in_both < n_classes:
        missing = f"only {in_both} of {n_classes} classes have images in both halves"
    if number.support == 0:  # which one absent class of many does not explain
        none = f"there are no {evaluator.support[name].unit} to compute it from"
        return f"{none}; {missing}" if missing else none
    return missing or (
        f"its formula has no value for these latents, {n_classes} classes and {len(images)} images"
    )
