"""DINOv2 with register tokens (Darcet et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from .adapter import VisionAdapter
from .dinov2 import Dinov2Adapter
from .family import VisionFamily


class Dinov2WithRegistersAdapter(VisionAdapter):
    """DINOv2 with register tokens."""

    layout = replace(Dinov2Adapter.layout, backbones=("dinov2_with_registers",))


FAMILY = VisionFamily(
    name="dinov2_with_registers",
    architectures=("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    model_types=("dinov2_with_registers",),
    adapter=Dinov2WithRegistersAdapter,
    description="DINOv2 with registers: class token, registers (4), then patches.",
)
