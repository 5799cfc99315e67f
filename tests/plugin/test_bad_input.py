"""What cannot work is refused before the long work; what breaks later costs nothing saved."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from safetensors.torch import load_file
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.training import interrupts, preflight
from taxolens.plugin.training.checkpoints import checkpoints_in
from taxolens.plugin.training.runner import VisionSAETrainingRunner
from taxolens.registry.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    UnknownNameError,
)
from tiny_runs import BATCH


def refused(training, error, said, **changes):
    with pytest.raises(error, match=said):
        training.runner(training.single(**changes))


def test_a_hook_that_does_not_exist_is_answered_with_the_nearest(training):
    refused(
        training, UnknownNameError, "blocks.0.hook_resid_post", hook_name="blocks.0.hook_resid_pots"
    )
    hooks = {"first": "blocks.0.hook_resid_post", "last": "blocks.7.hook_resid_post"}
    with pytest.raises(UnknownNameError, match=r"blocks.7.hook_resid_post"):
        training.runner(training.multi(hook_names=hooks))


def test_a_d_in_that_does_not_match_is_named_with_the_width_found(training):
    said = r"sae\.d_in: not the width at blocks\.0\.hook_resid_post; given 24; allowed: 16"
    refused(training, ConfigError, said, sae=training.sae(24))
    with pytest.raises(ConfigError, match=r"last\.d_in: not the width at blocks\.1.*given 24"):
        training.runner(training.multi(saes={"first": training.sae(), "last": training.sae(24)}))


def test_tokens_that_the_model_does_not_have_are_answered_with_those_it_has(training):
    refused(training, ConfigError, "allowed: class, mean_patch, patch, all", tokens="register")


def test_names_of_evaluators_and_a_tree_for_them_are_checked(training):
    evaluators = {"evaluators": ["lch_hight"], "taxonomy": "x"}
    refused(
        training, UnknownNameError, "did you mean 'lch_height'.*given 'lch_hight'", **evaluators
    )
    refused(
        training,
        ConfigError,
        "taxonomy: the evaluators need one; given None",
        evaluators=["lch_height"],
    )


def test_a_tree_that_is_saved_for_a_later_evaluation_can_be_read(training):
    refused(training, ConfigError, "did you mean 'cifar100'", taxonomy="cifar10")


def test_labels_outside_the_class_tree_are_named(training, tmp_path):
    tree = tmp_path / "tree.csv"
    tree.write_text("parent,child\nanimal,cat\nanimal,wolf\n")
    refused(training, ConfigError, "dog", evaluators=["lch_height"], taxonomy=str(tree))


def test_a_device_that_is_not_there_is_named(training):
    refused(
        training,
        ConfigError,
        "device: torch cannot use it here: .*given 'cuda:77'; .* such as device=\"cpu\"",
        device="cuda:77",
    )


def test_data_must_be_given_and_hold_images(training, vit, tmp_path):
    with pytest.raises(ConfigError, match="dataset_path: missing; given None"):
        VisionSAETrainingRunner(training.single(dataset_path=""), override_model=vit)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    cfg = training.single(dataset_path=str(tmp_path / "empty"))
    with pytest.raises((DataError, ConfigError), match="image"):
        VisionSAETrainingRunner(cfg, override_model=vit)
    with pytest.raises(ConfigError, match="dataset_path"):
        VisionSAETrainingRunner(training.single(dataset_path="./typo"), override_model=vit)


def test_more_corrupt_images_than_allowed_stop_the_run(training, vit, tmp_path):
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    for index in range(40):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
        if index % 2:
            (folder / f"{index}.png").write_bytes(b"no picture")
    cfg = training.single(training_tokens=80)
    runner = training.runner(cfg, override_dataset=load_images(tmp_path / "photos"))
    with pytest.raises(DataError, match="corrupt"):
        runner.run()


@pytest.mark.parametrize(
    ("sae", "said"),
    [
        (
            TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, normalize_activations="layer_norm"),
            "architecture 'topk' with these settings cannot be trained: .*normalization",
        ),
        (TopKTrainingSAEConfig(d_in=16, d_sae=32, k=40), r"sae\.k: not possible; given 40"),
        (
            JumpReLUTrainingSAEConfig(d_in=16, d_sae=32, jumprelu_sparsity_loss_mode="quadratic"),
            "'jumprelu' .* cannot be built: .*target_l0",
        ),
    ],
    ids=["dead latents", "k", "target_l0"],
)
def test_settings_that_saelens_refuses_late_are_refused_early(training, sae, said):
    refused(training, ConfigError, said, sae=sae)


def test_places_that_cannot_be_written_are_named(training, tmp_path):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "output")
    refused(training, ConfigError, f"output_path: cannot write into '{place}'", output_path=place)
    refused(training, ConfigError, "checkpoint_path: cannot write into", checkpoint_path=place)


def test_room_on_the_disk_is_counted_before(training, monkeypatch):
    usage = namedtuple("usage", "total used free")
    weights = (16 * 32 * 2 + 16 + 32) * 4
    needed = weights + 3 * weights * 4  # the output, three checkpoints and one for an interrupt
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, needed - 1))
    said = r"output_path, checkpoint_path: 0\.1 MiB needed in .* 0\.1 MiB free.*keep_checkpoints"
    refused(training, ConfigError, said, n_checkpoints=3)
    training.runner(training.single(n_checkpoints=3, keep_checkpoints=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, needed))
    training.runner(training.single(n_checkpoints=3))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_room_for_the_cache_is_that_of_its_arrays(training, images, vit, dtype):
    place = training.folder / "activations"
    settings = {"dtype": dtype, "use_cached_activations": True, "n_checkpoints": 0}
    cfg = training.single(**settings, cached_activations_path=str(place))
    predicted = preflight.cache_size(cfg, vit, images)
    ActivationCache.build(vit, images, cfg.extraction, source=cfg.image_source, path=place)
    (file,) = place.glob("blocks*.npy")
    assert predicted == np.load(file).nbytes


@pytest.mark.parametrize(
    ("settings", "n"),
    [
        ({"n_checkpoints": 0}, 0),
        ({"n_checkpoints": 0, "save_final_checkpoint": True}, 1),
        ({"n_checkpoints": 2}, 2),
        ({"n_checkpoints": 2, "save_final_checkpoint": True}, 3),
        ({"n_checkpoints": 2, "save_final_checkpoint": True, "checkpoint_path": None}, 0),
    ],
)
def test_room_for_checkpoints_is_that_of_their_files(training, settings, n):
    """But for headers, counts of firings and JSON; and one more beside regular ones, for an interrupt."""
    sae = TopKTrainingSAEConfig(d_in=16, d_sae=1024, k=4)
    runner = training.runner(training.single(sae=sae, **settings))
    predicted = preflight.bytes_needed(runner.cfg, [runner.sae])["checkpoint_path"]
    runner.run()
    files = [path for path in (training.folder / "checkpoints").rglob("*") if path.is_file()]
    found = sum(path.stat().st_size for path in files)
    one = 3 * 4 * (2 * 16 * 1024 + 16 + 1024)
    assert n * one <= found <= n * 1.1 * one
    assert predicted == (n + (settings["n_checkpoints"] > 0)) * one * (n > 0)


class TestCheckpointsOfOtherRuns:
    @pytest.fixture
    def checkpoint(self, training):
        training.runner(training.single(n_checkpoints=1)).run()
        return str(training.checkpoints / "48")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"sae": JumpReLUTrainingSAEConfig(d_in=16, d_sae=32)},
                r"saes\.sae\.architecture: found 'topk', wanted 'jumprelu'",
            ),
            (
                {"sae": TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4)},
                r"saes\.sae\.d_sae: found 32, wanted 64",
            ),
            (
                {"hook_name": "blocks.1.hook_resid_post"},
                r"saes\.sae\.hook_name: found 'blocks\.0\.hook_resid_post', wanted 'blocks\.1",
            ),
            ({"seed": 7}, "seed: found 42, wanted 7"),
            ({"tokens": "patch"}, "tokens: found 'class', wanted 'patch'"),
            ({"train_batch_size_tokens": 16}, "found 8, wanted 16"),
        ],
        ids=["architecture", "d_sae", "hook", "seed", "tokens", "batch size"],
    )
    def test_are_refused_with_the_field_that_differs(self, training, checkpoint, changes, said):
        refused(training, CheckpointError, said, resume_from_checkpoint=checkpoint, **changes)

    def test_so_are_those_of_other_images(self, training, checkpoint, tmp_path):
        (tmp_path / "other" / "cat").mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (20, 20)).save(tmp_path / "other" / "cat" / f"{index}.png")
        other = load_images(tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"belongs to another run: activations.images: "):
            cfg = training.single(resume_from_checkpoint=checkpoint)
            training.runner(cfg, override_dataset=other)

    def test_and_those_of_many_saes(self, training, checkpoint):
        with pytest.raises(CheckpointError, match=r"saes\.first.*found None"):
            training.runner(training.multi(resume_from_checkpoint=checkpoint))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"lr": 0.02}, r"lr: found 0\.01, wanted 0\.02; lr_end: found 0\.001, wanted 0\.002"),
            (
                {"lr_scheduler_name": "cosineannealing"},
                "lr_scheduler_name: found 'constant', wanted 'cosineannealing'",
            ),
            ({"lr_warm_up_steps": 3}, "lr_warm_up_steps: found 0, wanted 3"),
            ({"lr_decay_steps": 3}, "lr_decay_steps: found 0, wanted 3"),
            ({"adam_beta1": 0.5}, r"adam_beta1: found 0\.\d+, wanted 0\.5"),
            ({"training_tokens": 40}, "training_tokens: found 80, wanted 40"),
        ],
    )
    def test_settings_that_the_state_of_a_checkpoint_overrules_are_refused(
        self, training, checkpoint, changes, said
    ):
        said = (
            f"checkpoint .*48: its state goes on with other settings: {said}.*; allowed: the values"
        )
        refused(training, CheckpointError, said, resume_from_checkpoint=checkpoint, **changes)

    def test_auto_does_not_go_on_with_a_run_of_another_learning_rate(self, training, checkpoint):
        other = {"checkpoint_id": "other", "output_path": str(training.folder / "other")}
        cfg = training.single(resume_from_checkpoint="auto", lr=0.02, **other)
        training.runner(cfg)
        assert cfg.resume_from_checkpoint is None

    def test_others_take_effect_with_a_warning(self, training, checkpoint, caplog):
        cfg = training.single(resume_from_checkpoint=checkpoint, dead_feature_window=7)
        training.runner(cfg)
        assert (
            "dead_feature_window: found 1, wanted 7. They take effect from here on" in caplog.text
        )

    def test_so_is_another_start_of_the_weights(self, training, checkpoint):
        start = {"from_pretrained_path": checkpoint, "checkpoint_id": "further", "n_checkpoints": 1}
        start["output_path"] = str(training.folder / "further")
        training.runner(training.single(**start)).run()
        further = str(training.folder / "checkpoints" / "further" / "48")
        again = {"resume_from_checkpoint": further}
        said = "from_pretrained_path: found '.*run/48', wanted None"
        refused(training, CheckpointError, said, **again)
        training.runner(training.single(**start, **again))

    def test_norms_that_were_estimated_are_not_estimated_again(self, training):
        sae = BatchTopKTrainingSAEConfig(
            d_in=16, d_sae=32, k=4, normalize_activations="expected_average_only_in"
        )
        training.runner(training.single(sae=sae, n_checkpoints=1)).run()
        again = {"sae": sae, "resume_from_checkpoint": str(training.checkpoints)}
        said = "n_batches_for_norm_estimate: found 2, wanted 3"
        refused(training, CheckpointError, said, **again, n_batches_for_norm_estimate=3)

    @pytest.mark.parametrize("resume", ["auto", "folder"])
    def test_a_longer_run_takes_over_how_many_batches_were_estimated_from(self, training, resume):
        sae = BatchTopKTrainingSAEConfig(
            d_in=16, d_sae=32, k=4, normalize_activations="expected_average_only_in"
        )
        settings = {"sae": sae, "n_batches_for_norm_estimate": None, "dead_feature_window": 1}
        training.runner(training.single(**settings, n_checkpoints=1)).run()
        resume = "auto" if resume == "auto" else str(training.checkpoints)
        settings |= {"training_tokens": 20 * BATCH, "resume_from_checkpoint": resume}
        longer = training.runner(training.single(**settings))
        (checkpoint,) = checkpoints_in(training.checkpoints)
        assert longer.cfg.resume_from_checkpoint == str(checkpoint)
        longer.run()
        recorded = json.loads((training.output / "runner_cfg.json").read_text())
        assert recorded["n_batches_for_norm_estimate"] == 10  # the steps of the first run
        assert recorded["training_tokens"] == 20 * BATCH
        assert not [name for name in recorded if "defaults" in name]
        # The same command over its own result, whose checkpoints are gone.
        shutil.rmtree(training.checkpoints)
        settings["resume_from_checkpoint"] = None
        training.runner(training.single(**settings, overwrite_output=False)).run()

    def test_a_fresh_start_into_their_folder_is_refused(self, training, checkpoint):
        refused(
            training, ConfigError, 'holds checkpoints already.*resume_from_checkpoint="auto", which'
        )
        refused(
            training,
            ConfigError,
            'holds checkpoints already.*the settings of their run: resume_from_checkpoint="',
            seed=7,
            resume_from_checkpoint="auto",
        )

    def test_truncated_weights_are_recognised(self, training, checkpoint):
        file = training.checkpoints / "48" / "sae_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        said = r"damaged: sae_weights\.safetensors has .* No complete checkpoint comes before it"
        refused(training, CheckpointError, said, resume_from_checkpoint=checkpoint)
        said = "from_pretrained_path: .* cannot be loaded"
        refused(
            training, CheckpointError, said, from_pretrained_path=checkpoint, checkpoint_id="other"
        )

    def test_a_path_that_is_no_checkpoint_is_named(self, training):
        refused(training, CheckpointError, "typo is not a folder", resume_from_checkpoint="typo")


@pytest.mark.parametrize("prefetch", [False, 2])
def test_activations_that_become_nan_stop_the_run_with_a_checkpoint(training, vit_folder, prefetch):
    training.runner(training.single(checkpoint_id="whole")).run()
    expected = load_file(training.output / "sae_weights.safetensors")
    model = load_vision_model(vit_folder)

    def poison():
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    sae = training.meddling(training.sae(), poison, step=4)
    runner = training.runner(
        training.single(prefetch_llm_batches=prefetch), override_sae=sae, override_model=model
    )
    with pytest.raises(DataError, match=r"blocks\.0\.hook_resid_post"):
        runner.run()
    (checkpoint,) = checkpoints_in(training.checkpoints)
    assert int(checkpoint.name) >= 40
    training.runner(training.single(resume_from_checkpoint=str(checkpoint))).run()
    found = load_file(training.output / "sae_weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_weights_that_become_nan_are_never_saved(training, monkeypatch, kind):
    cfg = getattr(training, kind)(n_checkpoints=3)
    sae = training.meddling(training.sae(), lambda: sae.b_dec.data.fill_(float("nan")), step=4)
    overrides = {"override_sae": sae}
    if kind == "multi":
        other = training.meddling(training.sae(), lambda: None)
        overrides = {"override_saes": {"first": other, "last": sae}}
    with pytest.raises(DivergedError, match=r"b_dec is not finite after 48 tokens.*lower lr"):
        training.runner(cfg, **overrides).run()
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["24"]
    assert not list(training.output.rglob("*.safetensors"))


@pytest.mark.parametrize("final", [False, True])
def test_an_sae_that_diverges_in_the_last_step_costs_no_other(training, final):
    training.runner(training.multi()).run()
    alone = load_file(training.output / "first" / "sae_weights.safetensors")
    sae = training.meddling(training.sae(), lambda: sae.W_enc.data.fill_(float("nan")), step=9)
    saes = {"first": training.meddling(training.sae(), lambda: None), "last": sae}
    (training.output / "first" / "cfg.json").unlink()
    cfg = training.multi(save_final_checkpoint=final)
    with pytest.raises(DivergedError, match=r"'.*output' holds the other SAEs alone. SAE 'last': "):
        training.runner(cfg, override_saes=saes).run()
    # nothing stands in the place of the other one: not the result of the run before either
    assert [sae.name for sae in find_saes(training.output)] == ["first"]
    found = load_file(training.output / "first" / "sae_weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())
    assert not list(training.folder.glob("checkpoints/**/*.json"))


def test_divergence_is_noticed_on_the_way(training, monkeypatch):
    monkeypatch.setattr(interrupts, "WATCH_EVERY", 3)
    sae = training.meddling(training.sae(), lambda: sae.b_dec.data.fill_(float("inf")), step=3)
    with pytest.raises(DivergedError, match="after 40 tokens"):
        training.runner(training.single(), override_sae=sae).run()
    assert checkpoints_in(training.checkpoints) == []
    assert not list(training.output.rglob("*.safetensors"))


def test_a_step_that_fails_is_reported_as_it_is(training):
    def fail():
        raise RuntimeError("out of memory")

    cfg = training.single(n_checkpoints=3)
    sae = training.meddling(training.sae(), fail, step=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.runner(cfg, override_sae=sae).run()
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["24"]


def test_a_config_is_not_changed_by_being_refused(training):
    cfg = training.single(sae=training.sae(24))
    before = copy.deepcopy(cfg.to_dict())
    with pytest.raises(ConfigError):
        training.runner(cfg)
    assert cfg.to_dict() == before
