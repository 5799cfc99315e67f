import dataclasses
import inspect
import json
import logging
import re
from types import SimpleNamespace

import pytest
import yaml
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAEConfig,
    TranscoderConfig,
)
from taxolens.plugin.training.config import (
    VisionFields,
    VisionLoggingConfig,
    VisionMultiSAERunnerConfig,
    VisionSAERunnerConfig,
    sae_config_for_hook,
    sae_config_from_dict,
    sae_configs_for_hooks,
)
from taxolens.registry.errors import ConfigError, UnknownNameError

SAE = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4)
QUIET = {"verbose": False}


def single(**changes):
    return VisionSAERunnerConfig(**{"sae": SAE, "dataset_path": "photos", **QUIET, **changes})


def multi(**changes):
    saes = {"a": SAE, "b": StandardTrainingSAEConfig(d_in=16, d_sae=8)}
    settings = {"saes": saes, "hook_names": "blocks.0.hook_resid_post", "dataset_path": "photos"}
    return VisionMultiSAERunnerConfig(**{**settings, **QUIET, **changes})


CONFIGS = {
    "single": lambda: single(tokens="patch", evaluators=["lch_height"], image_size=32, lr=3e-5),
    "matryoshka": lambda: single(
        sae=MatryoshkaBatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, matryoshka_widths=[8, 32]),
        use_cached_activations=True,
        logger=LoggingConfig(log_to_wandb=False, wandb_id="mine"),
    ),
    "multi": lambda: multi(keep_checkpoints=2, lr_end=0.0),
    "controls": lambda: multi(saes={"a": SAE, "b": SAE}, constraint={"b": "frozen_decoder"}),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_config_survives_being_written_and_read(tmp_path, kind, suffix):
    cfg = CONFIGS[kind]()
    path = cfg.save(tmp_path / f"config{suffix}")
    read = type(cfg).load(path)
    assert read.to_dict() == cfg.to_dict()
    assert type(read) is type(cfg)
    assert read.seqpos_slice == (None,)
    text = path.read_text()
    plain = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    assert plain == cfg.to_dict()


def test_every_added_field_is_explained():
    explained = inspect.getdoc(VisionFields)
    missing = [f.name for f in dataclasses.fields(VisionFields) if f"{f.name} (" not in explained]
    assert not missing


def test_the_defaults_are_those_of_images():
    cfg = single()
    assert cfg.model_class_name == "SAETransformerBridge"
    assert (cfg.tokens, cfg.split, cfg.streaming, cfg.prepend_bos) == (
        "class",
        "train",
        False,
        False,
    )


@pytest.mark.parametrize(
    ("read", "given", "said"),
    [
        (
            VisionSAERunnerConfig,
            {"training_token": 5},
            "training_token: not known .did you mean 'training_tokens'",
        ),
        (
            VisionSAERunnerConfig,
            {"logger": {"wandb_projet": "x"}},
            "logger.wandb_projet: .*'wandb_project'",
        ),
        (VisionSAERunnerConfig, {"sae": {"architecture": "topk", "kk": 3}}, "sae.kk: .*'k'"),
        (VisionMultiSAERunnerConfig, {"hook_name": "x"}, "hook_name: .*'hook_names'"),
        (
            VisionMultiSAERunnerConfig,
            {"saes": {"a": {"architecture": "topk", "dsae": 3}}},
            "saes.a.dsae: .*'d_sae'",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known(read, given, said):
    known = (single if read is VisionSAERunnerConfig else multi)().to_dict()
    with pytest.raises(ConfigError, match=said):
        read.from_dict({**known, **given})


@pytest.mark.parametrize(
    ("missing", "read"),
    [
        ("sae", VisionSAERunnerConfig),
        ("saes", VisionMultiSAERunnerConfig),
        ("hook_names", VisionMultiSAERunnerConfig),
    ],
)
def test_what_must_be_given_is_named(missing, read):
    known = (single if read is VisionSAERunnerConfig else multi)().to_dict()
    del known[missing]
    with pytest.raises(ConfigError, match=f"^{missing}: not given"):
        read.from_dict(known)


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1, 2]", "allowed: `name: value` lines"), ("a: [", "config.yaml"), (None, "No such file")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, said):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        VisionSAERunnerConfig.load(path)


def test_an_architecture_that_cannot_be_trained_is_answered_with_those_that_can():
    with pytest.raises(UnknownNameError, match=r"did you mean 'topk'.*given 'top_k'"):
        sae_config_from_dict({"architecture": "top_k"}, "sae")
    for name in ("transcoder", "skip_transcoder", "temporal"):
        with pytest.raises(UnknownNameError, match=f"not trained.*given '{name}'; allowed: .*topk"):
            sae_config_from_dict({"architecture": name}, "sae")
    with pytest.raises(ConfigError, match="allowed: a mapping with an architecture"):
        sae_config_from_dict({"d_in": 3}, "sae")
    with pytest.raises(ConfigError, match=r"sae: .*d_sae"):
        sae_config_from_dict({"architecture": "topk", "d_in": 3}, "sae")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": "cls"}, "tokens: not possible; given 'cls'; allowed: .*class"),
        (
            {"training_tokens": 0},
            "training_tokens: not possible; given 0; allowed: an integer above 0",
        ),
        (
            {"training_tokens": 1e6},
            "training_tokens: not possible; given 1000000.0; allowed: an integer",
        ),
        ({"lr": "3e-4"}, "lr: not possible; given '3e-4'; allowed: a number above 0"),
        ({"lr": float("nan")}, "lr: not possible; given nan"),
        ({"num_workers": True}, "num_workers: not possible; given True"),
        (
            {"max_corrupt_share": 1.5},
            "max_corrupt_share: not possible; given 1.5; allowed: a number from 0 to 1",
        ),
        ({"lr_scheduler_name": "cosine"}, "lr_scheduler_name: .*cosineannealing"),
        ({"dtype": "float31"}, "dtype: not possible; given 'float31'; allowed: .*float32"),
        (
            {"checkpoint_id": "a/b"},
            "checkpoint_id: not possible; given 'a/b'; allowed: a name that a folder",
        ),
        (
            {"keep_checkpoints": 0},
            "keep_checkpoints: not possible; given 0; allowed: an integer above 0, or none",
        ),
        (
            {"constraint": "frozen"},
            "constraint: not known; given 'frozen'; allowed: frozen_decoder, .*, or none",
        ),
        ({"constraint": {"sae": "frozen_decoder"}}, "constraint: not known; given {'sae'"),
        (
            {"constraint": "frozen_decoder", "from_pretrained_path": "sae"},
            "from_pretrained_path: .* no random start .*; given 'sae'; allowed: none, or no const",
        ),
        (
            {"seqpos_slice": (1, 2)},
            r"seqpos_slice: no meaning for images; given \(1, 2\).*`tokens`",
        ),
        (
            {"hook_head_index": -1},
            "hook_head_index: not possible; given -1; allowed: an integer, 0",
        ),
        ({"hook_head_index": True}, "hook_head_index: not possible; given True"),
        ({"model_kwargs": {"a": 1}}, "model_kwargs: .*model_from_pretrained_kwargs"),
        (
            {"sae": TopKSAEConfig(d_in=16, d_sae=32)},
            "given 'TopKSAEConfig'; allowed: TopKTrainingSAEConfig",
        ),
        (
            {"sae": TranscoderConfig(d_in=16, d_sae=32, apply_b_dec_to_input=False)},
            "can be loaded but not trained.*given 'transcoder'",
        ),
        ({"sae": None}, "sae: not possible; given None; allowed: the training config"),
        ({"sae": TopKTrainingSAEConfig(d_in=0, d_sae=32)}, "sae.d_in: not possible; given 0"),
        (
            {
                "lr_scheduler_name": "cosineannealing",
                "lr_warm_up_steps": 9,
                "training_tokens": 4096 * 9,
                "train_batch_size_tokens": 4096,
            },
            "lr_warm_up_steps .*below the 9 steps",
        ),
        (
            {"lr_warm_up_steps": 9, "training_tokens": 8 * 9, "train_batch_size_tokens": 8},
            "lr_warm_up_steps .*given 9; allowed: below the 9 steps",
        ),
        (
            {"lr_decay_steps": 900, "training_tokens": 8 * 9, "train_batch_size_tokens": 8},
            "lr_decay_steps.*given 900; allowed: below the 9 steps .*: more tokens, a smaller batch, "
            "or lr_warm_up_steps 0 and lr_decay_steps 4, half of the steps",
        ),
        (
            {
                "sae": StandardTrainingSAEConfig(d_in=16, d_sae=32, l1_warm_up_steps=10),
                "training_tokens": 8 * 9,
                "train_batch_size_tokens": 8,
            },
            "sae.l1_warm_up_steps: longer than the run; given 10; allowed: up to 9",
        ),
        (
            {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 1, "lr_end": 0.0},
            "lr_end above 0",
        ),
        (
            {
                "lr_scheduler_name": "cosineannealingwarmrestarts",
                "n_restart_cycles": 3,
                "training_tokens": 4096 * 2,
                "train_batch_size_tokens": 4096,
            },
            "n_restart_cycles: not possible; given 3; allowed: at most 2",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(changes, said):
    with pytest.raises(ConfigError, match=said):
        single(**changes)


def test_the_saes_of_a_multi_config_are_checked_each():
    with pytest.raises(ConfigError, match="saes: missing; given None"):
        multi(saes={})
    with pytest.raises(ConfigError, match=r"'../a'; allowed: a name that a folder can have"):
        multi(saes={"../a": SAE})
    with pytest.raises(ConfigError, match=r"b.d_sae: not possible; given -1"):
        multi(saes={"a": SAE, "b": BatchTopKTrainingSAEConfig(d_in=16, d_sae=-1)})


def test_each_sae_of_a_multi_config_has_its_constraint():
    saes = {"a": SAE, "b": SAE}
    assert multi(saes=saes).sae_constraints == {}
    both = multi(saes=saes, constraint="frozen_encoder")
    assert both.sae_constraints == {"a": "frozen_encoder", "b": "frozen_encoder"}
    one = multi(saes=saes, constraint={"b": "frozen_decoder", "a": None})
    assert one.sae_constraints == {"b": "frozen_decoder"}
    with pytest.raises(ConfigError, match="constraint: not known; given 'thaw'"):
        multi(saes=saes, constraint={"a": "thaw"})
    with pytest.raises(ConfigError, match=r"constraint of SAE: not known.*given 'c'"):
        multi(saes=saes, constraint={"c": "frozen_decoder"})


def test_settings_of_texts_are_ignored_with_a_warning(caplog):
    single(prepend_bos=True, activations_mixing_fraction=0.1)
    assert "ignored: prepend_bos, activations_mixing_fraction" in caplog.text


def test_training_tokens_are_whole_batches(caplog):
    caplog.set_level(logging.INFO)
    cfg = single(training_tokens=10_000, train_batch_size_tokens=4096)
    assert cfg.training_tokens == 3 * 4096
    assert cfg.total_training_steps == cfg.to_sae_trainer_config().total_training_steps == 3
    assert "10000 rounded up to 12288, 3 batches of 4096" in caplog.text
    assert single(training_tokens=8192).training_tokens == 8192


def test_a_stable_checkpoint_folder_can_be_chosen():
    assert single(checkpoint_id="mine").checkpoint_path == "checkpoints/mine"
    logger = LoggingConfig(wandb_id="abc")
    assert single(logger=logger).checkpoint_path == "checkpoints/abc"
    assert single().checkpoint_path != single().checkpoint_path
    assert single(checkpoint_path=None, checkpoint_id="mine").checkpoint_path is None
    read = VisionSAERunnerConfig.from_dict(
        {"sae": SAE.to_dict(), "checkpoint_path": "elsewhere", "checkpoint_id": "mine"}
    )
    assert read.checkpoint_path == "elsewhere/mine"
    assert VisionSAERunnerConfig.from_dict(read.to_dict()).checkpoint_path == "elsewhere/mine"


def test_cached_activations_have_a_folder_for_their_hook_points_and_tokens():
    paths = [
        single(use_cached_activations=True, model_name="a/b", tokens=tokens).cached_activations_path
        for tokens in ("class", "patch")
    ]
    assert paths[0] == "activations/photos/a_b/blocks.11.hook_resid_post_class"
    assert paths[1] != paths[0]
    hooks = [{"a": "blocks.0.hook_resid_post", "b": f"blocks.{i}.hook_resid_post"} for i in (1, 2)]
    many = [multi(use_cached_activations=True, hook_names=names) for names in hooks]
    assert many[0].cached_activations_path != many[1].cached_activations_path
    assert (
        single(use_cached_activations=True, cached_activations_path="x").cached_activations_path
        == "x"
    )


def test_a_template_becomes_one_sae_for_every_hook_point(vit):
    template = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=1, d_sae=64, k=4, matryoshka_widths=[8, 64]
    )
    saes, hook_names = sae_configs_for_hooks(vit, ["blocks.*.hook_resid_post"], template)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert list(saes) == names
    assert hook_names == {name: name for name in names}
    assert [(sae.d_in, sae.d_sae) for sae in saes.values()] == [(16, 64), (16, 64)]
    assert saes[names[0]].matryoshka_widths is not saes[names[1]].matryoshka_widths
    wide = sae_config_for_hook(vit, "blocks.0.mlp.hook_post", SAE, expansion_factor=2)
    assert (wide.d_in, wide.d_sae, wide.k) == (32, 64, 4)
    assert (SAE.d_in, SAE.d_sae) == (16, 32)


def test_wandb_refusing_a_file_costs_a_warning(caplog, tmp_path):
    cfg = single()
    assert isinstance(cfg.logger, VisionLoggingConfig)
    cfg.logger.log(None, tmp_path / "weights", tmp_path / "cfg", None)
    assert "W&B did not take the SAE" in caplog.text


def test_wandb_gets_names_that_it_allows(monkeypatch):
    logged = []
    monkeypatch.setattr(LoggingConfig, "log", lambda self, trainer, *_: logged.append(trainer))
    sae = SimpleNamespace(get_name=lambda: f"sae_/my models/{'x' * 200}/vït_blocks.0")
    single().logger.log(SimpleNamespace(sae=sae, cfg="cfg"), "weights", "cfg.json", None)
    (trainer,) = logged
    assert trainer.cfg == "cfg"
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", trainer.sae.get_name())
    assert trainer.sae.get_name().endswith("v_t_blocks.0")
