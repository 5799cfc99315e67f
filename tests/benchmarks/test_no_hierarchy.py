"""A small form of `benchmarks/no_hierarchy.py`: the permuted-classes null holds, and can be left."""

from __future__ import annotations

import json
from pathlib import Path

import no_hierarchy
import numpy as np
import pytest
import tables
import taxolens
from scipy.stats import binom
from taxolens.registry.taxonomies import permuted_classes

RUNS = 40
METRICS = {
    "pair_depth": "pair_depth",
    "ontological_coverage": "internal_f1",
    "lch_height": "generality_gap",
}


def past(world: str, sizes: str, metric: str, tree: str = "3x3x3") -> list[bool]:
    """Whether p ≤ .05, of the runs that are judged."""
    found = [
        no_hierarchy.run(tree, world, sizes, seed, [metric]).get(f"{metric}/{METRICS[metric]}")
        for seed in range(RUNS)
    ]
    return [p <= 0.05 for p in found if p is not None]


@pytest.mark.parametrize("sizes", ["balanced", "one large"])
@pytest.mark.parametrize("world", ["noise", "flat"])
def test_without_hierarchy_the_null_holds(world: str, sizes: str) -> None:
    found = past(world, sizes, "pair_depth")
    assert len(found) == RUNS and sum(found) <= binom.ppf(0.999, RUNS, 0.05)


def test_permuting_classes_of_all_sizes_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails where strata are given up."""
    monkeypatch.setattr(permuted_classes, "SIZE_FACTOR", np.inf)
    monkeypatch.setattr(permuted_classes.strata, "__defaults__", (np.inf,))
    found = past("noise", "one large", "pair_depth")
    assert len(found) == RUNS and sum(found) > 0.8 * RUNS


@pytest.mark.parametrize("metric", METRICS)
def test_planted_truth_leaves(metric: str) -> None:
    found = past("groups", "balanced", metric)
    assert len(found) == RUNS and sum(found) >= 0.9 * RUNS


def test_runs_in_the_file_are_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    rows = [
        {"job": ["3x3", "noise", "balanced", seed], "evaluators": ["pair_depth"],
         "p": {"pair_depth/pair_depth": p}}
        for seed, p in enumerate([0.05, 0.9, None])
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = no_hierarchy.read(file)
    assert found["3x3", "noise", "balanced", 1] == {"pair_depth": {"pair_depth": 0.9}}
    counts = no_hierarchy.counted(found)
    assert counts["runs"] == {"pair_depth": {"3x3": {"noise, balanced": 3}}}
    assert counts["cells"] == {"pair_depth/pair_depth": {"3x3": {"noise, balanced": (2, 1)}}}


def test_cells_that_were_run_again_replace_the_stored_ones() -> None:
    stored = {
        "runs": {
            "pair_depth": {"3x3": {"noise, balanced": 200, "flat, balanced": 200}},
            "gone": {},
        },
        "cells": {
            "pair_depth/pair_depth": {
                "3x3": {"noise, balanced": [200, 9], "flat, balanced": [7, 1]}
            },
            "pair_depth/was_judged": {
                "3x3": {"noise, balanced": [200, 9], "flat, balanced": [7, 1]}
            },
            "gone/metric": {"3x3": {"noise, balanced": [200, 9]}},
        },
    }
    counts = {
        "runs": {"pair_depth": {"3x3": {"noise, balanced": 50}, "2x2x2": {"noise, balanced": 3}}},
        "cells": {"pair_depth/pair_depth": {"3x3": {"noise, balanced": (40, 2)}}},
    }
    assert no_hierarchy.replaced(stored, counts) == {
        "runs": {
            "pair_depth": {
                "3x3": {"noise, balanced": 50, "flat, balanced": 200},
                "2x2x2": {"noise, balanced": 3},
            }
        },
        "cells": {
            "pair_depth/pair_depth": {
                "3x3": {"noise, balanced": (40, 2), "flat, balanced": [7, 1]}
            },
            "pair_depth/was_judged": {"3x3": {"flat, balanced": [7, 1]}},
        },
    }


def test_no_stored_share_without_hierarchy_is_above_the_bar() -> None:
    """At least 200 runs of each cell of every evaluator that is judged against permuted trees."""
    counts = tables.load()["no_hierarchy"]
    without = [f"{w}, {sizes}" for w in tables.WORLDS["Without"] for sizes in tables.CLASS_SIZES]
    evaluators = set(taxolens.EVALUATORS) - set(no_hierarchy.LEFT_OUT)
    assert set(counts["runs"]) == evaluators
    for of_trees in counts["runs"].values():
        assert all(of_trees[t][column] >= 200 for t in tables.TREES for column in without)
    cells = [cell for _, column, cell in tables.entries(counts["cells"]) if column in without]
    assert len(cells) > 1000 and not any(tables.above_bar(*cell) for cell in cells)


def test_only_evaluators_without_a_verdict_against_permuted_trees_are_left_out() -> None:
    """A reason in place of a null: the evaluator is not judged against it."""
    for name, evaluator in taxolens.EVALUATORS.items():
        judged = any(direction is not None for direction in evaluator.higher_is_better.values())
        has_verdict = judged and not evaluator.nulls.get("permuted_classes")
        assert has_verdict == (name not in no_hierarchy.LEFT_OUT), name
