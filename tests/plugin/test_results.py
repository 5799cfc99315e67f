"""results.json: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import math
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_factory import make_results
from taxolens.plugin.evaluation.beside_nulls import beats, jackknife, null_result, with_nulls
from taxolens.plugin.reporting.headlines import headlines, with_q
from taxolens.plugin.reporting.metric_table import _cells
from taxolens.plugin.reporting.results import JSON_SCHEMA, NO_NULL, SCHEMA, NullResult, Results
from taxolens.registry.errors import DataError
from taxolens.registry.files import write_atomically
from taxolens.registry.presentation import Support, shown_metrics

VALIDATOR = jsonschema.Draft202012Validator(json.loads(JSON_SCHEMA.read_text()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("results"))


def test_read_back_equal(results: Results, tmp_path: Path) -> None:
    file = results.save(tmp_path)
    again = Results.load(tmp_path)
    written, read = (repr(asdict(r)) for r in (results, again))  # of NaN too
    assert read.replace(str(tmp_path), "") == written.replace(str(results.folder), "")
    assert max(map(len, map(repr, [again, *again.saes]))) < 300
    assert again.folder == tmp_path
    assert Results.load(file).saes[0].id == results.saes[0].id


def test_file_is_strict_json_with_the_schema_first(results: Results, tmp_path: Path) -> None:
    text = results.save(tmp_path).read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(text, parse_constant=refuse)
    assert next(iter(data)) == "schema"
    assert data["schema"] == SCHEMA
    assert "folder" not in data
    root = results.taxonomy.tree["edges"][0][0]
    assert data["saes"][0]["node_f1"][root] is None
    assert math.isnan(Results.load(tmp_path).saes[0].node_f1[root])


def test_files_from_before_presentation_and_trained_as_are_read(results: Results) -> None:
    data = results.to_dict()
    for info in data["evaluators"].values():
        del info["headlines"], info["labels"], info["node_table"]
    for sae in data["saes"]:
        del sae["trained_as"]
    found = Results.from_dict(data)
    assert {sae.trained_as for sae in found.saes} == {"topk"}
    info = found.evaluators["ontological_coverage"]
    assert (info.headlines, info.labels, info.node_table) == ([], {}, None)
    assert found.label("ontological_coverage", "leaf_f1") == "leaf_f1"
    assert results.label("ontological_coverage", "leaf_f1") == "coverage of the leaves"
    assert results.label("no such evaluator", "m") == "m"


def test_unknown_fields_are_ignored(results: Results) -> None:
    data = results.to_dict()
    data["later"] = 1
    data["saes"][0]["later"] = {"x": 2}
    assert Results.from_dict(data).saes[0].id == results.saes[0].id


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("schema",),
            "taxolens.results/2",
            "given 'taxolens.results/2'; allowed: 'taxolens.results/1'",
        ),
        (("saes",), {}, r"r\.json\.saes: not possible; given {}; allowed: a list"),
        (
            ("saes", 1, "d_in"),
            "8",
            r"r\.json\.saes\[1\]\.d_in: not possible; given '8'; allowed: an integer",
        ),
        (
            ("saes", 0, "l0"),
            True,
            r"saes\[0\]\.l0: not possible; given True; allowed: a number or null",
        ),
        (("saes", 0, "run"), None, r"saes\[0\]\.run: not possible; given None; allowed: a str"),
        (
            ("dataset", "skipped", 0),
            3,
            r"dataset\.skipped\[0\]: not possible; given 3; allowed: an object",
        ),
        (
            ("evaluators", "pair_depth", "directions", "pair_depth"),
            "up",
            "given 'up'; allowed: a bool",
        ),
        (
            (
                "saes",
                0,
                "evaluators",
                "pair_depth",
                "metrics",
                "pair_depth",
                "nulls",
                "random",
                "n",
            ),
            1.5,
            r"metrics\.pair_depth\.nulls\.random\.n: not possible; given 1.5; allowed: an integer",
        ),
    ],
)
def test_misfits_are_named(results: Results, path: tuple, value: object, message: str) -> None:
    data = copy.deepcopy(results.to_dict())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DataError, match=message):
        Results.from_dict(data, source="r.json")
    assert not VALIDATOR.is_valid(data)


def test_missing_field_is_named(results: Results) -> None:
    data = results.to_dict()
    del data["saes"][0]["hook_name"]
    with pytest.raises(DataError, match=r"saes\[0\]: 'hook_name' is missing"):
        Results.from_dict(data)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"json: not found; allowed: what `taxolens evaluate RUN`"):
        Results.load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": ')
    with pytest.raises(DataError, match="json: not JSON"):
        Results.load(tmp_path)


def test_frame_has_a_row_per_sae_and_metric(results: Results) -> None:
    frame = results.frame()
    assert len(frame) == 3 * 6
    row = frame[(frame.layer == 2) & (frame.metric == "pair_depth")].iloc[0]
    metric = results.saes[2].evaluators["pair_depth"].metrics["pair_depth"]
    assert row["value"] == metric.value
    assert row["permuted_classes"] == metric.nulls["permuted_classes"].mean
    assert row["permuted_classes_best"] == metric.nulls["permuted_classes"].best
    assert "shuffled_best" not in frame
    assert (row["low"], row["high"]) == (metric.low, metric.high)
    for draws in (19, 1):
        metric.nulls["permuted_classes"] = NullResult(0.5, 0.5, draws, True, p=1 / (draws + 1))
        frame = results.frame()
        row = frame[(frame.layer == 2) & (frame.metric == "pair_depth")].iloc[0]
        assert row["permuted_classes_n"] == draws and row["permuted_classes_p"] == 1 / (draws + 1)


# Nulls ------------------------------------------------------------------------------------------

numbers = st.floats(-5, 5).map(lambda v: round(v, 2))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(numbers, st.lists(numbers, min_size=1, max_size=6), st.booleans())
def test_a_null_is_left_behind_when_every_draw_is_beaten(value, draws, higher) -> None:
    found = null_result(value, draws, higher)
    beaten = [value > d if higher else value < d for d in draws]
    assert found.left_behind == all(beaten)
    assert found.best == (max(draws) if higher else min(draws))
    assert found.mean == pytest.approx(sum(draws) / len(draws))
    assert found.n == len(draws)


@given(numbers, st.lists(numbers, min_size=19, max_size=40), st.booleans())
def test_with_many_draws_p_decides(value, draws, higher) -> None:
    found = null_result(value, draws, higher)
    as_good = sum(d >= value if higher else d <= value for d in draws)
    assert found.p == (1 + as_good) / (1 + len(draws))
    assert found.left_behind == (found.p <= 0.05)


def test_p_is_exact_where_draws_and_value_are_exchangeable() -> None:
    """The share of p ≤ .05 over all ranks of 20 equally likely values is 1 of 20."""
    values = list(range(20))
    found = [null_result(v, [w for w in values if w != v], True).p for v in values]
    assert sorted(found) == [(k + 1) / 20 for k in range(20)]
    assert sum(p <= 0.05 for p in found) == 1


def test_the_interval_is_that_of_the_textbook_for_a_mean() -> None:
    """Delete-a-group jackknife of a mean of G groups of one: the t interval of the mean."""
    sample = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    left_out = [float(np.delete(sample, i).mean()) for i in range(5)]
    low, high = jackknife(sample.mean(), left_out)
    expected = scipy.stats.t.interval(0.95, 4, sample.mean(), scipy.stats.sem(sample))
    assert (low, high) == pytest.approx(expected)
    assert np.isnan(jackknife(1.0, [1.0, math.nan, 2.0])).all()
    assert np.isnan(jackknife(1.0, [1.0, 2.0])).all()


def test_a_number_that_no_group_of_images_moves_has_no_interval() -> None:
    """The jackknife would estimate an error of 0; what uses no label may depend on no image."""
    value = {"share": 0.5, "cosine": 0.5, "mean": 0.5}
    rest = [{**value, "mean": 0.5 + i / 100} for i in range(5)]
    found = with_nulls(value, {}, dict.fromkeys(value), label_free={"cosine"}, left_out=rest)
    assert np.isnan([found["share"].low, found["share"].high]).all()
    assert found["cosine"].low == found["cosine"].high == 0.5
    assert found["mean"].low < 0.5 < found["mean"].high


def test_q_is_adjusted_over_the_headlines_of_all_saes(tmp_path: Path) -> None:
    results = with_q(make_results(tmp_path, n_layers=3))
    shown = {(m.evaluator, m.metric) for m in headlines(results)}
    found = [
        (number.nulls["permuted_classes"], (evaluator, metric) in shown)
        for _, evaluator, metric, number in results.rows()
    ]
    judged = [null for null, is_shown in found if is_shown and math.isfinite(null.p)]
    assert len(judged) > 3
    expected = scipy.stats.false_discovery_control([null.p for null in judged])
    assert [null.q for null in judged] == pytest.approx(list(expected))
    assert all(math.isnan(null.q) for null, is_shown in found if not is_shown)
    assert [null.past for null in judged] == [null.q <= 0.05 for null in judged]


def test_what_is_not_judged_takes_no_part_in_the_adjustment(tmp_path: Path) -> None:
    results = make_results(tmp_path, n_layers=3)
    key = "ontological_coverage", "internal_f1"
    few = results.saes[1].evaluators[key[0]].metrics
    few[key[1]] = replace(few[key[1]], support=4)
    shown = {(m.evaluator, m.metric) for m in headlines(results)}
    found = [
        (number, number.nulls["permuted_classes"])
        for _, evaluator, metric, number in with_q(results).rows()
        if (evaluator, metric) in shown
    ]
    judged = [null for number, null in found if not number.undecided]
    assert len(judged) == len(found) - 1 and all(math.isfinite(null.p) for _, null in found)
    expected = scipy.stats.false_discovery_control([null.p for null in judged])
    assert [null.q for null in judged] == pytest.approx(list(expected))
    assert [math.isnan(null.q) for _, null in found].count(True) == 1


def test_a_q_of_05_is_past_the_null_whatever_its_last_digit() -> None:
    """.017·50/17 is .05, and computed it is larger by its rounding."""
    q = float(scipy.stats.false_discovery_control([0.017] * 17 + [1.0] * 33)[0])
    assert q > 0.05 and q == pytest.approx(0.05)
    assert NullResult(0.0, 0.0, 999, True, p=0.017, q=q).past is True
    assert NullResult(0.0, 0.0, 999, True, p=0.017, q=0.0501).past is False


def test_support_and_interval_stand_beside_the_number() -> None:
    support = {"f1": Support("n_nodes", "nodes", least=3)}
    values = {"f1": 0.75, "n_nodes": 2.0}
    left_out = [{"f1": v, "n_nodes": 2.0} for v in (0.7, 0.8, 0.75)]
    draws = {"permuted_classes": [{"f1": 0.1, "n_nodes": 2.0}] * 19}
    found = with_nulls(
        values, draws, {"f1": True, "n_nodes": None}, support=support, left_out=left_out
    )
    assert found["f1"].support == 2 and found["f1"].undecided == "computed from 2, fewer than 3"
    assert (found["f1"].low, found["f1"].high) == pytest.approx(jackknife(0.75, [0.7, 0.8, 0.75]))
    assert found["n_nodes"].support is None


def test_an_interval_is_cut_at_the_range_of_its_metric() -> None:
    left_out = [{"share": v, "gain": v} for v in (0.85, 1.0, 0.95)]
    values = {"share": 0.95, "gain": 0.95}
    found = with_nulls(values, {}, {}, left_out=left_out, ranges={"share": (0.0, 1.0)})
    low, high = jackknife(0.95, [0.85, 1.0, 0.95])
    assert low < 0.95 < 1 < high
    assert (found["gain"].low, found["gain"].high) == (low, high)
    assert (found["share"].low, found["share"].high) == (low, 1.0)
    assert _cells(found["share"])[0] == _cells(found["gain"])[0]  # ± is the part that is not cut


def test_without_the_number_of_one_group_there_is_no_interval() -> None:
    left_out = [{"share": 0.85}, {"share": 1.0}, {"share": 0.95}, {}]
    found = with_nulls({"share": 0.95}, {}, {}, left_out=left_out)["share"]
    assert math.isnan(found.low) and math.isnan(found.high)


def test_no_direction_no_verdict() -> None:
    assert beats(1.0, 0.0, None) is None
    assert beats(math.nan, 0.0, True) is None
    assert beats(1.0, 1.0, True) is False
    assert beats(1e-15, 0.0, True) is False
    assert beats(-1e-15, 0.0, False) is False
    assert null_result(1.0, [0.5], None).left_behind is None


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e-9])
def test_the_unit_of_x_changes_no_verdict(unit: float) -> None:
    """A squared error has no scale of its own; near 0 a gap has the rounding of what it is the gap of."""
    draws = [{"mse": e * unit**2, "gap": e * 1e-16} for e in (0.3, 0.9, 0.95)]
    values = {"mse": 0.1 * unit**2, "gap": 0.1 * 1e-16}
    found = with_nulls(
        values,
        {"random": draws},
        {"mse": False, "gap": False},
        ranges={"mse": (0.0, math.inf)},
    )
    assert found["mse"].nulls["random"].p == 1 / 4 and found["mse"].nulls["random"].left_behind
    assert found["gap"].nulls["random"].p == 1
    tie = {"mse": values["mse"] * (1 + 1e-12)}
    found = with_nulls(tie, {"random": [values]}, {"mse": False}, ranges={"mse": (0.0, math.inf)})
    assert found["mse"].nulls["random"].p == 1


def test_undefined_draws_are_left_out() -> None:
    found = null_result(1.0, [math.nan, 0.25, math.inf], True)
    assert (found.n, found.mean, found.left_behind) == (1, 0.25, True)
    assert null_result(1.0, [math.nan], True).reason == "undefined under this null"


def test_with_nulls_puts_reasons_where_there_are_no_numbers() -> None:
    found = with_nulls(
        {"a": 1.0, "b": 2.0, "c": 3.0},
        {
            "permuted_classes": [{"a": 0.5, "b": 2.0}, {"a": 1.5, "b": 2.0}] * 10,
            "random": "no latents",
            "shuffled": [{"a": 0.0, "b": 0.0, "c": 3.0}],
        },
        {"a": True, "b": True, "c": True},
        controls={"planted": {"a": 3.0}},
        invariant=["b"],
        label_free=["c"],
    )
    assert found["a"].missed == ["permuted_classes"]
    assert found["a"].nulls["random"].reason == "no latents"
    assert found["a"].controls == {"planted": 3.0}
    assert found["b"].missed == []
    assert found["c"].missed == []
    assert found["c"].nulls["shuffled"].reason == "no label is used"
    assert "does not depend" in str(found["b"].nulls["permuted_classes"].reason)


def test_a_verdict_needs_both_nulls_of_labels() -> None:
    values, directions = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, dict.fromkeys("abc", True)
    draws = {
        "permuted_classes": [{"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}] * 19,
        "shuffled": [{"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}],
        "random": [{"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}] * 3,
    }

    def judged(*nulls: str) -> dict[str, str | None]:
        given = {name: draws[name] for name in nulls}
        found = with_nulls(values, given, directions, invariant=["b", "c"], label_free=["c"])
        for metric, number in found.items():
            assert number.past_all is (None if number.not_judged or metric == "d" else True)
            assert number.missed == []
        return {metric: number.not_judged for metric, number in found.items()}

    free = {"c": None, "d": None}  # no label enters; no direction
    assert judged(*draws) == {"a": None, "b": None, **free}
    without = "the null shuffled was not computed"
    assert judged("permuted_classes", "random") == {"a": without, "b": None, **free}
    without = "the null permuted_classes was not computed"
    assert judged("shuffled", "random") == {"a": without, "b": without, **free}


def test_without_a_tree_to_compare_with_nothing_is_judged() -> None:
    """No class can be exchanged, or the metric has no number under any permuted tree."""
    values = {"a": 1.0, "b": 2.0, "c": math.nan, "d": 4.0}
    shuffled = [dict.fromkeys(values, 0.0)]
    directions = {"a": True, "b": True, "c": True, "d": None}
    for permuted in ("no two classes are alike", [{"a": math.nan}] * 19):
        draws = {"permuted_classes": permuted, "shuffled": shuffled}
        found = with_nulls(values, draws, directions, invariant=["b"])
        reason = permuted if isinstance(permuted, str) else "undefined under this null"
        assert found["a"].undecided == f"no draw of permuted classes: {reason}"
        assert found["a"].past_all is None and found["a"].missed == []
        assert found["b"].past_all is True  # does not depend on the tree
        assert found["c"].undecided == found["d"].undecided == NO_NULL

    # A null without a meaning for the evaluator is none that is missing.
    draws = {"permuted_classes": "no tree is used", "shuffled": shuffled}
    declared = {"permuted_classes": "no tree is used", "shuffled": None}
    assert with_nulls(values, draws, directions, declared=declared)["a"].past_all is True


# Files ------------------------------------------------------------------------------------------


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "folder" / "a.json"
    write_atomically(file, "old")
    assert stat.S_IMODE(file.stat().st_mode) & 0o400

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [f.name for f in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("declared", "directions", "present", "shown"),
    [
        (["b"], {"a": True, "b": None}, None, ["b"]),
        (["b", "z"], {"a": True, "b": None}, None, ["b", "z"]),
        (["b", "z"], {"a": True, "b": None, "z": True}, ["a", "b"], ["b"]),
        (["z"], {"a": None, "b": False}, ["a", "b"], ["b"]),
        ([], {"a": None, "b": False, "c": True}, None, ["b"]),
        ([], {"a": None, "b": None}, None, ["a"]),
        ([], {"a": None, "b": False}, ["a"], ["a"]),
        ([], {}, None, []),
    ],
)
def test_the_metrics_that_summaries_show(
    declared: list[str], directions: Any, present: Any, shown: list[str]
) -> None:
    assert shown_metrics(declared, directions, present) == shown
