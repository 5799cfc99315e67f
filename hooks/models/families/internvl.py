"""InternVL's vision tower in transformers (InternViT, Chen et al. 2023), with LayerScale."""

from __future__ import annotations

from dataclasses import replace

from .beit import BeitAdapter
from .family import VisionFamily


class InternVLVisionAdapter(BeitAdapter):
    """InternVL's vision tower."""

    layout = replace(
        BeitAdapter.layout,
        layers="encoder.layer",
        projection="projection_layer",
        extras=(),
        backbones=(),
    )


FAMILY = VisionFamily(
    name="internvl",
    architectures=("InternVLVisionModel",),
    model_types=("internvl_vision",),
    adapter=InternVLVisionAdapter,
    description="InternVL's vision tower: class token, then patches.",
)
