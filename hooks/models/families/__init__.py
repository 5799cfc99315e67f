"""The model families, one file each. `FAMILIES` is what taxolens itself registers."""

from . import (
    aimv2,
    beit,
    clip,
    dinov2,
    dinov2_with_registers,
    dinov3,
    ijepa,
    internvl,
    open_clip,
    qwen_vl,
    siglip,
    timm_vit,
    vit,
    vit_mae,
    wrapped,
)
from .family import VisionFamily, VisionSource, load_transformers

FAMILIES = (
    vit.FAMILY,
    dinov2.FAMILY,
    dinov2_with_registers.FAMILY,
    dinov3.FAMILY,
    clip.FAMILY,
    siglip.FAMILY,
    vit_mae.FAMILY,
    beit.FAMILY,
    ijepa.FAMILY,
    aimv2.FAMILY,
    internvl.FAMILY,
    qwen_vl.FAMILY,
    open_clip.FAMILY,
    timm_vit.FAMILY,
    wrapped.FAMILY,
)

__all__ = ["FAMILIES", "VisionFamily", "VisionSource", "load_transformers"]
