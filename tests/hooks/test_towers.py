"""Vision towers inside models that write text: taken out, and edited where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers as hf
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.models.load import from_module, load_vision_model, run_to_hooks
from taxolens.hooks.models.towers import cuts
from taxolens.registry.errors import ConfigError
from tiny_models import LLAMA, VIT, pictures, save_tiny
from torch import Tensor, nn

IMAGE = 39  # the token that stands for a place of an image
HOOK = "blocks.0.hook_resid_post"
CLIP = {**VIT, "model_type": "clip_vision_model"}
SIGLIP = {**VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
INTERN = {**VIT, "image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"}
GEMMA = {**LLAMA, "model_type": "gemma", "head_dim": 8}


def llava(**options: Any) -> nn.Module:
    """LLaVA reads the second last of the tower's hidden states: what its first block gives."""
    config = hf.LlavaConfig(
        vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, **options
    )
    return hf.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=GEMMA, image_token_index=IMAGE, projection_dim=16
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config=INTERN, text_config={**LLAMA, "model_type": "qwen2"}, image_token_id=IMAGE
    )
    return hf.InternVLForConditionalGeneration(config)


def idefics3(kind: str = "Idefics3") -> nn.Module:
    config = getattr(hf, f"{kind}Config")(
        vision_config=dict(VIT), text_config=LLAMA, image_token_id=IMAGE, scale_factor=2
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    # the model, the family of its tower, tokens of the text for each image
    "llava": (llava, "clip", 16),
    "paligemma": (paligemma, "siglip", 16),
    "internvl": (internvl, "internvl", 4),
    "idefics3": (idefics3, "siglip", 4),
    "smolvlm": (lambda: idefics3("SmolVLM"), "siglip", 4),
}


def build(variant: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[variant][0]()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    return model.eval()


def asked(variant: str) -> dict[str, Tensor]:
    """Two texts with an image each."""
    images = pictures()
    tokens = torch.tensor([[1, *[IMAGE] * MODELS[variant][2], 5, 6]] * 2)
    if variant in ("idefics3", "smolvlm"):
        images = images[:, None]
    return {"input_ids": tokens, "pixel_values": images, "attention_mask": torch.ones_like(tokens)}


def sae_of(tower: Any) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata["tokens"] = "patch"
    return sae


@pytest.mark.parametrize("variant", MODELS)
def test_the_tower_is_taken_out(variant: str) -> None:
    plain, images = build(variant), pictures()
    tower = from_module(build(variant))
    assert tower.family == MODELS[variant][1]
    base: Any = plain.model
    own = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
    with torch.no_grad():
        expected = own(images, output_hidden_states=True).hidden_states[1]
    assert torch.equal(run_to_hooks(tower, images, [HOOK])[HOOK], expected)
    assert tower.cfg.has_class_token is (MODELS[variant][1] in ("clip", "internvl"))


@pytest.mark.parametrize("variant", MODELS)
def test_an_edit_at_the_tower_changes_the_text(variant: str) -> None:
    plain, model, text = build(variant), build(variant), asked(variant)
    tower = from_module(model)
    sae = sae_of(tower)
    with torch.no_grad():
        clean = plain(**text).logits
        assert torch.equal(model(**text).logits, clean)
        with tower.saes([sae]):
            spliced = model(**text).logits
            written = model.generate(**text, max_new_tokens=3, do_sample=False)
        with tower.hooks(fwd_hooks=[(HOOK, lambda acts, hook: torch.zeros_like(acts))]):
            ablated = model(**text).logits
        assert torch.equal(model(**text).logits, clean)
        assert written.shape[0] == 2

        # the same edit by a hook of torch on the untapped model
        base: Any = plain.model
        own = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
        layers = own.encoder.layer if hasattr(own.encoder, "layer") else own.encoder.layers
        handle = layers[0].register_forward_hook(  # before transformers records the hidden states
            lambda *given: torch.zeros_like(given[-1]), prepend=True
        )
        expected = plain(**text).logits
        handle.remove()
    assert not torch.allclose(spliced, clean, atol=1e-4)
    assert not torch.allclose(ablated, clean, atol=1e-4)
    torch.testing.assert_close(ablated, expected)


def test_loaded_with_the_whole_model(tmp_path: Path) -> None:
    build("llava").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}})
    )
    alone = load_vision_model(tmp_path)
    assert (alone.family, alone.whole) == ("clip", None)
    tower = load_vision_model(tmp_path, whole=True, attn_implementation="eager")
    assert type(tower.whole).__name__ == "LlavaForConditionalGeneration"
    assert "whole" not in dict(tower.named_children())
    text = asked("llava")
    with torch.no_grad():
        clean = tower.whole(**text).logits
        torch.testing.assert_close(clean, build("llava")(**text).logits)
        with tower.saes([sae_of(tower)]):
            assert not torch.allclose(tower.whole(**text).logits, clean, atol=1e-4)
    pattern = "blocks.1.attn.hook_pattern"
    assert run_to_hooks(tower, pictures(), [pattern])[pattern].shape == (2, 2, 17, 17)


def test_a_whole_model_that_there_is_not(tmp_path: Path) -> None:
    save_tiny("dinov2", tmp_path / "dinov2")
    with pytest.raises(ConfigError, match="whole: Dinov2Model is no part of a larger model"):
        load_vision_model(tmp_path / "dinov2", whole=True)
    save_tiny("resnet", tmp_path / "resnet")
    with pytest.raises(ConfigError, match="whole: ResNetModel is no part of a larger model"):
        load_vision_model(tmp_path / "resnet", whole=True)
    build("llava").save_pretrained(tmp_path / "llava")
    with pytest.raises(ConfigError, match="hooks of a 'wrapped' tower act in its own forward"):
        load_vision_model(tmp_path / "llava", family="wrapped", whole=True)


def test_tiles_are_left_out_with_a_warning(tmp_path: Path) -> None:
    build("internvl").save_pretrained(tmp_path)
    settings = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True}
    settings |= {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="cuts an image into several: .* resized to 32 x 32"):
        model = load_vision_model(tmp_path)
    described = preprocess_for(model).describe()
    assert (described["size"], described["mean"], described["crop"]) == ([32, 32], [0.1] * 3, None)


def test_which_settings_cut_an_image() -> None:
    """Llama 4's processor has a largest number of pieces, and no switch as GOT-OCR 2's has."""
    assert cuts({"max_patches": 16}) == "cuts an image into several"
    assert cuts({"max_patches": 12, "crop_to_patches": True}) == "cuts an image into several"
    assert cuts({"max_patches": 12, "crop_to_patches": False}) is None
    with pytest.warns(UserWarning, match="cuts an image into several: .* resized to 32 x 32"):
        model = from_module(build("internvl"), processor=hf.LlavaNextImageProcessorPil())
    assert model.processor is None


def test_a_switch_that_the_file_leaves_out(tmp_path: Path) -> None:
    """What the file leaves out is as the processor has it: this one cuts nothing."""
    build("internvl").save_pretrained(tmp_path)
    settings = {"image_processor_type": "GotOcr2ImageProcessor", "max_patches": 12}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_vision_model(tmp_path).processor.crop_to_patches is False


def test_towers_of_rows_of_patches_are_refused() -> None:
    config = hf.Glm4vVisionConfig(depth=1, hidden_size=16, num_heads=2, intermediate_size=16)
    with pytest.raises(ConfigError, match="takes rows of patches of images of any size, no images"):
        from_module(hf.Glm4vVisionModel(config))
