"""Loading: folders, the hub's cache, processors, controls, and what is refused before long work."""

from __future__ import annotations

import json
import shutil
import sys
import types
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.models.bridge import VisionBridge
from taxolens.hooks.models.hooked_module import HookedVisionModel
from taxolens.hooks.models.load import (
    find_family,
    from_module,
    hook_d_in,
    hook_n_tokens,
    load_vision_model,
    run_to_hooks,
)
from taxolens.hooks.models.tokens import tokens_per_image
from taxolens.registry.errors import CheckpointError, ConfigError, UnknownNameError
from tiny_models import VIT, pictures, preprocessing, save_tiny, tapped, tiny_model

POST = "blocks.1.hook_resid_post"
FAMILY_OF = {
    "vit_classifier": "vit",
    "deit_teacher": "vit",
    "dinov2_swiglu": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "dinov3": "dinov3",
    "clip_projection": "clip",
    "clip_both": "clip",
    "clip_classifier": "clip",
    "siglip_both": "siglip",
    "resnet": "wrapped",
    "dinov3_convnext": "wrapped",
    "vit_msn": "wrapped",
    "beit_classifier": "beit",
    "ijepa_classifier": "ijepa",
    "aimv2_both": "aimv2",
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and a hub that is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_hub_cache(cache: Path, name: str, folder: Path) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")


def assert_same_activations(model: Any, variant: str) -> None:
    """At the last block, as in the model that was saved: eager and sdpa differ by rounding."""
    expected = run_to_hooks(tapped(variant), pictures(), [POST])[POST]
    torch.testing.assert_close(run_to_hooks(model, pictures(), [POST])[POST], expected)


@pytest.mark.parametrize("variant", FAMILY_OF)
def test_a_folder_is_loaded_with_its_weights(variant: str, tmp_path: Path) -> None:
    folder = save_tiny(variant, tmp_path / variant)
    model = load_vision_model(folder)
    assert model.family == FAMILY_OF[variant]
    assert isinstance(model, HookedVisionModel if model.family == "wrapped" else VisionBridge)
    assert not model.training
    assert model.cfg.model_name == str(folder)
    assert_same_activations(model, variant)


@pytest.mark.parametrize(
    ("variant", "processor"),
    [
        ("vit", "ViTImageProcessorPil"),
        ("dinov2", "BitImageProcessorPil"),
        ("clip", "CLIPImageProcessorPil"),
        ("siglip", "SiglipImageProcessorPil"),
        ("dinov3", None),  # needs torchvision; its settings are there all the same
    ],
)
def test_processors_work_through_pil(variant: str, processor: str | None, tmp_path: Path) -> None:
    model = load_vision_model(save_tiny(variant, tmp_path))
    assert model.preprocessor_config is not None
    assert model.preprocessor_config["size"] == {"height": 32, "width": 32}
    assert (type(model.processor).__name__ if model.processor else None) == processor


def saved_with(settings: dict[str, Any], folder: Path) -> Path:
    save_tiny("vit_msn", folder, processor=False)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


NEEDS_TORCHVISION = pytest.param(
    "PPLCNetImageProcessor",
    marks=pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is installed"),
)


@pytest.mark.parametrize("kind", [NEEDS_TORCHVISION, "SomebodysImageProcessor"])
def test_steps_of_a_processor_that_are_not_known(kind: str, tmp_path: Path) -> None:
    """PP-LCNet's gives blue, green, red: resized and cropped images would be other ones."""
    settings = {"image_processor_type": kind, "size": {"height": 32, "width": 32}}
    with pytest.raises(
        ConfigError, match=f"its image processor, {kind}, cannot be loaded.*model, pro"
    ):
        load_vision_model(saved_with(settings, tmp_path))


def test_a_processor_is_known_by_its_model(tmp_path: Path) -> None:
    """Of settings that name no type: DINOv3's resizes in floating point."""
    folder = save_tiny("dinov3", tmp_path)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    described = preprocess_for(load_vision_model(folder)).describe()
    assert described["resize_rescaled"] is True


def test_no_preprocessing_is_a_warning(tmp_path: Path) -> None:
    folder = save_tiny("dinov2", tmp_path, processor=False)
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        model = load_vision_model(folder)
    assert model.processor is None and model.preprocessor_config is None


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Beit", "IJepa", "DINOv3ViT"])
def test_a_model_of_images_that_are_no_squares(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**{**VIT, "image_size": [32, 64]})
    plain = getattr(transformers, f"{kind}Model")(config).eval()
    images = pictures(size=(32, 64))
    with torch.no_grad():
        states = plain(images, output_hidden_states=True).hidden_states
    model = from_module(plain)
    acts = run_to_hooks(model, images, ["hook_embed", POST])
    assert torch.equal(acts["hook_embed"], states[0]) and torch.equal(acts[POST], states[2])
    assert tokens_per_image(model, "all", hook_name=POST) == acts[POST].shape[1]


def test_a_hub_name_is_found_in_the_cache(offline: Path, tmp_path: Path) -> None:
    put_into_hub_cache(offline, "acme/tiny-dino", save_tiny("dinov2", tmp_path / "folder"))
    model = load_vision_model("acme/tiny-dino")
    assert (model.cfg.model_name, model.family) == ("acme/tiny-dino", "dinov2")
    assert type(model.processor).__name__ == "BitImageProcessorPil"
    assert_same_activations(model, "dinov2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_was_asked_for(attention: str, tmp_path: Path) -> None:
    model = load_vision_model(save_tiny("dinov2", tmp_path), attn_implementation=attention)
    assert model.attn_implementation == attention


def test_dtype_and_hook_names(tmp_path: Path) -> None:
    folder = save_tiny("dinov2", tmp_path)
    model = load_vision_model(folder, dtype="bfloat16", hook_names=["blocks.*.hook_resid_post"])
    assert run_to_hooks(model, pictures(), [POST])[POST].dtype == torch.bfloat16
    assert load_vision_model(folder, dtype=torch.float64).cfg.dtype == torch.float64


@pytest.mark.parametrize("variant", ["dinov2", "resnet"])
def test_a_control_of_random_weights(variant: str, tmp_path: Path) -> None:
    folder = save_tiny(variant, tmp_path)
    state = torch.get_rng_state()

    def acts(**options: Any) -> torch.Tensor:
        return run_to_hooks(load_vision_model(folder, **options), pictures(), [POST])[POST]

    trained, control = acts(), acts(random_weights=True, seed=1)
    assert trained.shape == control.shape
    assert not torch.allclose(trained, control)
    assert torch.equal(control, acts(random_weights=True, seed=1))
    assert not torch.allclose(control, acts(random_weights=True, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    transformers.ViTModel(tiny_model("vit").config, add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing("vit")))
    with pytest.warns(UserWarning, match=r"has no weights for pooler\.dense\.bias"):
        load_vision_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_implementation": "fast"},
            "attn_implementation: not known; given 'fast'; allowed: sdpa, eager",
        ),
        ({"dtype": "int8"}, "dtype: not known; given 'int8'; allowed: float32, bfloat16"),
        ({"family": "dino"}, "vision model family: not known (did you mean 'dinov"),
        ({"family": "siglip"}, "family: Dinov2Model is not built like one"),
        (
            {"hook_names": ["blocks.7.hook_resid_post"]},
            "given 'blocks.7.hook_resid_post'",
        ),
        (
            {"hook_names": ["blocks.0.attn.hook_pattern"]},
            "given 'sdpa'; allowed: eager",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_tiny("dinov2", tmp_path)
    with pytest.raises(ConfigError) as error:
        load_vision_model(folder, **options)
    assert message in str(error.value)


def test_a_transformers_that_builds_the_family_differently_is_named() -> None:
    """As transformers before 5.18, whose DINOv2 called the projections `query`, `key`, `value`."""
    model = tiny_model("dinov2")
    for block in model.encoder.layer:
        block.attention.query = block.attention._modules.pop("q_proj")
    needed = next(r for r in requires("taxolens") or () if r.startswith("transformers"))
    with pytest.raises(ConfigError) as error:
        from_module(model)
    assert str(error.value) == (
        "family: 'dinov2' does not fit how transformers builds Dinov2Model ('Dinov2Attention' "
        f"object has no attribute 'q_proj'); given transformers {transformers.__version__}; "
        f"allowed: the {needed} that taxolens requires, or family='wrapped'."
    )


def test_wrong_settings_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"attn_implementation: .*'sdpa'; allowed: eager"):
        load_vision_model("no/such-model", hook_names=["blocks.0.attn.hook_pattern"])
    with pytest.raises(UnknownNameError, match="vision model family: not known"):
        load_vision_model("no/such-model", family="resnet50")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "C:\\models", "", "~/x"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a folder.* allowed: .* facebook/dinov2-base"):
        load_vision_model(name)


def test_a_name_that_the_hub_does_not_have(offline: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name: its config cannot (.|\n)*'acme/nothing'"):
        load_vision_model("acme/nothing")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    folder = save_tiny("dinov2", tmp_path)
    with pytest.raises(
        ConfigError, match=rf"revision: the model is a folder, {folder}; given 'v1'"
    ):
        load_vision_model(folder, revision="v1")


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_vision_model(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="config cannot be read"):
        load_vision_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="no_such_model"):
        load_vision_model(tmp_path)
    (tmp_path / "config.json").write_text(tiny_model("dinov2").config.to_json_string())
    with pytest.raises(ConfigError, match="model_name: cannot be loaded"):
        load_vision_model(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    folder = save_tiny("dinov2", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"the weights cannot be read.*'{folder}'"):
        load_vision_model(folder)


def test_no_remote_code_by_default(tmp_path: Path) -> None:
    code = "raise SystemExit('remote code ran')"
    (tmp_path / "configuration_evil.py").write_text(code)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}})
    )
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_vision_model(tmp_path)


def test_a_family_can_be_forced(tmp_path: Path) -> None:
    model = load_vision_model(save_tiny("dinov2", tmp_path), family="wrapped")
    assert isinstance(model, HookedVisionModel) and model.family == "wrapped"
    assert_same_activations(model, "dinov2")


def test_a_tapped_model_is_not_tapped_again() -> None:
    plain = tiny_model("dinov2")
    model = from_module(plain)
    with pytest.raises(ConfigError, match="tapped already"):
        from_module(plain)
    assert from_module(model) is model
    wrapped = from_module(tiny_model("resnet"))
    assert from_module(wrapped) is wrapped


def test_families_are_found_by_class_architecture_or_type() -> None:
    assert find_family(None, tiny_model("siglip")).name == "siglip"
    assert find_family(transformers.Dinov2Config()).name == "dinov2"
    assert find_family(transformers.SwinConfig()).name == "wrapped"
    assert find_family(transformers.CLIPConfig(architectures=["CLIPModel"])).name == "clip"


def test_someone_elses_bridge_is_adopted(tmp_path: Path) -> None:
    """TransformerLens's own ViT bridge knows nothing of prefix tokens."""
    folder = save_tiny("deit", tmp_path)
    booted: Any = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    model = from_module(booted)
    assert model is booted and isinstance(model, VisionBridge)
    assert (model.family, model.cfg.n_prefix_tokens, model.cfg.patch_size) == ("vit", 2, 8)
    assert_same_activations(model, "deit")


def test_an_edit_of_the_pattern_acts_in_someone_elses_bridge(tmp_path: Path) -> None:
    folder = save_tiny("vit", tmp_path)
    booted: Any = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    booted.original_model.set_attn_implementation("eager")
    hook = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0)
    edited, ours = (
        model.run_with_hooks(pictures(), fwd_hooks=[hook])
        for model in (from_module(booted), tapped("vit"))
    )
    torch.testing.assert_close(edited, ours)
    assert not torch.allclose(edited, booted(pictures()))


def test_patches_that_are_not_square_are_refused() -> None:
    """Their tokens would be counted by the height of a patch alone."""
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": [8, 4]}
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    message = r"^patch_size: patches that are not square are not supported; given \(8, 4\)"
    with pytest.raises(ConfigError, match=message):
        from_module(transformers.ViTModel(config))
    wrapped = from_module(transformers.ViTModel(config), family="wrapped")
    assert tokens_per_image(wrapped, "all", hook_name="blocks.0.hook_resid_post") == 4 * 8 + 1


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ViTMAE", "Beit", "IJepa"])
def test_positions_of_no_square_are_those_of_one_size(kind: str) -> None:
    """Hugging Face interpolates any as those of a square: 2 x 8 patches as 4 x 4."""
    sizes = {**VIT, "patch_size": 8, "use_absolute_position_embeddings": True}

    def made(**size: Any) -> Any:
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **size})
        return from_module(getattr(transformers, f"{kind}Model")(config).eval())

    model, hook = made(image_size=[16, 64]), "blocks.0.hook_resid_post"
    trained = torch.zeros(1, 3, 16, 64)
    assert run_to_hooks(model, trained, [hook])[hook].shape[1] == model.cfg.n_ctx
    for size in ((32, 32), (32, 128), (64, 16)):
        with pytest.raises(ConfigError, match=r"image_size: .* learned positions .* 16 x 64"):
            model(torch.zeros(1, 3, *size))
        with pytest.raises(ConfigError, match=r"image_size: .* learned positions .* 16 x 64"):
            hook_d_in(model, hook, size)
    square = made(image_size=[33, 32])
    assert hook_n_tokens(square, hook, (64, 64)) == square.cfg.n_prefix_tokens + 64


def test_rotary_positions_are_those_of_any_size() -> None:
    config = transformers.DINOv3ViTConfig(**{**VIT, "image_size": [16, 64], "patch_size": 8})
    model, hook = from_module(transformers.DINOv3ViTModel(config)), "blocks.0.hook_resid_post"
    assert hook_n_tokens(model, hook, (32, 32)) == model.cfg.n_prefix_tokens + 16


class TinyTimm(torch.nn.Module):
    """A model with the attributes that timm's have."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc(x)

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 0.5, "mean": (0.1, 0.2, 0.3)}
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
        self.reg_token = torch.nn.Parameter(torch.zeros(1, 2, 8))
        self.patch_embed = torch.nn.Conv2d(3, 8, 8, 8)
        self.blocks = torch.nn.Sequential(self.Block(), self.Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(x), -1, -1)
        return self.blocks(torch.cat([prefix, patches], dim=1)).mean(1)


def test_timm_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {"architecture": "tiny", "pretrained_cfg": TinyTimm().pretrained_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: list[tuple[str, bool]] = []

    def create_model(name: str, *, pretrained: bool) -> torch.nn.Module:
        asked.append((name, pretrained))
        return TinyTimm()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    model = load_vision_model(tmp_path)
    load_vision_model(tmp_path, random_weights=True)
    assert asked == [(f"local-dir:{tmp_path}", True), (f"local-dir:{tmp_path}", False)]
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_prefix_tokens) == (2, 8, 3)
    assert run_to_hooks(model, pictures(size=16), [POST])[POST].shape == (2, 3 + 4, 8)
    settings = model.preprocessor_config
    assert settings is not None and settings["size"] == {"shortest_edge": 32}
    assert settings["crop_size"] == {"height": 16, "width": 16}
    assert settings["image_mean"] == [0.1, 0.2, 0.3]
    assert from_module(TinyTimm()).preprocessor_config == settings


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "tiny"}')
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'taxolens\[timm\]'"):
        load_vision_model(tmp_path)
