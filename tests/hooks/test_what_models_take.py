"""What a model takes, and what it does not: channels, sizes, tokens, arguments; each is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conformance import tiny_config
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from taxolens import VisionSAERunnerConfig, VisionSAETrainingRunner
from taxolens.hooks.models.load import (
    from_module,
    hook_d_in,
    hook_n_tokens,
    load_vision_model,
    run_to_hooks,
)
from taxolens.hooks.models.tokens import check_tokens, tokens_per_image
from taxolens.registry.errors import ConfigError
from tiny_images import hf_dataset
from tiny_models import CNN, DINOV2, VIT, pictures, tapped

HOOK = "blocks.0.hook_resid_post"
ONE_CHANNEL = {
    "bridged": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2, num_channels=1)),
    "wrapped": lambda: hf.ResNetModel(hf.ResNetConfig(**{**CNN, "num_channels": 1})),
}


def train(model: Any, hook: str = HOOK, **changes: Any) -> Any:
    settings = {"tokens": "all", "sae": TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4), **changes}
    cfg = VisionSAERunnerConfig(
        model_name=model.cfg.model_name,
        dataset_path="noise",
        hook_name=hook,
        training_tokens=32,
        train_batch_size_tokens=16,
        store_batch_size_prompts=2,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **settings,
    )
    return VisionSAETrainingRunner(cfg, override_model=model, override_dataset=hf_dataset(4)).run()


@pytest.mark.parametrize("kind", ONE_CHANNEL)
def test_images_of_three_channels_for_a_model_of_one(kind: str) -> None:
    model = from_module(ONE_CHANNEL[kind]().eval())
    message = (
        r"takes images of 1 channel\(s\); given \(2, 3, 32, 32\); allowed: another model, or from"
    )
    for use in (
        lambda: model(pictures()),
        lambda: run_to_hooks(model, pictures(), [HOOK]),
        lambda: model.run_with_cache(pictures(), names_filter=[HOOK]),
        lambda: model.run_with_hooks(pictures(), fwd_hooks=[(HOOK, lambda x, hook: x)]),
        lambda: train(model, image_size=32),
    ):
        with pytest.raises(ConfigError, match=message):
            use()
    assert run_to_hooks(model, pictures()[:, :1], [HOOK])[HOOK].shape[-1] == 16


def test_images_smaller_than_a_patch() -> None:
    model = tapped("dinov2")
    message = r"image_size: smaller than a patch of .*; given \(4, 9\); allowed: 8 pixels or more"
    for use in (
        lambda: model(pictures(size=(4, 9))),
        lambda: run_to_hooks(model, pictures(size=(4, 9)), [HOOK]),
        lambda: hook_d_in(model, HOOK, (4, 9)),
        lambda: hook_n_tokens(model, HOOK, (4, 9)),
        lambda: tokens_per_image(model, "all", (4, 9)),
    ):
        with pytest.raises(ConfigError, match=message):
            use()
    with pytest.raises(ConfigError, match=r"image_size: smaller than a patch"):
        train(model, image_size=4)
    assert run_to_hooks(model, pictures(size=(8, 9)), [HOOK])[HOOK].shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("variant", "hook"),
    [("siglip", "pooler.hook_out"), ("clip", "ln_final.hook_out"), ("beit", "pooler.hook_out")],
)
def test_pooled_hook_points_have_one_vector(variant: str, hook: str) -> None:
    model = tapped(variant)
    assert tokens_per_image(model, "all", None, hook) == 1
    for tokens in ("patch", "mean_patch"):
        message = (
            f"has one vector for each image, no {tokens} tokens; given '{tokens}'; allowed: all,"
        )
        with pytest.raises(ConfigError, match=message):
            check_tokens(model, tokens, hook)
    assert train(model, hook).cfg.metadata.tokens_per_image == 1


def test_a_grid_of_one_place_is_no_pooling() -> None:
    plain = hf.ResNetModel(hf.ResNetConfig(**{**CNN, "image_size": 8}, embedding_size=16)).eval()
    model = from_module(plain)
    hook = "blocks.1.hook_resid_post"
    assert [tokens_per_image(model, t, 8, hook) for t in ("patch", "mean_patch", "all")] == [1] * 3


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_attention_patterns_are_no_tokens(tokens: str) -> None:
    hook = "blocks.0.attn.hook_pattern"
    with pytest.raises(
        ConfigError, match=r"activations \(4, 2, 5, 5\) of no tokens; given 'blocks"
    ):
        train(tapped("dinov2"), hook, tokens=tokens)


def test_naflex_is_refused_by_name() -> None:
    text = {**VIT, "vocab_size": 20, "max_position_embeddings": 8}
    vision = {**{k: v for k, v in VIT.items() if k != "image_size"}, "num_patches": 16}
    config = hf.Siglip2Config(vision_config=vision, text_config=text)
    message = r"NaFlex: each image is cut .*; allowed: .* google/siglip2-base-patch16-224"
    for kind in (hf.Siglip2Model, hf.Siglip2ForImageClassification):
        with pytest.raises(ConfigError, match=message):
            from_module(kind(config))


def test_a_model_that_needs_more_than_images() -> None:
    class Captioned(torch.nn.Module):
        def forward(self, pixel_values: Any, input_ids: Any, mask: Any = None) -> Any:
            return pixel_values

    with pytest.raises(
        ConfigError, match=r"Captioned needs input_ids beside images \(B, C, H, W\)"
    ):
        from_module(Captioned())


def test_sizes_in_the_config_of_the_vision_part() -> None:
    vision = {**VIT, "num_channels": 4, "output_channels": 8, "mlp_dim": 32, "window_size": 2}
    plain = hf.SamModel(hf.SamConfig(vision_config={**vision, "global_attn_indexes": [1]}))
    cfg = from_module(plain).cfg
    assert (cfg.image_size, cfg.n_channels, cfg.d_model) == ((32, 32), 4, 16)


def test_of_several_class_tokens_the_others_are_registers() -> None:
    plain = hf.PixioModel(hf.PixioConfig(**VIT, n_cls_tokens=3)).eval()
    model = from_module(plain)
    assert (model.cfg.has_class_token, model.cfg.n_register_tokens) == (True, 2)
    assert tokens_per_image(model, "patch", 32, HOOK) == 16
    with torch.no_grad():
        states = plain(pictures(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(run_to_hooks(model, pictures(), [HOOK])[HOOK], states[1])


def test_a_backbone_of_eager_attention_alone_is_loaded(tmp_path: Path) -> None:
    plain = hf.RTDetrModel(tiny_config(hf.RTDetrConfig)).eval()
    plain.save_pretrained(tmp_path)
    model = load_vision_model(tmp_path)
    hook = model.cfg.n_layers - 1
    assert run_to_hooks(model, pictures(size=64), [f"blocks.{hook}.hook_resid_post"])
