"""Models run with activations replaced: against hooks written by hand, to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.hooks.models.intervention import ModelIntervention, Pictures, output_names
from taxolens.hooks.models.load import from_module, run_to_hooks
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import Taxonomy
from tiny_images import hf_dataset, noise
from tiny_models import BRIDGED, PATCH_SIZE, WRAPPED, pictures, tapped, tiny_model
from torch import nn

IMAGES = pictures(6)
INDEX = torch.tensor([4, 1, 5])
CLASSES = Taxonomy.from_edges([("all", c) for c in "abcd"], list("abcd"))


def give(positions: Any) -> torch.Tensor:
    return IMAGES[list(positions)]


def intervention(variant: str, hook: str, tokens: str = "mean_patch", **more: Any) -> Any:
    return ModelIntervention(tapped(variant), give, hook, tokens, **more)


def equal(one: Any, other: Any) -> bool:
    logits = (one.logits is None) == (other.logits is None)
    if logits and one.logits is not None:
        logits = torch.equal(one.logits, other.logits)
    return logits and torch.equal(one.embedding, other.embedding)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("variant", (*BRIDGED, *WRAPPED))
def test_an_edit_that_changes_nothing_changes_no_bit(variant: str, block: int) -> None:
    run = intervention(variant, f"blocks.{block}.hook_resid_post", "all")
    clean = run(INDEX)
    assert equal(run(INDEX, lambda x: x), clean)
    assert not equal(run(INDEX, torch.zeros_like), clean)
    assert clean.embedding.shape == (3, clean.embedding.shape[1])
    if variant.endswith("classifier"):
        assert clean.logits is not None


@pytest.mark.parametrize("variant", BRIDGED)
def test_a_run_from_the_block_on_equals_one_from_the_pixels(variant: str) -> None:
    """With the batches of both alike."""
    for block in (0, 1):
        hook = f"blocks.{block}.hook_resid_post"
        short = intervention(variant, hook, "patch")
        whole = intervention(variant, hook, "patch", resume=False)
        assert equal(short(INDEX), whole(INDEX))
        assert short._block == block  # it was not given up
        for edit in (torch.zeros_like, lambda x: x + 1, lambda x: x.mean(0, keepdim=True) + 0 * x):
            assert equal(short(INDEX, edit), whole(INDEX, edit))


def test_a_model_that_cannot_be_run_from_the_block_on_is_run_from_the_pixels() -> None:
    model = from_module(tiny_model("vit_classifier"))
    embed: Any = model.embed.original_component
    backbone: Any = model.original_model.vit
    seen: list[torch.Tensor] = []  # what goes around the blocks no stand-in can know
    backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    backbone.layernorm.original_component.register_forward_hook(
        lambda module, arguments, output: output + seen[-1].mean((1, 2, 3))[:, None, None]
    )
    run = ModelIntervention(model, give, "blocks.0.hook_resid_post", "class")
    assert equal(run(INDEX), ModelIntervention(model, give, "ln_final.hook_out", "class")(INDEX))
    assert run._block is None and "forward" not in vars(embed)


@pytest.mark.parametrize("variant", ["vit_classifier", "dinov2_classifier", "deit_teacher"])
def test_zero_ablation_equals_a_hook_written_by_hand(variant: str) -> None:
    run = intervention(variant, "blocks.0.hook_resid_post", "class", resume=False)
    found = run(INDEX, torch.zeros_like)
    plain = tiny_model(variant)
    backbone = getattr(plain, plain.base_model_prefix)
    layers = backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer

    def ablate(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0] = 0
        return output

    layers[0].register_forward_hook(ablate)
    with torch.no_grad():
        expected = plain(IMAGES[INDEX]).logits
        hidden = backbone(IMAGES[INDEX]).last_hidden_state
    assert torch.equal(found.logits, expected)
    assert torch.equal(found.embedding, hidden[:, 0])


def test_wrapped_models_too() -> None:
    run = intervention("resnet_classifier", "blocks.0.hook_resid_post", "all")
    plain = tiny_model("resnet_classifier")
    stage = plain.resnet.encoder.stages[0]
    stage.register_forward_hook(lambda m, a, output: output * 2)
    with torch.no_grad():
        expected = plain(IMAGES[INDEX]).logits
        features = plain.resnet(IMAGES[INDEX]).last_hidden_state
    found = run(INDEX, lambda x: x * 2)
    assert torch.equal(found.logits, expected)
    assert torch.allclose(found.embedding, features.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "width"), [("class", 1), ("register", 4), ("patch", 16), ("all", 21)]
)
def test_the_edit_sees_the_chosen_tokens_and_the_others_stay(tokens: str, width: int) -> None:
    model, hook = tapped("dinov3"), "blocks.1.hook_resid_post"
    seen: list[torch.Tensor] = []

    def edit(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x + 100

    run = ModelIntervention(model, give, hook, tokens, resume=False)
    images = IMAGES[INDEX]
    plain = run_to_hooks(model, images, [hook])[hook]
    with run._replacing(edit):
        changed = run_to_hooks(model, images, ["ln_final.hook_in"])["ln_final.hook_in"]
    assert [tuple(x.shape) for x in seen] == [(3, width, 16)]
    moved = ((changed - plain).abs() > 50).all(-1)
    start = {"class": 0, "register": 1, "patch": 5, "all": 0}[tokens]
    expected = torch.zeros(21, dtype=torch.bool)
    expected[start : start + width] = True
    assert torch.equal(moved, expected.expand(3, -1))
    assert torch.equal(changed[~moved], plain[~moved])


def test_the_mean_patch_moves_every_patch() -> None:
    model, hook = tapped("vit"), "blocks.0.hook_resid_post"
    run = ModelIntervention(model, give, hook, "mean_patch")
    before = run_to_hooks(model, IMAGES[:2], [hook])[hook]
    after = run._edited(before, lambda x: 2 * x)
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.allclose(after[:, 1:], before[:, 1:] + before[:, 1:].mean(1, keepdim=True))


def test_heads_are_joined_for_the_edit() -> None:
    run = intervention("vit_classifier", "blocks.1.attn.hook_z", "all")
    widths: list[int] = []

    def edit(x: torch.Tensor) -> torch.Tensor:
        widths.append(x.shape[-1])
        return x

    assert equal(run(INDEX, edit), run(INDEX)) and widths == [16]


def test_batches_and_order_do_not_matter() -> None:
    run = intervention("vit_classifier", "blocks.0.hook_resid_post", "class", batch_size=2)
    whole = intervention("vit_classifier", "blocks.0.hook_resid_post", "class")
    found, expected = run(INDEX, lambda x: x * 3), whole(INDEX.flip(0), lambda x: x * 3)
    assert torch.allclose(found.logits, expected.logits.flip(0), atol=1e-5)
    with pytest.raises(ConfigError, match="index: no image"):
        run(INDEX[:0])


def test_pictures_are_read_once_and_corrupt_ones_have_no_position() -> None:
    images = ImageDataset(hf_dataset(6, corrupt=[1], draw=lambda i: noise(i, (32, 32))))
    calls: list[int] = []

    def preprocess(picture: Any) -> np.ndarray:
        calls.append(1)
        return np.moveaxis(np.asarray(picture, dtype=np.float32), -1, 0)

    read = Pictures(images, np.array([0, 2, 3, 4, 5]), preprocess)
    first = read([1, 3, 1])
    assert torch.equal(first[0], first[2]) and len(calls) == 2
    expected = np.moveaxis(np.asarray(noise(4, (32, 32)), dtype=np.float32), -1, 0)
    assert torch.equal(read([3])[0], torch.from_numpy(expected)) and len(calls) == 2


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from taxolens.hooks.models import intervention as module

    monkeypatch.setattr(module, "KEPT_BYTES", IMAGES[0].nbytes)
    kept, made = module._Kept(), []

    def make(positions: Any) -> torch.Tensor:
        made.append(list(positions))
        return give(positions)

    for _ in range(2):
        assert torch.equal(kept([2, 0], make), IMAGES[[2, 0]])
    assert made == [[2, 0], [0]]


def test_outputs_are_told_by_name() -> None:
    model = from_module(tiny_model("vit_classifier"))
    model.original_model.config.id2label = dict(enumerate(["b", "A", "none", "d", "c"]))
    assert output_names(model) == ["b", "A", "none", "d", "c"]
    run = ModelIntervention(model, give, "blocks.0.hook_resid_post", "class", taxonomy=CLASSES)
    assert run.logit_classes.tolist() == [1, 0, -1, 3, 2]
    nameless = intervention("vit_classifier", "blocks.0.hook_resid_post", taxonomy=CLASSES)
    assert nameless.logit_classes is None  # LABEL_0 ... are no classes
    headless = intervention("vit", "blocks.0.hook_resid_post", taxonomy=CLASSES)
    assert headless.logit_classes is None and headless(INDEX).logits is None


def test_messages() -> None:
    with pytest.raises(ConfigError, match="no class token"):
        intervention("siglip", "blocks.0.hook_resid_post", "class")
    with pytest.raises(ConfigError, match=r"hook_names: not known.*given 'blocks\.9"):
        intervention("vit", "blocks.9.hook_resid_post")
    run = intervention("vit", "blocks.0.hook_resid_post", "class")
    with pytest.raises(ValueError, match=r"given \(3, 1, 16\), it returned \(3, 1, 8\)"):
        run(INDEX, lambda x: x[..., :8])
    assert PATCH_SIZE == 8


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h)[0]
        return x + self.mlp(self.norm2(x))


class Registers(nn.Module):
    """A ViT with registers, without a class token: it predicts from the mean of its patches."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=32, num_channels=3)
        self.patch_embed = nn.Conv2d(3, d, 8, 8)
        self.reg_token = nn.Parameter(torch.randn(1, 4, d))
        self.blocks = nn.Sequential(Block(d), Block(d))
        self.head = nn.Linear(d, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.reg_token.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 4:].mean(1))


def test_of_registers_without_a_class_token_the_patches_embed() -> None:
    model = from_module(Registers().eval())
    hook = "blocks.0.hook_resid_post"
    intervention = ModelIntervention(model, lambda rows: pictures(len(rows), 32), hook, "patch")
    found = intervention(torch.arange(3)).embedding
    last = run_to_hooks(model, pictures(3, 32), ["blocks.1.hook_resid_post"])
    torch.testing.assert_close(found, last["blocks.1.hook_resid_post"][:, 4:].mean(1))
