"""OpenCLIP checkpoints, against its tower and transform written once more after open_clip's source."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from taxolens.hooks.images.preprocess import open_clip_preprocessing, preprocess_for
from taxolens.hooks.models.load import load_vision_model, run_to_hooks
from taxolens.registry.errors import CheckpointError, ConfigError
from tiny_models import pictures, save_tiny
from torch import Tensor, nn

VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
MODEL = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": {}}
NAMES = [f"blocks.{i}.hook_resid_post" for i in range(2)]


class Block(nn.Module):
    """`ResidualAttentionBlock` of open_clip."""

    def __init__(self, width: int, heads: int, act: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", act())]
        self.mlp = nn.Sequential(OrderedDict([*parts, ("c_proj", nn.Linear(4 * width, width))]))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    """`VisionTransformer` of open_clip, as `CLIPVisionCfg` has it by default."""

    def __init__(self, act: Any = nn.GELU) -> None:
        super().__init__()
        width = VISION["width"]
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, 2, act) for _ in range(2))
        self.proj = nn.Parameter(torch.empty(width, 12))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each block gives, and the embedding of the image."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        states = [x := block(x) for block in self.transformer.resblocks]
        return states, self.ln_post(x)[:, 0] @ self.proj


def save(folder: Path, tower: nn.Module, *, kind: str = "safetensors", **changes: Any) -> Path:
    """A checkpoint of open_clip, with a text tower's weights beside."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {**MODEL, **changes, "vision_cfg": {**VISION, **changes.get("vision_cfg", {})}}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    weights |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    if kind == "safetensors":
        save_file(weights, folder / "open_clip_model.safetensors")
    else:
        wrapped = {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
        torch.save(wrapped, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("quick", [False, True])
def test_its_blocks_and_its_embedding(quick: bool, kind: str, tmp_path: Path) -> None:
    tower = Tower(QuickGELU if quick else nn.GELU)
    model = load_vision_model(save(tmp_path / "clip", tower, kind=kind, quick_gelu=quick))
    states, embedding = tower(pictures())
    got = run_to_hooks(model, pictures(), NAMES)
    for name, state in zip(NAMES, states):
        torch.testing.assert_close(got[name], state, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.original_model(pictures()).image_embeds, embedding, rtol=1e-4, atol=1e-5
        )
    assert (model.family, model.cfg.has_class_token) == ("clip", True)
    other = Tower(nn.GELU if quick else QuickGELU)(pictures())[0]
    assert not torch.allclose(got[NAMES[1]], other[1], atol=1e-3)


def test_all_names_of_a_vision_transformer(tmp_path: Path) -> None:
    model = load_vision_model(save(tmp_path, Tower()), attn_implementation="eager")
    names = [f"blocks.1.{name}" for name in ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")]
    names += [f"blocks.1.attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern")]
    got = run_to_hooks(model, pictures(), names)
    assert got["blocks.1.attn.hook_pattern"].shape == (2, 2, 17, 17)


def in_cache(offline: Path, name: str, folder: Path) -> None:
    repository = offline / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "abc123", dirs_exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and a hub that is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["acme/clip", "hf-hub:acme/clip", "open-clip:acme/clip"])
def test_repositories(name: str, offline: Path, tmp_path: Path) -> None:
    in_cache(offline, "acme/clip", save(tmp_path / "clip", Tower()))
    model = load_vision_model(name)
    assert (model.cfg.model_name, model.family, model.processor) == (name, "clip", None)


def test_a_prefix_chooses_where_there_are_both(offline: Path, tmp_path: Path) -> None:
    folder = save_tiny("clip_both", save(tmp_path / "clip", Tower()))
    in_cache(offline, "acme/both", folder)
    assert load_vision_model("acme/both").processor is not None  # transformers' own files
    assert load_vision_model("hf-hub:acme/both").processor is None
    in_cache(offline, "acme/dino", save_tiny("dinov2", tmp_path / "dino"))
    assert load_vision_model("hf-hub:acme/dino").family == "dinov2"


def test_an_architecture_and_a_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The activation is the tag's: open_clip's own model of this name differs, with a warning."""
    tower = Tower(QuickGELU)
    folder = save(tmp_path, tower)
    published = {"hf_hub": "", "mean": (0.1,) * 3, "std": (1.0,) * 3, "quick_gelu": True}
    library = types.SimpleNamespace(
        get_model_config=lambda name: json.loads(json.dumps(MODEL)) if name == "ViT-T" else None,
        get_pretrained_cfg=lambda name, tag: published if tag == "openai" else {},
        list_pretrained_tags_by_model=lambda name: ["openai"],
        download_pretrained=lambda cfg: str(folder / "open_clip_model.safetensors"),
    )
    monkeypatch.setitem(sys.modules, "open_clip", library)
    model = load_vision_model("open-clip:ViT-T/openai")
    got = run_to_hooks(model, pictures(), NAMES[1:])[NAMES[1]]
    torch.testing.assert_close(got, tower(pictures())[0][1], rtol=1e-4, atol=1e-5)
    assert model.preprocessor_config["image_mean"] == [0.1] * 3
    with pytest.raises(ConfigError, match=r"no tag 'laion' of ViT-T; given .*; allowed: openai"):
        load_vision_model("open-clip:ViT-T/laion")


def test_without_open_clip_a_tag_is_refused(monkeypatch: pytest.MonkeyPatch, offline: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'taxolens\[open-clip\]'"):
        load_vision_model("open-clip:ViT-B-32/openai")


def test_untrained(tmp_path: Path) -> None:
    folder = save(tmp_path, Tower())
    (folder / "open_clip_model.safetensors").unlink()
    assert load_vision_model(folder, random_weights=True).cfg.d_mlp == 64
    with pytest.raises(ConfigError, match=r"no weights; given .*; allowed: open_clip_model.safe"):
        load_vision_model(folder)


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        (
            {"timm_model_name": "vit_base", "timm_proj": "linear"},
            "timm_model_name 'vit_base', timm_proj 'linear'",
        ),
        ({"pool_type": "avg"}, "pool_type 'avg'"),
        ({"layers": [3, 4, 6, 3]}, r"layers \[3, 4, 6, 3\]"),
        ({"ls_init_value": 0.1}, "ls_init_value 0.1"),
        ({"no_ln_pre": True, "qk_norm": True}, "no_ln_pre True, qk_norm True"),
        ({"attentional_pool": True}, "attentional_pool True"),
    ],
)
def test_other_towers_are_refused(vision: dict[str, Any], named: str, tmp_path: Path) -> None:
    message = rf"no plain vision transformer \({named}\)"
    with pytest.raises(ConfigError, match=message):
        load_vision_model(save(tmp_path, Tower(), vision_cfg=vision))


def test_towers_of_timm(tmp_path: Path) -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": None}
    folder = save(tmp_path, Tower(), vision_cfg={**vision, "image_size": 224}, embed_dim=6)
    try:
        timm = pytest.importorskip("timm", exc_type=ImportError)
    except pytest.skip.Exception:
        with pytest.raises(ConfigError, match=r"pip install 'taxolens\[timm\]'"):
            load_vision_model(folder)
        return
    torch.manual_seed(0)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=6, global_pool="token").eval()
    weights = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    model = load_vision_model(folder)
    assert (model.family, model.processor) == ("timm", None)
    with torch.no_grad():
        assert torch.equal(model(pictures(size=224)), trunk(pictures(size=224)))


def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = save(tmp_path, Tower(), vision_cfg={"layers": 3})
    with pytest.raises(CheckpointError, match=r"the weights cannot be read: (?s:.)*layers.2"):
        load_vision_model(folder)
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00X")
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        load_vision_model(folder)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(ConfigError, match="no model_cfg with a vision_cfg"):
        load_vision_model(folder)
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read: open_clip_config.json"):
        load_vision_model(folder)


# Preprocessing ------------------------------------------------------------------------------------


def transform(image: Image.Image, size: tuple[int, int], mode: str, resample: int) -> np.ndarray:
    """`image_transform` of open_clip in evaluation, with torchvision's arithmetic, on Pillow."""
    height, width = size
    if mode == "squash":
        image = image.resize((width, height), resample)
    elif mode == "longest" or height != width:
        ratios = image.height / height, image.width / width
        ratio = max(ratios) if mode == "longest" else min(ratios)
        resized = round(image.width / ratio), round(image.height / ratio)
        image = image.resize(resized, resample)
    else:
        short, long = sorted(image.size)
        other = int(height * long / short)
        portrait = image.width <= image.height
        image = image.resize((height, other) if portrait else (other, height), resample)
    black = Image.new("RGB", (max(width, image.width), max(height, image.height)), (7, 7, 7))
    black.paste(image, ((black.width - image.width) // 2, (black.height - image.height) // 2))
    top, left = round((black.height - height) / 2), round((black.width - width) / 2)
    image = black.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    return pixels.sub(torch.tensor(0.4)).div(torch.tensor(0.3)).numpy()


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_its_transform_to_the_bit(mode: str, size: Any, interpolation: str) -> None:
    config = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    config |= {"mean": [0.4] * 3, "std": [0.3] * 3}
    model = types.SimpleNamespace(preprocessor_config=open_clip_preprocessing(config))
    ours = preprocess_for(model)
    pair = (size, size) if isinstance(size, int) else size
    leaves_default = mode == "shortest" and pair[0] != pair[1]
    resample = 2 if interpolation == "bilinear" and not leaves_default else 3
    for n, shape in enumerate([(61, 40), (40, 61), (20, 33), (32, 32), (100, 7)]):
        noise = np.random.default_rng(n).integers(0, 256, (*shape, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        assert np.array_equal(ours(image), transform(image, pair, mode, resample))


def test_preprocessing_of_a_checkpoint(tmp_path: Path) -> None:
    model = load_vision_model(save(tmp_path, Tower()))
    assert model.processor is None
    described = preprocess_for(model).describe()
    assert (described["size"], described["crop"], described["resample"]) == (32, [32, 32], 3)
    assert (described["mean"], described["std"]) == ([0.5] * 3, [0.25] * 3)
    with pytest.raises(ConfigError, match="resize_mode of open_clip: not known; given 'fit'"):
        open_clip_preprocessing({"resize_mode": "fit"})
    assert open_clip_preprocessing({})["image_mean"] == list(hf.image_utils.OPENAI_CLIP_MEAN)
