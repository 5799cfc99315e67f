"""The vision towers of Qwen-VL: as transformers has them to the bit, with their patches in raster order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers as hf
from PIL import Image
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.activations.extract import model_fingerprint
from taxolens.hooks.images.preprocess import preprocess_for
from taxolens.hooks.models.load import (
    expand_hook_names,
    from_module,
    hook_n_tokens,
    load_vision_model,
    run_to_hooks,
)
from taxolens.hooks.models.tokens import tokens_per_image
from taxolens.registry.errors import ConfigError
from tiny_models import LLAMA, tiny_model
from torch import Tensor, nn
from torch.nn.functional import unfold

IMAGE, START = 39, 38  # tokens of the text: a place of an image, and the one before the first place
PATCH, MERGE, WINDOW = 8, 2, 32
HEIGHT, WIDTH = 6, 10  # of an image in patches; windows of 4 x 4 patches, the last ones smaller
HOOK = "blocks.0.hook_resid_post"
VISION = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "hidden_size": 16}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TEXT = {**LLAMA, "rope_parameters": ROPE}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": START}
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2VL", {"embed_dim": 16, "mlp_ratio": 2}),
    "qwen2.5": (
        "Qwen2_5_VL",
        {
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "window_size": WINDOW,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3": (
        "Qwen3VL",
        {
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "num_position_embeddings": 36,  # 6 x 6
            "deepstack_visual_indexes": [0],
        },
    ),
}


def build(version: str, attention: str = "eager") -> Any:
    """The model of text and images, random."""
    name, vision = VERSIONS[version]
    text = {**TEXT, "head_dim": 8, "model_type": "", "pad_token_id": 0}
    config = getattr(hf, f"{name}Config")(
        vision_config={**VISION, **vision},
        text_config=text,
        **TOKENS,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, f"{name}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    return model.eval()


def pictures(n: int = 2, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, height * PATCH, width * PATCH, generator=generator)


def processor(**settings: Any) -> Any:
    size = {"shortest_edge": 16 * 16, "longest_edge": 10**6}
    return hf.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size, **settings)


def rows_of(images: Tensor) -> dict[str, Tensor]:
    """The rows of patches and their grids, as the image processor makes them."""
    plain = processor(do_resize=False, do_rescale=False, do_normalize=False)
    found = [plain(picture.numpy(), return_tensors="pt") for picture in images]
    return {
        "hidden_states": torch.cat([each["pixel_values"] for each in found]),
        "grid_thw": torch.cat([each["image_grid_thw"] for each in found]),
    }


def raster_of(version: str, height: int = HEIGHT, width: int = WIDTH) -> list[int]:
    """The place in raster order of each row inside the blocks, by loops over windows, groups and patches."""
    side = WINDOW // PATCH if version == "qwen2.5" else max(height, width)
    return [
        row * width + column
        for top in range(0, height, side)
        for left in range(0, width, side)
        for group_top in range(top, min(top + side, height), MERGE)
        for group_left in range(left, min(left + side, width), MERGE)
        for row in range(group_top, group_top + MERGE)
        for column in range(group_left, group_left + MERGE)
    ]


def in_raster_order(version: str, rows: Tensor, n_images: int) -> Tensor:
    """(B * T, d) -> (B, T, d)."""
    order = raster_of(version)
    found = torch.empty(n_images, len(order), rows.shape[-1])
    found[:, order] = rows.unflatten(0, (n_images, -1))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("version", VERSIONS)
def test_equal_to_hugging_face_to_the_bit(version: str, attention: str) -> None:
    images, plain = pictures(), build(version, attention).model.visual
    with torch.no_grad():
        expected = plain(**rows_of(images), output_hidden_states=True)
    model = from_module(build(version, attention))
    assert model.family == "qwen_vl" and model.attn_implementation == attention
    posts = expand_hook_names(model, ["blocks.*.hook_resid_post"])
    names = ["blocks.0.hook_resid_pre", *posts]
    stopped = run_to_hooks(model, images, names)
    with torch.no_grad():
        output, cached = model.run_with_cache(images, names_filter=names)
        whole = model.original_model(images)
    for name, rows in zip(names, expected.hidden_states, strict=True):
        state = in_raster_order(version, rows, len(images))
        assert torch.equal(stopped[name], state), name
        assert torch.equal(cached[name], state), name
    final = in_raster_order(version, expected.last_hidden_state, len(images))
    assert torch.equal(output, final) and torch.equal(whole.last_hidden_state, final)
    assert torch.equal(whole.pooler_output.flatten(0, 1), expected.pooler_output)


@pytest.mark.parametrize("version", VERSIONS)
def test_patches_are_in_raster_order(version: str) -> None:
    """What enters the blocks is the map of each patch by the weights of the embedding, computed apart."""
    model, plain = from_module(build(version)), build(version).model.visual
    images = pictures(height=6, width=6)
    patches = unfold(images, PATCH, stride=PATCH).mT  # (B, T, 3 * 8 * 8), row by row
    weight = plain.patch_embed.proj.weight.sum(2).flatten(1)  # a picture is two equal frames
    expected = patches @ weight.T
    if version == "qwen3":
        expected = expected + plain.patch_embed.proj.bias
    names = ["hook_embed", "embed.hook_in", "blocks.0.hook_resid_pre"]
    got = run_to_hooks(model, images, names)
    torch.testing.assert_close(got["hook_embed"], expected)
    frames = got["embed.hook_in"].unflatten(-1, (3, 2, -1))
    assert torch.equal(frames[:, :, :, 0].flatten(2), patches)
    if version == "qwen3":  # positions of a grid of their own size
        expected = expected + plain.pos_embed.weight
    torch.testing.assert_close(got["blocks.0.hook_resid_pre"], expected)


def test_a_window_is_a_square_of_the_image() -> None:
    """In a block with windows, a change of one patch reaches the patches of its square alone."""
    model, images = from_module(build("qwen2.5")), pictures(1)
    changed = images.clone()
    changed[:, :, 5 * PATCH :, 9 * PATCH :] += 1.0  # row 5, column 9: rows 4 to 5, columns 8 to 9
    first, second = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    one, other = (run_to_hooks(model, each, [first, second]) for each in (images, changed))
    moved = (one[first] != other[first]).any(-1).view(HEIGHT, WIDTH)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[4:, 8:] = True
    assert torch.equal(moved, expected)
    assert (one[second] != other[second]).any(-1).all()  # of full attention


@pytest.mark.parametrize("version", VERSIONS)
def test_all_names_and_their_shapes(version: str) -> None:
    model, images = from_module(build(version)), pictures(3)
    n_tokens, d_mlp = HEIGHT * WIDTH, 32 if version == "qwen2" else 24
    widths = {
        **dict.fromkeys(["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out"], 16),
        **dict.fromkeys(["hook_resid_post", "ln1.hook_normalized", "attn.hook_q"], 16),
        **dict.fromkeys(["attn.hook_k", "attn.hook_v", "attn.hook_z"], 16),
        **dict.fromkeys(["mlp.hook_pre", "mlp.hook_post"], d_mlp),
    }
    names = {f"blocks.1.{name}": width for name, width in widths.items()} | {
        "ln_final.hook_out": 16
    }
    got = run_to_hooks(model, images, list(names))
    assert {n: tuple(a.shape) for n, a in got.items()} == {
        n: (3, n_tokens, width) for n, width in names.items()
    }
    assert torch.equal(
        got["blocks.1.hook_resid_pre"] + got["blocks.1.hook_attn_out"],
        got["blocks.1.hook_resid_mid"],
    )
    assert torch.equal(
        got["blocks.1.hook_resid_mid"] + got["blocks.1.hook_mlp_out"],
        got["blocks.1.hook_resid_post"],
    )
    block: Any = build(version).model.visual.blocks[1]
    with torch.no_grad():
        joint = block.attn.qkv(block.norm1(got["blocks.1.hook_resid_pre"]))
    for name, part in zip("qkv", joint.chunk(3, dim=-1)):
        torch.testing.assert_close(got[f"blocks.1.attn.hook_{name}"], part)
    _, cache = model.run_with_cache(images, names_filter=["blocks.1.attn.hook_q"])
    assert cache["blocks.1.attn.hook_q"].shape == (3, n_tokens, 2, 8)


def test_fingerprint_follows_the_towers_own_config() -> None:
    """The weights are the same; windows, blocks without them and the activation function are not."""

    def tower(attention: str = "eager", **fields: Any) -> Any:
        config = build("qwen2.5").model.visual.config
        for name, value in fields.items():
            setattr(config, name, value)
        config._attn_implementation = attention
        made = type(build("qwen2.5").model.visual)(config).eval()
        made.load_state_dict(build("qwen2.5").model.visual.state_dict())
        return from_module(made)

    images = pictures()
    plain = tower()
    one = model_fingerprint(plain)
    run_to_hooks(plain, images, [HOOK])
    assert one == model_fingerprint(plain) == model_fingerprint(tower("sdpa"))
    window = build("qwen2.5").model.visual.config.window_size
    others = [{"window_size": window * 2}, {"fullatt_block_indexes": [0]}, {"hidden_act": "relu"}]
    assert len({one, *(model_fingerprint(tower(**fields)) for fields in others)}) == 4


def in_place(pattern: torch.Tensor, hook: Any) -> None:
    pattern.zero_()


@pytest.mark.parametrize("version", VERSIONS)
def test_patterns_weigh_the_values(version: str) -> None:
    """Each block's pattern times its values gives z; between windows it is zero."""
    model, images = from_module(build(version)), pictures()
    for block in range(3):
        names = [f"blocks.{block}.attn.hook_{name}" for name in ("pattern", "v", "z")]
        with torch.no_grad():
            clean, cached = model.run_with_cache(images, names_filter=names)
        pattern, v, z = (cached[name] for name in names)
        assert pattern.shape == (2, 2, HEIGHT * WIDTH, HEIGHT * WIDTH)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 2, HEIGHT * WIDTH))
        assert torch.equal(clean, model(images))
        windowed = version == "qwen2.5" and block != 1
        assert bool((pattern == 0).any()) is windowed
    name = "blocks.0.attn.hook_pattern"
    for edit in (lambda pattern, hook: pattern * 0, in_place):
        with pytest.raises(ConfigError, match="hook_pattern: it cannot be edited in a tower"):
            model.run_with_hooks(images, fwd_hooks=[(name, edit)])
    assert torch.equal(model(images), clean)
    with pytest.raises(ConfigError, match="only eager attention forms; given 'sdpa'"):
        run_to_hooks(from_module(build(version, "sdpa")), images, [name])
    with pytest.raises(ConfigError, match=r"hook_attn_scores.*never fires: the scores"):
        run_to_hooks(model, images, ["blocks.0.attn.hook_attn_scores"])


@pytest.mark.parametrize("version", VERSIONS)
def test_counts_of_tokens_and_sizes(version: str) -> None:
    model = from_module(build(version))
    assert not model.cfg.has_class_token and model.cfg.n_prefix_tokens == 0
    assert model.cfg.image_size == (16 * PATCH, 16 * PATCH)
    assert hook_n_tokens(model, HOOK) == tokens_per_image(model, "patch") == 256
    assert hook_n_tokens(model, HOOK, 32) == tokens_per_image(model, "all", 32) == 16
    with pytest.raises(ConfigError, match="image_size: not a whole number of groups of patches"):
        model(torch.zeros(1, 3, 3 * PATCH, 4 * PATCH))
    with pytest.raises(ConfigError, match="has no class token"):
        tokens_per_image(model, "class")


def test_another_model_is_no_such_tower() -> None:
    for family in ("qwen_vl", "timm"):
        with pytest.raises(ConfigError, match="family: ViTModel is not built like one; given '"):
            from_module(tiny_model("vit"), family=family)


def sae_of(hook: str = HOOK, tokens: str = "patch") -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata["tokens"] = tokens
    return sae


@pytest.mark.parametrize("tokens", ["patch", "mean_patch", "all"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_spliced_sae_is_given_tokens_in_order(version: str, tokens: str) -> None:
    model, images, sae = from_module(build(version)), pictures(), sae_of(tokens=tokens)
    after = "blocks.1.hook_resid_pre"
    clean = run_to_hooks(model, images, [HOOK])[HOOK]
    acts = f"{HOOK}.hook_sae_acts_post"
    with torch.no_grad(), model.saes([sae]):
        _, cache = model.run_with_cache(images, names_filter=[acts])
        spliced = run_to_hooks(model, images, [HOOK, after])
    chosen = clean.mean(1, keepdim=True) if tokens == "mean_patch" else clean
    torch.testing.assert_close(cache[acts], sae.encode(chosen))
    expected = sae(chosen)
    if tokens == "mean_patch":
        expected = clean + (expected - chosen)
    torch.testing.assert_close(spliced[HOOK], expected)
    torch.testing.assert_close(spliced[after], expected)
    assert torch.equal(run_to_hooks(model, images, [HOOK])[HOOK], clean)


# In the whole model ---------------------------------------------------------------------------------


def asked(images: Tensor) -> dict[str, Tensor]:
    """A text for each image, with a token for each of its groups of patches."""
    rows = rows_of(images)
    n_places = images[0, 0].numel() // (PATCH * MERGE) ** 2
    tokens = torch.tensor([[1, START, *[IMAGE] * n_places, 5, 6]] * len(images))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": rows["hidden_states"],
        "image_grid_thw": rows["grid_thw"],
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_an_edit_at_the_tower_changes_the_text(version: str) -> None:
    plain, model, text = build(version), build(version), asked(pictures())
    tower = from_module(model)
    row, column = 4, 7
    edited = row * WIDTH + column

    def edit(acts: Tensor, hook: Any) -> Tensor:
        acts = acts.clone()
        acts[:, edited] = 0.0
        return acts

    place = raster_of(version).index(edited)

    def by_hand(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.unflatten(0, (2, -1))[:, place] = 0.0
        return output

    with torch.no_grad():
        clean = plain(**text).logits
        assert torch.equal(model(**text).logits, clean)
        with tower.hooks(fwd_hooks=[(HOOK, edit)]):
            ablated = model(**text).logits
        handle = plain.model.visual.blocks[0].register_forward_hook(by_hand)
        expected = plain(**text).logits
        handle.remove()
        with tower.saes([sae_of()]):
            spliced = model(**text).logits
            written = model.generate(**text, max_new_tokens=2, do_sample=False)
        assert torch.equal(model(**text).logits, clean)
    assert torch.equal(ablated, expected) and not torch.allclose(ablated, clean, atol=1e-4)
    assert not torch.allclose(spliced, clean, atol=1e-4) and written.shape[0] == 2


def test_images_of_several_sizes_in_one_pass() -> None:
    """Without hooks as ever; with hooks they have no common shape."""
    model, plain = build("qwen2.5"), build("qwen2.5")
    tower = from_module(model)
    one, two = asked(pictures(1)), asked(pictures(1, 4, 4))
    rows = {
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
        "image_grid_thw": torch.cat([one["image_grid_thw"], two["image_grid_thw"]]),
    }
    with torch.no_grad():
        found = model.model.get_image_features(**rows).pooler_output
        expected = plain.model.get_image_features(**rows).pooler_output
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with (
            tower.hooks(fwd_hooks=[(HOOK, lambda acts, hook: acts)]),
            pytest.raises(ConfigError, match="images of several sizes in one forward pass"),
        ):
            model.model.get_image_features(**rows)


# Loading --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("qwen2.5").save_pretrained(tmp_path)
    processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    return tmp_path


def test_loaded_from_a_folder_with_the_whole_model(folder: Path) -> None:
    with pytest.warns(UserWarning, match="makes patches of images of any size.* resized to 128 x"):
        alone = load_vision_model(folder)
    assert (alone.family, alone.whole) == ("qwen_vl", None)
    with pytest.warns(UserWarning):
        tower = load_vision_model(
            folder, whole=True, attn_implementation="eager", hook_names=[HOOK]
        )
    assert type(tower.whole).__name__ == "Qwen2_5_VLForConditionalGeneration"
    text = asked(pictures())
    with torch.no_grad():
        clean = tower.whole(**text).logits
        assert torch.equal(clean, build("qwen2.5")(**text).logits)
        with tower.saes([sae_of()]):
            assert not torch.allclose(tower.whole(**text).logits, clean, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config")
def test_a_tower_alone(tmp_path: Path) -> None:
    for version in ("qwen2.5", "qwen3"):
        tower = build(version).model.visual
        tower.save_pretrained(tmp_path / version)
        model = load_vision_model(tmp_path / version, attn_implementation="eager")
        images = pictures()
        with torch.no_grad():
            expected = tower(**rows_of(images)).last_hidden_state
        assert torch.equal(model(images), in_raster_order(version, expected, 2))
        with pytest.raises(ConfigError, match="no part of a larger model"):
            load_vision_model(tmp_path / version, whole=True)
    build("qwen2").model.visual.save_pretrained(
        tmp_path / "qwen2"
    )  # which transformers cannot load
    with pytest.raises(ConfigError, match="cannot be loaded: Unrecognized") as error:
        load_vision_model(tmp_path / "qwen2")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe"])
def test_towers_that_are_built_like_qwen3s(name: str) -> None:
    fields = {**VISION, **VERSIONS["qwen3"][1]}
    if "3_5" in name:
        del fields["deepstack_visual_indexes"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = getattr(hf, f"{name}VisionModel")(
            getattr(hf, f"{name}VisionConfig")(**fields)
        ).eval()
    images = pictures()
    with torch.no_grad():
        expected = tower(**rows_of(images), output_hidden_states=True)
    model = from_module(tower)
    got = run_to_hooks(model, images, [HOOK, "ln_final.hook_out", "blocks.2.attn.hook_z"])
    assert model.family == "qwen_vl"
    assert torch.equal(got[HOOK], in_raster_order("qwen3", expected.hidden_states[1], 2))
    with torch.no_grad():
        last = in_raster_order("qwen3", expected.last_hidden_state, 2)
    assert torch.equal(model(images), last)


@pytest.mark.parametrize("edge", [48, 80])
def test_preprocessing_is_the_processors_to_the_bit(folder: Path, edge: int) -> None:
    """Of a square picture, which the processor told to make as many pixels resizes to the same size."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    with pytest.warns(UserWarning):
        model = load_vision_model(folder)
    made = torch.from_numpy(preprocess_for(model, edge)(image))[None]
    size = {"shortest_edge": edge**2, "longest_edge": edge**2}
    own = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = own(image, size=size, return_tensors="pt")
    rows, grid = model.original_model.patches_of(made)
    assert torch.equal(rows, expected["pixel_values"])
    assert torch.equal(grid, expected["image_grid_thw"])


def test_a_processor_given_by_hand_and_one_that_leaves_fields_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="makes patches of images of any size"):
        model = from_module(build("qwen2"), processor=processor())
    expected = preprocess_for(model).describe()
    assert (expected["size"], expected["resample"]) == ([128, 128], 3)
    assert expected["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    build("qwen2").save_pretrained(tmp_path)
    fields = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": MERGE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning):
        assert preprocess_for(load_vision_model(tmp_path)).describe() == expected
