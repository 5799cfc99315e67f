"""One head of a hook point: against slices made by hand of what Hugging Face's own attention gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.models.intervention import ModelIntervention
from taxolens.hooks.models.load import from_module, hook_d_in
from taxolens.registry.errors import ConfigError
from taxolens.registry.heads import columns_of, head_key, head_name, key_of
from tiny_images import hf_dataset, noise
from tiny_models import tiny_model

N, D_HEAD = 6, 8
Z = "blocks.0.attn.hook_z"
PARTS = {"hook_q": "q_proj", "hook_k": "k_proj", "hook_v": "v_proj", "hook_z": "o_proj"}
HEAD = slice(8, 16)  # the second of two heads
SPANS = {"class": slice(0, 1), "patch": slice(1, 17), "all": slice(0, 17)}


@pytest.fixture(scope="module")
def model() -> Any:
    tapped = from_module(tiny_model("vit_classifier"))
    size = {"height": 32, "width": 32}
    tapped.preprocessor_config = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return tapped


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return ImageDataset(hf_dataset(N, ["ant", "bee"], draw=noise))


@pytest.fixture(scope="module")
def pixels(model: Any, images: ImageDataset) -> torch.Tensor:
    preprocess = preprocess_for(model)
    return torch.stack([torch.from_numpy(preprocess(images.decode(i))) for i in range(N)])


def sae_of(head: int | None, tokens: str = "all", hook: str = Z, d_in: int = D_HEAD) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=12))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = hook, head
    sae.cfg.metadata.tokens = tokens
    return sae


def own(
    part: str, pixels: torch.Tensor, change: Any = None, block: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What passes a part of an attention of Hugging Face, (B, T, 16), and the logits."""
    plain, kept = tiny_model("vit_classifier"), []
    projection = dict(plain.vit.layers[block].named_modules())[f"attention.{part}"]

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.clone())
        return value if change is None else change(value.clone())

    if part == "o_proj":  # what goes in
        projection.register_forward_pre_hook(lambda module, given: (keep(given[0]),))
    else:
        projection.register_forward_hook(lambda module, given, output: keep(output))
    with torch.no_grad():
        return (plain(pixels).logits, kept[0])[::-1]


def test_a_head_is_named_by_its_columns() -> None:
    assert head_key(Z, 1, D_HEAD) == f"{Z}[8:16]" == key_of(sae_of(1))
    assert head_key(Z, None, 16) == Z == key_of(sae_of(None))
    assert columns_of(f"{Z}[8:16]") == (Z, HEAD)
    assert columns_of(Z) == (Z, slice(None))
    assert (head_name(Z, 0), head_name(Z, None)) == (f"{Z}.head0", Z)


@pytest.mark.parametrize("point", PARTS)
@pytest.mark.parametrize("tokens", [*SPANS, "mean_patch"])
def test_cache_and_stream_give_the_columns_of_the_head(
    point: str, tokens: str, model: Any, images: Any, pixels: Any, tmp_path: Path
) -> None:
    hook = f"blocks.1.attn.{point}"
    keys = [head_key(hook, 1, D_HEAD), head_key(hook, 0, D_HEAD)]
    expected, _ = own(PARTS[point], pixels, block=1)
    expected = (
        expected[:, 1:].mean(1, keepdim=True)
        if tokens == "mean_patch"
        else expected[:, SPANS[tokens]]
    )
    cache = ActivationCache.build(model, images, keys, tokens=tokens, path=tmp_path, progress=False)
    assert cache.hook_names == [hook], "the hook point is stored once"
    assert np.allclose(cache.activations(keys[0]), expected[..., HEAD], atol=1e-6)
    assert np.allclose(cache.tensor(keys[1]), expected[..., :8], atol=1e-6)
    assert np.allclose(cache.activations(hook), expected, atol=1e-6), "all heads, joined"
    per_image = expected.shape[1]
    for source in ({"model": model, "images": images}, {"model": None, "images": None}):
        cached = {"cache": cache} if source["model"] is None else {}
        stream = ActivationStream(
            *(source["model"], source["images"], keys),
            **{"tokens": tokens, "train_batch_size_tokens": N * per_image, **cached},
        )
        batch = next(stream)
        assert list(batch) == keys
        both = torch.cat([batch[keys[1]], batch[keys[0]]], dim=1)
        rows = expected.flatten(0, 1)
        nearest = (both[:, None] - rows).norm(dim=2).min(1)
        assert nearest.values.max() < 1e-5
        assert sorted(nearest.indices.tolist()) == list(range(len(rows)))


def test_the_mean_patch_beside_other_tokens_is_that_of_the_head(
    model: Any, images: Any, pixels: Any
) -> None:
    key = head_key(Z, 1, D_HEAD)
    cache = ActivationCache.build(
        model, images, [key], tokens="class", mean_patch=True, progress=False
    )
    expected, _ = own("o_proj", pixels)
    assert np.allclose(cache.mean_patch(key), expected[:, 1:, HEAD].mean(1), atol=1e-6)
    tensor = cache.tensor(key, "mean_patch")
    assert np.allclose(tensor[:, 0], expected[:, 1:, HEAD].mean(1), atol=1e-6)


@pytest.mark.parametrize("tokens", [*SPANS, "mean_patch"])
def test_a_spliced_sae_acts_on_its_head_alone(tokens: str, model: Any, pixels: Any) -> None:
    sae = sae_of(1, tokens)

    def change(z: torch.Tensor) -> torch.Tensor:
        if tokens == "mean_patch":
            mean = z[:, 1:, HEAD].mean(1, keepdim=True)
            z[:, 1:, HEAD] += sae(mean) - mean
        else:
            z[:, SPANS[tokens], HEAD] = sae(z[:, SPANS[tokens], HEAD])
        return z

    _, expected = own("o_proj", pixels, change)
    _, untouched = own("o_proj", pixels)
    with torch.no_grad():
        found = model.run_with_saes(pixels, saes=[sae])
        _, cache = model.run_with_cache_with_saes(
            pixels, saes=[sae], return_cache_object=False, names_filter=lambda name: "post" in name
        )
        with_error = model.run_with_saes(pixels, saes=[sae], use_error_term=True)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, untouched, atol=1e-3)
    assert torch.allclose(with_error, untouched, atol=1e-5)
    assert cache[f"{Z}.hook_sae_acts_post"].shape == (
        N,
        {"class": 1, "mean_patch": 1, "patch": 16, "all": 17}[tokens],
        12,
    )
    assert torch.allclose(model(pixels), untouched, atol=1e-6), "taken out again"


def test_the_ablation_of_a_latent_changes_its_head_alone(model: Any, pixels: Any) -> None:
    sae = sae_of(0, "patch")

    def without(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., 2] = 0
        return acts

    def change(z: torch.Tensor) -> torch.Tensor:
        x = z[:, 1:, :8]
        latents = sae.encode(x)
        latents[..., 2] = 0
        z[:, 1:, :8] = sae.decode(latents)
        return z

    _, expected = own("o_proj", pixels, change)
    with torch.no_grad():
        found = model.run_with_hooks_with_saes(
            pixels, saes=[sae], fwd_hooks=[(f"{Z}.hook_sae_acts_post", without)]
        )
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("hook", [Z, "blocks.0.attn.hook_q"])
def test_an_intervention_edits_the_head_alone(hook: str, model: Any, pixels: Any) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (N, 16, D_HEAD)
        return 2 * x

    def change(z: torch.Tensor) -> torch.Tensor:
        z[:, 1:, HEAD] *= 2
        return z

    intervene = ModelIntervention(model, lambda index: pixels[index], head_key(hook, 1, 8), "patch")
    found = intervene(torch.arange(N), double)
    _, expected = own(PARTS[hook.rpartition(".")[2]], pixels, change)
    assert found.logits is not None
    assert torch.allclose(found.logits, expected, atol=1e-5)


def test_two_heads_of_one_hook_point_are_not_spliced_in_together(model: Any, pixels: Any) -> None:
    with pytest.raises(ConfigError, match=r"hook_head_index 0\), and only one can be; given 1"):
        model.run_with_saes(pixels, saes=[sae_of(0), sae_of(1)])
    assert not model.acts_to_saes
    both = model.run_with_saes(pixels, saes=[sae_of(0), sae_of(1, hook="blocks.1.attn.hook_z")])
    assert both.shape == (N, 5), "heads of two hook points can be"


@pytest.mark.parametrize(
    ("variant", "hook", "head", "message"),
    [
        ("vit", Z, 2, r"hook_head_index: 'blocks.0.attn.hook_z' has 2 heads; given 2; allowed: 0 to 1"),
        ("vit", Z, -1, r"has 2 heads; given -1; allowed: 0 to 1"),
        ("vit", Z, True, r"has 2 heads; given True"),
        ("vit", "blocks.0.hook_resid_post", 0, r"has no heads; given 0; allowed: none, or a hook point named hook_q"),
        ("vit", "blocks.0.attn.o.hook_in", 0, r"'blocks.0.attn.o.hook_in' of .* has no heads"),
        ("convnext", "blocks.0.hook_resid_post", 0, r"has no heads; given 0; allowed: none\."),
    ],
)  # fmt: skip
def test_a_head_that_is_not_there_is_refused(
    variant: str, hook: str, head: Any, message: str
) -> None:
    model = from_module(tiny_model(variant))
    with pytest.raises(ConfigError, match=message):
        hook_d_in(model, hook, head=head)
    with pytest.raises(ConfigError, match=message):
        model.add_sae(sae_of(head, hook=hook))
    assert not model.acts_to_saes


def test_an_sae_of_another_width_is_not_spliced_into_a_head(model: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"d_in: not the width of a head at .*; given 16; allowed: 8"
    ):
        model.add_sae(sae_of(1, d_in=16))
