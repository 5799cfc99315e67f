"""results.json: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import math
import stat
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_factory import make_results
from taxolens.plugin.evaluation.beside_nulls import beats, null_result, with_nulls
from taxolens.plugin.reporting.results import JSON_SCHEMA, SCHEMA, Results
from taxolens.registry.errors import DataError
from taxolens.registry.files import write_atomically

VALIDATOR = jsonschema.Draft202012Validator(json.loads(JSON_SCHEMA.read_text()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("results"))


def test_read_back_equal(results: Results, tmp_path: Path) -> None:
    file = results.save(tmp_path)
    again = Results.load(tmp_path)
    assert repr(again).replace(str(tmp_path), "") == repr(results).replace(str(results.folder), "")
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


def test_no_direction_no_verdict() -> None:
    assert beats(1.0, 0.0, None) is None
    assert beats(math.nan, 0.0, True) is None
    assert beats(1.0, 1.0, True) is False
    assert beats(1e-15, 0.0, True) is False
    assert beats(-1e-15, 0.0, False) is False
    assert null_result(1.0, [0.5], None).left_behind is None


def test_undefined_draws_are_left_out() -> None:
    found = null_result(1.0, [math.nan, 0.25, math.inf], True)
    assert (found.n, found.mean, found.left_behind) == (1, 0.25, True)
    assert null_result(1.0, [math.nan], True).reason == "undefined under this null"


def test_with_nulls_puts_reasons_where_there_are_no_numbers() -> None:
    found = with_nulls(
        {"a": 1.0, "b": 2.0, "c": 3.0},
        {
            "permuted_classes": [{"a": 0.5, "b": 2.0}, {"a": 1.5, "b": 2.0}],
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
