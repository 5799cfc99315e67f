"""An SAE acts on the tokens of its metadata: against hooks on Hugging Face's own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.models.intervention import ModelIntervention
from taxolens.hooks.models.load import hook_d_in, run_to_hooks
from taxolens.registry.errors import ConfigError
from tiny_models import pictures, tapped, tiny_model

HOOK = "blocks.0.hook_resid_post"
SPANS = {"class": slice(0, 1), "register": slice(1, 5), "patch": slice(5, 21), "all": slice(0, 21)}


def sae_for(tokens: str | None, hook: str = HOOK, d_in: int = 16) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    sae.cfg.metadata.hook_name = hook
    if tokens is not None:
        sae.cfg.metadata["tokens"] = tokens
    return sae


def by_hand(variant: str, change: Any) -> torch.Tensor:
    """The output of Hugging Face's model with `change` applied to what its first block gives."""
    plain = tiny_model(variant)
    layers = {
        "dinov3": lambda: plain.model.layer,
        "vit_classifier": lambda: plain.vit.layers,
        "vit_msn": lambda: plain.layers,
    }[variant]()

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0].clone()), *output[1:])
        return change(output.clone())

    layers[0].register_forward_hook(hook)
    with torch.no_grad():
        output = plain(pictures())
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def replaced(sae: Any, span: slice) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x[:, span] = sae(x[:, span])
        return x

    return change


@pytest.mark.parametrize("tokens", SPANS)
def test_other_tokens_pass_through(tokens: str) -> None:
    model, sae, images = tapped("dinov3"), sae_for(tokens), pictures()
    span = SPANS[tokens]
    others = torch.ones(21, dtype=torch.bool)
    others[span] = False
    with torch.no_grad():
        before = run_to_hooks(model, images, [HOOK])[HOOK]
        output = model.run_with_saes(images, saes=[sae])
        with model.saes([sae]):
            after = run_to_hooks(model, images, [HOOK])[HOOK]
            _, latents = model.run_with_cache(images)
        assert torch.equal(after[:, others], before[:, others])
        torch.testing.assert_close(after[:, span], sae(before[:, span]))
        torch.testing.assert_close(output, by_hand("dinov3", replaced(sae, span)))
        found = latents[f"{HOOK}.hook_sae_acts_post"]
        torch.testing.assert_close(found, sae.encode(before[:, span]))


@pytest.mark.parametrize("variant", ["vit_classifier", "vit_msn"])
def test_bridged_and_wrapped_alike(variant: str) -> None:
    sae = sae_for("class")
    model = tapped(variant)
    with torch.no_grad():
        output = model.run_with_saes(pictures(), saes=[sae])
        torch.testing.assert_close(output, by_hand(variant, replaced(sae, slice(0, 1))))
        with_error = model.run_with_saes(pictures(), saes=[sae], use_error_term=True)
        torch.testing.assert_close(with_error, model(pictures()), rtol=1e-4, atol=1e-4)


def test_the_change_of_the_mean_patch_reaches_every_patch() -> None:
    model, sae, images = tapped("dinov3"), sae_for("mean_patch"), pictures()
    with torch.no_grad(), model.saes([sae]):
        after = run_to_hooks(model, images, [HOOK])[HOOK]
    before = run_to_hooks(model, images, [HOOK])[HOOK]
    mean = before[:, 5:].mean(1, keepdim=True)
    assert torch.equal(after[:, :5], before[:, :5])
    with torch.no_grad():
        torch.testing.assert_close(after[:, 5:], before[:, 5:] + sae(mean) - mean)


@pytest.mark.parametrize("variant", ["vit_classifier", "vit_msn"])
def test_other_tokens_only_by_name(variant: str) -> None:
    model, sae, images = tapped(variant), sae_for("class"), pictures()
    everywhere = by_hand(variant, replaced(sae, slice(None)))
    with torch.no_grad():
        torch.testing.assert_close(
            model.run_with_saes(images, saes=[sae], tokens="all"), everywhere
        )
        with model.saes([sae], tokens="all"):
            torch.testing.assert_close(model(images), everywhere)
        model.add_sae(sae, tokens="all")
        inner = model.run_with_saes(images, saes=[sae_for("class")])
        torch.testing.assert_close(inner, by_hand(variant, replaced(sae, slice(0, 1))))
        torch.testing.assert_close(model(images), everywhere)  # as it was before
        model.reset_saes()
        # without tokens in its metadata nothing is known: SAELens's own rule
        torch.testing.assert_close(model.run_with_saes(images, saes=[sae_for(None)]), everywhere)


@pytest.mark.parametrize("variant", ["vit_classifier", "vit_msn"])
@pytest.mark.parametrize("edit", ["ablate", "steer"])
def test_a_latent_is_ablated_or_steered_at_its_own_tokens(variant: str, edit: str) -> None:
    model, sae, images = tapped(variant), sae_for("class"), pictures()
    with torch.no_grad():
        x = run_to_hooks(model, images, [HOOK])[HOOK][:, :1]
        latent = int(sae.encode(x).sum((0, 1)).argmax())

        def change(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts = acts.clone()
            acts[..., latent] = 0 if edit == "ablate" else acts[..., latent] + 3
            return acts

        def expected(x: torch.Tensor) -> torch.Tensor:
            own = sae.encode(x[:, :1])[..., latent]
            by = -own if edit == "ablate" else torch.full_like(own, 3)
            x[:, :1] += by[..., None] * sae.W_dec[latent]
            return x

        with model.saes([sae], use_error_term=True):
            point = f"{HOOK}.hook_sae_acts_post"
            found = model.run_with_hooks(images, fwd_hooks=[(point, change)])
    torch.testing.assert_close(found, by_hand(variant, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", ["class", "patch", "mean_patch"])
def test_interventions_and_spliced_saes_agree(tokens: str) -> None:
    """What `reconstruction`, `detection` and others measure is what `run_with_saes` does."""
    model, sae, images = tapped("vit_classifier"), sae_for(tokens), pictures(3)
    run = ModelIntervention(model, lambda rows: images[list(rows)], HOOK, tokens)
    with torch.no_grad():
        found = run(torch.arange(3), sae)
        expected = model.run_with_saes(images, saes=[sae])
    torch.testing.assert_close(found.logits, expected)


def test_a_transcoder_is_given_the_same_tokens_of_its_input() -> None:
    model, sae, images = (
        tapped("vit_classifier"),
        sae_for("class", "blocks.0.ln2.hook_out"),
        pictures(),
    )
    out = "blocks.0.mlp.hook_out"
    sae.cfg.metadata.hook_name_out = out
    with torch.no_grad():
        found = run_to_hooks(model, images, ["blocks.0.ln2.hook_out", out])
        with model.saes([sae]):
            after = run_to_hooks(model, images, [out])[out]
        assert torch.equal(after[:, 1:], found[out][:, 1:])
        torch.testing.assert_close(after[:, :1], sae(found["blocks.0.ln2.hook_out"][:, :1]))


def test_a_class_token_alone() -> None:
    """CLIP's last norm gives (B, d)."""
    model, hook = tapped("clip"), "ln_final.hook_out"
    sae = sae_for("class", hook, hook_d_in(model, hook))
    with torch.no_grad():
        before = run_to_hooks(model, pictures(), [hook])[hook]
        with model.saes([sae]):
            after = run_to_hooks(model, pictures(), [hook])[hook]
        torch.testing.assert_close(after, sae(before))


def test_tokens_that_are_not_there() -> None:
    for variant in ("siglip", "resnet"):
        model = tapped(variant)
        with pytest.raises(ConfigError, match=r"tokens: .* has no class token"):
            model.add_sae(sae_for("class"))
        assert model.acts_to_saes == {}
