"""No code that comes with a model or a dataset runs because a file says so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation import forward
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.config import VisionSAERunnerConfig
from taxolens.registry.errors import ConfigError
from tiny_runs import HOOK

CODE = """
from pathlib import Path
from transformers import Dinov2Config, Dinov2Model
Path({marker!r}).write_text("ran")
class Config(Dinov2Config):
    model_type = "{kind}"
class Model(Dinov2Model):
    config_class = Config
"""


@pytest.fixture(params=["dinov2", "stranger"])
def foreign(request: Any, vit_folder: Path, tmp_path: Path) -> Path:
    """A model folder whose config names code in it: beside a known type, and of an unknown one."""
    folder = tmp_path / "model"
    shutil.copytree(vit_folder, folder)
    marker = str(tmp_path / "marker")
    (folder / "code.py").write_text(CODE.format(marker=marker, kind=request.param))
    (folder / "code_of_it.py").write_text(CODE.format(marker=marker, kind=request.param))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code_of_it.Config", "AutoModel": "code_of_it.Model"}
    config["model_type"], config["architectures"] = request.param, ["Model"]
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": "code_of_it.Config"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def sae_folder(folder: Path, model: Path, world: Path, **metadata: Any) -> Path:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=24, k=4))
    torch.nn.init.normal_(sae.W_enc)
    facts = {
        "model_name": str(model),
        "hook_name": HOOK,
        "dataset_path": str(world),
        "split": "train",
        "tokens": "class",
        "taxonomy": str(world / "validation"),
        **metadata,
    }
    for name, value in facts.items():
        sae.cfg.metadata[name] = value
    folder.mkdir()
    sae.save_inference_model(folder)
    return folder


FAST: dict[str, Any] = {"progress": False, "n_permutations": 1, "evaluators": ["pair_depth"]}
TRUST = {"model_from_pretrained_kwargs": {"trust_remote_code": True}}


@pytest.mark.parametrize("place", ["metadata", "runner_cfg.json"])
def test_an_sae_folder_turns_no_code_on(
    place: str, foreign: Path, world: Path, tmp_path: Path
) -> None:
    folder = sae_folder(tmp_path / "sae", foreign, world, **(TRUST if place == "metadata" else {}))
    if place != "metadata":
        (folder / place).write_text(json.dumps(TRUST))
    with pytest.raises(ConfigError, match=r"trust_remote_code.*which a file cannot allow to run"):
        evaluate_run(folder, **FAST)
    assert not (tmp_path / "marker").exists()


def test_without_a_word_of_trust_none_is_assumed(
    foreign: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the terminal was asked"))
    folder = sae_folder(tmp_path / "sae", foreign, world)
    with (
        pytest.raises(ConfigError, match="trust_remote_code")
        if "stranger" in (foreign / "config.json").read_text()
        else pytest.MonkeyPatch.context()
    ):
        evaluate_run(folder, **FAST)
    assert not (tmp_path / "marker").exists()


def test_the_caller_may_trust(foreign: Path, world: Path, tmp_path: Path) -> None:
    (foreign / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning):
        load_vision_model(foreign, trust_remote_code=True)
    assert (tmp_path / "marker").read_text() == "ran"


@pytest.mark.parametrize(
    "more",
    [
        {"device_map": "auto"},
        {"dtype": 1},
        {"seed": "0"},
        {"random_weights": 1},
        {"family": ["vit"]},
    ],
)
def test_other_arguments_in_metadata_are_refused(
    more: dict[str, Any], vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    folder = sae_folder(tmp_path / "sae", vit_folder, world, model_from_pretrained_kwargs=more)
    with pytest.raises(ConfigError, match=f"metadata: {next(iter(more))}: not possible"):
        evaluate_run(folder, **FAST)


def test_the_model_is_named_before_it_is_read(
    vit_folder: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(forward, "load_vision_model", stop)
    folder = sae_folder(tmp_path / "sae", vit_folder, world)
    with caplog.at_level(logging.WARNING), pytest.raises(InterruptedError):
        evaluate_run(folder, **FAST)
    assert f"reading the model {vit_folder}" in caplog.text


def test_a_file_of_settings_turns_no_code_on(training: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("model_from_pretrained_kwargs: {trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match="trust_remote_code: a file cannot allow code to run"):
        gather(config=path)
    cfg = training.single(model_from_pretrained_kwargs={"trust_remote_code": True})
    for name in ("cfg.json", "cfg.yaml"):
        cfg.save(tmp_path / name)
        with pytest.raises(ConfigError, match="trust_remote_code: a file cannot allow code to run"):
            VisionSAERunnerConfig.load(tmp_path / name)


def test_datasets_are_not_trusted_by_default(training: Any, tmp_path: Path) -> None:
    assert training.single().image_source.trust_remote_code is False
    cfg = training.single(dataset_trust_remote_code=True)
    assert cfg.image_source.trust_remote_code is True  # the caller's own word
    cfg.save(tmp_path / "cfg.json")
    assert VisionSAERunnerConfig.load(tmp_path / "cfg.json").dataset_trust_remote_code is False
