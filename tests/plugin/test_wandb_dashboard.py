"""The W&B workspace: every panel asks for keys that an evaluation really logs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from results_factory import make_results
from taxolens.plugin.cli import main
from taxolens.plugin.reporting.wandb_dashboard import TRAINING_METRICS, dashboard, save_dashboard
from taxolens.plugin.reporting.wandb_log import log_results
from taxolens.registry.errors import ConfigError, TaxolensError
from wandb_reader import OfflineRun

pytest.importorskip("wandb_workspaces")


def keys_of(panel: Any) -> list[str]:
    return [str(getattr(key, "name", key)) for key in getattr(panel, "y", None) or panel.metrics]


@pytest.mark.parametrize("runs", [("demo",), ("seed0", "seed1")])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_panels_show_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: tuple[str, ...], n_layers: int
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    results = make_results(tmp_path / "results", runs=runs, n_layers=n_layers)
    workspace = dashboard(results, "team/project")
    assert (workspace.entity, workspace.project) == ("team", "project")
    sections = {section.name: section.panels for section in workspace.sections}
    assert next(iter(sections)) == "headlines" and {*results.evaluators} < {*sections}
    place = log_results(results, mode="offline", project="project")
    wandb.teardown()
    read = OfflineRun(Path(str(place)))
    for name, panels in sections.items():
        if name == "training":
            continue
        for panel in panels:
            assert keys_of(panel)
            for key in [*keys_of(panel), *([str(panel.x)] if hasattr(panel, "y") else [])]:
                assert read.logged(key), f"{name}: {panel.title} asks for {key}"
    assert all(
        any(key.endswith(m) for m in TRAINING_METRICS)
        for p in sections["training"]
        for key in keys_of(p)
    )
    assert workspace._to_model().model_dump_json()


def test_curves_stand_beside_their_nulls(tmp_path: Path) -> None:
    results = make_results(tmp_path, n_layers=3)
    first = dashboard(results, "project").sections[0].panels[0]
    assert keys_of(first)[0] == "layers/ontological_coverage/internal_f1"
    assert "layers/ontological_coverage/internal_f1/permuted_classes" in keys_of(first)


@pytest.mark.parametrize("where", ["", "a/b/c", "team/"])
def test_a_place_that_is_no_project(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match=r"wandb_dashboard.*PROJECT or ENTITY/PROJECT"):
        dashboard(make_results(tmp_path), where)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r"taxolens\[workspaces\]"):
        dashboard(make_results(tmp_path), "project")


def test_a_dashboard_that_wandb_refuses_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb_workspaces.workspaces import Workspace

    def refuse(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Workspace, "save", refuse)
    results = make_results(tmp_path)
    with pytest.raises(TaxolensError, match="no network"):
        save_dashboard(results, "project")
    assert main(["report", str(tmp_path), "--wandb_dashboard", "project"]) == 1
    assert "no network" in capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()
