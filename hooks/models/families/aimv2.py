"""AIMv2's vision tower (Fini et al. 2024), alone or as half of a checkpoint. No class token.

Its norms are RMSNorms, its MLPs SwiGLUs. A checkpoint of one image size alone (not a "native" one) has
learned positions, which transformers does not interpolate.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from .adapter import Layout, VisionAdapter, VisionEmbeddings
from .family import VisionFamily, VisionSource, load_transformers


class Aimv2Embeddings(VisionEmbeddings):
    """AIMv2's embeddings, whose learned positions are those of one image size."""

    @property
    def takes_any_size(self) -> bool:
        embeddings: Any = self.original_component
        return embeddings.config.is_native


class Aimv2VisionAdapter(VisionAdapter):
    """AIMv2's vision tower."""

    layout = Layout(
        layers="encoder.layers",
        norms=("rms_norm1", "rms_norm2"),
        attention="attention",
        projection="out_proj",
        mlp=("up_proj", "down_proj"),
        mlp_name="ffn",
        final_norm="rms_norm",
        extras=(("pooler", "head", GeneralizedComponent),),
        class_token=False,
        embeddings=Aimv2Embeddings,
    )


def load_aimv2(source: VisionSource) -> nn.Module:
    """The vision tower; of a checkpoint of both towers, transformers loads it with the other alone."""
    model: Any = load_transformers(source)
    return getattr(model, "vision_model", model)


FAMILY = VisionFamily(
    name="aimv2",
    architectures=("Aimv2VisionModel",),
    model_types=("aimv2_vision_model", "aimv2"),
    adapter=Aimv2VisionAdapter,
    load=load_aimv2,
    description="AIMv2's vision tower: patches only, no class token.",
)
