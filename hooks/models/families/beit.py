"""BEiT (Bao et al. 2021), with relative positions in its attention and LayerScale.

Where the mean of the patches is pooled (`use_mean_pooling`), the last norm is that of the pooler, and
`ln_final` has one vector for each image, as `pooler`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from .adapter import VisionNorm
from .family import VisionFamily
from .vit import ViTAdapter

SCALES = ("lambda_1", "lambda_2")


class LayerScale(nn.Module):
    """What BEiT's blocks multiply by, a parameter or 1.0, as a module: hooks need one."""

    def __init__(self, weight: nn.Parameter | float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.weight * hidden_states

    def __mul__(self, hidden_states: Tensor) -> Tensor:
        return self(hidden_states)


class LayerScaleBridge(GeneralizedComponent):
    """A `LayerScale` with hook points."""

    def __mul__(self, hidden_states: Tensor) -> Tensor:
        return self(hidden_states)


class BeitAdapter(ViTAdapter):
    """BEiT; turns the LayerScales of its blocks into modules."""

    layout = replace(
        ViTAdapter.layout,
        backbones=("beit",),
        scales=SCALES,
        scale=LayerScaleBridge,
        extras=(
            ("pooler", "pooler", GeneralizedComponent),
            ("ln_final", "pooler.layernorm", VisionNorm),
        ),
    )

    def prepare_model(self, hf_model: Any) -> None:
        """Make modules of the LayerScales, then map the components."""
        for block in hf_model.get_submodule(f"{self._prefix(hf_model)}{self.layout.layers}"):
            for name in SCALES:
                scale = LayerScale(getattr(block, name))
                delattr(block, name)
                setattr(block, name, scale)
        super().prepare_model(hf_model)


FAMILY = VisionFamily(
    name="beit",
    architectures=("BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling"),
    model_types=("beit",),
    adapter=BeitAdapter,
    description="BEiT: class token, then patches.",
)
