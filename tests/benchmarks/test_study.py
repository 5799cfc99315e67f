"""The tables of the docs are those of the stored results, and the tables are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import study
from results_factory import make_results
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


def test_an_evaluator_without_directions_is_described(found: Stored) -> None:
    found.data["evaluators"]["d"] = {"directions": {}, "headlines": [], "units": {}}
    found.at(8, "topk")["d/delta"] = number(0.2, 0.01)
    found.at(2, "untrained")["d/delta"] = {"value": 3.0}
    found.at(8, "untrained")["d/delta"] = {"value": None}
    assert study.metric_table(found, "d").splitlines() == [
        "|  | block 2 | block 8 |",
        "|---|---|---|",
        "| TopK: `delta` | – | .200 ±.010 |",
        "| TopK on the untrained model: `delta` | – | – |",
    ]


def test_parts_of_a_study_are_joined(tmp_path: Path) -> None:
    """Evaluators of the same SAEs, and other SAEs; q is adjusted over all of them."""
    settings = dict.fromkeys(study.SETTINGS, 3)
    whole = replace(make_results(tmp_path), settings=settings)
    first, last = whole.saes[0], whole.saes[-1]
    names = list(first.evaluators)

    def part(sae, *evaluators: str):
        infos = {name: whole.evaluators[name] for name in evaluators}
        kept = replace(sae, evaluators={name: sae.evaluators[name] for name in evaluators})
        return replace(whole, evaluators=infos, saes=[kept])

    joined = study.joined([part(first, *names[1:]), part(first, names[0]), part(last, *names)])
    assert set(joined.evaluators) == set(names) and len(joined.saes) == 2
    of_both = replace(whole, saes=[first, last])

    def numbers(results):
        return {(sae.id, *name): number for sae, *name, number in results.rows()}

    assert repr(sorted(numbers(joined).items())) == repr(
        sorted(numbers(study.with_q(of_both)).items())
    )

    with pytest.raises(ValueError, match="another dataset"):
        study.joined([whole, replace(whole, dataset=replace(whole.dataset, n_images=1))])
    with pytest.raises(ValueError, match="other settings"):
        study.joined([whole, replace(whole, settings={**settings, "seed": 99})])


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
