import dataclasses
import io
import json
import math

import pytest
from results_factory import make_results
from rich.console import Console
from taxolens.plugin import cli
from taxolens.plugin.reporting.metric_table import (
    ShownMetric,
    headlines,
    legend,
    summary_rows,
    summary_table,
    verdict,
)
from taxolens.plugin.reporting.model_card import model_card
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import EvaluatorResult, MetricResult, NullResult
from taxolens.registry.presentation import Headline

HEADLINE = ShownMetric("pair_depth", "pair_depth", "pair depth", "where classes meet")


def number(value, permuted, random, *, p, **certainty):
    past = p <= 0.05
    nulls = {
        "permuted_classes": NullResult(permuted, permuted, 99, past, p=p, q=min(1.0, 2 * p)),
        "shuffled": NullResult(0.01, 0.01, 1, True),
        "random": NullResult(random, random, 1, value > random),
        "neurons": NullResult(reason="x has no latents"),
    }
    return MetricResult(value, nulls, **certainty)


@pytest.fixture
def results(tmp_path):
    """Three blocks: below its nulls, above the permuted classes, above all."""
    made = make_results(tmp_path)
    numbers = [
        number(0.4, 0.5, 0.45, p=0.93),
        number(0.6, 0.5, 0.7, p=0.02, low=0.5, high=0.7, support=1213, least=10),
        number(1.25, 0.5, 0.7, p=0.01),
    ]
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
        "0": ["0", ".400", ".500 (.93)!", ".010", ".450!", "–"],
        "1": ["1", ".600 ±.100", "1,213", ".500 (.02*)", ".010", ".700!", "–"],
        "2": ["2", "1.250", ".500 (.01*)", ".010", ".700", "–"],
    }


@pytest.mark.parametrize(
    ("p", "terminal", "page", "card"),
    [
        (0.02, ".02", "0.020", "0.02"),
        (0.93, ".93", "0.930", "0.93"),
        (0.001, ".001", "0.001", "0.001"),
        (0.052, ".052", "0.052", "0.052"),
        (0.0496, ".05", "0.050", "0.0496"),
        (0.05, ".05", "0.050", "0.05"),
        (0.0502, ".0502", "0.0502", "0.0502"),
        (0.050004, ".050004", "0.050004", "0.050004"),
        (0.00012, ".0001", "0.0001", "0.00012"),
        (0.9998, ".9998", "0.9998", "0.9998"),
        (1.0, "1", "1.00", "1"),
    ],
)
def test_a_p_is_neither_0_nor_on_the_other_side_of_the_level(results, p, terminal, page, card):
    of = number(0.6, 0.5, 0.4, p=p)
    of.nulls["permuted_classes"] = NullResult(0.5, 0.5, 9999, p <= 0.05, p=p, q=p)
    evaluators = {"pair_depth": EvaluatorResult({"pair_depth": of})}
    sae = dataclasses.replace(results.saes[0], evaluators=evaluators)
    one = dataclasses.replace(results, saes=[sae])
    star = "*" if p <= 0.05 else ""
    assert f".500 ({terminal}{star})" in text_of(one, width=80)
    path = write_report(one, results.folder / "r.html", interactive=False)
    text = path.read_text()
    assert f">q {page}<" in text and f'<td class="num">{page}</td>' in text
    row = next(
        line
        for line in model_card(one, "a/b", {}, picture="p", files={}).splitlines()
        if line.startswith("| pair depth")
    )
    assert f"| {card} | {card}{star} |" in row


def test_the_table_says_what_it_shows(results):
    text = text_of(results)
    assert "blocks.*.hook_resid_post" in text
    assert "perm. (p)" in text
    words = legend(results, [HEADLINE])
    assert "pair depth: where classes meet" in words
    assert "16 of the 18 classes present can move; 19 distinct trees were drawn." in words
    assert "These are few" not in words and "mean and p of 99 draws;" in words
    few = dataclasses.replace(results.permuted_classes, movable=8)
    words_of_few = legend(dataclasses.replace(results, permuted_classes=few), [HEADLINE])
    assert "8 of the 18 classes present can move; 19 distinct trees were drawn. These are few" in (
        words_of_few
    )
    assert (
        "shuffled over images (1 draw), untrained twins of the SAE (1 draw), the neurons. A"
        in words
    )
    number = results.saes[0].evaluators["pair_depth"].metrics["pair_depth"]
    number.nulls["permuted_classes"] = NullResult(0.5, 0.5, 54, True, p=0.02)
    assert "mean and p of 54 to 99 draws;" in legend(results, [HEADLINE])


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


def test_what_rounds_to_zero_has_no_sign(results):
    near_zero = number(-0.0004, -0.0501, 0.45, p=0.02)
    of = EvaluatorResult({"pair_depth": near_zero})
    saes = [dataclasses.replace(sae, evaluators={"pair_depth": of}) for sae in results.saes]
    row = rows_of(dataclasses.replace(results, saes=saes))["0"]
    assert [c.strip() for c in row if c.strip()][1:3] == [".000", "-.050 (.02*)"]


def test_rows_for_programs(results):
    rows = summary_rows(results, [HEADLINE])
    assert [row["hook_name"] for row in rows] == [f"blocks.{b}.hook_resid_post" for b in range(3)]
    assert rows[0]["value"] == 0.4
    assert rows[0]["permuted_classes"] == 0.5
    assert rows[0]["not_left_behind"] == ["permuted_classes", "random"]
    assert rows[2]["not_left_behind"] == []
    assert (rows[1]["p"], rows[1]["q"], rows[1]["permuted_classes_draws"]) == (0.02, 0.04, 99)
    assert (rows[1]["low"], rows[1]["high"], rows[1]["support"]) == (0.5, 0.7, 1213)


def test_numbers_of_too_few_things_or_draws_are_not_judged(results):
    few = number(0.6, 0.5, 0.4, p=0.01, support=2, least=10)
    draws = number(0.6, 0.5, 0.4, p=0.01)
    draws.nulls["permuted_classes"] = NullResult(0.5, 0.5, 2, True, p=1 / 3)
    assert few.undecided == "computed from 2, fewer than 10"
    assert draws.undecided == "2 draws of permuted classes, fewer than 19"
    assert few.missed == draws.missed == [] and few.past_all is None is draws.past_all
    saes = [
        dataclasses.replace(sae, evaluators={"pair_depth": EvaluatorResult({"pair_depth": n})})
        for sae, n in zip(results.saes, [few, draws, number(1.25, 0.5, 0.7, p=0.01)], strict=True)
    ]
    found = dataclasses.replace(results, saes=saes)
    shown = [[cell for cell in map(str.strip, row) if cell] for row in rows_of(found).values()]
    assert [row[1] for row in shown] == [".600 ?", ".600 ?", "1.250"]
    assert "2 numbers are not judged" in verdict(found, [HEADLINE])
    assert "pair depth 1 and 1" in verdict(found, [HEADLINE])


def test_the_verdict_counts_what_leaves_which_null_behind(results):
    assert "Of 3 SAEs" in verdict(results, [HEADLINE])
    assert "pair depth 2 and 1" in verdict(results, [HEADLINE])


def test_a_null_that_was_left_out_is_not_said_to_be_undefined_or_passed(results):
    def texts(names):
        saes = []
        for sae in results.saes:
            given = sae.evaluators["pair_depth"].metrics["pair_depth"]
            nulls = {name: null for name, null in given.nulls.items() if name in names}
            pair = EvaluatorResult({"pair_depth": dataclasses.replace(given, nulls=nulls)})
            saes.append(dataclasses.replace(sae, evaluators={"pair_depth": pair}))
        settings = {**results.settings, "nulls": list(names)}
        made = dataclasses.replace(results, saes=saes, settings=settings)
        page = write_report(made, results.folder / "r.html", interactive=False).read_text()
        words = legend(made, [HEADLINE]).splitlines()[-1]
        card = model_card(made, "a/b", {}, picture="p", files={})
        return words, verdict(made, [HEADLINE]), page, card

    words, found, page, card = texts(["permuted_classes", "shuffled"])
    assert "twins of the SAE (not computed), the neurons (not computed). A null" in words
    assert words.endswith("that null is not defined there, or was not computed.")
    assert "past all nulls that were computed: pair depth 2 and 2" in found
    assert page.count("Not computed: untrained twin, neurons.") == 2
    assert "past every null<br>that was computed at" in page
    assert "past the nulls that were computed |" in card
    assert "not defined there, not computed (untrained twin, neurons), or not judged" in card

    words, found, page, card = texts(["permuted_classes", "shuffled", "random", "neurons"])
    assert words.endswith("that null is not defined there.") and "not computed)" not in words
    assert "past all nulls: pair depth 2 and 1" in found
    assert "Not computed" not in page and "past every<br>null at" in page
    assert "past the nulls |" in card and "not defined there, or not judged" in card

    words, *_ = texts(["shuffled"])
    assert "over the tree (not computed)" in words


def test_the_verdict_says_at_how_many_saes_a_metric_is_judged(results):
    first, *rest = results.saes
    fewer = [dataclasses.replace(first, evaluators={}), *rest]
    text = verdict(dataclasses.replace(results, saes=fewer), [HEADLINE])
    assert text.startswith("Of 3 SAEs") and text.endswith("pair depth 2 and 1 of 2.")
    assert verdict(results, [HEADLINE]).endswith("pair depth 2 and 1.")


@pytest.mark.parametrize("complete", [True, False])
def test_an_evaluation_that_is_not_finished_is_said_to_be(results, complete, capsys):
    path = results.folder / "report.html"
    for saes in (results.saes, []):
        made = dataclasses.replace(results, complete=complete, saes=saes)
        made.save(results.folder)
        cli.main(["report", str(results.folder), "--static"])
        said = "Unfinished. The evaluation was stopped before every SAE was measured. Run it again"
        assert (said in " ".join(capsys.readouterr().out.split())) == (not complete)
        assert (said.removeprefix("Unfinished. ") in path.read_text()) == (not complete)
        cli.main(["report", str(results.folder), "--static", "--json"])
        assert json.loads(capsys.readouterr().out)["complete"] is complete


def test_without_numbers_there_is_no_verdict(results):
    assert verdict(results, [ShownMetric("none", "such", "thing")]).startswith("No number")
    assert summary_rows(results, [ShownMetric("none", "such", "thing")]) == []


def test_it_fits_into_80_columns(results):
    lines = text_of(results, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


# What is shown ----------------------------------------------------------------------------------


def shown_of(results, **infos):
    """(evaluator, metric, title) of what is shown of `results` where evaluators say so."""
    changed = {
        name: dataclasses.replace(results.evaluators[name], **given)
        for name, given in infos.items()
    }
    found = headlines(dataclasses.replace(results, evaluators={**results.evaluators, **changed}))
    return [(metric.evaluator, metric.metric, metric.title) for metric in found]


@pytest.fixture
def whole(tmp_path):
    return make_results(tmp_path / "whole", n_layers=1)


def test_evaluators_say_what_is_shown_and_in_which_order(whole):
    first = Headline("error", "error rate", priority=1)
    assert shown_of(whole, level_information={"headlines": [first]}) == [
        ("level_information", "error", "error rate"),
        ("ontological_coverage", "internal_f1", "node coverage"),
        ("pair_depth", "pair_depth", "pair depth"),
    ]


def test_an_evaluator_without_headline_shows_its_first_metric_with_a_direction(whole):
    silent = {
        "ontological_coverage": {
            "headlines": [],
            "directions": {"internal_nodes": None, "leaf_f1": True, "internal_f1": True},
        },
        "level_information": {"directions": {"error": None}},
    }
    assert shown_of(whole, **silent) == [
        ("ontological_coverage", "leaf_f1", "ontological coverage: coverage of the leaves"),
        ("pair_depth", "pair_depth", "pair depth"),
        ("level_information", "error", "level information: error"),
    ]


def test_headlines_of_metrics_that_nobody_has_are_left_out(whole):
    missing = Headline("no_such_metric", "missing")
    found = shown_of(whole, ontological_coverage={"headlines": [missing]})
    assert ("ontological_coverage", "internal_f1") in {shown[:2] for shown in found}
    assert "missing" not in {shown[2] for shown in found}
    assert headlines(dataclasses.replace(whole, saes=[])) == []


def test_the_legend_explains_by_headline_or_description_and_names_the_direction(whole):
    text = legend(whole, [ShownMetric("level_information", "error", "error", "how many are wrong")])
    assert "error: how many are wrong (lower is better)" in text
    assert "pair depth: Mean depth of the LCA of pairs.\n" in legend(whole)


def test_a_null_that_was_not_computed_is_not_counted_as_passed(results):
    saes = []
    for sae in results.saes:
        given = sae.evaluators["pair_depth"].metrics["pair_depth"]
        nulls = {**given.nulls, "permuted_classes": NullResult(reason="no class enters")}
        changed = {"pair_depth": dataclasses.replace(given, nulls=nulls)}
        saes.append(dataclasses.replace(sae, evaluators={"pair_depth": EvaluatorResult(changed)}))
    assert "pair depth – and 1" in verdict(dataclasses.replace(results, saes=saes), [HEADLINE])


def test_a_long_title_is_wrapped_over_the_rows(results):
    title = "a third party's evaluator: share of [things] that are right"
    long = ShownMetric("pair_depth", "pair_depth", title)
    console = Console(width=100, record=True, file=io.StringIO())
    for given in (results, dataclasses.replace(results, saes=results.saes[:1])):
        console.print(summary_table(given, [long]))
        text = console.export_text()
        firsts = [line[:18].strip() for line in text.splitlines()]
        assert " ".join(filter(None, firsts)).endswith(title.replace("\n", " "))
        assert text.count(".400") == 1


def test_the_architecture_is_named_as_it_was_trained(results):
    saes = [dataclasses.replace(sae, trained_as="my_topk") for sae in results.saes]
    same = dataclasses.replace(results, saes=saes)
    assert "blocks.*.hook_resid_post · my_topk" in text_of(same)
    assert {row["architecture"] for row in summary_rows(same, [HEADLINE])} == {"my_topk"}
    apart = [dataclasses.replace(s, layer=1, id=f"run{i}") for i, s in enumerate(saes)]
    apart[0] = dataclasses.replace(apart[0], trained_as="topk")
    text = text_of(dataclasses.replace(results, saes=apart), width=120)
    assert "run0 (topk)" in text and "run1 (my_topk)" in text


def test_a_long_name_leaves_place_for_the_numbers(results):
    """The names of published SAEs and of files are longer than the table is wide."""
    names = [
        f"prisma/sae-top_k-64-cls_only-layer_{i}-hook_resid_post/n_images_2600" for i in (1, 2)
    ]
    saes = [
        dataclasses.replace(s, id=n, layer=1) for s, n in zip(results.saes, names, strict=False)
    ]
    lines = text_of(dataclasses.replace(results, saes=saes), width=100).splitlines()
    column = [line[13:43].strip() for line in lines]
    assert all(name in "".join(column) for name in names)
    parts = [part for part in column if part and part in "".join(names)]
    assert {part[-1] for part in parts} <= {*"/_-", "0"}  # no line ends within a word
    assert ".400" in "".join(lines) and "…" not in "".join(lines)
