"""Hooks asked for by a name that gives nothing are refused, on bridges and on wrapped models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.models.load import from_module, run_to_hooks
from taxolens.registry.errors import ConfigError, UnknownNameError
from tiny_models import pictures, tapped, tiny_model

HOOK = "blocks.0.hook_resid_post"


def nothing(acts: torch.Tensor, hook: Any) -> None:
    """A hook that only looks."""


def within(model: Any, **options: Any) -> None:
    with model.hooks(**options):
        pass


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "run_with_hooks": lambda m, name: m.run_with_hooks(pictures(), fwd_hooks=[(name, nothing)]),
    "positions": lambda m, name: m.run_with_hooks(pictures(), [(name, nothing)]),
    "backward": lambda m, name: m.run_with_hooks(
        pictures(), bwd_hooks=[(name, nothing)], reset_hooks_end=True
    ),
    "run_with_cache": lambda m, name: m.run_with_cache(pictures(), names_filter=name),
    "cache of many": lambda m, name: m.run_with_cache(pictures(), names_filter=[HOOK, name]),
    "add_hook": lambda m, name: m.add_hook(name, nothing),
    "add_perma_hook": lambda m, name: m.add_perma_hook(name, nothing),
    "hooks": lambda m, name: within(m, fwd_hooks=[(name, nothing)]),
    "with SAEs": lambda m, name: m.run_with_cache_with_saes(pictures(), names_filter=[name]),
}
WRONG = {
    "misspelt": ("blocks.0.hook_resid_pst", UnknownNameError, "did you mean.*hook_resid_post"),
    "no such block": ("blocks.7.hook_resid_post", UnknownNameError, "blocks 0 to 1"),
    "of no SAE": (f"{HOOK}.hook_sae_acts_post", UnknownNameError, "hook_names: not known"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("variant", ["dinov2", "vit_msn"])
def test_a_name_that_does_not_exist(variant: str, wrong: str, way: str) -> None:
    model = tapped(variant)
    name, error, match = WRONG[wrong]
    with pytest.raises(error, match=match):
        WAYS[way](model, name)
    if wrong != "of no SAE":
        with pytest.raises(error) as expected:
            run_to_hooks(model, pictures(), [name])
        with pytest.raises(error) as found:
            WAYS[way](model, name)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_never_fires(way: str) -> None:
    model, name = tapped("dinov2", "sdpa"), "blocks.0.attn.hook_pattern"
    with pytest.raises(ConfigError, match="only eager attention forms; given 'sdpa'"):
        WAYS[way](model, name)
    with pytest.raises(ConfigError, match=r"it is off; allowed: model\.set_use_hook_mlp_in"):
        WAYS[way](model, "blocks.0.hook_mlp_in")


@pytest.mark.parametrize("variant", ["dinov2", "vit_msn"])
def test_filters(variant: str) -> None:
    model = tapped(variant, "sdpa") if variant == "dinov2" else tapped(variant)
    for way in ("run_with_hooks", "run_with_cache", "add_hook", "hooks"):
        with pytest.raises(ConfigError, match="the filter accepts no hook point"):
            WAYS[way](model, lambda name: "nothing" in name)
    if variant == "dinov2":
        with pytest.raises(ConfigError, match="only eager attention"):
            WAYS["run_with_cache"](model, lambda name: name.endswith("hook_pattern"))
    _, cache = model.run_with_cache(
        pictures(), names_filter=lambda name: name.endswith(("hook_resid_post", "hook_pattern"))
    )
    assert HOOK in cache


@pytest.mark.parametrize("variant", ["dinov2", "vit_msn"])
def test_an_sae_in_the_place_of_a_hook_point(variant: str) -> None:
    model = from_module(tiny_model(variant))
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    sae.cfg.metadata.hook_name = HOOK
    inside = f"{HOOK}.hook_sae_acts_post"
    model.add_sae(sae)
    for way in ("run_with_hooks", "run_with_cache", "add_hook", "hooks"):
        with pytest.raises(ConfigError, match="an SAE is spliced in there; allowed: reset_saes"):
            WAYS[way](model, HOOK)
        WAYS[way](model, inside)
    model.reset_saes()


@pytest.mark.parametrize("variant", ["dinov2", "vit_msn"])
def test_an_added_hook_fires_under_any_of_its_names(variant: str) -> None:
    model = from_module(tiny_model(variant))
    seen: list[torch.Size] = []
    model.add_hook(HOOK, lambda acts, hook: seen.append(acts.shape))
    model(pictures())
    assert seen == [(2, 17, 16)]


def test_a_model_that_draws_is_refused_by_a_whole_cache_too() -> None:
    model = from_module(tiny_model("vit_mae"), family="wrapped")
    with pytest.raises(ConfigError, match="draws random numbers"):
        model.run_with_cache(pictures())
