"""What every family must hold: equality with Hugging Face to the bit, and SAEs in and out again."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from far_device import FAR_DEVICES, on
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.models.families import FAMILIES
from taxolens.hooks.models.hooked_module import find_blocks
from taxolens.hooks.models.load import expand_hook_names, from_module, hook_d_in, run_to_hooks
from taxolens.registry.errors import ConfigError
from tiny_models import BRIDGED, IMAGE_SIZE, OTHER_SIZE, WRAPPED, pictures, tapped, tiny_model

SIZES = (IMAGE_SIZE, OTHER_SIZE)
ALL = (*BRIDGED, *WRAPPED)
# told to interpolate by a flag; the others do it by themselves, or turn positions
FLAGGED = ("vit", "deit", "clip", "siglip", "ijepa")
# trained at one size, and refused by transformers at any other
ONE_SIZE = ("aimv2_one_size",)


def plain_output(model: Any, images: torch.Tensor, **options: Any) -> Any:
    if images.shape[-1] != IMAGE_SIZE and model.config.model_type.startswith(FLAGGED):
        options["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":  # all patches, in their order
        model.config.mask_ratio = 0.0
        n_patches = (images.shape[-1] // 8) ** 2
        options["noise"] = torch.linspace(0, 1, n_patches).expand(len(images), -1)
    with torch.no_grad():
        return model(images, **options)


def sae_at(model: Any, hook_name: str) -> StandardSAE:
    d_in = hook_d_in(model, hook_name)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    sae.cfg.metadata.hook_name = hook_name
    return sae


# under contract in test_open_clip.py, test_qwen_vl.py and, where timm is installed, in test_timm.py
ELSEWHERE = {"open_clip", "qwen_vl", "timm"}
# whose last norm comes after pooling
POOLED = ("clip", "clip_projection", "clip_classifier", "beit", "beit_classifier")
MIDDLE = "blocks.0.hook_resid_post"


def test_every_family_is_under_contract() -> None:
    """A new family needs a model in tiny_models.py."""
    under = {tapped(variant).family for variant in ALL}
    assert under | ELSEWHERE == {family.name for family in FAMILIES}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", BRIDGED)
def test_equal_to_hugging_face_to_the_bit(variant: str, attention: str) -> None:
    reference = tiny_model(variant, attn_implementation=attention)
    model = tapped(variant, attention)
    posts = expand_hook_names(model, ["blocks.*.hook_resid_post"])
    names = ["hook_embed", "blocks.0.hook_resid_pre", *posts]
    for size in SIZES[:1] if variant in ONE_SIZE else SIZES:
        images = pictures(size=size)
        plain = plain_output(reference, images, output_hidden_states=True)
        expected = dict(zip(names, [plain.hidden_states[0], *plain.hidden_states]))
        with torch.no_grad():
            output, cached = model.run_with_cache(images, names_filter=names)
            whole = model.original_model(images)
        stopped = run_to_hooks(model, images, names)

        assert list(stopped) == names
        for name in names:
            assert torch.equal(cached[name], expected[name]), name
            assert torch.equal(stopped[name], expected[name]), name
        final = plain.logits if hasattr(plain, "logits") else plain.last_hidden_state
        assert torch.equal(output, final)
        for field in ("pooler_output", "image_embeds"):
            if getattr(plain, field, None) is not None:
                assert torch.equal(getattr(whole, field), getattr(plain, field))


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("device", FAR_DEVICES)
def test_activations_on_another_device_are_those_of_the_cpu(variant: str, device: str) -> None:
    model = tapped(variant)
    names = [*expand_hook_names(model, ["blocks.*.hook_resid_post"])]
    expected = run_to_hooks(model, pictures(), names)
    with on(device):
        there = from_module(tiny_model(variant).to(device))
        got = run_to_hooks(there, pictures().to(device), names)
        assert {got[name].device.type for name in names} == {device}
        for name in names:
            torch.testing.assert_close(got[name].cpu(), expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", BRIDGED)
def test_sublayers_add_up_to_the_residual_stream(variant: str) -> None:
    model = tapped(variant)
    parts = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.1.{part}" for part in parts]
    got = run_to_hooks(model, pictures(), names)
    pre, attention, mid, mlp, post = (got[name] for name in names)
    assert torch.equal(pre + attention, mid)
    assert torch.equal(mid + mlp, post)


@pytest.mark.parametrize("variant", BRIDGED)
def test_attention_pattern_is_hugging_faces(variant: str) -> None:
    plain = plain_output(tiny_model(variant), pictures(), output_attentions=True)
    got = run_to_hooks(tapped(variant), pictures(), ["blocks.1.attn.hook_pattern"])
    assert torch.equal(got["blocks.1.attn.hook_pattern"], plain.attentions[1])


PATTERN = "blocks.0.attn.hook_pattern"


def test_threads_that_share_a_model_each_see_their_patterns() -> None:
    """The config of an attention that is listened to is another one while it runs."""
    model, seen, failed = tapped("vit"), [], []
    images = [torch.randn_like(pictures()) for _ in range(2)]
    alone = [run_to_hooks(model, each, [PATTERN])[PATTERN] for each in images]
    model.hook_dict[PATTERN].add_hook(lambda pattern, hook: seen.append(pattern.clone()))

    def run(each: torch.Tensor) -> None:
        try:
            for _ in range(60):
                with torch.no_grad():
                    model(each)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(seen) == 120
    for pattern in alone:
        assert sum(torch.equal(pattern, each) for each in seen) == 60


def in_place(pattern: torch.Tensor, hook: Any) -> None:
    pattern[:, 0] = 0


PATTERN_HOOKS: dict[str, Any] = {
    "another tensor": lambda pattern, hook: pattern.roll(1, dims=-1) * 0.5,
    "in place": in_place,
    "nothing": lambda pattern, hook: None,
}


def textbook(eager: Any, first: Any, edit: Any) -> Any:
    """Attention whose pattern in one module is edited, then weighs the values query by query."""

    def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        output, pattern = eager(module, query, key, value, *rest, **options)
        if module is first:
            edited = edit(pattern, None)
            pattern = pattern if edited is None else edited
            rows = [(pattern[:, :, i, :, None] * value).sum(2) for i in range(pattern.shape[2])]
            output = torch.stack(rows, dim=1)
        return output, pattern

    return attend


@pytest.mark.parametrize("edit", PATTERN_HOOKS)
@pytest.mark.parametrize("variant", BRIDGED)
def test_an_edit_of_the_pattern_acts(
    variant: str, edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hook = tapped(variant), PATTERN_HOOKS[edit]
    last = "blocks.1.hook_resid_post"

    def run(*hooks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with model.hooks(fwd_hooks=list(hooks)):
            output, cached = model.run_with_cache(pictures(), names_filter=[last])
        return cached[last], output

    with torch.no_grad():
        clean, edited = run(), run((PATTERN, hook))
        again = run()
        with torch.inference_mode():
            inferred = run((PATTERN, hook))
    plain = tiny_model(variant)
    first = next(module for module in plain.modules() if is_attention(module))
    source = sys.modules[type(first).__module__]
    eager = source.eager_attention_forward
    monkeypatch.setattr(source, "eager_attention_forward", textbook(eager, first, hook))
    expected = plain_output(plain, pictures(), output_hidden_states=True).hidden_states[2]

    torch.testing.assert_close(edited[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inferred[0], expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(clean, again))
    assert torch.equal(clean[0], edited[0]) is (edit == "nothing")


def is_attention(module: Any) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(module, "config")


def test_gradients_pass_the_pattern() -> None:
    """Of a loss by the pattern: the change of the loss along a direction, over the step."""
    model = from_module(tiny_model("dinov2").double())  # whose softmax is of double precision too
    images, gradients = pictures().double(), []
    with model.hooks(bwd_hooks=[(PATTERN, lambda gradient, hook: gradients.append(gradient))]):
        model(images).pow(2).sum().backward()
    along = torch.randn(gradients[0].shape, dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        hook = (PATTERN, lambda pattern, hook: pattern + step * along)
        return model.run_with_hooks(images, fwd_hooks=[hook]).pow(2).sum()

    with torch.no_grad():
        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close((gradients[0] * along).sum(), slope, rtol=1e-5, atol=1e-6)


def test_a_pattern_that_does_not_act_is_not_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an attention that does more than weigh its values, the pattern can be read alone."""
    source = sys.modules[type(tiny_model("vit").layers[0].attention).__module__]
    eager = source.eager_attention_forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        output, pattern = eager(*arguments, **options)
        return output * 2, pattern

    monkeypatch.setattr(source, "eager_attention_forward", scaled)
    model, seen = from_module(tiny_model("vit")), []
    with torch.no_grad():
        clean = model(pictures())
        watch = (PATTERN, lambda pattern, hook: seen.append(pattern))
        assert torch.equal(model.run_with_hooks(pictures(), fwd_hooks=[watch]), clean)
    assert seen[0].shape == (2, 2, 17, 17)
    for context in (torch.no_grad(), torch.inference_mode()):
        for hook in (PATTERN_HOOKS["another tensor"], in_place):
            with (
                context,
                pytest.raises(ConfigError, match="hook_pattern: it cannot be edited in V"),
            ):
                model.run_with_hooks(pictures(), fwd_hooks=[(PATTERN, hook)])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_scores_are_refused(attention: str) -> None:
    with pytest.raises(ConfigError, match=r"the scores before the softmax are not given"):
        run_to_hooks(tapped("vit", attention), pictures(), ["blocks.0.attn.hook_attn_scores"])
    _, cached = tapped("vit").run_with_cache(pictures())
    assert not [name for name in cached if "scores" in name]


@pytest.mark.parametrize("variant", BRIDGED)
def test_inner_hooks_have_their_shapes(variant: str) -> None:
    model = tapped(variant)
    n_tokens = model.cfg.n_ctx
    names = {
        "embed.hook_out": (n_tokens, 16),
        "blocks.0.ln1.hook_normalized": (n_tokens, 16),
        "blocks.0.attn.hook_q": (n_tokens, 16),
        "blocks.0.attn.hook_z": (n_tokens, 16),
        "blocks.0.mlp.hook_pre": (n_tokens, model.cfg.d_mlp),
        "blocks.0.mlp.hook_post": (n_tokens, model.cfg.d_mlp),
        "ln_final.hook_out": (1 if variant in POOLED else n_tokens, 16),
    }
    got = run_to_hooks(model, pictures(3), list(names))
    assert {name: tuple(a.shape) for name, a in got.items()} == {
        name: (3, *shape) for name, shape in names.items()
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", WRAPPED)
def test_wrapped_is_equal_to_plain_hooks_to_the_bit(variant: str, size: int) -> None:
    images, plain = pictures(size=size), tiny_model(variant)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.ndim in (2, 3, 4):
                channels_last = isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm))
                channels_last &= getattr(module, "data_format", "") != "channels_first"
                channels_last |= "convnext" in variant and name.endswith((".act", ".activation_fn"))
                seen[name] = as_tokens(first, channels_last)

        return hook

    for name, module in plain.named_modules():
        if name:
            module.register_forward_hook(keep(name))
    expected = plain_output(plain, images)
    model = tapped(variant)
    names = [f"{name}.hook_out" for name in seen]
    flag = {"interpolate_pos_encoding": True} if variant == "vit_msn" and size != IMAGE_SIZE else {}
    with torch.no_grad():
        output, cached = model.run_with_cache(images, names_filter=names, **flag)
    for name, activation in seen.items():
        assert torch.equal(cached[f"{name}.hook_out"], activation), name
    final = expected.logits if hasattr(expected, "logits") else expected.last_hidden_state
    assert torch.equal(output, final)


def as_tokens(features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if features.ndim == 2:
        return features[:, None].clone()
    if features.ndim == 3:
        return features.clone()
    if channels_last:
        return features.flatten(1, 2).clone()
    return features.flatten(2).transpose(1, 2).clone()


@pytest.mark.parametrize("variant", ALL)
def test_stops_right_after_the_last_hook(variant: str) -> None:
    model = tapped(variant)
    hook_d_in(model, MIDDLE)  # tries the hook points out, once per model
    started: list[int] = []
    last = model.cfg.n_layers - 1
    counters = [
        first_layer(block).register_forward_pre_hook(lambda *_, number=n: started.append(number))
        for n, block in enumerate(plain_blocks(model))
    ]
    run_to_hooks(model, pictures(), ["blocks.0.hook_resid_post", "blocks.0.hook_resid_pre"])
    assert started == [0]
    started.clear()
    run_to_hooks(model, pictures(), [f"blocks.{last}.hook_resid_pre"])
    assert started == list(range(last))
    started.clear()
    with torch.no_grad():
        model(pictures())
    assert started == list(range(last + 1))
    for counter in counters:
        counter.remove()


def first_layer(block: torch.nn.Module) -> torch.nn.Module:
    kinds = (torch.nn.LayerNorm, torch.nn.Conv2d, torch.nn.Linear)
    return next(module for module in block.modules() if isinstance(module, kinds))


def plain_blocks(model: Any) -> list[torch.nn.Module]:
    if model.family != "wrapped":
        return [block.original_component for block in model.blocks]
    return [model.original_model.get_submodule(name) for name in find_blocks(model.original_model)]


@pytest.mark.parametrize("variant", ALL)
def test_sae_goes_in_and_comes_out(variant: str) -> None:
    model, images = tapped(variant), pictures()
    hook, hooks_before = MIDDLE, set(model.hook_dict)
    sae = sae_at(model, hook)
    with torch.no_grad():
        untouched = model(images)
        before = run_to_hooks(model, images, [hook])[hook]
        spliced = model.run_with_saes(images, saes=[sae], use_error_term=False)
        with_error = model.run_with_saes(images, saes=[sae], use_error_term=True)
        assert not torch.allclose(spliced, untouched, atol=1e-3)
        # x^ + (x - x^) is x up to the rounding of the last bit
        torch.testing.assert_close(with_error, untouched, rtol=1e-4, atol=1e-4)

        model.add_sae(sae)
        assert list(model.acts_to_saes) == [hook]
        torch.testing.assert_close(run_to_hooks(model, images, [hook])[hook], sae(before))
        assert torch.equal(model(images), spliced)
        model.reset_saes()
        assert model.acts_to_saes == {}
        assert set(model.hook_dict) == hooks_before
        assert torch.equal(model(images), untouched)
        assert torch.equal(run_to_hooks(model, images, [hook])[hook], before)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("edit", ["ablate", "steer"])
def test_a_latent_is_ablated_or_steered(variant: str, edit: str) -> None:
    model, images = tapped(variant), pictures()
    hook = MIDDLE
    sae = sae_at(model, hook)
    with torch.no_grad():
        before = run_to_hooks(model, images, [hook])[hook]
        latents = sae.encode(before)
        latent = int(latents.sum((0, 1)).argmax())
        assert latents[..., latent].any()

        def change(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts = acts.clone()
            acts[..., latent] = 0 if edit == "ablate" else acts[..., latent] + 3
            return acts

        by = -latents[..., latent] if edit == "ablate" else torch.full_like(latents[..., 0], 3)
        expected = before + by[..., None] * sae.W_dec[latent]
        untouched = model(images)
        with model.saes([sae], use_error_term=True):
            point = f"{hook}.hook_sae_acts_post"
            with model.hooks(fwd_hooks=[(point, change)]):
                after = run_to_hooks(model, images, [hook])[hook]
                changed = model(images)
            again = model.run_with_hooks(images, fwd_hooks=[(point, change)])
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(changed, again)
        assert not torch.allclose(changed, untouched, atol=1e-3)
        assert torch.equal(model(images), untouched)


@pytest.mark.parametrize("variant", BRIDGED)
def test_an_edit_reaches_the_hidden_states_of_hugging_face(variant: str) -> None:
    model = tapped(variant)
    with model.hooks(fwd_hooks=[(MIDDLE, lambda acts, hook: acts + 1)]), torch.no_grad():
        (after,) = run_to_hooks(model, pictures(), ["blocks.1.hook_resid_pre"]).values()
        states = model.original_model(pictures(), output_hidden_states=True).hidden_states
    before = run_to_hooks(model, pictures(), [MIDDLE])[MIDDLE]
    assert torch.equal(states[1], before + 1) and torch.equal(after, before + 1)


@pytest.mark.parametrize("variant", ("vit", "dinov2", "resnet", "vit_msn"))
def test_gradients_reach_the_pictures_past_a_hook(variant: str) -> None:
    model, images = tapped(variant), pictures().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(activation: torch.Tensor, hook: Any) -> None:
        activation.retain_grad()
        kept.append(activation)

    output = model.run_with_hooks(images, fwd_hooks=[(MIDDLE, keep)])
    output.square().sum().backward()
    assert images.grad is not None and kept[0].grad is not None
    assert kept[0].grad.any()


@pytest.mark.parametrize("variant", ["dinov2_swiglu", "clip", "resnet"])
def test_tapped_model_can_be_copied(variant: str) -> None:
    model = tapped(variant)
    hook = MIDDLE
    other = copy.deepcopy(model)
    assert torch.equal(
        run_to_hooks(model, pictures(), [hook])[hook], run_to_hooks(other, pictures(), [hook])[hook]
    )
