"""ViT-MAE's encoder (He et al. 2021), given every patch in order: nothing is masked or shuffled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..points import as_pair
from .adapter import VisionEmbeddings
from .family import VisionFamily
from .vit import ViTAdapter


class UnmaskedEmbeddings(VisionEmbeddings):
    """ViT-MAE's embeddings, which else keep a random quarter of the patches in random order."""

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Images (B, 3, H, W) -> tokens (B, 1 + patches, d), and the mask and order of the patches."""
        if options.get("noise") is None:  # patches are sorted by it
            embeddings: Any = self.original_component
            height, width = as_pair(embeddings.patch_embeddings.patch_size)
            n_patches = (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)
            order = torch.arange(n_patches, device=pixel_values.device, dtype=torch.float32)
            options["noise"] = order.expand(len(pixel_values), -1)
        return super().forward(pixel_values, **options)

    def output_of(self, tokens: Tensor) -> tuple[Tensor, None, None]:
        """What the encoder takes in place of an output of `tokens` (B, T, d)."""
        return tokens, None, None


class ViTMAEAdapter(ViTAdapter):
    """ViT-MAE's encoder; sets the model's `mask_ratio` to 0."""

    layout = replace(
        ViTAdapter.layout, extras=(), backbones=("vit",), embeddings=UnmaskedEmbeddings
    )

    def prepare_model(self, hf_model: Any) -> None:
        """Unmask the model, then map its components."""
        super().prepare_model(hf_model)
        hf_model.config.mask_ratio = 0.0


FAMILY = VisionFamily(
    name="vit_mae",
    architectures=("ViTMAEModel", "ViTMAEForPreTraining"),
    model_types=("vit_mae",),
    adapter=ViTMAEAdapter,
    description="ViT-MAE's encoder, unmasked: class token, then all patches in order.",
)
