"""One run of each kind, and what it writes."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import sae_files
import torch
from far_device import DEVICES
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    TopKTrainingSAEConfig,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training import calibration, preflight
from taxolens.plugin.training.checkpoints import checkpoints_in
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.plugin.training.dry_run import rehearse
from taxolens.plugin.training.runner import load_model, new_sae, required_plugin
from taxolens.registry.errors import ConfigError
from taxolens.registry.ranks import Ranks
from taxolens.registry.table import ARCHITECTURES, Architecture

HOOK = "blocks.0.hook_resid_post"
LAST_HOOK = "blocks.1.hook_resid_post"
# What an architecture needs beyond widths, where its default does not fit 32 latents.
SMALL = {"k": 4, "matryoshka_widths": [8, 32]}


def small_config(architecture):
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    fields = set(inspect.signature(config_class).parameters)
    return config_class(
        d_in=16, d_sae=32, **{name: value for name, value in SMALL.items() if name in fields}
    )


def test_what_is_overridden_in_saelens_is_there():
    """The names and arguments by which the runners hook into SAELens's."""
    expected = {
        LanguageModelSAETrainingRunner.run_trainer_with_interruption_handling: ["trainer"],
        LanguageModelSAETrainingRunner.save_checkpoint: ["checkpoint_path"],
        LanguageModelSAETrainingRunner.save_final_sae: [
            "sae",
            "output_path",
            "log_feature_sparsity",
        ],
        LanguageModelSAETrainingRunner._set_sae_metadata: [],
        LanguageModelSAETrainingRunner.run: [],
        MultiSAETrainingRunner._run_with_interruption_handling: ["trainer"],
        MultiSAETrainingRunner._save_runner_checkpoint_files: ["checkpoint_path"],
        MultiSAETrainingRunner._save_final_outputs: ["saes", "trainer"],
        MultiSAETrainingRunner._set_sae_metadata: [],
        MultiSAETrainingRunner.run: [],
        SAETrainer.save_checkpoint: ["checkpoint_name", "base_path", "wandb_aliases"],
        MultiSAETrainer.save_checkpoint: ["checkpoint_name", "wandb_aliases"],
        MultiSAETrainingRunnerConfig.to_sae_trainer_config: [],
        SAETrainer.step: ["batch"],
        SAETrainer.maybe_reset_sparsity: [],
        SAETrainer.full_sparsity_window_log: [],
        SAETrainer.build_train_step_log_dict: ["output", "n_training_samples"],
    }
    for method, names in expected.items():
        assert list(inspect.signature(method).parameters) == ["self", *names], method


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_architecture_trains_by_name(training, architecture):
    cfg = training.single(sae=small_config(architecture), training_tokens=16)
    sae = training.runner(cfg).run()
    assert sae.cfg.architecture() == architecture
    saved = SAE.load_from_disk(training.output)
    assert saved.cfg.metadata.training_architecture == architecture
    assert saved.encode(torch.randn(3, 16)).shape == (3, 32)
    untrained = new_sae(small_config(architecture), cfg.seed).state_dict()
    trained = sae.state_dict()
    assert any(not torch.equal(trained[name], untrained[name]) for name in untrained)


def test_one_sae_is_written_with_what_is_needed_to_use_it(training):
    training.runner(training.single(tokens="patch", taxonomy="cifar100")).run()
    assert sorted(path.name for path in training.output.iterdir()) == [
        *("cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    ]
    metadata = SAE.load_from_disk(training.output).cfg.metadata
    assert metadata.hook_name == HOOK
    assert metadata.model_class_name == "SAETransformerBridge"
    assert metadata.context_size == 5
    assert metadata.tokens == "patch"
    assert metadata.tokens_per_image == 4
    assert metadata.model_family == "dinov2"
    assert metadata.n_images == 10
    assert metadata.split == "train"
    assert metadata.taxonomy == "cifar100"
    assert metadata.taxolens_version
    assert "requires_plugin" not in metadata
    cfg = VisionSAERunnerConfig.load(training.output / "runner_cfg.json")
    assert (cfg.tokens, cfg.hook_name, cfg.sae.k) == ("patch", HOOK, 4)


def test_many_saes_are_written_each_into_its_folder(training):
    saes = training.runner(training.multi()).run()
    assert sorted(path.name for path in training.output.iterdir()) == [
        *("first", "last", "runner_cfg.json")
    ]
    for name, hook_name in (("first", HOOK), ("last", LAST_HOOK)):
        saved = SAE.load_from_disk(training.output / name)
        assert saved.cfg.metadata.hook_name == hook_name
        assert torch.equal(saved.b_dec, saes[name].b_dec)
    cfg = VisionMultiSAERunnerConfig.load(training.output / "runner_cfg.json")
    assert cfg.sae_hook_names == {"first": HOOK, "last": LAST_HOOK}


def test_an_sae_trained_among_others_is_the_one_trained_alone(training):
    normalized = BatchTopKTrainingSAEConfig(
        d_in=16, d_sae=32, k=4, normalize_activations="expected_average_only_in"
    )
    saes = {"first": normalized, "last": normalized}
    among = training.runner(training.multi(saes=saes)).run()
    alone = training.runner(training.single(sae=normalized, overwrite_output=True)).run()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(among["first"].state_dict()[name], tensor), name
    assert normalized.normalize_activations == "expected_average_only_in"


def test_the_seed_decides_everything_and_touches_nothing_else(training):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = training.runner(training.single(seed=1)).run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same = training.runner(training.single(seed=1, prefetch_llm_batches=3)).run()
    other = training.runner(training.single(seed=2, overwrite_output=True)).run()
    assert torch.equal(first.W_enc, same.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


@pytest.mark.parametrize(
    ("tokens", "per_image"), [("class", 1), ("patch", 4), ("all", 5), ("mean_patch", 1)]
)
def test_tokens_are_counted_exactly(training, caplog, tokens, per_image):
    caplog.set_level(logging.INFO)
    cfg = training.single(tokens=tokens, training_tokens=75, verbose=True, n_checkpoints=1)
    runner = training.runner(cfg)
    runner.run()
    epoch = 10 * per_image
    again = ", each through the model again (not with use_cached_activations)"
    assert (
        f"1 SAE(s) at {HOOK} of {cfg.model_name}; 10 images x {per_image} ({tokens}) = {epoch} "
        f"tokens an epoch, {80 / epoch:.2f} epochs{again if epoch <= 40 else ''}; 80 tokens = 10 steps x 8."
    ) in caplog.text
    state = torch.load(training.checkpoints / "48" / "trainer_state.pt")
    manifest = json.loads((training.checkpoints / "48" / "checkpoint.json").read_text())
    assert state["n_training_samples"] == manifest["n_training_samples"] == 48
    assert manifest["n_training_steps"] == 6


@pytest.mark.parametrize(("times", "warned"), [(80.0, True), (1.2, False)])
def test_bfloat16_that_a_cpu_computes_slowly_is_named(training, caplog, monkeypatch, times, warned):
    monkeypatch.setattr(preflight, "bfloat16_over_float32", lambda: times)
    training.runner(training.single())
    assert "bfloat16" not in caplog.text
    training.runner(training.single(autocast=True, autocast_lm=True))
    for field in ("autocast", "autocast_lm"):
        message = f"{field}: on this CPU a product of matrices takes 80.0 times as long in bfloat16"
        assert (message in caplog.text) == warned


def test_the_time_of_bfloat16_is_measured():
    assert 0 < preflight.bfloat16_over_float32(size=8) < float("inf")


def test_a_cache_is_not_offered_to_a_run_that_has_one(training, caplog):
    caplog.set_level(logging.INFO)
    folder = str(training.folder / "cache")
    changes = {"use_cached_activations": True, "cached_activations_path": folder}
    training.runner(training.single(tokens="class", verbose=True, **changes))
    assert "8.00 epochs; 80 tokens" in caplog.text


def test_only_the_newest_checkpoints_are_kept_when_asked(training):
    training.runner(training.single(n_checkpoints=5, keep_checkpoints=2)).run()
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["72", "64"]


def test_the_checkpoint_at_the_end_is_saelens_s_own(training):
    training.runner(training.single(save_final_checkpoint=True)).run()
    assert [path.name for path in training.checkpoints.iterdir()] == ["final_80"]


def test_no_output_and_no_checkpoints_when_not_wanted(training):
    cfg = training.single(checkpoint_path=None, output_path=None, n_checkpoints=2)
    training.runner(cfg).run()
    assert list(training.folder.iterdir()) == []


def test_an_output_folder_keeps_what_else_is_in_it(training):
    training.output.mkdir()
    (training.output / "results.json").write_text("{}")
    for _ in range(2):
        training.runner(training.single()).run()
    assert (training.output / "results.json").exists()
    assert SAE.load_from_disk(training.output)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes", [{"autocast": True}, {"autocast_lm": True}, {"dtype": "bfloat16"}], ids=str
)
def test_lower_precision_trains(training, vit_folder, device, changes):
    sae_dtype = changes.get("dtype", "float32")
    sae = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype=sae_dtype)
    cfg = training.single(sae=sae, device=device, act_store_device=device, **changes)
    model = load_vision_model(vit_folder, device=device)
    trained = training.runner(cfg, override_model=model).run()
    assert str(trained.W_enc.dtype) == f"torch.{sae_dtype}"
    assert torch.isfinite(trained.W_enc).all()


def test_compile_sae_reaches_torch(training, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **how: compiled.append((fn, how)) or fn)
    training.runner(training.single(compile_sae=True, sae_compilation_mode="default")).run()
    ((forward, how),) = compiled
    assert forward.__name__ == "training_forward_pass"
    assert how["mode"] == "default"


def test_compile_llm_reaches_torch(training, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compiled.append((module, how))
    )
    runner = training.runner(training.single(compile_llm=True, llm_compilation_mode="default"))
    assert compiled == [(runner.model.original_model, {"mode": "default"})]


def test_training_goes_on_from_saved_weights(training):
    training.runner(training.single(n_checkpoints=1)).run()
    checkpoint = training.checkpoints / "48"
    settings = {"checkpoint_id": "tuned", "output_path": str(training.folder / "tuned")}
    cfg = training.single(from_pretrained_path=str(checkpoint), **settings)
    runner = training.runner(cfg)
    assert torch.equal(runner.sae.W_enc, load_file(checkpoint / "sae_weights.safetensors")["W_enc"])
    runner.run()


def test_training_goes_on_from_another_librarys_file(training, tmp_path, monkeypatch):
    monkeypatch.setattr(sae_files, "D_IN", 16)
    monkeypatch.setitem(sae_files.PRISMA_CFG, "d_in", 16)
    file = sae_files.prisma(tmp_path, "standard", "topk", "none", "hub")
    cfg = training.single(from_pretrained_path=f"prisma:{file.path}")
    runner = training.runner(cfg)
    with torch.no_grad():
        assert torch.allclose(runner.sae(file.x), file.x_hat, atol=1e-4)
    runner.run()
    assert not torch.equal(runner.sae(file.x), file.x_hat)


def test_an_sae_of_another_width_is_refused(training, tmp_path):
    file = sae_files.prisma(tmp_path, "standard", "topk", "none", "hub")
    with pytest.raises(
        ConfigError, match=r"its d_in is not the width at .*; given 12; allowed: 16"
    ):
        training.runner(training.single(from_pretrained_path=str(file.path)))


def test_saes_can_be_given(training):
    sae = training.meddling(training.sae(), lambda: None)
    assert training.runner(training.single(), override_sae=sae).run() is sae
    with pytest.raises(
        ConfigError, match=r"override_saes: not possible; given \['other'\]; allowed: first, last"
    ):
        training.runner(training.multi(), override_saes={"other": sae})


@pytest.mark.parametrize(
    ("settings", "size", "is_sparse"),
    [
        ({}, 1, True),
        ({"sparse_step": False}, 1, False),
        ({"compile_sae": True}, 1, False),
        ({}, 2, False),
    ],
)
def test_the_step_is_that_of_the_run_wherever_it_is_decided(
    training, monkeypatch, settings, size, is_sparse
):
    """In a rehearsal, in a calibration, of a new SAE and of one that is given."""
    seen = []

    def looked(sae):
        seen.append(getattr(sae, "sparse_step", False))

    monkeypatch.setattr("taxolens.plugin.training.dry_run._train_one_step", looked)
    monkeypatch.setattr(calibration.SAETrainer, "step", lambda self, batch: looked(self.sae))
    monkeypatch.setattr("taxolens.registry.ranks.Ranks.here", lambda: Ranks(size=size))
    cfg = training.single(sae=small_config("batchtopk"), **settings)
    given = TrainingSAE.from_dict(cfg.sae.to_dict())
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    runner = training.runner(cfg, override_sae=given)
    assert runner.sae is given
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    looked(given)
    looked(training.runner(cfg).sae)
    calibration._time_steps(cfg, cfg.sae, size)
    # Its first step is SAELens's, of which FLOPs are counted.
    assert [*seen[:4], *set(seen[5:])] == [is_sparse] * 5 and seen[4] is False


def test_dead_latents_are_counted_from_the_step_on_that_can_have_any(training, monkeypatch):
    """Also after a stop: the count of passes without a firing is that of the checkpoint."""
    asked, seen = [], []

    def counted(mask):
        asked.append(int(mask.sum()))
        return lambda: asked[-1]

    class Watched(SAETrainer):
        def step(self, batch):
            seen.append(int(self.dead_neurons.sum()))
            return super().step(batch)

    monkeypatch.setattr("taxolens.registry.architectures.parts.sparse_step.counted", counted)
    monkeypatch.setattr("sae_lens.llm_sae_training_runner.SAETrainer", Watched)
    cfg = training.single(dead_feature_window=2, n_checkpoints=1)
    runner = training.runner(cfg)
    asked.clear()  # of the rehearsal, in which every latent is dead
    whole = runner.run()
    assert len(seen) == 10 and seen[:3] == [0, 0, 0] and all(seen[3:])
    assert asked == seen[3:]
    (checkpoint,) = checkpoints_in(Path(cfg.checkpoint_path))
    runner = training.runner(
        training.single(dead_feature_window=2, resume_from_checkpoint=str(checkpoint))
    )
    asked.clear()
    resumed = runner.run()
    assert asked == seen[int(checkpoint.name) // cfg.train_batch_size_tokens : 10]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_arguments_of_the_model_are_checked(training):
    more = {"model_from_pretrained_kwargs": {"random_weights": True, "seed": 3}}
    model = load_model(training.single(**more))
    assert model.cfg.n_layers == 2
    with pytest.raises(ConfigError, match=r"given 'colour'; allowed: dtype, .*family"):
        load_model(training.single(model_from_pretrained_kwargs={"colour": "red"}))


def test_an_architecture_saved_as_its_own_says_which_plugin_it_needs(monkeypatch):
    assert required_plugin(small_config("batchtopk")) is None  # saved as jumprelu

    class Ours(TopKTrainingSAEConfig):
        @classmethod
        def architecture(cls):
            return "jumprelu"

    cfg = Ours(d_in=16, d_sae=32, k=4)
    entry = Architecture("jumprelu", SAE, Ours, sae_class=SAE, sae_config_class=Ours)
    monkeypatch.setitem(ARCHITECTURES._entries, "jumprelu", entry)
    monkeypatch.setitem(ARCHITECTURES._plugins, "jumprelu", "someone")
    assert required_plugin(cfg) == "someone"


class TestEvaluationDuringTraining:
    @pytest.fixture(autouse=True)
    def wandb_disabled(self, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "disabled")

    @staticmethod
    def logging_config():
        return LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=2)

    @pytest.mark.parametrize("prefetch", [False, 2])
    def test_it_leaves_no_trace_in_the_weights(self, training, prefetch):
        plain = training.runner(training.multi()).run()
        seen = []

        def evaluator(sae, data_provider, activation_scaler):
            seen.append((sae.cfg.metadata.hook_name, next(data_provider).shape, sae.training))
            return {"noise": torch.rand(1).item()}

        cfg = training.multi(
            logger=self.logging_config(), evaluator=evaluator, prefetch_llm_batches=prefetch
        )
        evaluated = training.runner(cfg).run()
        assert seen == 5 * [(HOOK, (8, 16), False), (LAST_HOOK, (8, 16), False)]
        for name, sae in plain.items():
            assert torch.equal(sae.W_enc, evaluated[name].W_enc)

    def test_evaluators_are_named_in_the_config(self, training, monkeypatch):
        from taxolens.plugin.evaluation import training_evaluator

        seen = []

        def make_training_evaluator(cfg, model, held_out):
            assert (cfg.evaluators, model) == (["lch_height"], runner.model)
            assert held_out.source.holdout == 0.25 and held_out.source.is_held_out
            return lambda sae, *_: seen.append(sae.cfg.metadata.hook_name) or {}

        monkeypatch.setattr(training_evaluator, "make_training_evaluator", make_training_evaluator)
        tree = training.folder / "tree.csv"
        tree.write_text("parent,child\nanimal,cat\nanimal,dog\n")
        evaluation = {"evaluators": ["lch_height"], "taxonomy": str(tree), "holdout": 0.25}
        runner = training.runner(training.single(logger=self.logging_config(), **evaluation))
        runner.run()
        assert seen == 5 * [HOOK]
        evaluation["overwrite_output"] = True
        runner = training.runner(training.multi(logger=self.logging_config(), **evaluation))
        runner.run()
        assert seen[5:] == 5 * [HOOK, LAST_HOOK]

    def test_one_that_fails_costs_only_its_numbers(self, training, caplog):
        def evaluator(sae, data_provider, activation_scaler):
            raise RuntimeError("no such luck")

        cfg = training.multi(logger=self.logging_config(), evaluator=evaluator)
        assert set(training.runner(cfg).run()) == {"first", "last"}
        assert "no such luck" in caplog.text


def test_a_rehearsal_leaves_config_and_random_state_alone():
    cfg = small_config("matryoshka_batchtopk")
    cfg.matryoshka_widths = [8]
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="final matryoshka level"):
        rehearse("sae", cfg, "cpu")
    assert cfg.matryoshka_widths == [8]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rehearsal_refuses_what_is_not_finite_once_it_is_folded(monkeypatch):
    monkeypatch.setattr(
        "taxolens.plugin.training.dry_run._fold", lambda sae: sae.b_dec.data.fill_(float("inf"))
    )
    with pytest.raises(ConfigError, match=r"cannot fold .*: b_dec: not finite afterwards"):
        rehearse("sae", small_config("topk"), "cpu")


def test_a_rehearsal_encodes_with_what_is_saved(monkeypatch):
    cfg = small_config("topk")
    cfg.reshape_activations = "hook_z"  # what is saved takes heads apart
    rehearse("sae", cfg, "cpu")

    def encode(self, x):
        raise RuntimeError("selected index k out of range")

    monkeypatch.setattr("sae_lens.saes.topk_sae.TopKSAE.encode", encode)
    with pytest.raises(ConfigError, match=r"cannot encode once saved: selected index k"):
        rehearse("sae", small_config("topk"), "cpu")


def test_a_rehearsal_of_a_huge_sae_is_narrow(monkeypatch):
    monkeypatch.setattr("taxolens.plugin.training.dry_run.MAX_WEIGHTS", 100)
    monkeypatch.setattr("taxolens.plugin.training.dry_run.NARROW", 2)
    built = []
    monkeypatch.setattr(
        "taxolens.plugin.training.dry_run._train_one_step",
        lambda sae: built.append(SimpleNamespace(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae)),
    )
    rehearse("sae", small_config("topk"), "cpu")
    assert built == [SimpleNamespace(d_in=2, d_sae=32)]
