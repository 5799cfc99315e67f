"""The report: one file, no network, nothing unescaped, everything in it that was measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from results_factory import make_results, tree
from taxolens.plugin.reporting import charts
from taxolens.plugin.reporting.compare import write_comparison
from taxolens.plugin.reporting.controls import with_controls
from taxolens.plugin.reporting.headlines import ShownMetric, with_q
from taxolens.plugin.reporting.metric_table import summary_table
from taxolens.plugin.reporting.report import Report, short_name, write_report
from taxolens.plugin.reporting.results import MetricResult, NullResult, Results
from taxolens.plugin.reporting.series import all_series, layer_of, natural_key, positions
from taxolens.plugin.reporting.short_names import fitted, short_names
from taxolens.plugin.reporting.tree_chart import NOT_SCORED, Icicle, colour
from taxolens.plugin.reporting.wandb_log import layer_rows
from taxolens.registry.taxonomies.taxonomy import Taxonomy

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting and gathers what a browser would fetch and what a reader would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.seen = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.scripts += tag == "script"
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
            if name in found and not (tag == "a" and name == "href"):
                self.fetched.append(found[name])
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.seen += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def static(results: Results, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "static.html"
    return write_report(results, path, interactive=False).read_text()


def test_page_is_well_formed_and_fetches_nothing(static: str) -> None:
    page = Page(static)
    assert page.scripts == 0
    assert page.fetched and all(url.startswith("data:image/jpeg;base64,") for url in page.fetched)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", static)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_page_says_what_was_measured(static: str, results: Results) -> None:
    seen = Page(static).seen
    for text in ("a/model", "photos", "18 classes", "60 images", "truncated", "0.1.0"):
        assert text in seen
    for sae in results.saes:
        assert sae.hook_name in seen
        value = sae.evaluators["pair_depth"].metrics["pair_depth"].value
        assert charts.number(value) in seen
    for evaluator, metric in results.metric_names():
        assert evaluator in seen and results.label(evaluator, metric).replace("_", " ") in seen
    assert "coverage of the leavesleaf_f1 · higher is better" in seen
    assert "mean F1 over nodes · higher is better" in seen
    assert "coloured by how well <it> is found" in seen
    assert "x has no latents" in seen
    card = results.saes[0].most_specific[0]
    assert f"latent {card.latent}" in seen and card.path[-1] in seen


def test_a_number_stands_beside_its_certainty(results: Results, tmp_path: Path) -> None:
    page = Page(write_report(with_q(results), tmp_path / "r.html", interactive=False).read_text())
    assert "16 of the 18 classes present can move; 19 distinct trees were drawn." in page.seen
    assert "(shuffled labels 1 draw, untrained twin 1 draw, neurons 1 draw), every one" in page.seen
    sae = with_q(results).saes[1]
    coverage = sae.evaluators["ontological_coverage"].metrics
    number, nodes = coverage["internal_f1"], int(coverage["internal_nodes"].value)
    null = number.nulls["permuted_classes"]
    first, last = page.seen.index("Below each number, its"), page.seen.index("Every metric beside")
    for text in (
        f"{charts.number(number.low)} to {charts.number(number.high)}",
        f"permuted {charts.number(null.mean, number.value)}",
        f"q {charts.number(null.q)}",
        f"{nodes} nodes",
    ):
        assert text in page.seen[first:last], text
    every = page.seen[last:]
    assert (
        f"{nodes} nodes" in every and charts.number(null.p) in every and "not judged" not in every
    )
    coverage["internal_f1"] = replace(number, support=4)
    changed = replace(results, saes=[sae])
    seen = Page(write_report(changed, tmp_path / "r.html", interactive=False).read_text()).seen
    assert seen.count("not judged: computed from 4, fewer than 5") == 3  # glance, numbers, every
    table = pd.read_csv(
        write_comparison(changed, tmp_path) / "ontological_coverage.internal_f1.csv"
    )
    (row,) = table.to_dict("records")
    label = all_series(changed)[0].label
    assert row[f"{label} not judged"] == "computed from 4, fewer than 5"
    assert row[f"{label} support"] == 4
    for name, value in (("draws", 19), ("p", null.p), ("q", null.q)):
        assert row[f"{label} permuted_classes {name}"] == pytest.approx(value, rel=1e-5)
    for end in ("low", "high"):
        assert row[f"{label} {end}"] == pytest.approx(getattr(number, end), rel=1e-5)


def test_a_share_and_a_sparsity_say_what_they_are_of(results: Results, tmp_path: Path) -> None:
    def page(**changes: Any) -> str:
        saes = [replace(results.saes[0], **changes)]
        path = write_report(replace(results, saes=saes), tmp_path / "r.html", interactive=False)
        return Page(path.read_text()).seen

    plain = page()
    assert "4.2" in plain and "a token" not in plain and "at a threshold" not in plain
    assert "above 0 on 3.0 % of images" in plain
    assert "a token" not in page(l0_token=4.2)
    both = f"{charts.number(213.0)} an image, {charts.number(16.0)} a token"
    assert both in page(l0=213.0, l0_token=16.0)
    card = replace(
        results.saes[0].most_specific[0], f1=0.6, above_threshold_on=0.031, fires_on=0.0001
    )
    seen = page(most_specific=[card], least_specific=[])
    assert "above 0 on < 0.1 % of images" in seen
    assert f"F1 {charts.number(0.6)} at a threshold reached on 3.1 % of images" in seen
    assert "No latent of a node of several classes." in seen


def test_names_are_escaped(static: str) -> None:
    assert "<thing" not in static
    assert "&lt;thing" in static
    assert "<truncated>" not in static


def test_a_null_without_meaning_is_not_counted_as_one_that_was_not_left_behind(
    results: Results,
) -> None:
    headline = ShownMetric("pair_depth", "pair_depth", "pair depth")
    counted = Report(results).verdict(all_series(results)[0], headline)
    assert counted["n_permuted"] == counted["n"] > 0
    for sae in results.saes:
        number = sae.evaluators["pair_depth"].metrics["pair_depth"]
        number.nulls["permuted_classes"] = NullResult(reason="no class enters")
    left = Report(results).verdict(all_series(results)[0], headline)
    assert (left["n_permuted"], left["past_permuted"], left["n"]) == (0, 0, counted["n"])


def test_the_ends_of_a_series_are_its_first_and_last_layer(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    first = results.saes[0].evaluators["level_information"].metrics
    first["error"] = replace(first["error"], value=math.nan)
    report = Report(results)
    lower = report.verdict(report.series[0], ShownMetric("level_information", "error", "e"))
    values = [s.evaluators["level_information"].metrics["error"].value for s in results.saes]
    assert math.isnan(lower["first"]) and lower["last"] == values[2]
    assert (lower["best"], lower["best_at"]) == (values[1], "layer 1")
    described = ShownMetric("ontological_coverage", "internal_nodes", "n")
    found = report.verdict(report.series[0], described)
    assert math.isnan(found["best"]) and found["best_at"] == ""  # no direction, no best
    assert found["first"] < found["last"]


def test_the_best_value_is_one_that_is_judged(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    headline = ShownMetric("ontological_coverage", "internal_f1", "node coverage")
    values, support = (0.3, 0.9, 0.5), (6, 4, 6)

    def found(support: tuple[int, ...], **changes: Any) -> tuple[dict[str, Any], str]:
        for sae, value, n in zip(results.saes, values, support, strict=True):
            metrics = sae.evaluators["ontological_coverage"].metrics
            metrics["internal_f1"] = replace(
                metrics["internal_f1"], value=value, support=n, **changes
            )
        report = Report(results)
        page = write_report(results, tmp_path / "r.html", interactive=False).read_text()
        return report.verdict(report.series[0], headline), Page(page).seen

    few = "computed from 4, fewer than 5"
    judged, seen = found(support)
    assert (judged["best"], judged["best_at"]) == (0.5, "layer 2")
    assert judged["undecided"] == [("layer 1", few)] and f"layer 1 not judged: {few}" in seen
    none, seen = found((4, 4, 4))
    assert math.isnan(none["best"]) and none["best_at"] == ""
    assert f"layer 0, layer 1, layer 2 not judged: {few}" in seen
    without, _ = found((6, 6, 6), nulls={})  # nothing to be judged by
    assert (without["best"], without["undecided"]) == (0.9, [])


def test_a_null_that_is_not_left_behind_is_said_in_words(results: Results, tmp_path: Path) -> None:
    sae = results.saes[-1]
    metric = sae.evaluators["pair_depth"].metrics["pair_depth"]
    nulls = {**metric.nulls, "neurons": NullResult(9.0, 9.0, 1, False)}
    pair = replace(
        sae.evaluators["pair_depth"], metrics={"pair_depth": replace(metric, nulls=nulls)}
    )
    weak = replace(sae, evaluators={**sae.evaluators, "pair_depth": pair})
    changed = replace(results, saes=[*results.saes[:-1], weak])
    report = Report(changed)
    headline = next(h for h in report.headlines if h.evaluator == "pair_depth")
    before = Report(results).verdict(all_series(results)[0], headline)
    after = report.verdict(report.series[0], headline)
    assert after["past_all"] == before["past_all"] - 1
    assert "neurons" in after["missed"]
    assert "not past neurons" in Page(write_report(changed, tmp_path / "r.html").read_text()).seen


def test_interactive_figures_are_inlined_and_cannot_break_out(
    results: Results, tmp_path: Path
) -> None:
    text = write_report(results, tmp_path / "report.html").read_text()
    assert "plotly.js v" in text
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert len(blocks) == 9
    assert json.loads(blocks[0])["data"][0]["name"] == "</script><b>"
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)


def test_report_of_unfinished_failed_and_seen(results: Results, tmp_path: Path) -> None:
    sae = results.saes[0]
    failed = replace(sae.evaluators["pair_depth"], metrics={}, error="ValueError: <no>")
    changed = replace(
        results,
        complete=False,
        dataset=replace(results.dataset, seen_in_training=True, skipped=[]),
        saes=[replace(sae, evaluators={"pair_depth": failed})],
        folder=None,
    )
    seen = Page(write_report(changed, tmp_path / "r.html").read_text()).seen
    for text in ("Unfinished", "Not held out", "ValueError: <no>", "None."):
        assert text in seen


def test_report_without_any_sae(results: Results, tmp_path: Path) -> None:
    empty = replace(results, saes=[])
    assert "0 SAEs" in Page(write_report(empty, tmp_path / "r.html").read_text()).seen


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    results = make_results(tmp_path / "two", n_layers=2, runs=("one", "two"))
    seen = Page(write_report(results, interactive=False).read_text()).seen
    assert "thin: the same under permuted classes" in seen
    report = Report(results)
    assert [series.label for series in report.series] == ["one", "two"]
    rows = report.side_by_side(report.headlines[0])
    assert [place for place, _ in rows] == ["layer 0", "layer 1"]
    assert (
        rows[1][1][1] is results.saes[3].evaluators["ontological_coverage"].metrics["internal_f1"]
    )


def test_one_table_and_one_figure_per_metric(tmp_path: Path) -> None:
    results = make_results(tmp_path / "two", n_layers=2, runs=("one", "two"))
    folder = write_comparison(results)
    names = {f"{evaluator}.{metric}" for evaluator, metric in results.metric_names()}
    assert {f.stem for f in folder.glob("*.csv")} == names | {"saes"}
    assert {f.stem for f in folder.glob("*.svg")} == names
    header, *rows = (folder / "pair_depth.pair_depth.csv").read_text().splitlines()
    assert header.startswith("place,one,one low,one high,one permuted_classes,one permuted_classes")
    assert "two neurons" in header and len(rows) == 2
    svg = (folder / "pair_depth.pair_depth.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") == 4
    Page(svg)  # nested as it should be
    for text in (">one<", ">two<", "pair_depth / pair_depth", "higher is better"):
        assert text in svg  # it is read without the report around it
    saes = pd.read_csv(folder / "saes.csv")
    assert saes.series.tolist() == ["one", "one", "two", "two"]
    assert saes.l0.tolist() == pytest.approx([sae.l0 for sae in results.saes])
    assert saes.d_sae.tolist() == [sae.d_sae for sae in results.saes]


def test_what_is_no_longer_measured_is_not_left_beside_the_rest(tmp_path: Path) -> None:
    results = make_results(tmp_path, n_layers=1)
    folder = write_comparison(results)
    (folder / "mine.txt").touch()
    pair = {"pair_depth": results.saes[0].evaluators["pair_depth"]}
    fewer = replace(results, saes=[replace(results.saes[0], evaluators=pair)])
    write_comparison(fewer, earlier=results)
    assert {f.name for f in folder.iterdir()} == {
        "pair_depth.pair_depth.csv",
        "pair_depth.pair_depth.svg",
        "saes.csv",
        "mine.txt",
    }


def test_stages_of_a_cnn_have_a_row_each(results: Results) -> None:
    hooks = ["layer1.0.hook_out", "layer1.1.hook_out", "layer2.0.hook_out"]
    saes = [sae_like(results, id=h, name=h, hook_name=h, layer=layer_of(h)) for h in hooks]
    report = Report(replace(results, saes=saes))
    rows = report.side_by_side(report.headlines[0])
    assert [place for place, _ in rows] == hooks and all(row[0] for _, row in rows)


def test_points_of_a_vit_beside_a_cnn_stand_over_their_own_labels(tmp_path: Path) -> None:
    """Each tick of the axis is one place, and each point of a series stands at the tick of its own."""
    results = make_results(tmp_path, n_layers=4, runs=("vit", "cnn"))
    names = ["layer1.0", "layer1.2", "layer2.0", "layer2.3"]
    hooks = [*(f"blocks.{i}.hook_out" for i in (1, 4, 7, 11)), *names]
    saes = [
        replace(sae, id=f"{sae.run}/{h}", name=h, hook_name=h, layer=layer_of(h))
        for sae, h in zip(results.saes, hooks, strict=True)
    ]
    report = Report(replace(results, saes=saes))
    svg = str(report.chart(report.headlines[0]))
    labels = ("1", "4", "7", "11", "1.0", "1.2", "2.0", "2.3")
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle"[^>]*>([^<]+)<', svg)
    ticks = [(float(x), text) for x, text in found]
    assert [text for _, text in ticks] == list(labels)
    lines = {
        tuple(float(point.split(",")[0]) for point in points.split())
        for points in re.findall(r'<polyline points="([^"]+)"', svg)
    }
    xs = [x for x, _ in ticks]
    assert sorted(lines) == [pytest.approx(xs[:4], abs=0.1), pytest.approx(xs[4:], abs=0.1)]


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        (["layer3.5", "layer4.2"], [(0, "3.5"), (1, "4.2")]),  # 5 and 2 are blocks of a stage
        (["layer1.0", "layer2.1"], [(0, "1.0"), (1, "2.1")]),
        (["stages.0.layers.1.fc2", "stages.1.layers.3.fc2"], [(0, "0.1.2"), (1, "1.3.2")]),
        (["blocks.2.mlp.fc2", "blocks.10.mlp.fc2"], [(2, "2"), (10, "10")]),
        (["layer3.5"], [(0, "3.5")]),
        (["blocks.4.hook_out"], [(4, "4")]),
        (["ln_final"], [(0, "ln_final")]),
    ],
)
def test_a_curve_goes_over_layers_only_where_these_number_its_saes(
    results: Results, hooks: list[str], expected: list[tuple[float, str]]
) -> None:
    saes = [sae_like(results, id=h, name=h, hook_name=h, layer=layer_of(h)) for h in hooks[::-1]]
    found = replace(results, saes=saes)
    (series,) = all_series(found)
    assert positions(series) == expected
    assert [row["layers/layer"] for row in layer_rows(series)] == [x for x, _ in expected]
    report = Report(found)
    by_layer = expected[0][0] != 0
    places = [f"layer {text}" for _, text in expected] if by_layer else hooks
    assert [place for place, _ in report.side_by_side(report.headlines[0])] == places
    heading = "layer" if by_layer and len(hooks) > 1 else "SAE"
    assert [column.header for column in summary_table(found).columns][1] == heading


def test_many_series_are_told_apart(tmp_path: Path) -> None:
    runs = tuple(f"seed{i}" for i in range(12))
    report = Report(make_results(tmp_path, n_layers=2, runs=runs))
    styles = [style for style, _ in report.lines]
    assert len(set(styles)) == len(styles) == 13


# Series -----------------------------------------------------------------------------------------


def sae_like(results: Results, **changes):
    return replace(results.saes[0], **changes)


def names_of(results: Results, *saes) -> dict[str, list[str]]:
    found = all_series(replace(results, saes=list(saes)))
    return {series.label: [sae.id for sae in series] for series in found}


def test_layers_make_a_curve_in_natural_order(results: Results) -> None:
    saes = [
        sae_like(results, id=f"s{i}", name=f"s{i}", hook_name=f"blocks.{i}.hook_out", layer=i)
        for i in (10, 9, 2)
    ]
    assert names_of(results, *saes) == {"blocks.*.hook_out": ["s2", "s9", "s10"]}


def test_kinds_of_sae_make_a_curve_each(results: Results) -> None:
    saes = [
        sae_like(results, id=f"{kind}{i}", name=f"{kind}_{i}", hook_name=f"blocks.{i}.x", layer=i)
        for kind in ("topk32_", "relu_")
        for i in (0, 1)
    ]
    found = names_of(results, *saes)
    assert found == {"topk32__*": ["topk32_0", "topk32_1"], "relu__*": ["relu_0", "relu_1"]}


def test_single_runs_of_the_same_layer_stand_for_themselves(results: Results) -> None:
    saes = [sae_like(results, id=run, run=run, name=run) for run in ("seed0", "seed1")]
    assert names_of(results, *saes) == {"seed0": ["seed0"], "seed1": ["seed1"]}


def test_architectures_are_named_where_they_differ(results: Results) -> None:
    saes = [
        sae_like(results, id=run, run=run, name=run, trained_as=kind)
        for run, kind in (("a", "topk"), ("b", "standard"), ("old topk", "topk"))
    ]
    assert list(names_of(results, *saes)) == ["a (topk)", "b (standard)", "old topk"]


def test_constraints_are_named_where_the_run_does_not(results: Results) -> None:
    saes = [
        sae_like(results, id=run, run=run, name=run, constraint=constraint)
        for run, constraint in (("a", None), ("b", "frozen_decoder"), ("frozen_encoder", None))
    ]
    assert list(names_of(results, *saes)) == ["a", "b (frozen_decoder)", "frozen_encoder"]


def controlled(results: Results) -> Results:
    """Two runs of an SAE, and controls: two of the first run, one of a run of its own."""
    kinds = [
        ("one", "trained", None, 8.0),
        ("one", "frozen", "frozen_decoder", 8.0),
        ("one", "other", "frozen_decoder", 30.0),
        ("one", "another layer", "frozen_encoder", 8.0),
        ("two", "trained", None, 9.0),
        ("alone", "soft", "soft_frozen_decoder", 9.0),
    ]
    saes = []
    for at, (run, name, constraint, l0) in enumerate(kinds):
        metrics = {"pair_depth": MetricResult(at + 0.5)}
        changes: dict[str, Any] = {"constraint": constraint, "l0": l0, "run": run, "name": name}
        changes["l0_token"] = 3.0 if run == "two" else l0
        if name == "another layer":
            changes |= {"hook_name": "blocks.7.hook_resid_post", "layer": 7}
        found = replace(results.saes[0].evaluators["pair_depth"], metrics=metrics)
        evaluators = {"pair_depth": found}
        saes.append(sae_like(results, id=f"{run}/{name}", evaluators=evaluators, **changes))
    return replace(results, saes=saes)


def test_an_sae_stands_beside_its_controls(results: Results, tmp_path: Path) -> None:
    view = controlled(results)
    found = {
        sae.id: {constraint: control.id for constraint, control in controls.items()}
        for sae, controls in with_controls(view.saes)
    }
    soft = {"soft_frozen_decoder": "alone/soft"}
    assert found == {
        "one/trained": {"frozen_decoder": "one/frozen", **soft},
        "two/trained": {"frozen_decoder": "one/frozen", **soft},
    }
    assert with_controls(results.saes) == []

    odd = [replace(sae, id=f"={sae.id}") for sae in view.saes]
    written = write_comparison(replace(view, saes=odd), tmp_path / "odd") / "controls.csv"
    assert "'=one/trained" in written.read_text()  # no spreadsheet takes it for a formula
    table = pd.read_csv(write_comparison(view, tmp_path) / "controls.csv")
    assert table.sae.tolist() == ["one/trained", "two/trained"]
    assert table.trained.tolist() == [0.5, 4.5] and table.frozen_decoder.tolist() == [1.5, 1.5]
    assert table.soft_frozen_decoder.tolist() == [5.5, 5.5]
    assert "frozen_encoder" not in table

    page = write_report(view, tmp_path / "report.html", interactive=False).read_text()
    Page(page)
    start = page.index('id="controls"')
    section = page[start : page.index("</section>", start)]
    assert '<th class="num">trained</th><th class="num">frozen decoder</th>' in section
    for text in (
        "one/trained",
        "two/trained",
        ">1.50<",
        ">5.50<",
        ">8.00<",
        ">9.00 an image, 3.00",
    ):
        assert text in section, text
    assert "one/another layer" not in section


def test_without_controls_there_is_no_section(results: Results, tmp_path: Path) -> None:
    assert 'id="controls"' not in write_report(results, tmp_path / "r.html").read_text()
    assert not (write_comparison(results, tmp_path) / "controls.csv").exists()


def test_a_table_of_controls_that_other_saes_had_is_removed(
    results: Results, tmp_path: Path
) -> None:
    """Of an evaluation, perhaps one that never finished; a table of the user's own is left alone."""
    table = tmp_path / "metrics" / "controls.csv"
    table.parent.mkdir()
    for text, stays in (("evaluator,metric,sae,trained,frozen\n", False), ("a,b\n", True)):
        table.write_text(text)
        write_comparison(results, tmp_path)
        assert table.exists() == stays


def test_stages_of_a_cnn_make_one_curve(results: Results) -> None:
    hooks = ["layer1.0.hook_out", "layer1.1.hook_out", "layer2.0.hook_out"]
    saes = [sae_like(results, id=h, name=h, hook_name=h, layer=layer_of(h)) for h in hooks]
    assert names_of(results, *saes) == {"layer*.*.hook_out": hooks}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tokens", ("class", "patch")),
        ("constraint", (None, "frozen_decoder")),
        ("model_name", ("vit", "other")),
        ("trained_as", ("topk", "batchtopk")),
    ],
)
def test_saes_that_differ_in_more_than_their_layer_are_no_curve(
    results: Results, field: str, values: tuple[Any, Any]
) -> None:
    saes = [
        sae_like(results, id=f"block{layer}", run=f"block{layer}", name=hook, hook_name=hook,
                 layer=layer, **{field: value})
        for layer, value in zip((2, 5), values, strict=True)
        for hook in [f"blocks.{layer}.hook_resid_post"]
    ]  # fmt: skip
    found = replace(results, saes=saes)
    assert [len(series) for series in all_series(found)] == [1, 1]
    labels = [series.label for series in all_series(found)]
    assert str(values[1]) in labels[1] and str(values[1]) not in labels[0].replace("batch", "")
    assert [column.header for column in summary_table(found).columns][1] == "SAE"
    same = replace(results, saes=[replace(sae, **{field: values[0]}) for sae in saes])
    assert [len(series) for series in all_series(same)] == [2]
    assert [column.header for column in summary_table(same).columns][1] == "layer"


def test_layer_and_natural_order() -> None:
    assert layer_of("blocks.12.hook_resid_post") == 12
    assert layer_of("ln_final.hook_normalized") is None
    assert sorted(["b.10", "b.9", "a"], key=natural_key) == ["a", "b.9", "b.10"]


# Drawings ---------------------------------------------------------------------------------------


def test_icicle_gives_every_class_a_row_and_every_node_its_place() -> None:
    taxonomy = tree((3, 1, 2))  # the middle level has single children: it is merged away
    icicle = Icicle(taxonomy)
    assert icicle.n_rows == len(taxonomy.classes) == 6
    assert icicle.n_columns == 3
    by_node = {icicle.taxonomy.nodes[c.node]: c for c in icicle.cells}
    assert len(icicle.cells) == 1 + 3 + 6
    root = by_node["thing"]
    assert (root.column, root.first, root.rows) == (0, 0, 6)
    leaves = sorted((c.first, c.rows) for c in icicle.cells if c.column == 2)
    assert leaves == [(i, 1) for i in range(6)]


def test_colours_of_the_tree() -> None:
    assert colour(math.nan) == NOT_SCORED
    assert len({colour(v / 20) for v in range(21)}) == 6
    svg = Icicle(tree((2,))).draw({"thing.0": 0.9}, label="x & y")
    assert "F1 0.900" in svg and "not scored" in svg and "x &amp; y" in svg


def test_gaps_break_lines() -> None:
    nan = math.nan
    line = charts.Line("v", [0, 1, 2, 3, 4], [1, 2, nan, 4, 5], charts.VALUE)
    svg = charts.curves([line], label="l", x_ticks={i: str(i) for i in range(5)})
    assert svg.count("<polyline") == 2
    assert svg.count("<title>v, ") == 4
    empty = charts.Line("v", [0, 1], [nan, nan], charts.VALUE)
    assert "nan" not in charts.curves([empty], label="l", x_ticks={0: "0", 1: "1"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1.5, "−1.50"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (math.nan, "–"),
        (None, "–"),
        (0.00012, "1e−04"),
        (0.0, "0"),
        (4e-15, "0"),
        (42.0, "42"),
    ],
)
def test_numbers(value, text) -> None:
    assert charts.number(value) == text


def test_a_number_near_zero_has_the_decimals_of_its_neighbour() -> None:
    assert charts.number(-0.00012, 0.3) == "0.000"
    assert charts.number(-0.00012, 0.0004) == "−1e−04"
    assert charts.number(0.0012, 0.3) == "0.001"


def test_ticks_are_round_and_few() -> None:
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.13, 0.17) == [0.13, 0.14, 0.15, 0.16, 0.17]
    assert charts.ticks(2, 2) == [2]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("facebook/dinov2-base", "facebook/dinov2-base"),
        ("/data/vits/my-vit", "my-vit"),
        ("/lib/demo_assets/model", "demo_assets/model"),
        ("resnet", "resnet"),
    ],
)
def test_models_are_called_by_a_short_name(given: str, shown: str) -> None:
    assert short_name(given) == shown


def test_architectures_are_named_as_they_were_trained(results: Results, tmp_path: Path) -> None:
    sae = sae_like(results, trained_as="my_topk")
    changed = replace(results, saes=[sae])
    seen = Page(write_report(changed, tmp_path / "r.html").read_text()).seen
    assert "1 SAE (my_topk)" in seen and "my_topksaved as topk" in seen
    assert "my_topk, 16 latents" in seen
    saes = pd.read_csv(write_comparison(replace(changed, folder=tmp_path)) / "saes.csv")
    assert (saes.architecture.tolist(), saes.trained_as.tolist()) == (["topk"], ["my_topk"])
    assert set(changed.frame()["architecture"]) == {"my_topk"}


def test_a_card_without_f1_does_not_show_one(results: Results, tmp_path: Path) -> None:
    (card, *_) = results.saes[0].most_specific
    for f1, shown in ((math.nan, False), (0.0, True)):
        sae = sae_like(results, most_specific=[replace(card, f1=f1)], least_specific=[])
        page = write_report(replace(results, saes=[sae]), tmp_path / "r.html", interactive=False)
        facts = re.search(r'<p class="facts">(.*?)</p>', page.read_text())
        assert facts and ("F1" in facts[1]) == shown


# Names ------------------------------------------------------------------------------------------

NAMES = {
    "n1": "tench, Tinca tinca",
    "n2": "Ursus,arctos",
    "n3": "Ursus,maritimus",
    "n4": "Turdus merula, male",
    "n5": "Turdus merula, female",
    "n6": "crane, bird",
    "n7": "Crane",
    "n8": "bear, Ursidae",
}
SHORT = {**{name: name for name in NAMES.values()}, "tench, Tinca tinca": "tench"}


def named_results(folder: Path, classes: list[str]) -> Results:
    """Results over the classes of NAMES, which the dataset calls `classes`."""
    taxonomy = Taxonomy.from_edges([("root", node) for node in NAMES], list(NAMES), NAMES)
    made = make_results(folder, n_layers=1, taxonomy=taxonomy)
    (card, *_) = made.saes[0].most_specific
    cards = [replace(card, path=["root", name]) for name in NAMES.values()]
    images = [replace(card.images[0], label=name) for name in NAMES.values()]
    cards[0] = replace(cards[0], images=images)
    sae = sae_like(made, most_specific=cards, least_specific=[])
    return replace(made, saes=[sae], dataset=replace(made.dataset, classes=classes))


def test_no_two_classes_get_one_short_name(tmp_path: Path) -> None:
    of_dataset = ["tench", *list(NAMES.values())[1:7], "the bear"]
    for classes, bear in ((of_dataset, "bear"), (["bear", *of_dataset[1:]], "bear, Ursidae")):
        results = named_results(tmp_path, classes)
        text = write_report(results, tmp_path / "r.html", interactive=False).read_text()
        expected = list({**SHORT, "bear, Ursidae": bear}.values())
        crumbs = re.findall(r'<p class="crumbs">root<span class="sep"> › </span>(.*?)</p>', text)
        (strip, *_) = re.findall(r'<div class="strip">(.*?)</div>', text, re.DOTALL)
        assert crumbs == expected == re.findall("<figcaption>(.*?)</figcaption>", strip)
        drawn = re.findall(r"<text[^>]*>([^<]*?)(?:  [.\d]+)?</text>", text)
        assert set(expected) <= set(drawn)


def test_short_names_of_a_tree_alone() -> None:
    assert short_names(["a, b", "c, d", "c, e", ", f", "g,h"]) == {
        "a, b": "a",
        "c, d": "c, d",
        "c, e": "c, e",
        ", f": ", f",
        "g,h": "g,h",
    }
    assert fitted("Turdus merula, male", 12) != fitted("Turdus merula, female", 12)
    assert (fitted("hippopotamus", 8), fitted("hippopotamus", 12)) == ("hippopo…", "hippopotamus")
    assert all(len(fitted("a long, name", room)) == room for room in range(2, 13))
