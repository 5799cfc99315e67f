"""ViT and DeiT (Dosovitskiy et al. 2020, Touvron et al. 2020), supervised or self-supervised.

TransformerLens has an adapter of its own for both, and its `boot_transformers` keeps it. Ours has
the same hook names, interpolates position embeddings, counts DeiT's distillation token, and takes
DeiT's two-headed classifier.
"""

from __future__ import annotations

from transformer_lens.model_bridge.generalized_components.linear import LinearBridge

from .adapter import Layout, VisionAdapter
from .family import VisionFamily


class ViTAdapter(VisionAdapter):
    """ViT and DeiT."""

    layout = Layout(
        layers="layers",
        norms=("layernorm_before", "layernorm_after"),
        attention="attention",
        projection="o_proj",
        mlp=("fc1", "fc2"),
        final_norm="layernorm",
        extras=(("pooler", "pooler.dense", LinearBridge),),
        backbones=("vit", "deit"),
    )


FAMILY = VisionFamily(
    name="vit",
    architectures=(
        "ViTModel",
        "ViTForImageClassification",
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    ),
    model_types=("vit", "deit"),
    adapter=ViTAdapter,
    description="ViT and DeiT: class token (DeiT: and distillation token), then patches.",
)
