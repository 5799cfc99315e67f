"""The tables of the docs are those of the stored results, and the tables are right."""

from __future__ import annotations

import pytest
import study
from study import Stored


def number(value: float, half: float = 0.1, **nulls: dict[str, float]) -> dict[str, object]:
    return {"value": value, "low": value - half, "high": value + half, "nulls": nulls}


@pytest.fixture
def found() -> Stored:
    """Two blocks: in the first the SAE is like its controls, in the second better."""
    permuted = {"mean": 0.3, "n": 99, "p": 0.01, "q": 0.02, "left_behind": True}
    missed = {"mean": 0.3, "n": 99, "p": 0.5, "q": 0.6, "left_behind": False}
    values = {
        (2, "topk", None, "trained"): number(0.4, permuted_classes=missed),
        (8, "topk", None, "trained"): {**number(0.8, permuted_classes=permuted), "support": 1213},
        (2, "topk", "frozen_decoder", "trained"): number(0.45),
        (8, "topk", "frozen_decoder", "trained"): number(0.5),
        (8, "topk", None, "untrained"): number(0.65),
    }
    return Stored(
        {
            "evaluators": {"e": {"directions": {"m": True}, "headlines": [], "units": {}}},
            "saes": [
                {"block": b, "architecture": a, "constraint": c, "model": model, "l0": 16.0,
                 "metrics": {"e/m": of}}
                for (b, a, c, model), of in values.items()
            ],
        }
    )  # fmt: skip


def test_every_number_stands_beside_its_nulls_and_controls(found: Stored) -> None:
    assert study.metric_table(found, "e") == "\n".join(
        [
            "| `m` | block 2 | block 8 |",
            "|---|---|---|",
            "| **TopK** | .400 ±.100 | .800 ±.100 (1,213) |",
            "| classes permuted | .300 (p .50)! | .300 (p .01) |",
            "| decoder frozen | .450 ±.100 | .500 ±.100 |",
            "| **TopK on the untrained model** | – | .650 ±.100 |",
        ]
    )


def test_a_number_of_the_activations_has_one_row(found: Stored) -> None:
    for constraint in (None, *study.CONSTRAINTS):
        for block in (2, 8):
            if not found.at(block, "topk", constraint):
                found.data["saes"].append(
                    {"block": block, "architecture": "topk", "constraint": constraint,
                     "model": "trained", "metrics": {}}
                )  # fmt: skip
            found.at(block, "topk", constraint)["e/m"] = number(0.4)
    rows = study.metric_table(found, "e/m").splitlines()[2:]
    assert rows == [
        "| **activations** | .400 ±.100 | .400 ±.100 |",
        "| **activations of the untrained model** | – | .650 ±.100 |",
    ]


def test_planted_detectors_stand_beside_their_permuted_trees() -> None:
    permuted = {"mean": 0.3, "n": 99, "p": 0.54, "left_behind": False}
    data = {"classes": 4, "images_per_class": 3, "nodes": 7, "distinct_nodes": 7,
            "headlines": ["e/m", "e/undefined"],
            "worlds": {"one": {"e/m": number(0.4, permuted_classes=permuted)}, "two": {}}}  # fmt: skip
    assert study.planted_table(Stored(data)).splitlines()[2:] == [
        "| metric | one | two |",
        "|---|---|---|",
        "| `e` m | .400 (.300, p .54!) | – |",
    ]


def test_what_is_told_apart_at_which_blocks(found: Stored) -> None:
    row = study.glance_table(found).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = [
        cell.strip() for cell in study.glance_table(found).splitlines()[0].strip("|").split("|")
    ]
    told = dict(zip(names, cells, strict=True))
    assert told["metric"] == "`e` m" and told["draws"] == "99"
    assert told["classes permuted"] == "8" and told["decoder frozen"] == "8"
    assert told["untrained model"] == "no" and told["neurons"] == "–"


def test_a_number_that_is_not_judged_tells_nothing(found: Stored) -> None:
    found.at(8, "topk")["e/m"]["undecided"] = "computed from 2, fewer than 10"
    assert study.tells(found, 8, "e/m", "permuted_classes", True) is None


@pytest.mark.parametrize("page", study.PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_docs_are_those_of_the_stored_results(page) -> None:
    """Where this fails: python benchmarks/study.py write"""
    text = page.read_text()
    assert {match[1] for match in study.BLOCK.finditer(text)} & set(study.STORED)
    assert study.write(text, {name: Stored.load(name) for name in study.STORED}) == text


def test_a_table_is_written_between_its_markers(found: Stored) -> None:
    page = "before\n<!-- demo@8: e/m -->\nold\n<!-- /demo -->\nafter"
    made = study.write(page, {"demo": found})
    assert (
        made.startswith("before\n<!-- demo@8: e/m -->\n\n| `m` | block 8 |") and "old" not in made
    )
    assert made.endswith("<!-- /demo -->\nafter") and study.write(made, {"demo": found}) == made
