import dataclasses
import io
import math

import pytest
from results_factory import make_results
from rich.console import Console
from taxolens.plugin.reporting.metric_table import (
    HEADLINES,
    Headline,
    legend,
    summary_rows,
    summary_table,
    verdict,
)
from taxolens.plugin.reporting.results import EvaluatorResult, MetricResult, NullResult
from taxolens.registry.table import EVALUATORS

HEADLINE = Headline("pair_depth", "pair_depth", "pair depth", "where classes meet")


def number(value, permuted, random, *, best=None):
    nulls = {
        "permuted_classes": NullResult(permuted, best or permuted, 3, value > (best or permuted)),
        "shuffled": NullResult(0.01, 0.01, 1, True),
        "random": NullResult(random, random, 1, value > random),
        "neurons": NullResult(reason="x has no latents"),
    }
    return MetricResult(value, nulls)


@pytest.fixture
def results(tmp_path):
    """Three blocks: below its nulls, above the permuted classes, above all."""
    made = make_results(tmp_path)
    numbers = [number(0.4, 0.5, 0.45), number(0.6, 0.5, 0.7, best=0.55), number(1.25, 0.5, 0.7)]
    saes = [
        dataclasses.replace(sae, evaluators={"pair_depth": EvaluatorResult({"pair_depth": n})})
        for sae, n in zip(made.saes, numbers, strict=True)
    ]
    return dataclasses.replace(made, saes=saes)


def text_of(results, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(results, [HEADLINE]))
    return console.export_text()


def rows_of(results):
    """layer -> cells of its row."""
    lines = [
        line.strip().removeprefix("pair depth").strip() for line in text_of(results).splitlines()
    ]
    return {line[0]: line.split("  ") for line in lines if line[:1].isdigit()}


def test_every_number_stands_beside_its_nulls(results):
    cells = {
        layer: [c.strip() for c in row if c.strip()] for layer, row in rows_of(results).items()
    }
    assert cells == {
        "0": ["0", "0.400", "0.500 (0.500)", "0.010", "0.450", "–", "permuted, random"],
        "1": ["1", "0.600", "0.500 (0.550)", "0.010", "0.700", "–", "random"],
        "2": ["2", "1.250", "0.500 (0.500)", "0.010", "0.700", "–"],
    }


def test_the_table_says_what_it_shows(results):
    text = text_of(results)
    assert "blocks.*.hook_resid_post" in text
    assert "perm. (best)" in text
    assert "pair depth: where classes meet" in legend(results, [HEADLINE])


def test_saes_at_one_layer_are_told_apart_by_name(results):
    saes = [dataclasses.replace(sae, layer=3, id=f"sae {i}") for i, sae in enumerate(results.saes)]
    text = text_of(dataclasses.replace(results, saes=saes))
    assert all(f"sae {i}" in text for i in range(3))


def test_blocks_stand_in_order_of_depth(results):
    shuffled = dataclasses.replace(results, saes=results.saes[::-1])
    assert list(rows_of(shuffled)) == ["0", "1", "2"]


def test_undefined_numbers_are_called_so(results):
    undefined = EvaluatorResult({"pair_depth": MetricResult(math.nan, {})})
    saes = [dataclasses.replace(sae, evaluators={"pair_depth": undefined}) for sae in results.saes]
    assert "undefined" in text_of(dataclasses.replace(results, saes=saes))


def test_rows_for_programs(results):
    rows = summary_rows(results, [HEADLINE])
    assert [row["hook_name"] for row in rows] == [f"blocks.{b}.hook_resid_post" for b in range(3)]
    assert rows[0]["value"] == 0.4
    assert rows[0]["permuted_classes"] == 0.5
    assert rows[0]["not_left_behind"] == ["permuted_classes", "random"]
    assert rows[2]["not_left_behind"] == []


def test_the_verdict_counts_what_leaves_which_null_behind(results):
    assert "Of 3 SAEs" in verdict(results, [HEADLINE])
    assert "pair depth 2 and 1" in verdict(results, [HEADLINE])


def test_without_numbers_there_is_no_verdict(results):
    assert verdict(results, [Headline("none", "such", "thing")]).startswith("No number")
    assert summary_rows(results, [Headline("none", "such", "thing")]) == []


@pytest.mark.parametrize("headline", HEADLINES, ids=lambda h: f"{h.evaluator}/{h.metric}")
def test_headlines_are_metrics_with_a_direction(headline):
    import taxolens.plugin.manager as manager

    manager.load_plugins()
    assert EVALUATORS[headline.evaluator].higher_is_better[headline.metric] is not None


def test_it_fits_into_80_columns(results):
    lines = text_of(results, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
