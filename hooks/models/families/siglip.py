"""SigLIP's vision tower (Zhai et al. 2023), alone or as half of a checkpoint. No class token.

Those of Idefics3 and SmolVLM are built alike.
"""

from __future__ import annotations

from dataclasses import replace

from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from .clip import CLIPVisionAdapter, TowerAdapter, load_tower
from .family import VisionFamily


class SiglipVisionAdapter(TowerAdapter):
    """SigLIP's vision tower."""

    layout = replace(
        CLIPVisionAdapter.layout,
        extras=(("pooler", "head", GeneralizedComponent),),
        class_token=False,
    )


FAMILY = VisionFamily(
    name="siglip",
    architectures=("SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"),
    model_types=("siglip_vision_model", "siglip", "idefics3_vision", "smolvlm_vision"),
    adapter=SiglipVisionAdapter,
    load=load_tower,
    description="SigLIP's vision tower: patches only, no class token.",
)
