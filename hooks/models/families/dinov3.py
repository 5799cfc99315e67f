"""DINOv3's vision transformers (Siméoni et al. 2025). Its ConvNeXts are tapped as `wrapped`."""

from __future__ import annotations

from .adapter import Layout, VisionAdapter
from .family import VisionFamily


class DINOv3ViTAdapter(VisionAdapter):
    """The vision transformers of DINOv3."""

    layout = Layout(
        layers="model.layer",
        norms=("norm1", "norm2"),
        attention="attention",
        projection="o_proj",
        mlp=("up_proj", "down_proj"),
        scales=("layer_scale1", "layer_scale2"),
        final_norm="norm",
        rotary=True,
    )


FAMILY = VisionFamily(
    name="dinov3",
    architectures=("DINOv3ViTModel",),
    model_types=("dinov3_vit",),
    adapter=DINOv3ViTAdapter,
    description="DINOv3 ViT: class token, registers (4), then patches; rotary positions.",
)
