"""Models that are tapped at their named submodules: what differs from the families' bridges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers as hf
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.activations.extract import TokenExtractor
from taxolens.hooks.models.hooked_module import find_blocks
from taxolens.hooks.models.intervention import ModelIntervention
from taxolens.hooks.models.load import expand_hook_names, from_module, hook_d_in, run_to_hooks
from taxolens.hooks.models.tokens import TOKEN_CHOICES, check_tokens, tokens_of, tokens_per_image
from taxolens.registry.errors import ConfigError, UnknownNameError
from tiny_models import pictures, tapped, tiny_model
from torch import nn


class Residual(nn.Module):
    """As torchvision and timm write it: one ReLU used twice, all of it in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norm(self.conv(x)))
        out += x
        return self.relu(out - 0.5)


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(block(6), block(6))
        self.layer2 = nn.Sequential(block(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def resnet(seed: int = 0) -> ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet().eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_plain_module_of_torch(layout: Any) -> None:
    images = pictures().to(memory_format=layout)
    plain = resnet().to(memory_format=layout)
    model = from_module(resnet().to(memory_format=layout), model_name="own")
    assert (model.family, model.cfg.n_layers, model.cfg.model_name) == ("wrapped", 3, "own")
    with torch.no_grad():
        output, cached = model.run_with_cache(images)
        assert torch.equal(output, plain(images))
        first = plain.layer1[0](plain.stem(images))
    assert torch.equal(cached["blocks.0.hook_resid_post"], first.flatten(2).transpose(1, 2))
    assert torch.equal(cached["blocks.0.hook_resid_post"], cached["layer1.0.hook_out"])
    assert torch.equal(cached["blocks.1.hook_resid_pre"], cached["blocks.0.hook_resid_post"])


def test_what_was_kept_is_not_written_over() -> None:
    """`norm` is overwritten by its ReLU, and the ReLU's result by `+=`, in the model as it came."""
    images, plain = pictures(), resnet()
    with torch.no_grad():
        stem = plain.stem(images)
        norm = plain.layer1[0].norm(plain.layer1[0].conv(stem))
        expected = norm.flatten(2).transpose(1, 2).clone()
    names = ["layer1.0.norm.hook_out", "layer1.0.hook_out"]
    assert torch.equal(run_to_hooks(from_module(resnet()), images, names)[names[0]], expected)


def test_of_a_submodule_used_twice_the_last_use_counts() -> None:
    model, images = from_module(resnet()), pictures()
    name = "layer1.0.relu.hook_out"
    _, cached = model.run_with_cache(images, names_filter=name)
    assert torch.equal(run_to_hooks(model, images, [name])[name], cached[name])
    assert torch.equal(
        cached[name], run_to_hooks(model, images, ["layer1.0.hook_out"])["layer1.0.hook_out"]
    )


def test_pooled_features_are_one_token() -> None:
    model = from_module(resnet())
    got = run_to_hooks(model, pictures(3), ["head.hook_in", "head.hook_out"])
    assert [tuple(acts.shape) for acts in got.values()] == [(3, 1, 6), (3, 1, 5)]
    assert hook_d_in(model, "head.hook_in") == 6


def test_hook_points_fire_in_the_order_of_execution() -> None:
    names = expand_hook_names(from_module(resnet()), ["head.hook_in", "blocks.*.hook_resid_post"])
    assert names == [*(f"blocks.{i}.hook_resid_post" for i in range(3)), "head.hook_in"]


@pytest.mark.parametrize("variant", ["resnet", "convnext", "dinov3_convnext", "vit_msn"])
def test_an_edit_at_a_hook_point_reaches_the_output(variant: str) -> None:
    """The output is what comes of the edited feature map, in the layout that the model has."""
    model, images = tapped(variant), pictures()
    name = "blocks.0.hook_resid_post"
    with torch.no_grad():
        same = model.run_with_hooks(images, fwd_hooks=[(name, lambda acts, hook: acts.clone())])
        other = model.run_with_hooks(images, fwd_hooks=[(name, lambda acts, hook: acts.flip(-1))])
        assert torch.equal(same, model(images))
        assert not torch.allclose(other, same)


def test_an_edit_at_an_entry_reaches_the_output() -> None:
    model, images = from_module(resnet()), pictures()
    with torch.no_grad():
        zero = model.run_with_hooks(
            images, fwd_hooks=[("head.hook_in", lambda acts, hook: acts * 0)]
        )
        assert torch.equal(zero, model.original_model.head.bias.expand(2, 5))


def test_an_sae_at_a_point_that_is_not_there() -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    sae.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    for variant in ("resnet", "dinov2"):
        with pytest.raises(
            UnknownNameError, match=r"hook_names: not known.*given 'blocks\.5\.hook_resid_post'"
        ):
            tapped(variant).add_sae(sae)


@pytest.mark.parametrize("variant", ["resnet", "dinov2"])
def test_saes_in_a_cache(variant: str) -> None:
    model = tapped(variant)
    name = "blocks.0.hook_resid_post"
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    sae.cfg.metadata.hook_name = name
    latents = f"{name}.hook_sae_acts_post"
    _, cached = model.run_with_cache_with_saes(pictures(), saes=[sae], names_filter=[latents])
    before = run_to_hooks(model, pictures(), [name])[name]
    torch.testing.assert_close(cached[latents], sae.encode(before))


def test_the_outermost_list_of_like_modules_are_the_blocks() -> None:
    assert find_blocks(resnet()) == ["layer1.0", "layer1.1", "layer2.0"]
    assert find_blocks(tiny_model("resnet")) == ["encoder.stages.0", "encoder.stages.1"]
    lists = nn.ModuleDict({"a": nn.ModuleList([nn.Identity()]), "b": ResNet()})
    assert find_blocks(lists) == ["b.layer1.0", "b.layer1.1", "b.layer2.0"]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_a_model_that_calls_other_parts_blocks() -> None:
    """EfficientNet's `blocks` are stages of blocks: "blocks.0" stays what the model calls so."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                nn.Sequential(Residual(3), Residual(3)), nn.Sequential(Residual(3))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    model = from_module(Nested().eval())
    assert find_blocks(Nested()) == ["blocks.0.0", "blocks.0.1", "blocks.1.0"]
    assert model.cfg.n_layers == 0
    with pytest.raises(UnknownNameError, match="no list of blocks"):
        hook_d_in(model, "blocks.0.hook_resid_post")
    assert hook_d_in(model, "blocks.0.hook_out") == 3


def test_tuples_pass_with_their_first_member() -> None:
    class Pair(NamedTuple):
        features: torch.Tensor
        rest: str

    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(x + 1, "kept")

    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor], int]:
            return (x,), 7

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split = Split()
            self.nest = Nested()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            pair = self.split(x)
            (nested,), _ = self.nest(pair.features)
            return nested, pair.rest

    model, images = from_module(Model().eval()), pictures()
    for name in ("split.hook_out", "nest.hook_out"):
        hooks = [(name, lambda acts, hook: acts * 0)]
        assert torch.equal(model.run_with_hooks(images, fwd_hooks=hooks), images * 0)
    assert torch.equal(model(images), images + 1)


def test_a_prefix_that_the_grid_contradicts() -> None:
    """A class token by its name, but not among the tokens: better no number than a wrong one."""

    class Odd(ResNet):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))

    model = from_module(Odd().eval())
    model.cfg.image_size = (32, 32)
    with pytest.raises(
        ConfigError, match=r"seems to have 1 prefix tokens.*63 tokens there.*given 'blocks"
    ):
        tokens_per_image(model, "class", None, "blocks.0.hook_resid_post")
    hooks = ["head.hook_in", "blocks.0.hook_resid_post"]  # of the first it may be the class token
    with pytest.raises(ConfigError, match="seems to have 1 prefix tokens"):
        TokenExtractor(model, hooks, ["class"])
    with pytest.raises(ConfigError, match="seems to have 1 prefix tokens"):
        ModelIntervention(model, lambda rows: pictures(), hooks[1], "class")
    sae = StandardSAE(StandardSAEConfig(d_in=6, d_sae=8))
    sae.cfg.metadata.hook_name, sae.cfg.metadata["tokens"] = hooks[1], "class"
    with pytest.raises(ConfigError, match="seems to have 1 prefix tokens"):
        model.add_sae(sae)


class Mixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(x.mean(1, keepdim=True).expand_as(x))


class Transformer(nn.Module):
    """16 patches of pictures of 32; `before` and `after` learned tokens around them."""

    def __init__(self, before: int = 0, after: int = 0, name: str = "cls_token") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, 8)
        self.before = before
        self.register_parameter(name, nn.Parameter(torch.randn(1, before + after, 6)))
        self.learned = name
        self.layers = nn.ModuleList([Mixing(6), Mixing(6)])
        self.config = SimpleNamespace(image_size=32, hidden_size=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).mT
        learned = getattr(self, self.learned).expand(len(x), -1, -1)
        x = torch.cat([learned[:, : self.before], patches, learned[:, self.before :]], 1)
        for layer in self.layers:
            x = layer(x)
        return x


def refusals(model: Any, hook: str) -> dict[str, str]:
    found = {}
    for tokens in TOKEN_CHOICES:
        try:
            check_tokens(model, tokens, hook)
        except ConfigError as error:
            found[tokens] = str(error)
    return found


def test_prefix_tokens_are_where_they_are_said_to_be() -> None:
    hook = "blocks.1.hook_resid_post"
    in_front = from_module(Transformer(before=1).eval())
    assert set(refusals(in_front, hook)) == {"register"}
    assert set(refusals(from_module(Transformer().eval()), hook)) == {"class", "register"}
    last = refusals(from_module(Transformer(after=1).eval(), model_name="own"), hook)
    assert set(last) == {"class", "patch", "mean_patch", "register"}
    assert last["class"] == (
        "tokens: own has 1 prefix tokens by the names of its parameters, which come first, but of "
        "the 17 at 'blocks.1.hook_resid_post' 1 are no part of an image, at 16; allowed: the tokens "
        "all, or another hook point."
    )


@pytest.mark.parametrize(("before", "after"), [(10, 0), (0, 9), (4, 5)])
def test_learned_tokens_of_a_name_that_is_not_known(before: int, after: int) -> None:
    """With 9 of them there are 25 tokens, a square grid as it were."""
    model = from_module(Transformer(before, after, name="prompts").eval())
    found = refusals(model, "layers.1.hook_out")
    assert {"patch", "mean_patch"} <= set(found) and "all" not in found
    places = [*range(before), *range(before + 16, 16 + before + after)][:3]
    assert f"at {', '.join(map(str, places))} and so on" in found["patch"]


def test_tokens_that_no_grid_explains() -> None:
    """Behind the blocks 5 queries collect from the patches: a mean of patches they are not."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.norm = Transformer(), nn.LayerNorm(6)
            self.queries = nn.Parameter(torch.randn(5, 6))
            self.config = self.trunk.config

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.trunk(x)
            return self.norm((self.queries @ x.mT).softmax(-1) @ x)

    model = from_module(Queries().eval())
    assert set(refusals(model, "trunk.layers.1.hook_out")) == {"class", "register"}
    assert "the 5 tokens there are no square grid" in refusals(model, "norm.hook_in")["mean_patch"]


def test_radio_has_its_registers_behind_its_class_tokens() -> None:
    config = hf.RadioConfig(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 8, "num_cls_tokens": 2, "num_registers": 3},
    )
    plain = hf.RadioModel(config).eval()
    images = pictures()
    with torch.no_grad():
        expected = plain(images)
    model = from_module(plain)
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    assert not refusals(model, hook)
    acts = run_to_hooks(model, images, [hook])[hook]
    assert torch.equal(tokens_of(model, acts, "patch"), expected.features)
    assert torch.equal(
        tokens_of(model, acts, "class"), expected.summary.unflatten(1, (2, 16))[:, :1]
    )


def test_llama_4_has_its_class_token_last() -> None:
    config = hf.Llama4VisionConfig(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 8, "intermediate_size": 64, "vision_output_dim": 8},
        **{"projector_input_dim": 8, "projector_output_dim": 8},
    )
    model = from_module(hf.Llama4VisionModel(config).eval())
    found = refusals(model, "blocks.1.hook_resid_post")
    assert set(found) == {"class", "register", "patch", "mean_patch"}
    assert (
        "of the 17 at 'blocks.1.hook_resid_post' 1 are no part of an image, at 16" in found["patch"]
    )
    with pytest.raises(ConfigError, match="1 are no part of an image, at 16"):
        ModelIntervention(model, lambda rows: pictures(), "blocks.0.hook_resid_post", "all")


def test_a_submodule_with_a_name_that_is_taken() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooks = nn.Linear(3, 3)

    with pytest.raises(ConfigError, match="its submodule 'hooks' has a name"):
        from_module(Clash())


def test_moving_it_moves_what_the_config_says() -> None:
    model = from_module(resnet())
    assert model.to(torch.float64).cfg.dtype == torch.float64
    assert model.to("meta").cfg.device == "meta"
    assert len(list(model.parameters())) == len(list(resnet().parameters()))
