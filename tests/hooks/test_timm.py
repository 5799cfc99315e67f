"""timm's vision transformers under TransformerLens's names. Where timm is not installed, nothing is tested."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.activations.extract import model_fingerprint
from taxolens.hooks.models.load import from_module, load_vision_model, run_to_hooks
from taxolens.hooks.models.tokens import tokens_per_image
from tiny_models import pictures
from torch import Tensor, nn

timm = pytest.importorskip("timm", exc_type=ImportError)

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
EVA = {**TINY, "dynamic_img_size": False}
# name of timm -> arguments, prefix tokens
MODELS: dict[str, tuple[str, dict[str, Any], tuple[bool, int]]] = {
    "plain": ("vit_tiny_patch16_224", {**TINY, "num_classes": 5}, (True, 0)),
    "clip": ("vit_base_patch32_clip_224", {**TINY, "num_classes": 0}, (True, 0)),
    "siglip": ("vit_base_patch16_siglip_224", {**TINY, "num_classes": 0}, (False, 0)),
    "dinov2": ("vit_small_patch14_reg4_dinov2", TINY, (True, 4)),
    "swiglu": ("vit_giant_patch14_dinov2", {**TINY, "mlp_ratio": 2.0}, (True, 0)),
    # 4 pixels of the CNN's stride, 2 of the patches
    "hybrid": ("vit_tiny_r_s16_p8_224", {**TINY, "patch_size": 2}, (True, 0)),
    "qk_norm": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True, "global_pool": "avg"}, (True, 0)),
    "eva02": ("eva02_tiny_patch14_336", {**EVA, "mlp_ratio": 2.0}, (True, 0)),
    "eva_fused": ("eva02_large_patch14_224", {**EVA, "qkv_fused": True}, (True, 0)),
    "perception": ("vit_pe_core_base_patch16_224", {**EVA, "ref_feat_shape": (4, 4)}, (True, 0)),
    "perception_lang": (
        "vit_pe_lang_large_patch14_448",
        {**EVA, "ref_feat_shape": (4, 4)},
        (True, 0),
    ),
    "dinov3": ("vit_small_patch16_dinov3", EVA, (True, 4)),
}
POSTS = [f"blocks.{i}.hook_resid_post" for i in range(2)]


def build(variant: str, attention: str = "eager") -> nn.Module:
    name, arguments, _ = MODELS[variant]
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention != "eager"
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", MODELS)
def test_equal_to_timm_to_the_bit(variant: str, attention: str) -> None:
    plain, model = build(variant, attention), from_module(build(variant, attention))
    assert model.family == "timm"
    states: list[Tensor] = []
    inputs: list[Tensor] = []
    plain.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    for block in plain.blocks:
        block.register_forward_hook(lambda _, given, output: states.append(output))
    with torch.no_grad():
        output = plain(pictures())
        got, cache = model.run_with_cache(pictures())
    assert torch.equal(got, output)
    stopped = run_to_hooks(model, pictures(), ["hook_embed", *POSTS])
    for name, expected in zip(["hook_embed", *POSTS], [*inputs, *states]):
        assert torch.equal(cache[name], expected), name
        assert torch.equal(stopped[name], expected), name
    has_class, n_registers = MODELS[variant][2]
    assert (model.cfg.has_class_token, model.cfg.n_register_tokens) == (has_class, n_registers)
    assert (model.cfg.patch_size, model.cfg.n_channels) == (8, 3)
    assert (
        tokens_per_image(model, "patch", 32)
        == stopped[POSTS[0]].shape[1] - model.cfg.n_prefix_tokens
    )
    assert stopped[POSTS[0]].shape[1] == model.cfg.n_ctx == has_class + n_registers + 16


@pytest.mark.parametrize("variant", MODELS)
def test_parts_add_up(variant: str) -> None:
    model = from_module(build(variant))
    parts = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.1.{part}" for part in parts]
    names += [f"blocks.1.attn.hook_{part}" for part in ("q", "k", "v", "z", "pattern")]
    names += ["blocks.1.ln1.hook_out", "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"]
    pre, attention, mid, mlp, post, q, k, v, z, pattern, normed, before, after = run_to_hooks(
        model, pictures(), names
    ).values()
    assert torch.equal(pre + attention, mid) and torch.equal(mid + mlp, post)
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    plain = build(variant).blocks[1].attn
    with torch.no_grad():
        if plain.qkv is not None:
            bias = plain.qkv.bias
            if getattr(plain, "q_bias", None) is not None:
                bias = torch.cat((plain.q_bias, plain.k_bias, plain.v_bias))
            expected = torch.nn.functional.linear(normed, plain.qkv.weight, bias).chunk(3, -1)
        else:
            expected = [part(normed) for part in (plain.q_proj, plain.k_proj, plain.v_proj)]
        for found, wanted in zip((q, k, v), expected):
            torch.testing.assert_close(found, wanted)
        heads = v.unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = plain.norm((pattern @ heads).transpose(1, 2).flatten(2))
        torch.testing.assert_close(z, mixed)
    assert before.shape == after.shape == (2, model.cfg.n_ctx, model.cfg.d_mlp)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("plain", {"act_layer": "quick_gelu"}),
        ("plain", {"global_pool": "avg"}),
        ("eva02", {"rope_temperature": 10.0}),
    ],
)
def test_fingerprint_follows_what_is_computed(variant: str, changes: dict[str, Any]) -> None:
    """The weights are the same, and the config that TransformerLens reads is too."""
    name, arguments, _ = MODELS[variant]
    plain = build(variant)
    other = timm.create_model(name, pretrained=False, **{**arguments, **changes}).eval()
    other.load_state_dict(plain.state_dict(), strict=False)
    one = model_fingerprint(from_module(plain))
    assert one == model_fingerprint(from_module(build(variant, "sdpa")))
    assert one != model_fingerprint(from_module(other))


@pytest.mark.parametrize("point", ["hook_resid_post", "attn.hook_v", "attn.hook_pattern"])
def test_an_edit_reaches_the_output(point: str) -> None:
    model = from_module(build("plain"))
    with torch.no_grad():
        clean = model(pictures())
        hook = (f"blocks.0.{point}", lambda acts, hook: acts * 0)
        assert not torch.allclose(model.run_with_hooks(pictures(), fwd_hooks=[hook]), clean)
        assert torch.equal(model(pictures()), clean)
        assert torch.equal(copy.deepcopy(model)(pictures()), clean)


def test_an_sae_goes_in_and_comes_out() -> None:
    model = from_module(build("perception"))
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    sae.cfg.metadata.hook_name = POSTS[0]
    with torch.no_grad():
        clean = model(pictures())
        assert not torch.allclose(model.run_with_saes(pictures(), saes=[sae]), clean)
        assert torch.equal(model(pictures()), clean)


def test_other_models_of_timm_stay_wrapped() -> None:
    assert from_module(timm.create_model("resnet10t", pretrained=False)).family == "wrapped"
    post_norm = timm.create_model("vit_srelpos_small_patch16_224", pretrained=False, depth=1)
    assert from_module(post_norm).family == "wrapped"
    assert from_module(build("plain"), family="wrapped").family == "wrapped"


def test_a_folder_with_its_data_config(tmp_path: Path) -> None:
    model = build("plain", "sdpa")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": TINY,
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for attention in ("sdpa", "eager"):
        loaded = load_vision_model(tmp_path, attn_implementation=attention)
        assert (loaded.family, loaded.attn_implementation) == ("timm", attention)
        with torch.no_grad():
            assert torch.equal(loaded(pictures()), build("plain", attention)(pictures()))
    assert loaded.preprocessor_config["crop_pct"] == 0.9
