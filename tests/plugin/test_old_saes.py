"""SAEs of earlier runs in an output folder: named, never measured with, never written over."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from taxolens.plugin.evaluation import evaluate
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training import preflight
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.registry.errors import CheckpointError, ConfigError
from tiny_runs import HOOK, LAST_HOOK, SMALL_TOPK


def test_only_the_saes_of_the_run_are_found(training: Any, caplog: Any) -> None:
    training.runner(training.multi()).run()
    again = training.multi(
        saes={"first": training.sae(), "wide": training.sae()},
        hook_names={"first": HOOK, "wide": LAST_HOOK},
        checkpoint_id="other",
        overwrite_output=True,
    )
    training.runner(again).run()
    assert (training.output / "last" / "cfg.json").exists()
    assert [sae.name for sae in find_saes(training.output)] == ["first", "wide"]
    assert f"not of the run, and left out: {training.output / 'last'}" in caplog.text
    assert [sae.name for sae in find_saes(training.output / "last")] == ["last"]

    single = training.single(checkpoint_id="single", overwrite_output=True)
    training.runner(single).run()
    assert [sae.path for sae in find_saes(training.output)] == [training.output]

    caplog.clear()
    (training.output / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the SAEs that runner_cfg\.json lists"):
        find_saes(training.output)


def test_a_missing_sae_of_the_run_is_named(training: Any, caplog: Any) -> None:
    training.runner(training.multi()).run()
    shutil.rmtree(training.output / "last")
    assert [sae.name for sae in find_saes(training.output)] == ["first"]
    assert f"lists SAEs that are missing: {training.output / 'last'}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.5}, "lr, lr_end"),
        ({"seed": 3}, "seed"),
        ({"tokens": "patch"}, "tokens"),
        ({"resample_every": 4}, "resample_every"),
        ({"autocast": True}, "autocast"),
        ({"lr_end": 0.002}, "lr_end"),
        ({"n_restart_cycles": 2}, "n_restart_cycles"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"jpeg_edge": 32}, "jpeg_edge"),
        ({"dead_feature_window": 2}, "dead_feature_window"),
        ({"n_batches_for_norm_estimate": 3}, "n_batches_for_norm_estimate"),
        ({"n_batches_in_buffer": 3}, "n_batches_in_buffer"),
        ({"store_batch_size_prompts": 2}, "store_batch_size_prompts"),
        ({"model_from_pretrained_kwargs": {"seed": 1}}, "model_from_pretrained_kwargs"),
        ({"sparse_step": False}, "sparse_step"),
    ],
)
def test_another_run_is_not_written_into_the_folder(
    training: Any, changes: dict[str, Any], named: str
) -> None:
    training.runner(training.single()).run()
    before = (training.output / "sae_weights.safetensors").read_bytes()
    with pytest.raises(
        ConfigError, match=rf"holds another run \(differing in {named}\).*overwrite"
    ):
        training.runner(training.single(checkpoint_id="other", **changes))
    assert (training.output / "sae_weights.safetensors").read_bytes() == before
    training.runner(training.single(checkpoint_id="other", overwrite_output=True, **changes))
    # The same run again may write its own files anew, and so may one that goes on.
    training.runner(training.single(checkpoint_id="again"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint_id": "other"}, r"output_path: holds another run \(differing in seed\)"),
        ({"output_path": "other"}, "checkpoint_path: holds checkpoints already"),
    ],
)
def test_nor_by_a_runner_that_was_made_before_the_folder_was_written(
    training: Any, changes: dict[str, Any], said: str
) -> None:
    if "output_path" in changes:
        changes = {"output_path": str(training.folder / "other")}
    first = training.runner(training.single(n_checkpoints=1))
    second = training.runner(training.single(n_checkpoints=1, seed=3, **changes))
    first.run()
    before = contents(training.folder)
    with pytest.raises(ConfigError, match=said):
        second.run()
    assert contents(training.folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file but the locks, which are empty."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if content}


def test_neither_does_a_resumed_run_write_into_the_folder_of_another(training: Any) -> None:
    training.runner(training.single(seed=3)).run()
    before = (training.output / "sae_weights.safetensors").read_bytes()
    own = {"checkpoint_id": "own", "n_checkpoints": 1, "dead_feature_window": 1}
    elsewhere = str(training.folder / "elsewhere")
    training.runner(training.single(**own, output_path=elsewhere)).run()
    own["resume_from_checkpoint"] = "auto"
    with pytest.raises(ConfigError, match=r"holds another run \(differing in seed\)"):
        training.runner(training.single(**own))
    assert (training.output / "sae_weights.safetensors").read_bytes() == before
    # Its own result it writes anew, also after more tokens.
    for changes in ({}, {"training_tokens": 160}):
        training.runner(training.single(**own, output_path=elsewhere, **changes)).run()
    training.runner(training.single(**own, overwrite_output=True))


# Fields that have no part in the weights of an SAE, but where and on what they are computed, or are refused for images.
NOT_OF_THE_WEIGHTS = {
    *("device", "llm_device", "act_store_device", "prefetch_llm_batches", "num_workers"),
    *("compile_sae", "sae_compilation_mode", "llm_compilation_mode", "cached_activations_path"),
    *("output_path", "overwrite_output", "checkpoint_path", "checkpoint_id", "keep_checkpoints"),
    *("n_checkpoints", "save_final_checkpoint", "resume_from_checkpoint", "logger", "verbose"),
    *("taxonomy", "evaluators", "evaluator", "n_eval_batches", "eval_batch_size_prompts"),
    *("eval_dataset_path", "eval_dataset_name", "eval_split", "eval_max_images", "hook_eval"),
    *("max_corrupt_share", "max_image_pixels", "remote_images", "dataset_trust_remote_code"),
    *("model_class_name", "model_kwargs", "context_size", "seqpos_slice", "prepend_bos"),
    *("is_dataset_tokenized", "use_chat_formatting", "exclude_special_tokens", "verbose"),
    *("sequence_separator_token", "disable_concat_sequences", "activations_mixing_fraction"),
    *("sae_lens_version", "sae_lens_training_version", "dead_feature_threshold"),
}


@pytest.mark.parametrize("kind", [VisionSAERunnerConfig, VisionMultiSAERunnerConfig])
def test_every_setting_of_the_weights_tells_two_runs_apart(kind: Any) -> None:
    names = {field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")}
    assert names - set(preflight.RUN_SETTINGS) <= NOT_OF_THE_WEIGHTS
    assert not NOT_OF_THE_WEIGHTS & set(preflight.RUN_SETTINGS)


def test_a_folder_of_an_earlier_version_lacks_settings(training: Any) -> None:
    training.runner(training.single()).run()
    file = training.output / "runner_cfg.json"
    recorded = json.loads(file.read_text())
    for name in ("sparse_step", "resample_every", "dtype", "jpeg_edge"):
        del recorded[name]
    file.write_text(json.dumps(recorded))
    training.runner(training.single(checkpoint_id="again", dtype="bfloat16"))


@pytest.mark.parametrize("start", ["", "../other/../output"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_sae_that_a_run_starts_from_is_not_written_over(
    training: Any, start: str, overwrite: bool
) -> None:
    training.runner(training.single()).run()
    (training.folder / "other").mkdir()
    settings = {"checkpoint_id": "tuned", "from_pretrained_path": str(training.output / start)}
    said = r"output_path: the SAE that the run starts from \(from_pretrained_path\) lies there"
    with pytest.raises(ConfigError, match=said):
        training.runner(training.single(**settings, overwrite_output=overwrite))
    settings["output_path"] = str(training.folder / "tuned")
    for _ in range(2):  # the same command again may write its own files anew
        shutil.rmtree(training.folder / "checkpoints", ignore_errors=True)
        training.runner(training.single(**settings)).run()


def test_nor_is_the_checkpoint_that_a_run_starts_from(training: Any) -> None:
    final = {"save_final_checkpoint": True, "n_checkpoints": 0}
    training.runner(training.single(**final)).run()
    (start,) = training.checkpoints.iterdir()
    changes = {**final, "from_pretrained_path": str(start)}
    changes["output_path"] = str(training.folder / "tuned")
    with pytest.raises(ConfigError, match="checkpoint_path: the SAE that the run starts from"):
        training.runner(training.single(**changes))
    training.runner(training.single(**changes, checkpoint_id="tuned")).run()


def test_an_sae_of_unknown_origin_is_not_written_over(training: Any, tmp_path: Path) -> None:
    training.runner(training.single()).run()
    (training.output / "runner_cfg.json").unlink()
    with pytest.raises(ConfigError, match=r"holds another run \(differing in all settings\)"):
        training.runner(training.single(checkpoint_id="other"))
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes.json").write_text(json.dumps({}))
    training.runner(training.single(checkpoint_id="other", output_path=str(folder)))


def test_numbers_of_the_run_that_is_written_over_are_dropped(
    training: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the evaluation after a training with `overwrite_output`, which goes on as any other."""
    base = training.single()
    flags = {
        "model_name": base.model_name,
        "hook_name": HOOK,
        "output_path": base.output_path,
        "dataset_path": str(world),
        "taxonomy": str(world / "validation"),
        "training_tokens": 64,
        "train_batch_size_tokens": 8,
        **SMALL_TOPK,
    }

    def trained(**changes: Any) -> Job:
        job = Job(gather(flags={**flags, **changes}))
        job.train()
        return job

    first, _ = trained(evaluators=["pair_depth", "cpcc"]).evaluate(progress=False)
    other = trained(evaluators=["pair_depth"], seed=3, overwrite_output=True)
    second, _ = other.evaluate(progress=False)
    assert list(second.evaluators) == ["pair_depth"]
    assert second.saes[0].weights != first.saes[0].weights

    monkeypatch.setattr(evaluate, "measure_sae", lambda *_, **__: pytest.fail("measured again"))
    assert other.evaluate(progress=False)[0].saes == second.saes
