"""Everything else: CNNs, timm's models and vision models of Hugging Face that no family claims."""

from __future__ import annotations

from .family import VisionFamily

FAMILY = VisionFamily(
    name="wrapped",
    architectures=(),
    description="CNNs, timm, other Hugging Face vision models: hooks on named submodules.",
)
