"""The common part of our TransformerLens adapters: pre-norm vision transformers of Hugging Face.

A family is then a `Layout`, which has Hugging Face's names of the parts. The parts themselves run
Hugging Face's own code, so activations are equal to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import ArchitectureAdapter, AttentionBridge, NormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.block import (
    DelegatedAttentionBlockBridge,
)
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.vision_classifier_head import (
    VisionClassifierHeadBridge,
)
from transformers import AttentionInterface

from ....registry.errors import ConfigError
from ..points import as_pair, other_size
from ..rows import Rows

HOOKED = "taxolens_hooked"
"""Under this name transformers knows eager attention that gives its pattern to `hook_pattern`."""


def side_of_patch(size: int | Sequence[int]) -> int:
    """Pixels along a side of a patch.

    Raises:
        ConfigError: patches are not square.
    """
    height, width = as_pair(size)
    if height != width:
        problem = "patches that are not square are not supported"
        raise ConfigError(
            "patch_size",
            problem,
            given=(height, width),
            allowed="a model of square patches, or family='wrapped'",
        )
    return height


class VisionEmbeddings(GeneralizedComponent):
    """Hugging Face's embeddings: images (B, 3, H, W) -> tokens (B, T, d), prefix tokens first.

    Position embeddings are interpolated whenever an image has another size than the model was
    trained at, for models where Hugging Face interpolates on request only.
    """

    @property
    def takes_any_size(self) -> bool:
        """Whether images of another size than the model was trained at are possible.

        Hugging Face interpolates learned positions as those of a square.
        """
        names = ("position_embeddings", "position_embedding")
        learned = any(getattr(self.original_component, name, None) is not None for name in names)
        if not learned:
            return True
        height, width = self._size("image_size")
        patch_height, patch_width = self._size("patch_size")
        return height // patch_height == width // patch_width

    def _size(self, name: str) -> tuple[int, int]:
        """A size, (height, width) in pixels, which Hugging Face keeps at one of three places."""
        embeddings: Any = self.original_component
        places = (
            embeddings,
            getattr(embeddings, "patch_embeddings", None),
            getattr(embeddings, "config", None),
        )
        return as_pair(next(getattr(place, name) for place in places if hasattr(place, name)))

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Images (B, 3, H, W) -> tokens (B, T, d).

        Raises:
            ConfigError: the model cannot take images of this size.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        if not self.takes_any_size and size != self._size("image_size"):
            raise other_size(size, self._size("image_size"))
        if "interpolate_pos_encoding" in options and not options["interpolate_pos_encoding"]:
            options["interpolate_pos_encoding"] = size != self._size("image_size")
        return super().forward(pixel_values, **options)


class VisionNorm(NormalizationBridge):
    """LayerNorm whose statistics are computed only where a hook reads them.

    TransformerLens computes `hook_scale` and `hook_normalized` at every call; without hooks, they
    cost more than the norm itself.
    """

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config, use_native_layernorm_autograd=True)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """(B, T, d) -> (B, T, d), normalised."""
        if self.hook_scale.has_hooks() or self.hook_normalized.has_hooks():
            return super().forward(hidden_states, **options)
        norm: Any = self.original_component
        return self.hook_out(norm(self.hook_in(hidden_states)))


class _Hooked:
    """A config of Hugging Face with another attention; all else is the config's own."""

    def __init__(self, config: Any) -> None:
        self._config, self._attn_implementation = config, HOOKED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def eager_attention(attention: nn.Module) -> Callable[..., Any] | None:
    """The eager attention of the file that a module of Hugging Face is from; None where it has none."""
    source = sys.modules.get(type(attention).__module__)
    return getattr(source, "eager_attention_forward", None)


def _hooked(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Eager attention of Hugging Face whose pattern passes `hook_pattern` before it weighs the values."""
    eager = eager_attention(attention)
    assert eager is not None
    output, pattern = eager(attention, query, key, value, *rest, **options)
    return attention.on_pattern(output, pattern, value)


AttentionInterface.register(HOOKED, _hooked)
_swapping = (
    RLock()
)  # the config of an attention that is listened to is another one meanwhile, for all threads


def show_pattern(point: Any, pattern: Tensor, why: str) -> None:
    """Give a pattern that attention has used already to its hook point.

    Raises:
        ConfigError: a hook changes it.
    """
    # tensors of inference mode do not count their changes
    before: Any = pattern.clone() if pattern.is_inference() else pattern._version
    given = point(pattern)
    changed = (
        not torch.equal(pattern, before)
        if isinstance(before, Tensor)
        else pattern._version != before
    )
    if given is not pattern or changed:
        raise ConfigError(
            "hook_pattern",
            f"it cannot be edited {why}",
            allowed="a hook that returns nothing, or one at hook_z",
        )


class VisionAttention(AttentionBridge):
    """Hugging Face's attention as it is. `hook_pattern` fires with eager attention only.

    An edit of the pattern acts: the values are weighed by what the hook gives. `hook_attn_scores` never
    fires: Hugging Face gives no scores before the softmax.
    """

    supports_split_qkv_fork = False

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As Hugging Face's.

        Raises:
            ConfigError: a hook changes the pattern of an attention that does not compute it as
                Hugging Face's eager attention does.
        """
        attention: Any = self.original_component
        if not _is_listened_to(self.hook_pattern):
            return self._run(arguments, options)
        with _swapping:
            return self._run_hooked(attention, arguments, options)

    def _run_hooked(self, attention: Any, arguments: Any, options: Any) -> Any:
        state, passed = vars(attention), []

        def on_pattern(output: Tensor, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            passed.append(True)
            return self._weigh(output, pattern, value)

        config = state.get("config")
        eager = getattr(config, "_attn_implementation", None) == "eager"
        if eager and eager_attention(attention) is not None:
            state.update(config=_Hooked(config), on_pattern=on_pattern)
            try:
                output = self._run(arguments, options)
            finally:
                state["config"] = config
                del state["on_pattern"]
        else:
            output = self._run(arguments, options)
        pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not passed and isinstance(pattern, Tensor) and pattern.ndim == 4:
            show_pattern(self.hook_pattern, pattern, f"in {type(attention).__name__}")
        return output

    def _run(self, arguments: Any, options: Any) -> Any:
        # not `AttentionBridge.forward`, which gives the used pattern to `hook_pattern` and `hook_attn_scores`
        return super(AttentionBridge, self).forward(*arguments, **options)

    def _weigh(self, output: Tensor, pattern: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention gives, and its pattern (B, heads, T, T), after `hook_pattern`."""
        if not self._weighs_values(output, pattern, value):
            kind = type(self.original_component).__name__
            show_pattern(self.hook_pattern, pattern, f"in {kind}")
            return output, pattern
        # tensors of inference mode do not count their changes
        version = None if pattern.is_inference() else pattern._version
        given: Any = self.hook_pattern(pattern)
        if given is pattern and version is not None and pattern._version == version:
            return output, pattern
        return _weighed(given, value), given

    def _weighs_values(self, output: Tensor, pattern: Tensor, value: Tensor) -> bool:
        """Whether attention's output is its pattern times its values; found out once."""
        if "_by_pattern" not in self.__dict__:
            same_heads = pattern.shape[1] == value.shape[1]
            self.__dict__["_by_pattern"] = same_heads and torch.allclose(
                _weighed(pattern, value), output, rtol=1e-3, atol=1e-5, equal_nan=True
            )
        return self.__dict__["_by_pattern"]


def _is_listened_to(point: Any) -> bool:
    spliced = not isinstance(point, HookPoint)
    return spliced or point.has_hooks() or bool(point._forward_hooks or point._backward_hooks)


def _weighed(pattern: Tensor, value: Tensor) -> Tensor:
    """(B, heads, T, T), (B, heads, T, d_head) -> (B, T, heads, d_head), as eager attention has it."""
    return torch.matmul(pattern, value).transpose(1, 2).contiguous()


class VisionBlock(DelegatedAttentionBlockBridge):
    """Hugging Face's block as it is, with hook points on both sides.

    `hook_out` fires inside the call of Hugging Face's own block, before transformers records what the
    block gives: an edit there reaches `hidden_states`, which the projectors of LLaVA and others read.
    """

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        original_component.register_forward_hook(self._on_exit, prepend=True)

    def _on_exit(self, block: nn.Module, arguments: Any, output: Any) -> Any:
        return super()._apply_output_hook(output)

    def _apply_output_hook(self, output: Any, *arguments: Any, **options: Any) -> Any:
        return output  # it has passed `hook_out`

    def _filter_kwargs_for_forward(
        self, kwargs: dict[str, Any], num_positional_args: int = 0
    ) -> dict[str, Any]:
        # every block here takes any keyword; to inspect its signature at each call is slow
        return kwargs


@dataclass(frozen=True)
class Layout:
    """Hugging Face's names of the parts of a pre-norm vision transformer.

    Args:
        layers: the list of blocks.
        norms: a block's two LayerNorms.
        attention, projection: a block's attention and, in it, the output projection.
        mlp: the input and output projections of a block's MLP; one that has a `gate_proj` is a
            SwiGLU with `gate_proj`, `up_proj` and `down_proj`.
        mlp_name: a block's MLP.
        scales: a block's two LayerScales, empty without.
        scale: the bridge class of a LayerScale.
        final_norm: the LayerNorm after the last block; left out where a model has none.
        extras: parts beside those, as TransformerLens name -> (Hugging Face path, bridge class);
            left out where a model has none.
        backbones: under which names a model with a head keeps the backbone.
        class_token: whether the first token is a class token.
        rotary: whether positions enter as rotations of queries and keys.
        embed: the embeddings, whose output is the input of the first block.
        embeddings: the bridge class of the embeddings.
        attention_bridge: that of a block's attention.
    """

    layers: str
    norms: tuple[str, str]
    attention: str
    projection: str
    mlp: tuple[str, str]
    final_norm: str
    mlp_name: str = "mlp"
    scales: tuple[str, ...] = ()
    scale: type[GeneralizedComponent] = GeneralizedComponent
    extras: tuple[tuple[str, str, type[GeneralizedComponent]], ...] = ()
    backbones: tuple[str, ...] = ()
    class_token: bool = True
    rotary: bool = False
    embed: str = "embeddings"
    embeddings: type[GeneralizedComponent] = VisionEmbeddings
    attention_bridge: type[VisionAttention] = VisionAttention


class VisionAdapter(ArchitectureAdapter):
    """Maps a Hugging Face vision transformer to TransformerLens's names, after its `layout`.

    `cfg` also has the layout of the tokens: `has_class_token`, `n_register_tokens` (every prefix token
    that is not the class token, so DeiT's distillation token too), `n_prefix_tokens` (all of
    them), `patch_size`, and `image_size`, the (height, width) that the model was trained at.
    """

    layout: ClassVar[Layout]
    rows_at: Callable[[str], Rows] | None = (
        None  # hook point -> its rows, in a model without an axis of images
    )
    cfg: Any  # TransformerLens's config, which takes more fields than it declares

    applicable_phases: list[int] = [1]
    supports_generation = False
    supports_causal_loss = False
    supports_hf_output_attentions = False  # eager attention returns its pattern unasked
    supports_compatibility_mode = False  # folding weights would end the equality to the bit

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        cfg.is_visual_model = True
        cfg.positional_embedding_type = "standard"
        cfg.attn_only = False
        cfg.attention_dir = "bidirectional"
        self.weight_processing_conversions = {}

    def prepare_model(self, hf_model: Any) -> None:
        """Read the sizes off the model, then map its components."""
        self.describe(hf_model)
        self.component_mapping = self._components(hf_model, self._prefix(hf_model))
        if self.layout.rotary:  # set last: an attention bridge would wait for rotary hooks
            self.cfg.positional_embedding_type = "rotary"

    def describe(self, hf_model: Any) -> None:
        """Write the sizes of the model and the layout of its tokens into `cfg`."""
        backbone = hf_model.get_submodule(self._prefix(hf_model).rstrip("."))
        self._read_sizes(getattr(hf_model.config, "vision_config", hf_model.config), backbone)
        self._read_tokens(backbone)

    def _prefix(self, hf_model: nn.Module) -> str:
        """What comes before the backbone's parts in a model with a head, e.g. "dinov2."."""
        return next((f"{name}." for name in self.layout.backbones if hasattr(hf_model, name)), "")

    def _read_sizes(self, config: Any, backbone: nn.Module) -> None:
        cfg = self.cfg
        cfg.d_model = config.hidden_size
        cfg.n_layers = config.num_hidden_layers
        cfg.n_heads = config.num_attention_heads
        cfg.d_head = config.hidden_size // config.num_attention_heads
        rms = hasattr(config, "rms_norm_eps")
        cfg.normalization_type = "RMS" if rms else "LN"
        cfg.final_rms = rms
        cfg.eps = config.rms_norm_eps if rms else config.layer_norm_eps
        cfg.act_fn = config.hidden_act
        mlp: Any = backbone.get_submodule(f"{self.layout.layers}.0.{self.layout.mlp_name}")
        cfg.gated_mlp = hasattr(mlp, "gate_proj")
        down = "down_proj" if cfg.gated_mlp else self.layout.mlp[1]
        cfg.d_mlp = getattr(mlp, down).in_features
        cfg.n_channels = config.num_channels
        cfg.patch_size = side_of_patch(config.patch_size)
        cfg.image_size = as_pair(config.image_size)

    def _read_tokens(self, backbone: Any) -> None:
        cfg = self.cfg
        registers = getattr(backbone.embeddings, "register_tokens", None)
        distillation = getattr(backbone.embeddings, "distillation_token", None)
        cfg.has_class_token = self.layout.class_token
        cfg.n_register_tokens = sum(t.shape[1] for t in (registers, distillation) if t is not None)
        cfg.n_prefix_tokens = int(cfg.has_class_token) + cfg.n_register_tokens
        height, width = cfg.image_size
        cfg.n_ctx = cfg.n_prefix_tokens + (height // cfg.patch_size) * (width // cfg.patch_size)

    def _components(self, hf_model: nn.Module, prefix: str) -> dict[str, GeneralizedComponent]:
        components: dict[str, GeneralizedComponent] = {
            "embed": self.layout.embeddings(name=prefix + self.layout.embed),
            "blocks": self._blocks(f"{prefix}{self.layout.layers}"),
        }
        heads = (
            ("unembed", "classifier", VisionClassifierHeadBridge),
            ("visual_projection", "visual_projection", LinearBridge),
        )
        own = (("ln_final", self.layout.final_norm, VisionNorm), *self.layout.extras)
        inner = ((name, prefix + path, bridge) for name, path, bridge in own)
        for name, path, bridge in (*inner, *heads):
            if _has(hf_model, path):
                components[name] = bridge(path, self.cfg)
        return components

    _qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def _mlp(self) -> GeneralizedComponent:
        name, (up, down) = self.layout.mlp_name, self.layout.mlp
        return (
            self._gated_mlp(name)
            if self.cfg.gated_mlp
            else self._ungated_mlp(name, up=up, down=down)
        )

    def _blocks(self, name: str) -> GeneralizedComponent:
        layout = self.layout
        parts: dict[str, GeneralizedComponent] = {
            "ln1": VisionNorm(layout.norms[0], self.cfg),
            "attn": layout.attention_bridge(
                name=layout.attention,
                config=self.cfg,
                is_causal=False,
                submodules={
                    **{name: LinearBridge(name=path) for name, path in zip("qkv", self._qkv)},
                    "o": LinearBridge(name=layout.projection),
                },
            ),
            "ln2": VisionNorm(layout.norms[1], self.cfg),
            "mlp": self._mlp(),
        }
        # what a sublayer adds to the residual stream is what leaves its LayerScale
        aliases = {}
        for number, scale in enumerate(layout.scales, start=1):
            parts[f"ls{number}"] = layout.scale(name=scale)
            aliases["hook_attn_out" if number == 1 else "hook_mlp_out"] = f"ls{number}.hook_out"
        return VisionBlock(name=name, submodules=parts, hook_alias_overrides=aliases or None)


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module) or isinstance(child, nn.Identity):
            return False
        module = child
    return True
