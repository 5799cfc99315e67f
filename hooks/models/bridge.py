"""SAELens's bridge into TransformerLens, with TransformerLens's hook aliases working on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sae_lens.analysis.hooked_sae_transformer import set_deep_attr
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import AttentionBridge, TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from .evals import EvaluatesImages
from .families.adapter import VisionAttention, VisionEmbeddings
from .named_hooks import NamedHooks
from .rows import RowsConversion
from .splicing import SplicesAtTokens

NEVER_BYPASSED = (VisionEmbeddings,)  # they also see to the interpolation


class VisionBridge(EvaluatesImages, NamedHooks, SplicesAtTokens, SAETransformerBridge):
    """A vision transformer of Hugging Face under TransformerLens's hook names.

    `SAETransformerBridge` (6.54) leaves the aliases out of `hook_dict`: a hook or a cache asked for
    under `blocks.0.hook_resid_post` is then dropped without a warning. This class adds them.

    Attributes:
        family: the name of its `VisionFamily`.
        processor: Hugging Face's image processor, or None.
        preprocessor_config: the checkpoint's preprocessing settings, or None.
    """

    cfg: Any
    family: str
    preprocessor_config: dict[str, Any] | None
    # TransformerLens's forward writes to it, and would else find timm's of this name, which may be None.
    pos_embed: Any = SimpleNamespace()

    def __init__(self, model: nn.Module, adapter: Any, tokenizer: Any = None) -> None:
        super().__init__(model, adapter, tokenizer)
        rows_at = getattr(adapter, "rows_at", None)
        if rows_at is not None:
            points: dict[str, Any] = self.points()
            for name, point in points.items():
                point.hook_conversion = RowsConversion(rows_at(name), point.hook_conversion)
        self._learn_aliases()

    @classmethod
    def adopt(cls, bridge: TransformerBridge) -> VisionBridge:
        """Turn a bridge that was booted elsewhere into this class, in place."""
        if isinstance(bridge, cls):
            return bridge
        if not isinstance(bridge, SAETransformerBridge):
            bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}  # type: ignore[assignment]
        bridge.__class__ = cls  # as SAETransformerBridge.boot_transformers itself does
        adopted: Any = bridge
        for module in adopted.modules():
            if type(module) is AttentionBridge:  # of TransformerLens's own adapter
                module.__class__ = VisionAttention
        adopted._learn_aliases()
        return adopted

    def _learn_aliases(self) -> None:
        self._displaced: dict[str, HookPoint] = {}  # by SAEs
        hooks = super(SAETransformerBridge, self).hook_dict
        self._canonical: dict[str, str] = {
            alias: point.name
            for alias, point in hooks.items()
            if isinstance(point, HookPoint) and point.name not in (None, alias)
        }
        conversions: dict[str, Any] = {
            name: getattr(point, "hook_conversion", None) for name, point in self.points().items()
        }
        self.heads: dict[str, int] = {
            name: conversion.n_heads
            for name, conversion in conversions.items()
            if getattr(conversion, "splits_attention_heads", False)
        }

    @property
    def whole(self) -> nn.Module | None:
        """The model that the vision tower is a part of: hooks and SAEs act in it too."""
        return self.__dict__.get("_whole")

    def keep_whole(self, module: nn.Module) -> None:
        """Set `whole`; no submodule, since this model is a part of it."""
        self.__dict__["_whole"] = module

    @property
    def smallest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of the smallest image that the model is sure to take."""
        height, width = self.cfg.image_size
        any_size = isinstance(self.embed, VisionEmbeddings) and self.embed.takes_any_size
        if not any_size or height != width:
            return height, width
        return 2 * self.cfg.patch_size, 2 * self.cfg.patch_size

    @property
    def only_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the only images that the model takes; None: others too."""
        one = isinstance(self.embed, VisionEmbeddings) and not self.embed.takes_any_size
        return tuple(self.cfg.image_size) if one else None

    @property
    def attn_implementation(self) -> str:
        """Hugging Face's name of the way that attention is computed."""
        return self.original_model.config._attn_implementation  # type: ignore[union-attr]

    def points(self) -> dict[str, nn.Module]:
        """Canonical name -> the hook point, or the SAE that is spliced in there."""
        return {n: p for n, p in self._hook_registry.items() if ".hook_sae_" not in n}

    @property
    def aliases(self) -> dict[str, str]:
        """Alias -> canonical name."""
        return self._canonical

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point under its canonical name and its aliases, those of spliced SAEs too."""
        hooks = super().hook_dict
        inside: dict[str, list[str]] = {}
        for name in hooks:
            if ".hook_sae_" in name:
                base, _, internal = name.partition(".hook_sae_")
                inside.setdefault(base, []).append(internal)
        for alias, name in self._canonical.items():
            if name in hooks:
                hooks[alias] = hooks[name]
            for internal in inside.get(name, ()):
                hooks[f"{alias}.hook_sae_{internal}"] = hooks[f"{name}.hook_sae_{internal}"]
        return hooks

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Within, Hugging Face's own modules run wherever no hook listens and no SAE is spliced in.

        The tapped modules give the same numbers, but a dozen of them per block cost as much Python
        as a small model's arithmetic.
        """
        bypassed = [slot for slot in self._slots() if not slot.is_listened_to()]
        try:
            for slot in bypassed:
                slot.siblings[slot.name] = slot.tapped.original_component
            yield
        finally:
            for slot in bypassed:
                slot.siblings[slot.name] = slot.tapped

    def _slots(self) -> list[_Slot]:
        if "_kept_slots" not in self.__dict__:
            self.__dict__["_kept_slots"] = [
                _Slot(parent._modules, name, child)
                for parent in list(self.original_model.modules())
                if not isinstance(parent, GeneralizedComponent)
                for name, child in parent._modules.items()
                if isinstance(child, GeneralizedComponent) and not isinstance(child, NEVER_BYPASSED)
            ]
        return self.__dict__["_kept_slots"]

    def _resolve_hook_name(self, hook_name: str) -> str:
        return self._canonical.get(hook_name, hook_name)

    def add_sae(
        self, sae: SAE[Any], use_error_term: bool | None = None, *, tokens: str | None = None
    ) -> None:
        """As `SplicesAtTokens.add_sae`."""
        metadata = sae.cfg.metadata
        name = self._resolve_hook_name(metadata.hook_name_out or metadata.hook_name)
        point = self._hook_registry.get(name)
        super().add_sae(sae, use_error_term=use_error_term, tokens=tokens)
        if isinstance(point, HookPoint):
            self._displaced.setdefault(name, point)

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        """Put back the very hook point that was there.

        `SAETransformerBridge` puts a new one, which has lost its full name: hooks asked for by name
        would no longer find it.
        """
        super()._reset_sae(act_name, prev_wrapper)
        for name in list(self._displaced):
            if isinstance(self._hook_registry[name], HookPoint):
                point = self._displaced.pop(name)
                set_deep_attr(self, name, point)
                self._hook_registry[name] = point
                point.name = name


class _Slot:
    """Where a tapped module sits in Hugging Face's model."""

    def __init__(self, siblings: dict[str, Any], name: str, tapped: GeneralizedComponent) -> None:
        self.siblings, self.name, self.tapped = siblings, name, tapped
        self.points = [point for point in tapped._modules if point.startswith("hook_")]

    def is_listened_to(self) -> bool:
        modules: Any = self.tapped._modules
        for name in self.points:
            point = modules[name]
            if type(point) is not HookPoint or point.fwd_hooks or point.bwd_hooks:
                return True
        return bool(self.tapped._forward_hooks or self.tapped._forward_pre_hooks)
