"""Folders that have moved, SAEs from elsewhere, and paths as people type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import taxolens
from taxolens.hooks.images.source import ImageSource
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.training.config import VisionSAERunnerConfig
from taxolens.registry.errors import ConfigError
from tiny_runs import HOOK, LAST_HOOK

FAST: dict[str, Any] = {
    "progress": False,
    "n_permutations": 2,
    "n_groups": 0,
    "evaluators": "pair_depth",
}


@pytest.fixture
def moved(training: Any, vit_folder: Path, world: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """A run trained with paths relative to its folder, from which it is then away."""
    home = tmp_path / "home"
    shutil.copytree(vit_folder, home / "models" / "vit")
    shutil.copytree(world, home / "photos")
    monkeypatch.chdir(home)
    given = {"model_name": "models/vit", "dataset_path": "photos", "taxonomy": "photos/validation"}
    cfg = training.single(**given, output_path="out", checkpoint_path=None, eval_split="validation")
    training.runner(cfg, override_model=None, override_dataset=None).run()
    monkeypatch.chdir(tmp_path)
    return home


def test_paths_are_saved_absolute(moved: Path) -> None:
    metadata = json.loads((moved / "out" / "cfg.json").read_text())["metadata"]
    settings = json.loads((moved / "out" / "runner_cfg.json").read_text())
    for saved in (metadata, settings):
        assert saved["model_name"] == str(moved / "models" / "vit")
        assert saved["dataset_path"] == str(moved / "photos")
        assert saved["taxonomy"] == str(moved / "photos" / "validation")
    results = evaluate_run(moved / "out", **FAST)  # from another directory
    assert results.dataset.n_images == 32


def test_a_model_that_is_gone_is_named_and_can_be_given(moved: Path, tmp_path: Path) -> None:
    (moved / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"model_name: its folder is not there; given '{moved}"):
        evaluate_run(moved / "out", **FAST)
    results = evaluate_run(moved / "out", model_name=str(tmp_path / "elsewhere" / "vit"), **FAST)
    assert results.saes[0].model_name == str(tmp_path / "elsewhere" / "vit")
    (moved / "photos").rename(tmp_path / "pictures")
    given = {
        "model_name": str(tmp_path / "elsewhere" / "vit"),
        "taxonomy": str(tmp_path / "pictures" / "validation"),
    }
    with pytest.raises(ConfigError, match=rf"no such file or folder; given '{moved}/photos'"):
        evaluate_run(moved / "out", **given, **FAST)
    pictures = str(tmp_path / "pictures")
    assert (
        evaluate_run(moved / "out", **given, dataset_path=pictures, **FAST).dataset.path == pictures
    )


def test_an_sae_from_elsewhere_needs_no_edit(moved: Path, vit: Any) -> None:
    """Its config has none of our metadata."""
    cfg = json.loads((moved / "out" / "cfg.json").read_text())
    cfg["metadata"] = {}
    (moved / "out" / "runner_cfg.json").unlink()
    (moved / "out" / "cfg.json").write_text(json.dumps(cfg))
    given: dict[str, Any] = {
        "model_name": str(moved / "models" / "vit"),
        "dataset_path": str(moved / "photos"),
        "taxonomy": str(moved / "photos" / "validation"),
    }
    with pytest.raises(
        ConfigError, match=r"^hook_name, tokens: not in the metadata, and not given; allowed: --ho"
    ):
        evaluate_run(moved / "out", **given, **FAST)
    given |= {"hook_name": LAST_HOOK, "tokens": "patch", "image_size": 16}
    sae = evaluate_run(moved / "out", **given, **FAST).saes[0]
    assert (sae.hook_name, sae.tokens) == (LAST_HOOK, "patch")
    other = evaluate_run(moved / "out", **{**given, "hook_name": HOOK}, **FAST).saes[0]
    assert other.fingerprint != sae.fingerprint


def test_one_hook_point_is_not_given_to_saes_of_several(training: Any) -> None:
    training.runner(training.multi()).run()
    with pytest.raises(
        ConfigError, match=f"hook_name: the SAEs were trained at 2 hook points; given '{HOOK}'"
    ):
        evaluate_run(training.output, hook_name=HOOK, **FAST)


def test_the_home_folder_is_understood_everywhere(
    training: Any, moved: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", str(moved))
    cfg: VisionSAERunnerConfig[Any] = training.single(
        model_name="~/models/vit",
        dataset_path="~/photos",
        taxonomy="~/photos/validation",
        output_path="~/second",
        checkpoint_path="~/checkpoints",
        cached_activations_path="~/cache",
        use_cached_activations=True,
        eval_split="validation",
    )
    training.runner(cfg, override_model=None, override_dataset=None).run()
    assert (moved / "second" / "cfg.json").exists() and (moved / "cache").is_dir()
    assert find_saes("~/second")[0].path == moved / "second"
    results = taxolens.evaluate_run("~/second", output_path="~/report", **FAST)
    assert results.folder == moved / "report"
    assert ImageSource("~/photos").same_dataset(ImageSource(str(moved / "photos")))
