"""OpenCLIP's vision towers: its vision transformers, BioCLIP's too, as the tower of transformers' CLIP; timm's by timm.

A checkpoint is an `open_clip_config.json` beside weights, in a folder or on the hub. Its weights are renamed,
and the fused projection of attention is cut into queries, keys and values, so that activations are open_clip's
to rounding. open_clip itself is needed for names of an architecture and a tag alone, such as
`open-clip:ViT-B-32/laion2b_s34b_b79k`.

After open_clip 3.3: `CLIPVisionCfg` and `_build_vision_tower` in `model.py`, `VisionTransformer` in
`transformer.py`, `TimmModel` in `timm_model.py`, `image_transform` in `transform.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils.hub import cached_file

from ....registry.errors import CheckpointError, ConfigError
from ....registry.files import read_json_object
from ...images.preprocess import open_clip_preprocessing
from .family import VisionFamily, VisionSource
from .wrapped import timm_model

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREFIX, HUB_PREFIX = "open-clip:", "hf-hub:"
MODEL_TYPE = "open_clip"
USED = {"width", "layers", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
# Fields of its `vision_cfg` that change no activation in evaluation mode, or only which are returned.
WITHOUT_EFFECT = {"patch_dropout", "output_tokens", "pos_embed_type", "final_ln_after_pool"}
WITHOUT_EFFECT |= {"attn_pooler_queries", "attn_pooler_heads"}
DEFAULTS = {"pool_type": "tok", "block_type": "default"}  # of the others: None, False or 0
TOWER = "vision_model."
RENAMED = (
    (r"^conv1\.", TOWER + "embeddings.patch_embedding."),
    (r"^class_embedding$", TOWER + "embeddings.class_embedding"),
    (r"^positional_embedding$", TOWER + "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", TOWER + "pre_layrnorm."),
    (r"^ln_post\.", TOWER + "post_layernorm."),
    (r"^transformer\.resblocks\.", TOWER + "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


@dataclass(frozen=True)
class OpenClipConfig:
    """The config of an OpenCLIP checkpoint.

    Attributes:
        place: the folder or repository.
        model: the fields of open_clip's `model_cfg`.
        preprocess: those of its `preprocess_cfg`.
        weights: the file of weights, where it is known already.
    """

    place: str
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    model_type: str = MODEL_TYPE


def read_config(name: str, revision: str | None = None) -> OpenClipConfig | None:
    """The config of a folder, a repository on the hub, or `open-clip:ARCHITECTURE/TAG`.

    None where there is no `open_clip_config.json`, whatever the name begins with.

    Raises:
        ConfigError: open_clip has no such tag.
        UnreadableError: the file is damaged.
    """
    place = name.removeprefix(PREFIX).removeprefix(HUB_PREFIX)
    architecture, _, tag = place.rpartition("/")
    library = _library() if name.startswith(PREFIX) else None
    if library is not None and (model := library.get_model_config(architecture)) is not None:
        return _by_tag(library, name, architecture, tag, model)
    try:
        file = cached_file(place, CONFIG, revision=revision)
    except OSError:
        return None
    content = read_json_object(str(file))
    model = content.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        problem = f"{CONFIG} has no model_cfg with a vision_cfg"
        raise ConfigError("model_name", problem, given=name, allowed="a checkpoint of open_clip")
    return OpenClipConfig(place, model, content.get("preprocess_cfg") or {})


def _by_tag(
    library: Any, name: str, architecture: str, tag: str, model: dict[str, Any]
) -> OpenClipConfig:
    published = library.get_pretrained_cfg(architecture, tag)
    if not published:
        tags = ", ".join(library.list_pretrained_tags_by_model(architecture)) or "none"
        problem = f"open_clip has no tag {tag!r} of {architecture}"
        raise ConfigError("model_name", problem, given=name, allowed=tags)
    if published.get(
        "quick_gelu"
    ):  # weights trained with it; open_clip's own model warns, and has none
        model["quick_gelu"] = True
    return OpenClipConfig(name, model, published, library.download_pretrained(published))


def _library() -> Any:
    """open_clip; None where it cannot be imported."""
    try:
        import open_clip  # type: ignore[import-not-found]  # an extra
    except ImportError:
        return None
    return open_clip


def clip_config(config: OpenClipConfig) -> CLIPVisionConfig:
    """The config of the same tower in transformers.

    Raises:
        ConfigError: it has a part that CLIP's tower has not.
    """
    vision = dict(config.model["vision_cfg"])
    unlike = {
        name: value
        for name, value in vision.items()
        if name not in USED | WITHOUT_EFFECT
        and value not in (None, False, 0, DEFAULTS.get(name))
        and not (name.startswith("timm_") and not vision.get("timm_model_name"))
        and not (name == "act_kwargs" and value == {"approximate": "tanh"})
    }
    if isinstance(vision.get("layers", 12), list):
        unlike["layers"] = vision["layers"]
    if unlike:
        fields = ", ".join(f"{name} {value!r}" for name, value in unlike.items())
        problem = f"open_clip's tower is no plain vision transformer ({fields})"
        allowed = "its conversion for transformers, where there is one"
        raise ConfigError("model_name", problem, given=config.place, allowed=allowed)
    width = int(vision.get("width", 768))
    gelu = "gelu_pytorch_tanh" if vision.get("act_kwargs") else "gelu"
    return CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=int(vision.get("layers", 12)),
        num_attention_heads=width // int(vision.get("head_width", 64)),
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        patch_size=vision.get("patch_size", 16),
        image_size=vision.get("image_size", 224),
        projection_dim=int(config.model["embed_dim"]),
        hidden_act="quick_gelu" if config.model.get("quick_gelu") else gelu,
        layer_norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's vision tower, `visual.*`, under the names of transformers' CLIP.

    `in_proj_weight` (3d, d) is cut into three (d, d), `proj` (d, embedding) is transposed.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        name = name.removeprefix("module.")
        if not name.startswith("visual."):
            continue
        name = name.removeprefix("visual.")
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name == "proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif ".in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3)):
                found[name.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            found[name] = value
    return found


def preprocessing(config: OpenClipConfig) -> dict[str, Any]:
    """The settings of its preprocessing, at the image size of the tower as in open_clip."""
    size = config.model["vision_cfg"].get("image_size", 224)
    return open_clip_preprocessing({**config.preprocess, "size": size})


def load_open_clip(source: VisionSource) -> nn.Module:
    """The tower as transformers' `CLIPVisionModelWithProjection`, or timm's model, in evaluation mode.

    Raises:
        ConfigError: as `clip_config`, or there is no file of weights.
        CheckpointError: the weights are damaged.
        RuntimeError: they are not those of the config.
    """
    vision = source.config.model["vision_cfg"]
    if vision.get("timm_model_name") and vision.get("timm_proj") in (None, "", "none"):
        return _load_trunk(source, vision)
    settings = clip_config(source.config)
    model = CLIPVisionModelWithProjection._from_config(
        settings, dtype=source.dtype, attn_implementation=source.attn_implementation
    )
    if not source.random_weights:
        model.load_state_dict(converted(_read_weights(source)))
    return model.eval()


def _load_trunk(source: VisionSource, vision: Mapping[str, Any]) -> nn.Module:
    """A tower that is a model of timm and nothing after it (SigLIP's, Perception Encoder's)."""
    n_outputs = 0 if vision.get("timm_proj") == "none" else int(source.config.model["embed_dim"])
    model = timm_model(
        source,
        vision["timm_model_name"],
        num_classes=n_outputs,
        global_pool=vision.get("timm_pool", "avg"),
        pretrained=False,
    )
    if not source.random_weights:
        prefix = "visual.trunk."
        weights = {
            name.removeprefix("module.").removeprefix(prefix): value
            for name, value in _read_weights(source).items()
            if name.removeprefix("module.").startswith(prefix)
        }
        model.load_state_dict(weights)
    return model


def _read_weights(source: VisionSource) -> dict[str, Tensor]:
    place, known = source.config.place, source.config.weights
    file = Path(known) if known else _find_weights(place, source.revision)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        return weights.get("state_dict", weights)
    except Exception as error:  # of a damaged file torch raises nearly anything
        problem = f"the weights cannot be read: {error}"
        raise CheckpointError("model_name", problem, given=source.name) from error


def _find_weights(place: str, revision: str | None) -> Path:
    for name in WEIGHTS:
        try:
            return Path(str(cached_file(place, name, revision=revision)))
        except OSError:
            continue
    problem = "the checkpoint has no weights"
    raise ConfigError("model_name", problem, given=place, allowed=" or ".join(WEIGHTS))


FAMILY = VisionFamily(
    name="open_clip",
    architectures=(),
    model_types=(MODEL_TYPE,),
    load=load_open_clip,
    description="OpenCLIP's own files, BioCLIP's too; loaded as clip or timm.",
)
