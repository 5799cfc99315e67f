"""Why a headline number is undefined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import taxolens
from taxolens.plugin.evaluation.split import Split
from taxolens.plugin.evaluation.undefined import undefined_notes
from taxolens.plugin.reporting.results import MetricResult
from taxolens.registry.taxonomies import Taxonomy

PARENT_CHILD = taxolens.EVALUATORS["parent_child"]
TREE = Taxonomy.from_edges(
    [(g, f"{g}{c}") for g in "ab" for c in range(3)] + [("r", "a"), ("r", "b")]
)


def notes(labels: Any, support: int | None, l0: float = 6.0) -> list[str]:
    """Of an undefined edge precision."""
    metrics = {"edge_precision": MetricResult(value=math.nan, support=support)}
    split = Split.halves(np.asarray(labels), len(TREE.classes), 0)
    return undefined_notes(PARENT_CHILD, metrics, taxonomy=TREE, split=split, l0=l0)


ALL, FIVE = np.repeat(np.arange(6), 4), np.repeat(np.arange(5), 4)


@pytest.mark.parametrize(
    ("labels", "support", "reason"),
    [
        (ALL, 0, "there are no edges to compute it from"),
        # One absent class does not say why no latent implies another.
        (FIVE, 0, "there are no edges to compute it from; only 5 of 6 classes have images"),
        (FIVE, 7, "only 5 of 6 classes have images"),
        ([*FIVE, 5], 7, "only 5 of 6 classes have images in both halves"),
        (ALL, 7, "its formula has no value for these latents, 6 classes and 24 images"),
        (ALL, None, "its formula has no value for these latents, 6 classes and 24 images"),
    ],
)
def test_the_reason(labels: Any, support: int | None, reason: str) -> None:
    assert notes(labels, support) == [f"edge_precision: undefined, since {reason}."]


def test_without_active_latents_nothing_else_matters() -> None:
    said = notes(FIVE, 0, l0=0.0)
    assert said == ["edge_precision: undefined, since no latent is active on any image."]
