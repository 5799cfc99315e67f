"""I-JEPA's encoders (Assran et al. 2023): vision transformers without a class token."""

from __future__ import annotations

from dataclasses import replace

from .family import VisionFamily
from .vit import ViTAdapter


class IJepaAdapter(ViTAdapter):
    """I-JEPA's encoders."""

    layout = replace(ViTAdapter.layout, backbones=("ijepa",), class_token=False)


FAMILY = VisionFamily(
    name="ijepa",
    architectures=("IJepaModel", "IJepaForImageClassification"),
    model_types=("ijepa",),
    adapter=IJepaAdapter,
    description="I-JEPA's encoders: patches only, no class token.",
)
