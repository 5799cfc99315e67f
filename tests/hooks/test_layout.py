"""Wrapped models: which axes are positions, which first axis is no batch, what is drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.models.hooked_module import find_blocks
from taxolens.hooks.models.layout import Layout, Probe, decide
from taxolens.hooks.models.load import (
    expand_hook_names,
    from_module,
    hook_d_in,
    hook_n_tokens,
    run_to_hooks,
)
from taxolens.registry.errors import ConfigError
from tiny_models import MAE, VIT, pictures, tiny_model
from torch import nn

SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sam": lambda: hf.SamVisionModel(
        hf.SamVisionConfig(
            **VIT, output_channels=8, mlp_dim=32, window_size=2, global_attn_indexes=[1]
        )
    ),
    "vitdet": lambda: hf.VitDetModel(
        hf.VitDetConfig(**VIT, pretrain_image_size=32, window_size=2, window_block_indices=[0])
    ),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN, window_size=4)),
    "swinv2": lambda: hf.Swinv2Model(hf.Swinv2Config(**SWIN, window_size=4)),
    "convnextv2": lambda: hf.ConvNextV2Model(
        hf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    ),
}


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            parameter.data.normal_(mean=0.1 * (parameter.ndim == 1), std=0.2)
        return model


def output_of(plain: nn.Module, submodule: str, images: torch.Tensor) -> torch.Tensor:
    """What a submodule gives, by torch's own hook."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = plain.get_submodule(submodule).register_forward_hook(keep)
    with torch.no_grad():
        plain(images)
    handle.remove()
    return kept[-1]


LAYOUTS = {
    ("sam", "vision_encoder.layers.0"): "BHWC",
    ("sam", "vision_encoder.layers.1.attn.qkv"): "BHWC",
    ("sam", "vision_encoder.patch_embed"): "BHWC",
    ("sam", "vision_encoder.patch_embed.projection"): "BCHW",
    ("sam", "vision_encoder.neck.layer_norm1"): "BCHW",
    ("vitdet", "encoder.layer.0"): "BCHW",
    ("vitdet", "encoder.layer.1.attention.qkv"): "BHWC",
    ("vitdet", "encoder.layer.1.norm1"): "BHWC",
    ("convnextv2", "embeddings.layernorm"): "BCHW",
    ("convnextv2", "encoder.stages.0.layers.0.layernorm"): "BHWC",
    ("convnextv2", "encoder.stages.0.layers.0.grn"): "BHWC",
    ("convnextv2", "encoder.stages.0.layers.0.act"): "BHWC",
    ("convnextv2", "encoder.stages.1.downsampling_layer.0"): "BCHW",
    ("swin", "encoder.layers.0.blocks.0"): "BTC",
    ("swin", "embeddings.patch_embeddings.projection"): "BCHW",
}


@pytest.mark.parametrize(("variant", "submodule"), LAYOUTS, ids=lambda value: str(value))
def test_positions_are_positions_and_channels_are_width(variant: str, submodule: str) -> None:
    plain, images = build(variant), pictures(3)
    features = output_of(plain, submodule, images)
    expected = {
        "BCHW": lambda: features.flatten(2).transpose(1, 2),
        "BHWC": lambda: features.flatten(1, 2),
        "BTC": lambda: features,
    }[LAYOUTS[variant, submodule]]()
    model, name = from_module(build(variant)), f"{submodule}.hook_out"
    assert torch.equal(run_to_hooks(model, images, [name])[name], expected)
    assert hook_d_in(model, name) == expected.shape[2]
    assert hook_n_tokens(model, name) == expected.shape[1]
    with torch.no_grad():
        same = model.run_with_hooks(images, fwd_hooks=[(name, lambda acts, hook: acts.clone())])
        assert torch.equal(same, model(images))


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_an_edit_in_place_reaches_the_grid_in_its_own_layout(grad: Any) -> None:
    plain, images = build("convnextv2"), pictures()
    name = "encoder.stages.0.layers.0.grn"
    plain.get_submodule(name).register_forward_hook(
        lambda m, a, out: torch.cat([out[..., :1] + 1, out[..., 1:]], dim=-1)
    )

    def edit(acts: torch.Tensor, hook: Any) -> None:
        acts[:, :, 0] += 1

    with grad():
        found = from_module(build("convnextv2")).run_with_hooks(
            images, fwd_hooks=[(f"{name}.hook_out", edit)]
        )
        assert torch.equal(found, plain(images).last_hidden_state)


# Windows ------------------------------------------------------------------------------------------

PATTERNS = {  # (B * windows, heads, positions, positions): no tokens of images
    "swinv2": "encoder.layers.0.blocks.1.attention.self.dropout.hook_in",
}


@pytest.mark.parametrize("variant", PATTERNS)
def test_a_row_for_each_window_is_no_row_for_each_image(variant: str) -> None:
    model, name = from_module(build(variant)), PATTERNS[variant]
    match = rf"hook '{name}': it gives \d+ rows for 2 images, such as one for each window"
    for ask in (
        lambda: hook_d_in(model, name),
        lambda: run_to_hooks(model, pictures(), [name]),
        lambda: expand_hook_names(model, [name]),
    ):
        with pytest.raises(ConfigError, match=match):
            ask()
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=8))
    sae.cfg.metadata.hook_name = name
    with pytest.raises(ConfigError, match=match):
        model.add_sae(sae)
    # the rest of the block is there
    assert name not in expand_hook_names(model, ["**.hook_in"])
    acts = run_to_hooks(model, pictures(3), ["blocks.0.hook_resid_post"])
    assert len(acts["blocks.0.hook_resid_post"]) == 3


WINDOWED = {
    # the input of the attention is the norm before it; "blocks.1" is shifted by half a window
    ("swin", "encoder.layers.0.blocks.0"): ("attention.hook_in", "layernorm_before"),
    ("swin", "encoder.layers.0.blocks.1"): ("attention.hook_in", "layernorm_before"),
    ("swin padded", "encoder.layers.0.blocks.1"): ("attention.hook_in", "layernorm_before"),
    ("swinv2", "encoder.layers.0.blocks.1"): ("attention.hook_in", None),
    ("sam", "vision_encoder.layers.0"): ("attn.qkv.hook_in", "layer_norm1"),
    ("sam padded", "vision_encoder.layers.0"): ("attn.qkv.hook_in", "layer_norm1"),
    ("vitdet", "encoder.layer.0"): ("attention.hook_in", "norm1"),
    ("vitdet padded", "encoder.layer.0"): ("attention.hook_in", "norm1"),
}
MODELS |= {
    "swin padded": lambda: hf.SwinModel(hf.SwinConfig(**SWIN, window_size=5)),
    "sam padded": lambda: hf.SamVisionModel(
        hf.SamVisionConfig(
            **VIT, output_channels=8, mlp_dim=32, window_size=3, global_attn_indexes=[1]
        )
    ),
    "vitdet padded": lambda: hf.VitDetModel(
        hf.VitDetConfig(**VIT, pretrain_image_size=32, window_size=3, window_block_indices=[0])
    ),
}


@pytest.mark.parametrize(("variant", "block"), WINDOWED, ids=str)
def test_windows_are_folded_back_into_their_images(variant: str, block: str) -> None:
    hook, norm = WINDOWED[variant, block]
    plain, images = build(variant), pictures(3)
    model, name = from_module(build(variant)), f"{block}.{hook}"
    found = run_to_hooks(model, images, [name])[name]
    if norm is None:  # Swin v2 normalises after its attention
        kept: list[torch.Tensor] = []
        plain.get_submodule(block).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        with torch.no_grad():
            plain(images)
        expected = kept[0]
    else:
        expected = output_of(plain, f"{block}.{norm}", images)
        expected = expected.flatten(1, -2)
    assert torch.equal(found, expected)
    # the identity changes nothing, and an edit of one position reaches the output of its image alone
    with torch.no_grad():
        same = model.run_with_hooks(images, fwd_hooks=[(name, lambda acts, hook: acts.clone())])
        assert torch.equal(same, model(images))

        def edit(acts: torch.Tensor, hook: Any) -> None:
            acts[1, -1] += 100

        changed = model.run_with_hooks(images, fwd_hooks=[(name, edit)])
        moved = (changed != same).flatten(1).any(1)
        assert moved.tolist() == [False, True, False]


def test_a_class_is_where_its_image_is_inside_windows_too() -> None:
    """One nearest neighbour by the output of a windowed attention finds the image itself."""
    model, name = from_module(build("swin")), "encoder.layers.0.blocks.1.attention.hook_out"
    images = pictures(8)
    acts = run_to_hooks(model, images, [name])[name].mean(1)
    near = run_to_hooks(model, images + 0.01 * pictures(8, seed=5), [name])[name].mean(1)
    assert torch.cdist(near, acts).argmin(1).tolist() == list(range(8))


def test_the_probe_leaves_the_model_as_it_was() -> None:
    """A layer of Swin keeps the smallest window that it ever used."""
    config = hf.SwinConfig(**{**SWIN, "image_size": 160, "patch_size": 4}, window_size=20)
    torch.manual_seed(0)
    plain = hf.SwinModel(config).eval()
    windows = [m.window_size for m in plain.modules() if type(m).__name__ == "SwinLayer"]
    assert windows == [20] * 4
    images = pictures(size=160)
    model = from_module(plain)
    hook_d_in(model, "blocks.0.hook_resid_post")
    with pytest.raises(ConfigError, match=r"cannot be run on images \(4, 3, 64, 64\)"):
        hook_n_tokens(model, "blocks.0.hook_resid_post", 64)
    assert [m.window_size for m in plain.modules() if type(m).__name__ == "SwinLayer"] == windows
    torch.manual_seed(0)
    with torch.no_grad():
        expected = hf.SwinModel(config).eval()(images).last_hidden_state
        assert torch.equal(model(images), expected)


def test_windows_that_only_a_larger_image_has() -> None:
    """Of one window at the size of the probe, more at the size of the images."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side = min(x.shape[-1], 100)
            windows = x.unfold(2, side, side).unfold(3, side, side)
            return self.inner(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).mean((1, 2, 3))

    model = from_module(Windows().eval())
    model.cfg.image_size = (32, 32)
    assert hook_n_tokens(model, "inner.hook_out", 32) == 32 * 32
    with pytest.raises(ConfigError, match=r"'inner.hook_out': it gives 8 rows for 2 images"):
        run_to_hooks(model, pictures(size=200), ["inner.hook_out"])


def own(*shape: int) -> Probe:
    return Probe(2, (32, 32), shape)


def other(*shape: int) -> Probe:
    return Probe(3, (64, 96), shape)


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (own(2, 16, 4, 4), other(3, 16, 8, 12), Layout((2, 3), (1,))),
        (own(2, 4, 4, 16), other(3, 8, 12, 16), Layout((1, 2), (3,))),
        (own(2, 4, 4, 4), other(3, 8, 12, 4), Layout((1, 2), (3,))),
        (own(2, 17, 16), other(3, 97, 16), Layout((1,), (2,))),
        (own(2, 16, 17), other(3, 16, 97), Layout((2,), (1,))),
        (own(2, 2, 17, 8), other(3, 2, 97, 8), Layout((2,), (1, 3))),  # heads first
        (own(2, 17, 2, 8), other(3, 97, 2, 8), Layout((1,), (2, 3))),
        (own(2, 3, 8), other(3, 3, 8), Layout((1,), (2,))),
        (own(2, 16, 1, 1), other(3, 16, 1, 1), Layout((), (1, 2, 3))),
        (own(2, 16), other(3, 16), Layout((), (1,))),
        (own(2, 4, 4, 16), None, Layout((1, 2), (3,))),
        (own(2, 16, 4, 4), None, Layout((2, 3), (1,))),
        (own(2, 2, 17, 17), other(3, 2, 97, 97), "cannot be decided"),  # attention
        (own(2, 2, 17, 17), None, "cannot be decided"),
        (own(2, 4, 4, 4), None, "cannot be decided"),
        (own(8, 4, 16), other(12, 4, 16), "8 rows for 2 images"),
        (own(2, 4, 16), other(6, 4, 16), "6 rows for 3 images"),
        (own(2, 2, 2, 2, 2), None, "have no tokens"),
    ],
)
def test_what_moves_with_the_image_is_space(one: Probe, two: Any, expected: Any) -> None:
    found = decide(one, two, nn.Identity())
    if isinstance(expected, Layout):
        assert found == expected
    else:
        assert isinstance(found, str) and expected in found


def test_undecided_layouts_are_refused() -> None:
    """A cube of one size alone: nothing tells which axis is the width."""

    class Cube(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cube = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 32
            return self.cube(x[:, :1, ::8, ::8].expand(-1, 4, -1, -1)).mean((2, 3))

    model = from_module(Cube().eval())
    model.cfg.image_size = (32, 32)
    with pytest.raises(ConfigError, match=r"'cube.hook_out': which of its axes are positions"):
        hook_d_in(model, "cube.hook_out")


# Random numbers -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self.patches(x).flatten(2).transpose(1, 2))


DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, training=True),
    "order": lambda x: x[:, torch.randperm(x.shape[1])],
    "mask": lambda x: x[:, torch.randperm(x.shape[1])[:4]],
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_in_evaluation_mode_are_refused(draw: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Noisy(DRAWS[draw])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).mean(1)

    model = from_module(Model().eval(), model_name="noisy")
    model.cfg.image_size = (32, 32)
    state = torch.get_rng_state()
    match = r"model_name: it draws random numbers in evaluation mode.*given 'noisy'"
    for ask in (
        lambda: hook_d_in(model, "inner.hook_out"),
        lambda: run_to_hooks(model, pictures(), ["inner.hook_out"]),
    ):
        with pytest.raises(ConfigError, match=match):
            ask()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", ["vit_mae", "vit_mae_both"])
def test_a_masked_autoencoder_gives_all_patches_in_order(variant: str) -> None:
    model, images = from_module(tiny_model(variant)), pictures()
    assert (model.family, model.cfg.n_layers, model.cfg.n_prefix_tokens) == ("vit_mae", 2, 1)
    names = [f"blocks.{block}.hook_resid_post" for block in (0, 1)]
    found, again = run_to_hooks(model, images, names), run_to_hooks(model, images, names)
    plain = tiny_model("vit_mae")
    if variant.endswith("both"):
        plain = tiny_model(variant).vit
    plain.config.mask_ratio = 0.0
    with torch.no_grad():
        states = plain(images, noise=torch.arange(16.0).expand(2, -1), output_hidden_states=True)
    for name, state in zip(names, states.hidden_states[1:]):
        assert found[name].shape == (2, 17, 16)
        assert torch.equal(found[name], again[name]) and torch.equal(found[name], state)


def test_masked_and_wrapped_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws random numbers"):
        hook_d_in(from_module(tiny_model("vit_mae"), family="wrapped"), "layernorm.hook_out")


# Stacks -------------------------------------------------------------------------------------------


def test_blocks_are_those_of_the_encoder() -> None:
    detr = hf.DetrConfig(
        **{"use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 16},
        **{
            "backbone_config": hf.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4
            )
        },
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
    )
    found = find_blocks(hf.DetrModel(detr))
    assert found and not any("decoder" in name for name in found)
    wide = {**MAE, "decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    found = find_blocks(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**wide)))
    assert found == ["vit.layers.0", "vit.layers.1"]


def test_a_model_that_takes_no_images_is_named() -> None:
    model = from_module(hf.VideoMAEModel(hf.VideoMAEConfig(**VIT, num_frames=2)).eval())
    match = (
        r"model_name: it cannot be run on images \(2, 3, 32, 32\): ValueError: not enough values"
    )
    with pytest.raises(ConfigError, match=match):
        hook_d_in(model, "blocks.0.hook_resid_post")


class _Untidy(nn.Module):
    """A patch embedding and a head, in whose forward pass something else happens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8, track_running_stats=kind != "statistics of the batch")
        self.kind, self.before = kind, torch.zeros(())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.conv(pixel_values)).mean((2, 3)))
        if self.kind == "noise on the logits":
            return logits + torch.rand(5)
        if self.kind == "what was there before":
            logits = logits + self.before
            self.before = logits.detach().mean()
        return logits


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("noise on the logits", "two passes of the same images differ at 'its output'"),
        ("what was there before", "two passes of the same images differ at 'its output'"),
        ("statistics of the batch", "depends on the others of its batch, first at 'norm.hook_out'"),
    ],
)
def test_a_model_whose_numbers_are_not_those_of_the_image_is_refused(
    kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_to_hooks(from_module(_Untidy(kind).eval()), pictures(), ["conv.hook_out"])
    tidy = from_module(_Untidy("none").eval())
    assert run_to_hooks(tidy, pictures(), ["conv.hook_out"])["conv.hook_out"].shape[2] == 8
