"""DINOv2 (Oquab et al. 2023), with an MLP or, in the giant, a SwiGLU."""

from __future__ import annotations

from .adapter import Layout, VisionAdapter
from .family import VisionFamily


class Dinov2Adapter(VisionAdapter):
    """DINOv2, its feed-forward part an MLP or SwiGLU."""

    layout = Layout(
        layers="encoder.layer",
        norms=("norm1", "norm2"),
        attention="attention",
        projection="o_proj",
        mlp=("fc1", "fc2"),
        scales=("layer_scale1", "layer_scale2"),
        final_norm="layernorm",
        backbones=("dinov2",),
    )


FAMILY = VisionFamily(
    name="dinov2",
    architectures=("Dinov2Model", "Dinov2ForImageClassification"),
    model_types=("dinov2",),
    adapter=Dinov2Adapter,
    description="DINOv2, MLP or SwiGLU: class token, then patches.",
)
