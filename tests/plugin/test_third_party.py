"""A third party's evaluator and architecture are shown as ours are, by results alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import taxolens
import taxolens_example_plugin as example
import torch
import wandb
from PIL import Image
from rich.console import Console
from taxolens.plugin.commands import outcome
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.reporting.metric_table import legend, summary_rows, summary_table, verdict
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import Results
from taxolens.plugin.reporting.wandb_log import log_results
from taxolens.plugin.training.constraint import Constraint
from taxolens.registry.evaluators.parts.null_latents import TwinLatents
from taxolens.registry.evaluators.parts.sae_latents import SAELatents
from taxolens.registry.nulls import CONSTRAINTS
from temporary_plugins import temporary_plugins
from wandb_reader import OfflineRun

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
CLASSES = tuple(f"{parent}/{parent}_{i}" for parent in ("animal", "plant", "stone") for i in (0, 1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six held-out pictures for each of six classes under three."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        place = folder / "validation" / name
        place.mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 90, (20, 20, 3)) + np.array([50 * c, 0, 150 - 50 * c])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def evaluated(
    vit: Any, vit_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Results]:
    """evaluator -> the results of an evaluation with it alone, read when the plugin is gone."""
    folder = tmp_path_factory.mktemp("third_party")
    with temporary_plugins() as load:
        load(
            "example_plugin",
            register_architectures=example.register_architectures,
            register_evaluators=example.register_evaluators,
        )
        for seed, hook in enumerate(HOOKS):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                sae = example.ExampleTopK(example.ExampleTopKConfig(d_in=16, d_sae=24, k=4))
                torch.nn.init.normal_(sae.W_enc)
            sae.cfg.metadata.hook_name = hook
            sae.cfg.metadata.model_name = str(vit_folder)
            sae.cfg.metadata.tokens = "class"
            sae.save_inference_model(folder / "run" / hook)
        for name in ("example_siblings", "example_firing_rate"):
            evaluate_run(
                folder / "run",
                evaluators=name,
                dataset_path=str(pictures),
                taxonomy=str(pictures / "validation"),
                output_path=folder / name,
                override_model=vit,
                n_permutations=19,
                progress=False,
            )
            assert name in taxolens.EVALUATORS
    assert "example_siblings" not in taxolens.EVALUATORS
    names = ("example_siblings", "example_firing_rate")
    return {name: Results.load(folder / name) for name in names}


@pytest.fixture(scope="module")
def results(evaluated: dict[str, Results]) -> Results:
    return evaluated["example_siblings"]


def test_the_results_carry_what_the_evaluator_declares(results: Results) -> None:
    assert results.errors == {} and list(results.evaluators) == ["example_siblings"]
    info = results.evaluators["example_siblings"]
    assert tuple(info.headlines) == example.ExampleSiblings.headlines
    assert info.labels == example.ExampleSiblings.labels
    assert info.support == example.ExampleSiblings.support
    assert info.node_table == example.ExampleSiblings.node_table
    assert results.folder is not None
    file = json.loads((results.folder / "results.json").read_text())
    assert file["evaluators"]["example_siblings"]["headlines"][0]["title"] == "siblings"


def test_the_table_has_its_rows(results: Results) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(results))
    text = console.export_text()
    assert "blocks.*.hook_resid_post · example_topk" in text
    values = {row["layer"]: row["value"] for row in summary_rows(results)}
    assert len(values) == 2 and "siblings" in text
    for layer, value in values.items():
        assert f"{layer} {f'{value:.3f}'.lstrip('0')}" in " ".join(text.split())
    assert "siblings: pairs of classes with one parent; of latents of two classes." in legend(
        results
    )
    for sae, row in zip(results.saes, summary_rows(results), strict=True):
        latents = sae.evaluators["example_siblings"].metrics["latents"].value
        assert row["support"] == latents >= 5
        assert row["low"] <= row["value"] <= row["high"] and 0 < row["p"] <= 1
    assert verdict(results).startswith("2 numbers are not judged")  # the tree has 14 others


def test_the_command_line_shows_it(
    results: Results, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcome.show(results, tmp_path / "report.html")
    out = capsys.readouterr().out
    assert "siblings" in out and "report.html" in out and "No number" not in out
    nothing = Results.from_dict({**results.to_dict(), "saes": []})
    outcome.show(nothing, tmp_path / "report.html")
    assert capsys.readouterr().out.startswith("No evaluator gave a number.")


def test_the_report_shows_headline_label_cards_tree_and_figure(
    results: Results, tmp_path: Path
) -> None:
    page = write_report(results, tmp_path / "report.html").read_text()
    assert '<th scope="row">siblings<span' in page
    assert "pairs of classes with one parent · <span" in page
    assert "<h3>share of siblings among pairs of classes<span" in page
    assert "coloured by the F1 of the best latent for the class." in page
    assert "<summary>example_siblings / shares</summary>" in page
    assert "2 SAEs</b> (example_topk)" in page and "saved as topk" in page
    for row in summary_rows(results):
        assert f"{row['support']} latents of two classes" in page
    assert "not judged: 14 draws of permuted classes, fewer than 19" in page
    assert results.folder is not None
    for sae in results.saes:
        table = pd.read_csv(results.folder / sae.evaluators["example_siblings"].tables["classes"])
        placed = dict(zip(table["latent"], table["node"], strict=True))
        assert sae.most_specific
        for card in [*sae.most_specific, *sae.least_specific]:
            assert card.node == placed[card.latent] and f"latent {card.latent}<" in page
        best = table.groupby("node")["f1"].max()
        assert sae.node_f1 == pytest.approx(best.to_dict(), abs=1e-5)


def test_wandb_gets_its_numbers_titles_and_the_architecture(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    place = log_results(results, mode="offline", project="p")
    wandb.teardown()
    run = OfflineRun(Path(str(place)))
    values = [s.evaluators["example_siblings"].metrics["sibling_share"].value for s in results.saes]
    assert run.logged("layers/example_siblings/sibling_share") == values
    assert len(run.logged("layers/example_siblings/sibling_share/permuted_classes")) == 2
    for row in summary_rows(results):
        key = f"{row['hook_name']}/eval/example_siblings/sibling_share"
        found = {name: run.logged(f"{key}/{name}") for name in ("support", "draws", "judged", "p")}
        assert found == {
            "support": [row["support"]], "draws": [14], "judged": [0], "p": [row["p"]]
        }  # fmt: skip
    assert run.config["architectures"] == dict.fromkeys(HOOKS, "example_topk")
    assert run.logged("charts/example_siblings/sibling_share_table")
    titles = json.dumps(run.config)
    assert "example_siblings / share of siblings among pairs of classes" in titles
    for kind in ("tables/example_siblings/classes", "figures/example_siblings/shares"):
        assert run.logged(f"{HOOKS[0]}/{kind}")


def test_the_dashboard_puts_its_headline_first(results: Results) -> None:
    pytest.importorskip("wandb_workspaces")
    from taxolens.plugin.reporting.wandb_dashboard import dashboard

    sections = {section.name: section.panels for section in dashboard(results, "p").sections}
    assert [panel.title for panel in sections["headlines"]] == ["siblings"]
    titles = [panel.title for panel in sections["example_siblings"]]
    assert titles == ["latents", "share of siblings among pairs of classes"]


def test_an_evaluator_that_declares_nothing_is_shown_by_its_first_metric(
    evaluated: dict[str, Results], tmp_path: Path
) -> None:
    results = evaluated["example_firing_rate"]
    assert [row["title"] for row in summary_rows(results)] == ["example firing rate: mean"] * 2
    assert "images on which a latent fires (descriptive)" in legend(results)
    assert verdict(results) == "No number here has a null to be compared with."
    page = write_report(results, tmp_path / "report.html", interactive=False).read_text()
    assert "example firing rate: mean" in page and 'id="latents"' not in page


def test_the_architecture_is_the_one_that_was_trained(results: Results, tmp_path: Path) -> None:
    assert {(sae.architecture, sae.trained_as) for sae in results.saes} == {
        ("topk", "example_topk")
    }
    assert results.folder is not None
    run = results.folder.parent / "run"
    assert {sae.trained_as for sae in find_saes(run)} == {"example_topk"}
    old = tmp_path / "old"
    old.mkdir()
    for file in (run / HOOKS[0]).iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    cfg = json.loads((old / "cfg.json").read_text())
    del cfg["metadata"]["training_architecture"]
    (old / "cfg.json").write_text(json.dumps(cfg))
    assert [sae.trained_as for sae in find_saes(old)] == ["topk"]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_its_architecture_trains_with_each_constraint_and_has_a_twin(constraint: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = example.ExampleTopK(example.ExampleTopKConfig(d_in=16, d_sae=24, k=4))
        x = torch.randn(200, 16)
    first = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.3)
    Constraint(sae, constraint).start(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        (sae(x) - x).square().sum().backward()
        optimizer.step()
    held = "W_enc" if constraint == "frozen_encoder" else "W_dec"
    moved = {
        name for name, weight in sae.named_parameters() if not torch.equal(weight, first[name])
    }
    if constraint == "soft_frozen_decoder":
        cosine = torch.cosine_similarity(sae.W_dec, first["W_dec"])
        assert held in moved and (cosine > 0.8 - 1e-6).all() and (cosine < 0.9).any()
    else:
        assert held not in moved and {"W_enc", "W_dec"} - {held} <= moved
    twins = [TwinLatents.fit(SAELatents(sae), x, draw=draw) for draw in (0, 1)]
    assert all(type(twin.sae) is example.ExampleTopK for twin in twins)
    z = [twin.encode(x) for twin in twins]
    assert all((rows > 0).sum(1).max() <= 4 for rows in z) and not torch.equal(*z)
