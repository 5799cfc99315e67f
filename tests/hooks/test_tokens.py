"""Prefix tokens counted right for each family, and the chosen tokens taken from the right places."""

from __future__ import annotations

from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from taxolens.hooks.models.load import from_module, run_to_hooks
from taxolens.hooks.models.tokens import (
    TOKEN_CHOICES,
    check_tokens,
    input_size,
    select_tokens,
    tokens_per_image,
)
from taxolens.registry.errors import ConfigError
from tiny_models import OTHER_SIZE, pictures, tapped, tiny_model

# variant -> class token, registers (DeiT's distillation token is one), patches of a picture of 32
PREFIXES = {
    "vit": (True, 0, 16),
    "deit": (True, 1, 16),
    "deit_teacher": (True, 1, 16),
    "dinov2": (True, 0, 16),
    "dinov2_with_registers": (True, 4, 16),
    "dinov3": (True, 4, 16),
    "clip": (True, 0, 16),
    "siglip": (False, 0, 16),
    "vit_msn": (True, 0, 16),
    "beit": (True, 0, 16),
    "ijepa": (False, 0, 16),
    "aimv2": (False, 0, 16),
    "resnet": (False, 0, 16),
}


@pytest.mark.parametrize("variant", PREFIXES)
def test_prefix_tokens(variant: str) -> None:
    model = tapped(variant)
    has_class, n_registers, n_patches = PREFIXES[variant]
    assert model.cfg.has_class_token is has_class
    assert model.cfg.n_register_tokens == n_registers
    assert model.cfg.n_prefix_tokens == has_class + n_registers
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    all_tokens = run_to_hooks(model, pictures(), [hook])[hook]
    assert all_tokens.shape[1] == has_class + n_registers + n_patches


@pytest.mark.parametrize("size", [None, OTHER_SIZE, (48, 32)])
@pytest.mark.parametrize("variant", ["deit", "dinov2_with_registers", "siglip", "resnet"])
def test_the_number_of_tokens_is_the_number_selected(variant: str, size: Any) -> None:
    model = tapped(variant)
    hook = "blocks.1.hook_resid_post"
    activations = run_to_hooks(model, pictures(size=size or 32), [hook])[hook]
    has_class, n_registers, _ = PREFIXES[variant]
    for tokens in TOKEN_CHOICES:
        if (tokens == "class" and not has_class) or (tokens == "register" and not n_registers):
            continue
        selected = select_tokens(
            activations, tokens, has_class_token=has_class, n_register_tokens=n_registers
        )
        assert selected.shape[1] == tokens_per_image(model, tokens, size, hook), tokens


def test_tokens_come_from_their_places() -> None:
    """Class token, then registers, then patches."""
    acts = torch.arange(7.0).reshape(1, 7, 1).expand(2, 7, 3)

    def chosen(tokens: str) -> list[float]:
        picked = select_tokens(acts, tokens, has_class_token=True, n_register_tokens=2)
        assert picked.shape == (2, picked.shape[1], 3)
        return picked[0, :, 0].tolist()

    assert chosen("class") == [0]
    assert chosen("register") == [1, 2]
    assert chosen("patch") == [3, 4, 5, 6]
    assert chosen("all") == [0, 1, 2, 3, 4, 5, 6]
    assert chosen("mean_patch") == [4.5]


def test_the_class_token_is_the_one_that_the_model_pools() -> None:
    model = tapped("dinov2_with_registers")
    with torch.no_grad():
        pooled = model.original_model(pictures()).pooler_output
    last = run_to_hooks(model, pictures(), ["ln_final.hook_out"])["ln_final.hook_out"]
    picked = select_tokens(last, "class", has_class_token=True, n_register_tokens=4)
    assert torch.equal(picked[:, 0], pooled)


def test_siglip_has_no_class_token_and_says_what_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"siglip.*'class'; allowed: mean_patch, patch, all"):
        check_tokens(tapped("siglip"), "class")
    with pytest.raises(ConfigError, match="no class token"):
        tokens_per_image(tapped("siglip"), "class")


def test_registers_that_are_not_there() -> None:
    with pytest.raises(
        ConfigError, match=r"no register tokens; .*allowed: class, mean_patch, patch, "
    ):
        check_tokens(tapped("dinov2"), "register")
    check_tokens(tapped("deit"), "register")


def test_a_choice_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"tokens: not known .did you mean 'class'"):
        check_tokens(tapped("vit"), "clss")


def test_selecting_tokens_that_are_not_there() -> None:
    pooled = torch.zeros(2, 1, 3)
    with pytest.raises(ConfigError, match="of the 1 tokens there"):
        select_tokens(pooled, "patch", has_class_token=True, n_register_tokens=0)
    with pytest.raises(ConfigError, match="0 is a class token"):
        select_tokens(pooled, "class", has_class_token=False, n_register_tokens=0)


def test_a_shrinking_grid_needs_the_hook_point() -> None:
    model = from_module(tiny_model("dinov3_convnext"))
    assert tokens_per_image(model, "mean_patch") == 1
    with pytest.raises(ConfigError, match=r"hook_name: .*given None"):
        tokens_per_image(model, "patch")
    assert tokens_per_image(model, "patch", 64, "blocks.0.hook_resid_post") == 16 * 16
    assert tokens_per_image(model, "patch", 64, "blocks.1.hook_resid_post") == 8 * 8


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 24, "width": 16}}, (24, 16)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}}, (32, 32)),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}}
            | {"do_center_crop": True},
            (24, 24),
        ),
        ({"size": 40, "crop_size": 24, "do_center_crop": True}, (24, 24)),
        ({"size": {"shortest_edge": 24}, "crop_pct": 0.875}, (24, 24)),
        (None, (32, 32)),
    ],
)
def test_input_size_is_what_preprocessing_makes(
    settings: dict[str, Any] | None, size: tuple[int, int]
) -> None:
    model = from_module(tiny_model("dinov2"))
    model.preprocessor_config = settings
    assert input_size(model) == size
    assert tokens_per_image(model, "patch") == (size[0] // 8) * (size[1] // 8)
