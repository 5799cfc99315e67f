"""The vision towers of Qwen2-VL (Wang et al. 2024), Qwen2.5-VL (Bai et al. 2025), Qwen3-VL and Qwen3.5. No class token.

A tower takes rows of patches of images of any size, the four patches of a group of 2 x 2 after each other, and
Qwen2.5-VL's blocks have the groups of a window after each other. Here it takes images (B, C, H, W) of one size,
and activations at its hook points are (B, T, d) with the patches in raster order. The tower itself is run as
transformers has it: activations are its own to the bit. Each image, or each window, is attended by itself:
`hook_pattern` is (B, heads, T, T), zero between windows, and can be read but not edited.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import AttentionInterface, PreTrainedConfig
from transformers.vision_utils import get_vision_window_index

from ....registry.errors import ConfigError
from ..points import as_pair
from ..rows import Rows
from .adapter import Layout, VisionAdapter, VisionAttention, eager_attention, show_pattern
from .family import VisionFamily
from .timm_vit import Split

TOWERS = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    *("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel", "Qwen3_5VisionModel", "Qwen3_5MoeVisionModel"),
)
KEEPING = "taxolens_eager"
"""Under this name transformers knows eager attention that keeps its patterns."""
PATCHES_A_SIDE = 16
"""Patches in the height and width of an image where no image size is given (own definition): the towers have none."""


class ImageTower(nn.Module):
    """A tower that takes images (B, C, H, W) of one size; its outputs are (B, T, d) in raster order.

    Args:
        tower: of transformers.

    Attributes:
        rows: where the rows of its last forward pass, here or inside a larger model, belong.
        embedded: the same before Qwen2.5-VL sorts them by windows.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.rows, self.embedded = tower, Rows(), Rows()
        own = tower.config
        side = PATCHES_A_SIDE * as_pair(own.patch_size)[0]
        mlp = tower.blocks[0].mlp
        sizes: dict[str, Any] = {
            "hidden_size": getattr(own, "embed_dim", own.hidden_size),
            "num_hidden_layers": own.depth,
            "num_attention_heads": own.num_heads,
            "hidden_act": own.hidden_act,
            "num_channels": own.in_channels,
            "patch_size": list(as_pair(own.patch_size)),
            "image_size": [side, side],
            # Qwen2.5-VL's norms are RMSNorms
            "rms_norm_eps" if hasattr(mlp, "gate_proj") else "layer_norm_eps": 1e-6,
        }
        self._window_size: int | None = getattr(own, "window_size", None)
        self.config = PreTrainedConfig(**sizes)
        self.config.id2label = {}
        self.config._attn_implementation = own._attn_implementation
        for block in tower.blocks:
            block.attn.qkv = Split(block.attn.qkv, "qkv")
            block.attn.rows, block.attn.patterns = self.rows, None
        if own._attn_implementation == "eager":
            own._attn_implementation = KEEPING
        tower.register_forward_pre_hook(self._note_grid, with_kwargs=True)

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Images (B, C, H, W) -> the tower's output.

        Raises:
            ConfigError: their height or width is no multiple of the width of a group of patches.
        """
        patches, grid = self.patches_of(pixel_values)
        output = self.tower(patches, grid_thw=grid, **options)
        n_images = len(pixel_values)
        for name, value in output.items():
            if name in ("last_hidden_state", "hidden_states"):
                output[name] = _each(value, self.rows.fold)
            elif name != "attentions":  # those of groups of patches are in raster order
                output[name] = _each(value, lambda rows: rows.unflatten(0, (n_images, -1)))
        return output

    def patches_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B * T, C * frames * p * p) the rows of patches, and their grids (B, 3), as the image processor makes them."""
        config = self.tower.config
        patch, merge = as_pair(config.patch_size)[0], config.spatial_merge_size
        n, channels, *size = images.shape
        if any(edge % (patch * merge) for edge in size):
            raise ConfigError(
                "image_size",
                "not a whole number of groups of patches",
                given=tuple(size),
                allowed=f"multiples of {patch * merge} pixels",
            )
        height, width = size[0] // patch, size[1] // patch
        shape = (n, channels, height // merge, merge, patch, width // merge, merge, patch)
        patches = images.reshape(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = as_pair(config.temporal_patch_size)[0]  # a picture is a video of equal frames
        patches = patches.unsqueeze(6).expand(*patches.shape[:6], frames, patch, patch)
        grid = torch.tensor([[1, height, width]] * n, device=images.device)
        return patches.reshape(n * height * width, -1), grid

    def _note_grid(self, tower: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        grid = options["grid_thw"] if "grid_thw" in options else arguments[1]
        self.embedded.note(grid, lambda: self._order(grid[:1], None))
        self.rows.note(grid, lambda: self._order(grid[:1], self._window_size))

    def _order(self, grid: Tensor, window_size: int | None) -> Tensor:
        """(T,) int64: the place in raster order of each row of one image, sorted by windows where there are any."""
        config = self.tower.config
        merge = config.spatial_merge_size
        frames, height, width = (int(edge) for edge in grid[0])
        order = torch.arange(frames * height * width, device=grid.device)
        groups = (frames, height // merge, merge, width // merge, merge)
        order = order.view(groups).transpose(2, 3).reshape(-1, merge**2)
        if window_size is not None:
            windows, _ = get_vision_window_index(
                grid,
                spatial_merge_size=merge,
                window_size=window_size,
                patch_size=as_pair(config.patch_size)[0],
            )
            order = order[windows.to(order.device)]
        return order.flatten()


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(change(each) for each in value)


def _keeping_patterns(module: Any, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
    """Eager attention as the tower's own file has it; (1, heads, n, n) patterns are kept where they are wanted."""
    eager = eager_attention(module)
    assert eager is not None
    output, pattern = eager(module, *arguments, **options)
    if module.patterns is not None:
        module.patterns.append(pattern)
    return output, pattern


AttentionInterface.register(KEEPING, _keeping_patterns)


class QwenVLAttention(VisionAttention):
    """The attention of a tower; its eager patterns, an image or a window each, are given to `hook_pattern` together."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the tower's.

        Raises:
            ConfigError: a hook changes the pattern, which the tower has used already.
        """
        attention: Any = self.original_component
        attention.patterns = [] if self.hook_pattern.has_hooks(dir="fwd") else None
        try:
            output = super().forward(*arguments, **options)
            if attention.patterns:
                pattern = attention.rows.fold_squares(attention.patterns)
                why = "in a tower that attends each image or window by itself"
                show_pattern(self.hook_pattern, pattern, why)
        finally:
            attention.patterns = None
        return output


class QwenVLAdapter(VisionAdapter):
    """The vision towers of Qwen-VL, in an `ImageTower`."""

    layout = Layout(
        layers="blocks",
        norms=("norm1", "norm2"),
        attention="attn",
        projection="proj",
        mlp=("fc1", "fc2"),
        final_norm="merger.ln_q",
        backbones=("tower",),
        class_token=False,
        rotary=True,
        embed="patch_embed",
        embeddings=GeneralizedComponent,
        attention_bridge=QwenVLAttention,
    )
    _qkv = ("qkv.q", "qkv.k", "qkv.v")

    def prepare_model(self, hf_model: Any) -> None:
        """Name the parts after the tower's version, then map them."""
        if hasattr(hf_model.tower.blocks[0].mlp, "linear_fc1"):  # from Qwen3-VL on
            mlp = ("linear_fc1", "linear_fc2")
            self.layout = replace(self.layout, mlp=mlp, final_norm="merger.norm")  # type: ignore[misc]
        self.rows_at = lambda name: (
            hf_model.embedded if name.startswith("embed.") else hf_model.rows
        )
        super().prepare_model(hf_model)

    def _read_tokens(self, backbone: Any) -> None:
        cfg = self.cfg
        cfg.has_class_token = False
        cfg.n_register_tokens = cfg.n_prefix_tokens = 0
        cfg.n_ctx = PATCHES_A_SIDE**2


def fits(model: nn.Module) -> bool:
    """Whether a model is one of the towers."""
    kind = type(model)
    return kind.__name__ in TOWERS and kind.__module__.startswith("transformers.")


FAMILY = VisionFamily(
    name="qwen_vl",
    architectures=(),  # TransformerLens's own loader would pass the tower as it is
    adapter=QwenVLAdapter,
    claims=fits,
    prepare=ImageTower,
    description="Qwen-VL's vision towers: patches only, in raster order.",
)
