import re

import pytest
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.study.settings import gather, typed
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.registry.errors import ConfigError, UnknownNameError
from taxolens.registry.table import EVALUATORS

HOOK = "blocks.3.hook_resid_post"
BASE = {"model_name": "vit", "dataset_path": "photos", "hook_names": [HOOK], "d_sae": 64}


def write(folder, text):
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def without(*names):
    return {key: value for key, value in BASE.items() if key not in names}


def config_of(flags, widths=None, **kwargs):
    study = gather(flags={**BASE, **flags})
    return study.config(widths or {HOOK: 32}, **kwargs)


def test_one_hook_point_and_one_sae_make_the_single_config():
    config = config_of({"lr": 0.01, "l1_coefficient": 2.0, "run_name": "mine"})
    assert type(config) is VisionSAERunnerConfig
    assert config.hook_name == HOOK
    assert config.lr == 0.01
    assert config.logger.run_name == "mine"
    assert type(config.sae) is StandardTrainingSAEConfig
    assert (config.sae.d_in, config.sae.d_sae, config.sae.l1_coefficient) == (32, 64, 2.0)


def test_many_hook_points_make_the_multi_config_and_each_its_own_width():
    widths = {"blocks.0.hook_resid_post": 32, "blocks.0.mlp.hook_pre": 128}
    flags = {**without("d_sae"), "expansion_factor": 4.0}
    config = gather(flags=flags).config(widths)
    assert type(config) is VisionMultiSAERunnerConfig
    assert config.hook_names == {name: name for name in widths}
    assert {name: sae.d_sae for name, sae in config.saes.items()} == {
        "blocks.0.hook_resid_post": 128,
        "blocks.0.mlp.hook_pre": 512,
    }


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = write(
        tmp_path, "lr: 3e-4\nk: 9\ndataset_path: photos\nlogger:\n  run_name: of the file\n"
    )
    study = gather(preset="laptop", config=path, flags={"k": 5})
    assert study.runner["lr"] == 3e-4  # YAML reads 3e-4 as text
    assert study.runner["max_images"] == 20_000
    assert study.saes[""].fields["k"] == 5
    assert study.logger == {"log_to_wandb": False, "run_name": "of the file"}


def test_all_names_every_evaluator_in_files_flags_and_python(tmp_path):
    path = write(tmp_path, "evaluators: all\n")
    for study in (
        gather(config=path, flags=BASE),
        gather(flags={**BASE, "evaluators": ["all"]}),
    ):
        assert study.config({HOOK: 32}).evaluators == list(EVALUATORS)
    sae = TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4)
    settings = {"sae": sae, "model_name": "vit", "dataset_path": "photos"}
    for evaluators, expected in (
        ("all", list(EVALUATORS)),
        ("cpcc", ["cpcc"]),
        (["cpcc", "tree_probe"], ["cpcc", "tree_probe"]),
        (None, []),
    ):
        assert VisionSAERunnerConfig(**settings, evaluators=evaluators).evaluators == expected
    with pytest.raises(UnknownNameError, match=r"evaluator: not known.*given 'cpc'"):
        VisionSAERunnerConfig(**settings, evaluators=["all", "cpc"])
    with pytest.raises(UnknownNameError, match=r"evaluator: not known.*given 'cpc'"):
        choose_evaluators(["all", "cpc"], None)


def test_another_way_to_say_a_thing_replaces_the_first(tmp_path):
    study = gather(
        preset="laptop",
        flags={"dataset_path": "photos", "d_sae": 100, "training_tokens": 5000, "hook_name": HOOK},
    )
    assert study.saes[""].expansion_factor is None
    assert study.saes[""].fields["d_sae"] == 100
    assert study.epochs is None
    assert study.hook_names == (HOOK,)


def test_two_ways_at_once_are_refused():
    with pytest.raises(ConfigError, match="d_sae and expansion_factor say the same thing"):
        gather(flags={**BASE, "expansion_factor": 2.0})


def test_another_architecture_keeps_what_it_shares_with_the_presets():
    study = gather(preset="olson2025", flags={"architecture": "gated"})
    fields = study.saes[""].fields
    assert fields["l1_coefficient"] == 5.0
    study = gather(preset="olson2025", flags={"architecture": "topk", "k": 32})
    assert "l1_coefficient" not in study.saes[""].fields
    assert type(study.saes[""].config(1536, HOOK)) is TopKTrainingSAEConfig


def test_several_saes_at_every_hook_point(tmp_path):
    path = write(
        tmp_path,
        """
        model_name: vit
        dataset_path: photos
        hook_names: ["blocks.*.hook_resid_post"]
        expansion_factor: 2
        saes:
          relu: {architecture: standard, l1_coefficient: 3}
          sparse: {architecture: topk, k: 4, d_sae: 99, constraint: frozen_encoder}
        """,
    )
    config = gather(config=path).config(
        {"blocks.0.hook_resid_post": 8, "blocks.1.hook_resid_post": 8}
    )
    assert list(config.saes) == [
        f"blocks.{block}.hook_resid_post.{name}" for block in (0, 1) for name in ("relu", "sparse")
    ]
    assert config.hook_names["blocks.1.hook_resid_post.relu"] == "blocks.1.hook_resid_post"
    assert config.saes["blocks.0.hook_resid_post.relu"].d_sae == 16
    assert config.saes["blocks.0.hook_resid_post.sparse"].d_sae == 99
    assert config.sae_constraints == {
        f"blocks.{block}.hook_resid_post.sparse": "frozen_encoder" for block in (0, 1)
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": 64}, "k: saes.a has its own k; given 64; allowed: left out, or changed in saes"),
        (
            {"architecture": "jumprelu"},
            "architecture: saes.a has its own architecture; given 'jump",
        ),
        ({"constraint": "frozen_decoder"}, "constraint: saes.b has its own constraint"),
        ({"expansion_factor": 3.0}, "expansion_factor: saes.a has its own d_sae; given 3.0"),
        ({"d_sae": 32}, "d_sae: saes.a has its own d_sae"),
    ],
)
def test_a_flag_that_the_saes_of_a_file_would_overrule_is_refused(tmp_path, flags, message):
    text = "architecture: topk\nsaes: {a: {architecture: topk, k: 8, d_sae: 64}, b: {constraint: null}}"
    path, base = write(tmp_path, text), without("d_sae")
    with pytest.raises(ConfigError, match=re.escape(message)):
        gather(config=path, flags={**base, **flags})
    assert gather(config=path, flags={**base, "architecture": "topk"}).saes.keys() == {"a", "b"}
    other = {"normalize_activations": "layer_norm", "saes": {"c": {"d_sae": 32}}}
    assert gather(config=path, flags={**base, **flags, **other}).saes.keys() == {"c"}
    study = gather(config=path, flags={**base, "normalize_activations": "layer_norm"})
    assert {sae.fields["normalize_activations"] for sae in study.saes.values()} == {"layer_norm"}


def test_a_constraint_of_all_saes_and_of_one(tmp_path):
    assert config_of({"constraint": "frozen_decoder"}).constraint == "frozen_decoder"
    text = "constraint: frozen_decoder\nsaes: {a: {constraint: null}, b: {}}"
    study = gather(config=write(tmp_path, text), flags=BASE)
    config = study.config({HOOK: 32})
    assert config.sae_constraints == {f"{HOOK}.b": "frozen_decoder"}
    with pytest.raises(ConfigError, match="constraint: not known; given 'frozn'"):
        config_of({"constraint": "frozn"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainig_tokens: 5",
            r"study\.yaml: key not known .did you mean 'training_tokens'",
        ),
        (
            "logger: {wandb_projct: a}",
            "key not known .did you mean 'wandb_project'",
        ),
        (
            "sae: {l1_coeficient: 2}",
            "key not known .did you mean 'l1_coefficient'",
        ),
        ("lr: 1.0e-3\nlr: 4.0e-4", "the key 'lr' stands twice"),
        ("saes: {1: {}, '1': {}}", "the key '1' stands twice"),
        ("sae: 5", "sae: not settings; given 5; allowed: `name: value` lines"),
        ("zzzzzz: 1", "--help_all"),
        ("lr: fast", "lr: of the wrong type; given 'fast'; allowed: float"),
        ("num_workers: 1.5", "num_workers: of the wrong type; given 1.5; allowed: int"),
        ("streaming: maybe", "streaming: of the wrong type; given 'maybe'; allowed: bool"),
        ("hook_names: {a: b}", "hook_names: of the wrong type; given {'a': 'b'}; allowed: list"),
        ("saes: {a: 5}", "saes.a: not settings; given 5; allowed: "),
        ("saes: {a: {constraint: 5}}", "saes.a.constraint: of the wrong type; given 5"),
        ("saes: {a: {archtecture: topk}}", "saes: key not known; given 'a.archtecture'"),
    ],
)
def test_what_a_file_gets_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        gather(config=write(tmp_path, text), flags=BASE)


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'topk'"):
        gather(flags={**BASE, "architecture": "topkk"})


@pytest.mark.parametrize("missing", ["model_name", "dataset_path", "hook_names"])
def test_what_is_required_is_asked_for(missing):
    with pytest.raises(ConfigError, match=f"{missing}: not given"):
        gather(flags=without(missing))


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=f"d_in: not the width of {HOOK}; given 48; allowed: 32"):
        config_of({"d_in": 48})


def test_without_any_width_of_the_sae():
    with pytest.raises(ConfigError, match=r"d_sae: not given.*expansion_factor"):
        gather(flags=without("d_sae")).config({HOOK: 32})


def test_what_the_architecture_refuses_is_a_config_error():
    with pytest.raises(ConfigError, match="normalize_activations"):
        config_of({"normalize_activations": "twice"})


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "batch", "steps"),
    [
        (5, 360, 8, 225),  # 360 class tokens
        (5, 360 * 16, 32, 900),
        (1, 10_000_000, 4096, 2442),
        (2, 20, 8, 5),
    ],
)
def test_the_default_batch_fits_the_job_and_epochs_are_kept(epochs, per_epoch, batch, steps):
    config = config_of({"epochs": epochs}, tokens_per_epoch=per_epoch)
    assert config.train_batch_size_tokens == batch
    assert config.total_training_steps == steps
    assert config.training_tokens == steps * batch
    assert epochs * per_epoch <= config.training_tokens < epochs * per_epoch + batch


def test_a_batch_larger_than_the_run_is_refused():
    message = (
        r"train_batch_size_tokens: more than the 1,800 tokens of 5 epochs; given 4096; "
        r"allowed: up to 1800 \(left out, it is chosen for the run\), or epochs of at least 11.4\."
    )
    with pytest.raises(ConfigError, match=message):
        config_of({"epochs": 5, "train_batch_size_tokens": 4096}, tokens_per_epoch=360)


def test_a_run_of_few_steps_is_named(caplog):
    config_of({"training_tokens": 4000})
    assert "hardly learns" not in caplog.text
    config_of({"training_tokens": 4000, "train_batch_size_tokens": 4096})
    assert "4,096 are 1 steps of 4,096, in which an SAE hardly learns" in caplog.text
    assert (
        "819,200 tokens (more epochs), or a train_batch_size_tokens of at most 20," in caplog.text
    )


@pytest.mark.parametrize(("steps", "window"), [(3, 1), (100, 10), (225, 22), (1_000_000, 1000)])
def test_windows_are_a_share_of_the_run(steps, window):
    config = config_of({"training_tokens": 8 * steps, "train_batch_size_tokens": 8})
    assert config.dead_feature_window == window
    assert config.n_batches_for_norm_estimate == min(steps, 1000)
    given = {"dead_feature_window": 77, "n_batches_for_norm_estimate": 5}
    config = config_of({"training_tokens": 8 * steps, "train_batch_size_tokens": 8, **given})
    assert (config.dead_feature_window, config.n_batches_for_norm_estimate) == (77, 5)


def test_epochs_are_passes_over_the_images():
    config = config_of({"epochs": 3, "train_batch_size_tokens": 100}, tokens_per_epoch=1000)
    assert config.training_tokens == 3000
    with pytest.raises(ConfigError, match=r"epochs: .* unknown .*; allowed: training_tokens"):
        config_of({"epochs": 3.0})


def test_a_field_of_one_sae_only_is_refused_for_many():
    widths = {"blocks.0.hook_resid_post": 32, "blocks.1.hook_resid_post": 32}
    with pytest.raises(ConfigError, match="from_pretrained_path: no meaning for more than one SAE"):
        config_of({"from_pretrained_path": "sae"}, widths)


def test_the_sae_lives_where_the_run_does():
    config = config_of({"dtype": "float64"})
    assert config.sae.dtype == "float64"


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, "3e-4", 3e-4),
        (float, 3, 3.0),
        (int, "2e6", 2_000_000),
        (int, 1e6, 1_000_000),
        (int, 2**61 + 1, 2**61 + 1),
        (int | None, None, None),
        (bool | int, True, True),
        (bool | int, 3, 3),
        (tuple[int | None, ...], [1, None], (1, None)),
        (list[str], "one", ["one"]),
        (dict[str, int], {"a": 1}, {"a": 1}),
    ],
)
def test_values_become_what_the_field_asks_for(hint, value, expected):
    found = typed("field", value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, 2.5),
        (float, "x"),
        (bool, 1),
        (str, 3),
        (int | None, "x"),
        (list[int], ["a"]),
    ],
)
def test_values_that_cannot_are_refused(hint, value):
    with pytest.raises(ConfigError, match=r"field: of the wrong type; given .*; allowed: "):
        typed("field", value, hint)
