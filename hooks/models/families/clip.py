"""CLIP's vision tower (Radford et al. 2021), alone or as half of a CLIP checkpoint.

`hook_embed` is what enters the first block, after CLIP's LayerNorm of the embeddings. `ln_final`
sees the class token only, (B, d): CLIP normalises nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .adapter import Layout, VisionAdapter, VisionNorm
from .family import VisionFamily, VisionSource, load_transformers


class TowerAdapter(VisionAdapter):
    """A vision tower whose checkpoint may also hold a text tower."""

    def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
        """Let `boot_transformers` load the vision half of a checkpoint of both."""
        model_kwargs["config"] = vision_half(model_kwargs["config"])


class CLIPVisionAdapter(TowerAdapter):
    """CLIP's vision tower."""

    layout = Layout(
        layers="encoder.layers",
        norms=("layer_norm1", "layer_norm2"),
        attention="self_attn",
        projection="out_proj",
        mlp=("fc1", "fc2"),
        final_norm="post_layernorm",
        extras=(("embed_ln", "pre_layrnorm", VisionNorm),),
        backbones=("vision_model",),
    )


def vision_half(config: Any) -> Any:
    """The vision config of a two-tower config; a classifier's and a vision config as they are."""
    classifies = any("ForImageClassification" in a for a in config.architectures or ())
    return config if classifies else getattr(config, "vision_config", config)


def load_tower(source: VisionSource) -> nn.Module:
    """The vision tower alone, from a checkpoint of it or of both towers."""
    return load_transformers(replace(source, config=vision_half(source.config)))


FAMILY = VisionFamily(
    name="clip",
    architectures=(
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPModel",
        "CLIPForImageClassification",
    ),
    model_types=("clip_vision_model", "clip"),
    adapter=CLIPVisionAdapter,
    load=load_tower,
    description="CLIP's vision tower: class token, then patches.",
)
