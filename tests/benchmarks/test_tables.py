"""The tables and numbers of the docs are those of the stored results; no other number of the prose is measured."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import pytest
import tables
from tables import Stored


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
    assert tables.metric_table(found, "e") == "\n".join(
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
    for constraint in (None, *tables.CONSTRAINTS):
        for block in (2, 8):
            if not found.at(block, "topk", constraint):
                found.data["saes"].append(
                    {"block": block, "architecture": "topk", "constraint": constraint,
                     "model": "trained", "metrics": {}}
                )  # fmt: skip
            found.at(block, "topk", constraint)["e/m"] = number(0.4)
    rows = tables.metric_table(found, "e/m").splitlines()[2:]
    assert rows == [
        "| **activations** | .400 ±.100 | .400 ±.100 |",
        "| **activations of the untrained model** | – | .650 ±.100 |",
    ]


def test_an_evaluator_without_directions_is_described(found: Stored) -> None:
    found.data["evaluators"]["d"] = {"directions": {}, "headlines": [], "units": {}}
    found.at(8, "topk")["d/delta"] = number(0.2, 0.01)
    found.at(2, "untrained")["d/delta"] = {"value": 3.0}
    found.at(8, "untrained")["d/delta"] = {"value": None}
    assert tables.metric_table(found, "d").splitlines() == [
        "|  | block 2 | block 8 |",
        "|---|---|---|",
        "| TopK: `delta` | – | .200 ±.010 |",
        "| TopK on the untrained model: `delta` | – | – |",
    ]


def test_planted_detectors_stand_beside_their_permuted_trees() -> None:
    permuted = {"mean": 0.3, "n": 99, "p": 0.54, "left_behind": False}
    data = {"classes": 4, "images_per_class": 3, "nodes": 7, "distinct_nodes": 7,
            "headlines": ["e/m", "e/undefined"],
            "worlds": {"one": {"e/m": number(0.4, permuted_classes=permuted)}, "two": {}}}  # fmt: skip
    assert tables.planted_table(data).splitlines()[2:] == [
        "| metric | one | two |",
        "|---|---|---|",
        "| `e` m | .400 (.300, p .54!) | – |",
    ]


def test_what_is_told_apart_at_which_blocks(found: Stored) -> None:
    row = tables.glance_table(found).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    names = [
        cell.strip() for cell in tables.glance_table(found).splitlines()[0].strip("|").split("|")
    ]
    told = dict(zip(names, cells, strict=True))
    assert told["metric"] == "`e` m" and told["draws"] == "99"
    assert told["classes permuted"] == "8" and told["decoder frozen"] == "8"
    assert told["untrained model"] == "no" and told["neurons"] == "–"


def test_a_number_that_is_not_judged_tells_nothing(found: Stored) -> None:
    found.at(8, "topk")["e/m"]["undecided"] = "computed from 2, fewer than 10"
    assert tables.tells(found, 8, "e/m", "permuted_classes", True) is None


def test_node_indicators_stand_beside_their_nulls() -> None:
    permuted = {"mean": 0.3, "n": 99, "p": 0.5, "left_behind": False}
    data = {"classes": 4, "nodes": 7, "images": 12, "draws": 99,
            "indicators": {"e/m": {"value": 0.5, "support": 3, "nulls": {"permuted_classes": permuted}}}}  # fmt: skip
    assert tables.indicators_table(data).splitlines() == [
        "A tree of 4 classes and 7 nodes, 12 images, 99 permuted trees.",
        "",
        "| metric | node indicators | classes permuted | labels shuffled |",
        "|---|---|---|---|",
        "| `e` m | .500 (3) | .300 (p .50)! |  |",
    ]


def test_cases_of_known_truth_stand_beside_what_they_are_compared_with() -> None:
    cases = [
        {"metric": "e/m", "of": "noise", "value": 0.25, "beside": {"edges": 1200, "chance": 45.67}},
        {"metric": "e/n", "of": "rows", "value": None, "beside": {}},
    ]
    assert tables.cases_table({"cases": cases}).splitlines()[2:] == [
        "| `e` m | noise | .250 | edges: 1,200; chance: 45.7 |",
        "| `e` n | rows | – |  |",
    ]


@pytest.mark.parametrize(
    ("judged", "past", "above"),
    [(200, 16, False), (200, 17, True), (2000, 140, False), (2000, 141, True), (10, 1, False)],
)
def test_a_share_above_the_bar_is_bold(judged: int, past: int, above: bool) -> None:
    """200 runs: .05 + 2·√(.05·.95/200) = .081; 2,000 runs: .07."""
    assert tables.share(judged, past, barred=True).startswith("**") == above
    assert not tables.share(judged, past, barred=False).startswith("**")


def test_shares_past_a_null_stand_by_world_and_tree() -> None:
    counts = {
        "headlines": ["e/m", "e/none"],
        "runs": {"e": {"3x3": {"noise, balanced": 200, "planted, absent": 20}, "3x3x3": {"flat, absent": 300}}},
        "cells": {"e/m": {"3x3": {"noise, balanced": (200, 10), "planted, absent": (10, 10)},
                          "3x3x3": {"flat, absent": (300, 30)}}},
    }  # fmt: skip
    trees, without, head, _, row, also, *_, past = (
        tables.no_hierarchy_table(counts).replace("\n\n", "\n").splitlines()
    )
    assert trees == "Trees in each cell: 3x3, 3x3x3; –: nothing could be judged."
    assert without == (
        "Without hierarchy: 200 to 300 runs of every cell. 1 of 2 cells are bold, those of metrics that are not "
        "shown included, and 0.080 of all p are at most 0.05."
    )
    assert head.startswith("| metric | noise, balanced | noise, one large |")
    assert row.startswith("| `e` m | .05 – | – – |") and row.endswith("| – **.10** |")
    assert also == "With hierarchy: 20 to 20 runs of every cell." and past.endswith(
        "| 1 – | – – | – – | – – | – – |"
    )


def test_costs_stand_beside_what_they_are_compared_with() -> None:
    machine = {"machine": {"cpu": "x", "cores": 2, "threads": 1, "gpu": None, "torch": "2"}}
    data = {
        "evaluators": {**machine, "images": 5000, "classes": 9, "latents": 7, "permutations": 10,
                       "seconds": {"encoding": 60.0}, "spent": 15.0, "peak GiB": 1.62},
        "draws": {**machine, "images": 5000, "classes": 9, "latents": 7, "draws": 100, "encoding": 20.0,
                  "peak GiB": 1.1, "evaluators": {"all": {"draws": 2.84}}},
        "draws_21841": {**machine, "images": 2, "classes": 3, "latents": 4, "draws": 100, "encoding": None,
                        "peak GiB": 4.8, "evaluators": {"all": {"draws": None}}},
        "monosemanticity": {**machine, "images": 8, "latents": 7,
                            "seconds": {"streamed": 1.0, "pairs as matrices": 32.0, "pairs in turn": 3456.0}},
        "hyperbolicity": {**machine, "points": 1500, "seconds": {"ours": 11.2}, "GiB": 0.07,
                          "GiB of all triples": 25.1},
    }  # fmt: skip
    counted = "5,000 images, 9 classes, 7 latents"
    assert tables.cost_table(data).splitlines()[2:] == [
        f"| values, with the labels shuffled and with 10 permuted trees | {counted} | 15 s | encoding: 60 s | .25 "
        "| 1.6 GiB |",
        f"| 100 permuted trees alone | {counted} | 2.8 s | encoding: 20 s | .14 | 1.1 GiB |",
        "| 100 permuted trees alone | 2 images, 3 classes, 4 latents | – |  |  | 4.8 GiB |",
        "| MonoScore | 8 images, 7 latents | 1.0 s | the pairs in turn, as published: 58 min | 1/3,500 |  |",
        "| MonoScore | 8 images, 7 latents | 1.0 s | all pairs at once, as dense matrices: 32 s | 1/32 |  |",
        "| δ from one base point | 1,500 points | 11 s |  |  | .07 GiB, all triples 25.1 GiB |",
        "",
        "2 core(s) of x, 1 thread(s), torch 2.",
    ]


def test_a_table_is_written_between_its_markers(found: Stored) -> None:
    page = "before\n<!-- demo@8: e/m -->\nold\n<!-- /demo -->\nafter"
    made = tables.write(page, {"demo": found.data})
    assert (
        made.startswith("before\n<!-- demo@8: e/m -->\n\n| `m` | block 8 |") and "old" not in made
    )
    assert made.endswith("<!-- /demo -->\nafter")
    assert tables.write(made, {"demo": found.data}) == made
    with pytest.raises(KeyError, match="planted: none"):
        tables.write("<!-- planted: none -->\n<!-- /planted -->", {"planted": {}})


def test_a_number_is_written_into_its_sentence() -> None:
    found = {
        "demo_model": {"validation_accuracy": {"species": 0.4997, "realm": 0.8239}},
        "sparse_step": {"rows": [{"architecture": name, "ratio": ratio} for name, ratio in (
            ("topk", 2.67), ("topk, every latent dead", 1.998), ("matryoshka_batchtopk", 5.02),
            ("random_matryoshka", 9.0))]},
    }  # fmt: skip
    page = "It is right in <!-- demo_model: species -->1 %<!-- /demo_model --> of cases."
    assert tables.write(page, found) == page.replace("1 %", "50 %")
    page = "is <!-- sparse_step: times as fast --><!-- /sparse_step --> times as fast"
    assert re.sub("<.*?>", "", tables.write(page, found)) == "is 2.0 to 5.0 times as fast"


# The pages ----------------------------------------------------------------------------------------

each_page = pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)

# A number that is typed by hand: the phrase it stands in -> why it is not measured.
DEFINITION, DEFAULT, SETTING, PUBLISHED = "definition", "default", "setting of a study", "published"
TYPED = {
    "README.md": {
        "95 % interval": DEFINITION,
        "within a cosine of .8": DEFINITION,
        "WordNet 3.0": "version",
    },
    "evaluators.md": {
        "95 % interval": DEFINITION,
        "fewer than 1.25 times": DEFAULT,
        "99 draws () give at least .01": DEFINITION,
        "past a null where p ≤ .05": DEFINITION,
        "past that null where q ≤ .05": DEFINITION,
        "reach the L0 within 5 %": DEFINITION,
        "firing on 80 % of its images and on .1 % or 1 % of all others": DEFAULT,
        "take at most 1 GiB": DEFINITION,
        "at least τ = .5 of": DEFAULT,
        "at least 90 % of the k = 16 most activating": DEFAULT,
        "not 1 % of false alarms": "planted detectors",
        "false discovery rate of .05": DEFINITION,
        "at most .05 on average": DEFINITION,
        "F1 ≥ .5": DEFINITION,
        "λ = .01": DEFAULT,
        "P(p fires | c fires) ≥ .9": DEFAULT,
        "P(p|c)/P(p) ≥ 1.5": DEFAULT,
        "edges that still reach .9": DEFAULT,
        "TopK .17, MP .01, Matryoshka .16–.19, Tree SAE .63–.74": PUBLISHED,
        "recall .8 do not reach the bound of .9": DEFINITION,
        "shares .002/.009/.035/.189/.765": DEFAULT,
        "CLIP-L/14): 3.33 2.92 3.85 3.86 4.06": PUBLISHED,
        "held-out F1 exceeds .6": DEFAULT,
        "makes up 40 % of P": DEFAULT,
        "raises the F1 by .03": DEFAULT,
        "Benjamini and Hochberg: at .05": DEFINITION,
        "With 199 draws the smallest p is .005": DEFINITION,
        "c = .25, .5, 1": DEFINITION,
        "about .8/√d": DEFINITION,
        "SAELens 6.54": "version",
        "on more than 1 %": DEFINITION,
        "pairs of .7 or more": DEFAULT,
        "of length 1 times a strength": DEFINITION,
        "over 32 images is .1 nats": DEFAULT,
        "by chance .5": DEFINITION,
        "on 1 % of all others scores nearly 1": "by arithmetic",
        "the largest node with .5": "by arithmetic",
        "4 × 24 × 32": DEFAULT,
        "the default | .9": DEFAULT,
        "(own definition) | .9": DEFAULT,
        "where c fires | .8": DEFAULT,
        "5 % of the dictionary": DEFAULT,
        "more than 90 % of the images": "by arithmetic",
        "with p ≤ .05 against": DEFINITION,
        "Bold: above .07, and more than two standard errors above .05": DEFINITION,
        "Recall 80 %, false alarms .1 % or 1 %": SETTING,
    },
}
# A decimal number, or any number with the unit of a measurement.
NUMBER = re.compile(
    r"(?<![\w/])(?:\d[\d,]*\.\d+|\.\d+|\d[\d,]*(?= ?(?:%|s|ms|min|minutes?|hours?|GiB|MiB|×|times|runs)(?!\w)))"
)


def prose(text: str) -> str:
    """A page without what stands between markers, code, targets of links and numbers of arXiv."""
    for what in (
        r"```.*?```",
        r"<!-- (\w+)[^>]*?-->.*?<!-- /\1 -->",
        r"(?<=\])\([^)]*\)",
        r"`[^`\n]*`",
    ):
        text = re.sub(what, "", text, flags=re.DOTALL)
    return re.sub(r"arXiv \d{4}\.\d{5}", "arXiv", " ".join(text.split()))


def typed(text: str, phrases: Collection[str]) -> list[str]:
    """The numbers of a page's prose outside these phrases, each with its surroundings."""
    text = prose(text)
    for phrase in sorted(phrases, key=len, reverse=True):
        text = text.replace(phrase, "…")
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in NUMBER.finditer(text)]


@each_page
def test_the_tables_of_the_docs_are_those_of_the_stored_results(page: Path) -> None:
    """Where this fails: python benchmarks/tables.py"""
    text = page.read_text()
    assert tables.MARKED.search(text)
    assert tables.write(text, tables.load()) == text


@each_page
def test_no_number_of_the_prose_is_measured(page: Path) -> None:
    """Where this fails: a measured number belongs between markers (benchmarks/tables.py), any other into `TYPED`."""
    assert typed(page.read_text(), TYPED[page.name]) == []


@each_page
def test_every_phrase_with_a_number_stands_on_its_page(page: Path) -> None:
    text = prose(page.read_text())
    assert [phrase for phrase in TYPED[page.name] if phrase not in text] == []


@each_page
def test_no_line_of_a_sentence_begins_with_a_marker(page: Path) -> None:
    """Markdown would end the paragraph there."""
    assert re.findall(r"^<!-- .*-->[^\n]+$", page.read_text(), flags=re.M) == []


def test_a_measured_number_is_found() -> None:
    text = (
        "It took 37 s,\n.53 of it (`.9`), at k = 16 in the 2\nbest of 1,200 runs.\n<!-- demo: m -->\n.7\n"
        "<!-- /demo -->\n[a](b/1.5) arXiv 2505.15970 in <!-- demo: n -->50 %<!-- /demo --> of cases"
    )
    assert [m[0] for m in NUMBER.finditer(prose(text))] == ["37", ".53", "1,200"]
    assert typed(text, ["took 37 s", ".53 of it", "1,200 runs"]) == []
