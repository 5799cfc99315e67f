"""The pages under docs/formats say what the code writes, field by field, and what it reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import write_schema
from results_factory import make_results
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.filling import Plan
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import JSON_SCHEMA, Results
from taxolens.plugin.study.settings import STUDY_FIELDS, gather
from taxolens.plugin.training.checkpoints import checkpoints_in, read_manifest
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig
from taxolens.registry.errors import CheckpointError, ConfigError
from taxolens.registry.nulls import NULLS
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy
from tiny_runs import make_training

DOCS = Path(__file__).parents[2] / "docs" / "formats"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(JSON_SCHEMA.read_text()))


@pytest.fixture(scope="module")
def run(vit, vit_folder, photos, images, world, tmp_path_factory):
    """Two SAEs trained from cached activations, with checkpoints, evaluated with a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        training = make_training(vit, vit_folder, photos, images, tmp_path_factory.mktemp("run"))
        cache = training.folder / "cache"
        cfg = training.multi(
            use_cached_activations=True, cached_activations_path=str(cache), n_checkpoints=1
        )
        training.runner(cfg).run()
        results = evaluate_run(
            cfg.output_path,
            dataset_path=str(world),
            taxonomy=str(world / "validation"),
            n_permutations=2,
            controls=["planted"],
            keep_activations=True,
            override_model=vit,
            progress=False,
        )
        write_report(results, interactive=False)
        model_cfg = training.single(checkpoint_id="model", n_checkpoints=1, output_path=None)
        training.runner(model_cfg).run()
        runner = training.runner(training.multi(checkpoint_id="other", output_path=None))
    (checkpoint,) = checkpoints_in(training.checkpoints)
    (from_model,) = checkpoints_in(training.checkpoints.parent / "model")
    return SimpleNamespace(
        runner=runner,
        output=Path(cfg.output_path),
        cache=cache,
        checkpoint=checkpoint,
        from_model=from_model,
        results=results,
    )


def section(page: str, heading: str) -> str:
    """The text of a page from a heading to the next one; the text before all headings for ""."""
    parts = re.split(r"^#+ (.*)\n", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    found = dict(zip(["", *(title.replace("`", "") for title in parts[1::2])], parts[::2]))
    return found[heading]


def documented(page: str, heading: str, *, required: bool = False) -> set[str]:
    """The names in the first column of the table in a section; only those that are required."""
    rows = re.findall(r"^\| (`.*?) \|(.*)\|$", section(page, heading), flags=re.M)
    assert rows, f"{page}: no table under {heading!r}"
    return {
        name
        for first, rest in rows
        if not required or rest.split("|")[1].strip() == "yes"
        for name in re.findall(r"`([^`]+)`", first)
    }


def check(found: Iterable[str], page: str, heading: str) -> None:
    """Every key is on the page, and every key that the page requires is there."""
    keys = set(found)
    assert keys - documented(page, heading) == set(), f"not in {page} under {heading!r}"
    assert documented(page, heading, required=True) - keys == set(), "required there, not written"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def examples(page: str, language: str) -> list[str]:
    found = re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    assert found
    return found


# results.json -----------------------------------------------------------------------------------


def test_schema_and_tables_are_those_of_the_types() -> None:
    """Where this fails: python docs/formats/write_schema.py"""
    schema = write_schema.results_schema()
    assert json.loads(JSON_SCHEMA.read_text(encoding="utf-8")) == json.loads(json.dumps(schema))
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert write_schema.page_of(schema, page) == page
    assert write_schema.page_of(schema, page.replace("| `d_sae` | int", "| `d_sea` | tex")) == page


def test_results_fit_the_schema(run: Any, tmp_path: Path) -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    assert any(
        evaluator.metrics for sae in run.results.saes for evaluator in sae.evaluators.values()
    )
    for results in (run.results, make_results(tmp_path)):
        VALIDATOR.validate(json.loads((results.folder / "results.json").read_text()))


def test_a_field_that_the_types_lack_is_allowed_and_one_that_they_need_is_not(tmp_path) -> None:
    data = make_results(tmp_path).to_dict()
    VALIDATOR.validate({**data, "later": 1})
    del data["saes"][0]["hook_name"]
    with pytest.raises(jsonschema.ValidationError, match="'hook_name' is a required property"):
        VALIDATOR.validate(data)


def test_settings_and_provenance_of_results(run: Any) -> None:
    assert set(run.results.settings) == documented("results.md", "Keys of settings")
    assert set(run.results.provenance) == documented("results.md", "Keys of provenance")


def test_files_of_results(run: Any) -> None:
    patterns = [
        re.sub(r"<\w+>", ".+", re.escape(name)) + (".*" if name.endswith("/") else "")
        for name in documented("results.md", "Files")
    ]
    own = {name for name in files_in(run.output) if not re.match("(first|last)/", name)}
    for name in own - {"runner_cfg.json"}:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in own), pattern


def test_columns_of_the_tables_of_metrics(run: Any) -> None:
    saes = pd.read_csv(run.output / "metrics" / "saes.csv")
    assert set(saes.columns) <= documented("results.md", "Tables of metrics")
    for evaluator, metric in run.results.metric_names():
        table = pd.read_csv(run.output / "metrics" / f"{evaluator}.{metric}.csv")
        place, *columns = table.columns
        assert place == "place"
        assert documented("results.md", "Tables of metrics") >= {place, "<series>"}
        series = "|".join(re.escape(label) for label in set(saes["series"]))
        for column in columns:
            assert re.fullmatch(
                rf"({series})( ({'|'.join(NULLS)})( best| draws| p| q)?| low| high| support| not judged)?",
                column,
            ), column


def test_the_example_of_results_is_read() -> None:
    (text,) = examples("results.md", "json")
    data = json.loads(text)
    VALIDATOR.validate(data)
    results = Results.from_dict(data)
    tree = Taxonomy.from_json(json.dumps(results.taxonomy.tree))
    facts = results.taxonomy
    assert (len(tree.nodes), len(tree.classes), tree.max_depth) == (
        *(facts.n_nodes, facts.n_classes, facts.max_depth),
    )


# Activations ------------------------------------------------------------------------------------


def test_fields_and_files_of_a_cache(run: Any) -> None:
    index = json.loads((run.cache / "cache.json").read_text())
    check(index, "activations.md", "cache.json")
    check(index["facts"], "activations.md", "facts")
    check(index["facts"]["preprocessing"], "activations.md", "preprocessing")
    cache = ActivationCache.open(run.cache)
    names = {*(f"{hook}.npy" for hook in cache.hook_names), "labels.npy", "indices.npy"}
    assert files_in(run.cache) == {*names, "cache.json"}
    for hook in cache.hook_names:
        assert np.load(run.cache / f"{hook}.npy").shape == (10, 1, 16)
    (kept,) = (run.output / "activations").iterdir()
    assert np.load(kept / f"{hook}.mean_patch.npy").shape == (32, 16)
    named = documented("activations.md", "Files")
    assert {"cache.json", "labels.npy", "indices.npy"} <= named
    assert {"<hook>.npy", "<hook>.mean_patch.npy"} <= named


def test_the_example_of_a_cache_has_its_fields() -> None:
    (text,) = examples("activations.md", "json")
    index = json.loads(text)
    check(index, "activations.md", "cache.json")
    check(index["facts"], "activations.md", "facts")


def test_fields_of_a_cache_in_parts(run: Any, tmp_path: Path) -> None:
    facts = ActivationCache.open(run.cache).facts
    Plan.of(tmp_path, facts, run.runner.images, batch_size=4, n_ranks=2)
    check(json.loads((tmp_path / "cache.json").read_text()), "activations.md", "Index of the parts")
    assert {"cache.json", "part-<number>/"} <= documented("activations.md", "Parts")


# Checkpoints ------------------------------------------------------------------------------------


def test_fields_and_files_of_a_checkpoint(run: Any) -> None:
    manifest = json.loads((run.checkpoint / "checkpoint.json").read_text())
    check(manifest, "checkpoints.md", "checkpoint.json")
    check(manifest["run"], "checkpoints.md", "run")
    check(manifest["training"], "checkpoints.md", "training")
    assert set(manifest["files"]) == files_in(run.checkpoint) - {"checkpoint.json"}
    assert {key for facts in manifest["files"].values() for key in facts} == {"bytes", "sha256"}
    names = {Path(name).name for name in files_in(run.checkpoint)}
    assert names <= documented("checkpoints.md", "Files")


@pytest.mark.parametrize("source", ["model", "cache"])
def test_fields_of_a_position(run: Any, source: str) -> None:
    folder = run.checkpoint if source == "cache" else run.from_model
    state = json.loads((folder / "activations_store_state.json").read_text())
    check(state, "checkpoints.md", "activations_store_state.json")
    check(state["stream"], "checkpoints.md", "stream")
    assert state["stream"]["from"] == source
    if source == "model":
        assert set(state) == documented("checkpoints.md", "activations_store_state.json")
        assert set(state["stream"]) == documented("checkpoints.md", "stream")
    identity = read_manifest(folder).run.fixed["activations"]
    stream = documented("checkpoints.md", "stream")
    assert set(identity) == {*stream, "train_batch_size_tokens"}
    assert identity["from"] == source


def test_a_checkpoint_of_another_version_is_refused(run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(run.checkpoint, tmp_path / "80")
    file = folder / "checkpoint.json"
    written = file.read_text()
    file.write_text(written.replace("taxolens.checkpoint/2", "taxolens.checkpoint/3"))
    with pytest.raises(
        CheckpointError,
        match=r"schema: not known; given 'taxolens.checkpoint/3'; allowed: "
        "'taxolens.checkpoint/2' or 'taxolens.checkpoint/1'",
    ):
        read_manifest(folder)
    file.write_text(written.replace("taxolens.checkpoint/2", "taxolens.checkpoint/1"))
    assert read_manifest(folder) == read_manifest(run.checkpoint)


# SAEs and configs -------------------------------------------------------------------------------


def test_metadata_and_files_of_an_sae(run: Any) -> None:
    metadata = json.loads((run.output / "first" / "cfg.json").read_text())["metadata"]
    set_here = run.runner.saes["first"].cfg.metadata
    MultiSAETrainingRunner._set_sae_metadata(run.runner)
    theirs = set(set_here.keys())
    run.runner._set_sae_metadata()
    ours = set(set_here.keys()) - theirs
    assert ours <= set(metadata)
    check(ours, "saes.md", "Metadata")
    assert metadata["taxolens_schema"] == "taxolens.sae/1"
    assert {path.name for path in (run.output / "first").iterdir()} <= documented(
        "saes.md", "Files"
    )


def test_metadata_of_another_version_is_refused(run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(run.output / "first", tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["taxolens_schema"] = "taxolens.sae/2"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(
        ConfigError,
        match=r"taxolens_schema: not known; given 'taxolens.sae/2'; allowed: 'taxolens.sae/1'",
    ):
        find_saes(folder)
    del cfg["metadata"]["taxolens_schema"]  # as taxolens 0.1.0 wrote it
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert [sae.name for sae in find_saes(folder)] == ["sae"]


def test_a_runner_config_is_every_field_of_the_config(run: Any) -> None:
    written = json.loads((run.output / "runner_cfg.json").read_text())
    assert {"saes", "hook_names", "logger"} <= set(written)
    assert {"saes", "hook_names", "logger"} <= documented("configs.md", "runner_cfg.json")
    again = VisionMultiSAERunnerConfig.load(run.output / "runner_cfg.json")
    assert again.to_dict() == written
    with pytest.raises(ConfigError, match="schema: not known; allowed: a field of the config"):
        VisionMultiSAERunnerConfig.from_dict({**written, "schema": "taxolens.config/1"})


def test_fields_of_a_study_file(tmp_path: Path) -> None:
    own = {*STUDY_FIELDS, "model_name", "dataset_path", "sae", "logger"}
    assert documented("configs.md", "Study files") == own
    (text,) = examples("configs.md", "yaml")
    (tmp_path / "study.yaml").write_text(text)
    study = gather(config=tmp_path / "study.yaml")
    assert {name: sae.architecture for name, sae in study.saes.items()} == {
        "relu": "standard",
        "topk": "topk",
    }
    assert study.runner["lr"] == 4e-4 and study.epochs == 10


# Taxonomies -------------------------------------------------------------------------------------


def test_fields_and_examples_of_taxonomies(tmp_path: Path) -> None:
    (document,) = examples("taxonomies.md", "json")
    assert set(json.loads(document)) == documented("taxonomies.md", "taxolens.taxonomy/1")
    tree = Taxonomy.from_json(document)
    assert json.loads(tree.to_json()) == json.loads(document)
    by_hand = re.findall(r"\| `([\[{].*[\]}])` \|", section("taxonomies.md", "JSON by hand"))
    assert len(by_hand) == 3
    for text in by_hand:
        (tmp_path / "tree.json").write_text(text)
        read = load_taxonomy(tmp_path / "tree.json")
        assert read.nodes[0] == "animal" and "pug" in read.classes
    (tmp_path / "tree.csv").write_text(*examples("taxonomies.md", "csv"))
    read = load_taxonomy(tmp_path / "tree.csv", classes=tree.classes)
    assert asdict(read) == {**asdict(tree), "names": read.names}
    assert read.names == {**tree.names, "animal": "animal", "dog": "dog"}


def test_a_taxonomy_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text('{"format": "taxolens.taxonomy/2", "edges": []}')
    with pytest.raises(
        ConfigError,
        match=r"tree.json: format: not known; given 'taxolens.taxonomy/2'; allowed: 'taxolens.taxon",
    ):
        load_taxonomy(tmp_path / "tree.json")


# All pages --------------------------------------------------------------------------------------


def test_every_page_has_its_version_and_is_listed() -> None:
    listed = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = sorted(DOCS.glob("*.md"))
    assert len(pages) == 7
    for page in pages:
        if page.name != "README.md":
            row = re.search(rf"\({page.name}\).*\| `?(taxolens\.\w+/\d|none)`? \|$", listed, re.M)
            assert row, page.name
            if row[1] != "none":
                assert f"Version: `{row[1]}`" in page.read_text(encoding="utf-8")


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert not link or (page.parent / link).exists(), f"{page.name}: {link}"
