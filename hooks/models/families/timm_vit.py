"""timm's vision transformers: its ViTs (CLIP's, DINO's, SigLIP's too), EVA's, Perception Encoders, DINOv3's.

The classes `VisionTransformer` and `Eva` of timm 1.0, of pre-norm blocks with LayerNorms; other models of
timm, and those whose blocks are built otherwise, are tapped as `wrapped`. Activations are timm's own to the
bit. Queries, keys and values of one projection pass their hook points as its thirds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.vision_classifier_head import (
    VisionClassifierHeadBridge,
)
from transformers import PreTrainedConfig

from ..points import as_pair
from .adapter import Layout, VisionAdapter, VisionAttention, VisionNorm
from .family import VisionFamily
from .wrapped import load_timm

MODELS = ("VisionTransformer", "Eva")
BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
MLPS = ("Mlp", "GluMlp", "SwiGLU")


class Split(nn.Module):
    """A linear map whose output is of several parts, each of which passes a module of its name."""

    def __init__(self, linear: nn.Linear, names: Sequence[str], bias: Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.names = linear, tuple(names)
        self.bias = bias if bias is None else nn.Parameter(bias)  # added after the product
        for name in names:
            self.add_module(name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, parts * d_part)."""
        output = self.linear(x)
        if self.bias is not None:
            output = output + self.bias
        parts = [self.get_submodule(name) for name in self.names]
        if all(type(part) is nn.Identity for part in parts):  # nothing listens
            return output
        pieces = output.chunk(len(parts), dim=-1)
        return torch.cat([part(piece) for part, piece in zip(parts, pieces)], dim=-1)


class Chain(nn.Module):
    """The blocks one after the other. TransformerLens makes a list of `nn.Sequential`, which is not called."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]


class TimmAttention(VisionAttention):
    """timm's attention as it is. Eager attention passes its pattern through a dropout, which has hooks."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        dropout: Any = original_component.get_submodule("attn_drop")
        dropout.register_forward_hook(self._on_pattern)

    def _on_pattern(self, dropout: nn.Module, arguments: Any, pattern: Tensor) -> Tensor:
        return self.hook_pattern(pattern)


class TimmViTAdapter(VisionAdapter):
    """The vision transformers of timm, after `prepare`."""

    layout = Layout(
        layers="blocks.layers",
        norms=("norm1", "norm2"),
        attention="attn",
        projection="proj",
        mlp=("fc1", "fc2"),
        scales=("drop_path1", "drop_path2"),  # after LayerScale, and there without it too
        final_norm="norm",
        extras=(
            ("ln_final", "fc_norm", VisionNorm),
            ("pooler", "attn_pool", GeneralizedComponent),
            ("unembed", "head", VisionClassifierHeadBridge),
        ),
        embed="norm_pre",
        embeddings=GeneralizedComponent,
        attention_bridge=TimmAttention,
    )

    def describe(self, hf_model: Any) -> None:
        super().describe(hf_model)
        attention, mlp = hf_model.blocks[0].attn, hf_model.blocks[0].mlp
        self.cfg.d_head = attention.head_dim
        self.cfg.gated_mlp = type(mlp).__name__ != "Mlp"
        self._qkv = (
            ("q_proj", "k_proj", "v_proj") if attention.qkv is None else ("qkv.q", "qkv.k", "qkv.v")
        )
        self._gates = ("fc1_g", "fc1_x") if hasattr(mlp, "fc1_g") else ("fc1.gate", "fc1.up")

    def _read_tokens(self, backbone: Any) -> None:
        cfg = self.cfg
        cfg.has_class_token = backbone.cls_token is not None
        cfg.n_prefix_tokens = backbone.num_prefix_tokens
        cfg.n_register_tokens = cfg.n_prefix_tokens - int(cfg.has_class_token)
        cfg.n_ctx = cfg.n_prefix_tokens + backbone.patch_embed.num_patches

    def _mlp(self) -> GeneralizedComponent:
        if not self.cfg.gated_mlp:
            return super()._mlp()
        gate, up = self._gates
        return self._gated_mlp("mlp", gate=gate, up=up, down="fc2")


def fits(model: nn.Module) -> bool:
    """Whether a model is a vision transformer of timm that the family covers."""
    if not _is_timms(model, MODELS) or not hasattr(model, "norm_pre"):
        return False
    blocks: Any = model.get_submodule("blocks").children()
    return all(
        _is_timms(block, BLOCKS)
        and _is_timms(block.attn, ATTENTIONS)
        and _is_timms(block.mlp, MLPS)
        and isinstance(block.norm1, nn.LayerNorm)
        for block in blocks
    )


def _is_timms(module: nn.Module, names: Sequence[str]) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.partition(".")[0] == "timm"


def prepare(model: Any) -> None:
    """Split the fused projections of a model of timm, and give it what TransformerLens reads."""
    for block in model.blocks:
        if block.attn.qkv is not None:
            _split_attention(block.attn)
        if type(block.mlp).__name__ == "GluMlp":
            names = ("up", "gate") if block.mlp.gate_last else ("gate", "up")
            block.mlp.fc1 = Split(block.mlp.fc1, names)
    first, embed = model.blocks[0], model.patch_embed
    model.blocks = Chain(list(model.blocks))
    sizes: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.attn.num_heads,
        "layer_norm_eps": first.norm1.eps,
        "hidden_act": "gelu",
        "num_channels": getattr(embed, "in_chans", None) or embed.proj.in_channels,
        "patch_size": list(embed.feat_ratio(as_scalar=False)),  # of a hybrid, its CNN's stride too
        "image_size": list(as_pair(model.patch_embed.img_size)),
    }
    model.config = PreTrainedConfig(**sizes)
    model.config.id2label = {}  # its names are timm's, where it has any
    model.config._attn_implementation = "sdpa" if first.attn.fused_attn else "eager"
    model.register_forward_pre_hook(_by_name, with_kwargs=True)


def _split_attention(attention: Any) -> None:
    bias = None
    if getattr(attention, "q_bias", None) is not None:
        biases = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)).detach()
        if attention.qkv_bias_separate:
            bias = biases
        else:
            attention.qkv.bias = nn.Parameter(biases)
        attention.q_bias = attention.k_bias = attention.v_bias = None
    attention.qkv = Split(attention.qkv, "qkv", bias)


def _by_name(
    model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Images given by name, as TransformerLens does, by position, as models of timm take them."""
    if "pixel_values" in options:
        arguments = (options.pop("pixel_values"), *arguments)
    return arguments, options


FAMILY = VisionFamily(
    name="timm",
    architectures=(),
    adapter=TimmViTAdapter,
    load=load_timm,
    claims=fits,
    prepare=prepare,
    description="timm's vision transformers, EVA and Perception Encoder: prefix tokens, then patches.",
)
