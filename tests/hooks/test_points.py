"""Hook points by name, by pattern, and the errors of those who ask for others."""

from __future__ import annotations

from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from taxolens.hooks.models.load import (
    expand_hook_names,
    from_module,
    hook_d_in,
    hook_n_tokens,
    resolve_hook_name,
    run_to_hooks,
)
from taxolens.registry.errors import ConfigError, UnknownNameError
from tiny_models import pictures, tapped, tiny_model

POSTS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("hook_embed", "embed.hook_out"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_in"),
        ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in"),
        ("blocks.1.hook_resid_post", "blocks.1.hook_out"),
        ("blocks.1.hook_attn_out", "blocks.1.ls1.hook_out"),
        ("blocks.1.hook_mlp_out", "blocks.1.ls2.hook_out"),
        ("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"),
        ("blocks.1.mlp.hook_post", "blocks.1.mlp.out.hook_in"),
        ("ln_final.hook_out", "ln_final.hook_out"),
    ],
)
def test_transformer_lens_names(alias: str, canonical: str) -> None:
    assert resolve_hook_name(tapped("dinov2"), alias) == canonical
    assert tapped("dinov2").hook_dict[alias] is tapped("dinov2").hook_dict[canonical]


def test_names_of_families_that_differ() -> None:
    assert resolve_hook_name(tapped("vit"), "blocks.0.hook_attn_out") == "blocks.0.attn.hook_out"
    assert resolve_hook_name(tapped("vit"), "blocks.0.hook_mlp_out") == "blocks.0.mlp.hook_out"
    assert resolve_hook_name(tapped("clip"), "hook_embed") == "embed_ln.hook_out"
    swiglu = tapped("dinov2_swiglu")
    assert resolve_hook_name(swiglu, "blocks.0.mlp.hook_pre") == "blocks.0.mlp.gate.hook_out"
    assert resolve_hook_name(swiglu, "blocks.0.mlp.hook_pre_linear") == "blocks.0.mlp.in.hook_out"
    assert resolve_hook_name(tapped("resnet"), POSTS[0]) == POSTS[0]


def test_aliases_work_in_caches_and_hooks() -> None:
    """SAELens's bridge drops an alias without a word; ours must not."""
    model, seen = tapped("dinov2"), []
    _, cached = model.run_with_cache(pictures(), names_filter=POSTS[0])
    assert POSTS[0] in cached
    model.run_with_hooks(pictures(), fwd_hooks=[(POSTS[0], lambda acts, hook: seen.append(1))])
    assert seen == [1]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["blocks.*.hook_resid_post"], POSTS),
        (["blocks.{1,0}.hook_resid_post"], POSTS),
        (["blocks.{0, 1}.hook_resid_{pre,post}"], None),
        ([POSTS[1], "hook_embed"], ["hook_embed", POSTS[1]]),
        (["blocks.*.hook_out"], ["blocks.0.hook_out", "blocks.1.hook_out"]),
        (["blocks.[1-9].hook_resid_post"], POSTS[1:]),
        (["**.hook_resid_post"], POSTS),
        ([POSTS[1], "blocks.*.hook_resid_post"], POSTS),
        (["blocks.0.attn.?.hook_out"], [f"blocks.0.attn.{part}.hook_out" for part in "qkvo"]),
    ],
)
def test_patterns(patterns: list[str], names: list[str] | None) -> None:
    expected = names or [
        *("blocks.0.hook_resid_pre", POSTS[0]),
        *("blocks.1.hook_resid_pre", POSTS[1]),
    ]
    assert expand_hook_names(tapped("dinov2"), patterns) == expected


def test_many_blocks_are_in_order_of_execution() -> None:
    """Not in that of the alphabet, where 10 comes before 2."""
    import transformers
    from tiny_models import DINOV2

    config = transformers.Dinov2Config(**{**DINOV2, "num_hidden_layers": 11})
    model = from_module(transformers.Dinov2Model(config).eval())
    names = expand_hook_names(model, ["blocks.*.hook_resid_post"])
    assert names == [f"blocks.{i}.hook_resid_post" for i in range(11)]


def test_wildcards_leave_out_what_never_fires() -> None:
    names = expand_hook_names(tapped("dinov2", "sdpa"), ["blocks.0.attn.hook_*"])
    assert "blocks.0.attn.hook_out" in names
    assert "blocks.0.attn.hook_pattern" not in names
    assert "blocks.0.attn.hook_pattern" in expand_hook_names(
        tapped("dinov2"), ["blocks.0.attn.hook_*"]
    )


@pytest.mark.parametrize("patterns", [[], "blocks.*.hook_out"])
def test_patterns_must_be_a_list(patterns: Any) -> None:
    with pytest.raises(ConfigError, match=r"hook_names: .*allowed: a list of one or more"):
        expand_hook_names(tapped("dinov2"), patterns)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.0.hook_resid_pots", "did you mean 'blocks.0.hook_resid_post'"),
        ("blocks.12.hook_resid_post", "'blocks.1.hook_resid_post'"),
        ("blocks.12.hook_resid_post", "has blocks 0 to 1"),
        ("blocks.*.hook_rezid_post", "hook_resid_post"),
        ("*.hook_resid_post", r"`\*\*` for any number"),
        ("encoder.layer.0", "hook_names: not known.*given 'encoder.layer.0'"),
    ],
)
def test_an_unknown_hook_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        expand_hook_names(tapped("dinov2"), [name])
    with pytest.raises(UnknownNameError, match="hook_names: not known"):
        resolve_hook_name(tapped("dinov2"), name)


@pytest.mark.parametrize("variant", ["vit", "dinov2", "dinov3", "clip", "siglip"])
@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.*.attn.hook_pattern"])
def test_attention_patterns_need_eager(variant: str, name: str) -> None:
    model = tapped(variant, "sdpa")
    with pytest.raises(ConfigError, match=r"attn_implementation: .*'sdpa'; allowed: eager"):
        expand_hook_names(model, [name])
    assert len(expand_hook_names(tapped(variant), [name])) >= 1
    with pytest.raises(ConfigError, match="eager"):
        run_to_hooks(model, pictures(), ["blocks.0.attn.hook_pattern"])


def test_a_gated_hook_says_how_to_open_it() -> None:
    model = from_module(tiny_model("dinov2"))
    with pytest.raises(ConfigError, match=r"set_use_hook_mlp_in\(True\)"):
        resolve_hook_name(model, "blocks.0.hook_mlp_in")
    model.set_use_hook_mlp_in(True)
    names = ["blocks.0.hook_mlp_in", "blocks.0.hook_resid_mid"]
    got = run_to_hooks(model, pictures(), names)
    assert torch.equal(got[names[0]], got[names[1]])


def test_a_hook_that_never_fires() -> None:
    with pytest.raises(ConfigError, match="never fires in a forward pass of Dinov2Model"):
        resolve_hook_name(tapped("dinov2"), "blocks.0.attn.hook_result")


def test_widths_and_token_counts() -> None:
    model = tapped("dinov2")
    assert hook_d_in(model, "blocks.0.hook_resid_post") == 16
    assert hook_d_in(model, "blocks.0.mlp.hook_post") == 32
    assert hook_d_in(model, "blocks.0.attn.hook_z") == 16
    assert hook_n_tokens(model, POSTS[0]) == 17
    assert hook_n_tokens(model, POSTS[0], 48) == 37
    assert hook_d_in(model, "blocks.0.attn.hook_pattern", 48) == 37
    assert hook_d_in(tapped("resnet"), POSTS[1]) == 24


def test_width_is_looked_up_once() -> None:
    model = from_module(tiny_model("dinov2"))
    passes = []
    model.original_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(3):
        hook_d_in(model, POSTS[0])
        hook_d_in(model, POSTS[1])
    assert len(passes) == 3  # two of the same images, which must agree, and one of a single image


def test_training_mode_is_left_as_it_was() -> None:
    """Batch norms must not learn from the picture that hook points are tried out with."""
    model = from_module(tiny_model("resnet"))
    model.train()
    before = {name: t.clone() for name, t in model.original_model.state_dict().items()}
    hook_d_in(model, POSTS[0])
    assert model.training and model.original_model.training
    after = model.original_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reduce_sees_each_activation_and_keeps_only_its_result() -> None:
    model = tapped("dinov2")
    whole = run_to_hooks(model, pictures(4), POSTS)
    got = run_to_hooks(model, pictures(4), POSTS, reduce=lambda acts: acts[:, :1])
    for name in POSTS:
        assert torch.equal(got[name], whole[name][:, :1])
        assert got[name].untyped_storage().nbytes() == got[name].nbytes  # no patches kept alive


def test_names_asked_for_twice_or_by_alias_share_one_activation() -> None:
    got = run_to_hooks(tapped("dinov2"), pictures(), ["blocks.0.hook_out", POSTS[0], POSTS[0]])
    assert list(got) == ["blocks.0.hook_out", POSTS[0]]
    assert got["blocks.0.hook_out"] is got[POSTS[0]]
    assert run_to_hooks(tapped("dinov2"), pictures(), []) == {}


@pytest.mark.parametrize("variant", ["dinov2", "resnet"])
def test_hooks_and_modules_are_as_before_after_a_run(variant: str) -> None:
    model = tapped(variant)
    run_to_hooks(model, pictures(), POSTS)
    modules = list(model.original_model.modules())

    def fails(acts: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_to_hooks(model, pictures(), POSTS, reduce=fails)
    run_to_hooks(model, pictures(), POSTS)
    assert list(model.original_model.modules()) == modules
    assert not any(point.has_hooks() for point in model.points().values())
    assert model.context_level == 0


def test_own_hooks_of_the_user_are_heard_and_kept() -> None:
    model = from_module(tiny_model("dinov2"))
    model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0, is_permanent=True)
    plain = run_to_hooks(tapped("dinov2"), pictures(), POSTS)[POSTS[0]]
    for _ in range(2):
        assert not torch.allclose(run_to_hooks(model, pictures(), POSTS)[POSTS[0]], plain)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(run_to_hooks(model, pictures(), POSTS)[POSTS[0]], plain)


def test_activations_can_train_an_sae() -> None:
    """They carry no graph of the model, but are no inference tensors either."""
    acts = run_to_hooks(tapped("dinov2"), pictures(), POSTS)[POSTS[0]]
    assert not acts.requires_grad
    weight = torch.randn(16, 4, requires_grad=True)
    (acts @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pictures_are_brought_to_the_model(dtype: torch.dtype) -> None:
    model = from_module(tiny_model("dinov2").to(dtype))
    got = run_to_hooks(model, pictures(), POSTS)
    assert {acts.dtype for acts in got.values()} == {dtype}
