import pytest
import torch
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig
from taxolens.registry.errors import ConfigError, UnknownNameError
from taxolens.registry.nulls import CONSTRAINTS
from taxolens.registry.presets import PRESETS, describe_preset, load_preset, read_settings

# What a preset leaves to the command line.
GIVEN = {
    "laptop": {"dataset_path": "photos"},
    "tiny-imagenet": {"model_name": "vit", "dataset_path": "photos"},
    "trained-on-random": {"model_name": "vit", "dataset_path": "photos"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_config(name):
    flags = {"device": "cpu", **GIVEN.get(name, {})}
    study = gather(preset=name, flags=flags)
    d_in = next(iter(study.saes.values())).fields.get("d_in", 768)
    widths = {f"blocks.{block}.hook_resid_post": d_in for block in range(3)}

    config = study.config(widths, tokens_per_epoch=1_000_000)

    assert isinstance(config, VisionMultiSAERunnerConfig)
    assert list(config.saes) == [
        f"{hook}.{sae}" if sae else hook for hook in widths for sae in study.saes
    ]
    assert config.tokens == "class"
    assert config.training_tokens >= 100_000


def test_the_device_of_a_preset_is_replaced_where_it_is_not_there(tmp_path, caplog):
    """That of a file or a flag is refused later, as `test_what_cannot_work_is_said_before_training`."""
    assert load_preset("olson2025")["device"] == "cuda"
    if torch.cuda.is_available():
        pytest.skip("this machine has the preset's device")
    study = gather(preset="olson2025")
    found = "mps" if torch.backends.mps.is_available() else "cpu"
    assert study.runner["device"] == found
    assert {choice.fields["device"] for choice in study.saes.values()} == {found}
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith("device: torch cannot use it here")
    assert warning.endswith(f"{found!r} is used in place of 'cuda'.")
    caplog.clear()
    config = tmp_path / "study.yaml"
    config.write_text("device: cuda\n")
    assert gather(preset="olson2025", config=config).runner["device"] == "cuda"
    assert gather(preset="olson2025", flags={"device": "cuda"}).runner["device"] == "cuda"
    assert gather(preset="olson2025", flags={"device": "cpu"}).runner["device"] == "cpu"
    assert not caplog.records


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is_what_it_costs_and_where_it_comes_from(name):
    preset = describe_preset(name)
    assert preset.name == name
    assert len(preset.description) > 30 and not preset.description.startswith("#")
    assert preset.cost
    assert preset.source
    assert preset.description.isprintable()


def test_the_papers_own_study():
    preset = load_preset("olson2025")
    assert preset["model_name"] == "facebook/dinov2-giant"
    assert preset["hook_names"] == ["blocks.*.hook_resid_post"]
    assert preset["tokens"] == "class"
    assert preset["architecture"] == "standard"
    assert preset["sae"]["d_sae"] == 8 * preset["sae"]["d_in"] == 12_288
    assert preset["dataset_path"] == "ILSVRC/imagenet-1k"
    assert preset["taxonomy"] == "imagenet"


def test_controls_beside_each_sae():
    study = gather(preset="trained-on-random", flags=GIVEN["trained-on-random"])
    hook = "blocks.2.hook_resid_post"
    config = study.config({hook: 16}, tokens_per_epoch=100_000)
    assert set(config.hook_names_per_sae.values()) == {hook}
    assert config.sae_constraints == {f"{hook}.{kind}": kind for kind in CONSTRAINTS}
    trained, *controls = config.saes.values()
    assert all(control.to_dict() == trained.to_dict() for control in controls)
    again = VisionMultiSAERunnerConfig.from_dict(config.to_dict())
    assert again.sae_constraints == config.sae_constraints


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"preset: not known .did you mean 'laptop'"):
        load_preset("laptp")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read .not YAML"),
        ("- 1\n- 2", "contains a list"),
        ("just words", "contains a str"),
    ],
)
def test_a_file_that_is_no_study(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        read_settings(tmp_path / "missing.yaml")


def test_an_empty_file_says_nothing(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# only a comment\n")
    assert read_settings(path) == {}
