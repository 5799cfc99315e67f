"""SAELens's bridge into TransformerLens, with TransformerLens's hook aliases working on it."""

from __future__ import annotations

from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from .points import resolve_hook_name


class VisionBridge(SAETransformerBridge):
    """A vision transformer of Hugging Face under TransformerLens's hook names.

    `SAETransformerBridge` (6.54) leaves the aliases out of `hook_dict`: a hook or a cache asked for
    under `blocks.0.hook_resid_post` is then dropped without a word. Here they are in.

    Attributes:
        family: the name of its `VisionFamily`.
        processor: Hugging Face's image processor, or None.
        preprocessor_config: the checkpoint's preprocessing settings, or None.
    """

    family: str
    preprocessor_config: dict[str, Any] | None

    def __init__(self, model: nn.Module, adapter: Any, tokenizer: Any = None) -> None:
        super().__init__(model, adapter, tokenizer)
        self._learn_aliases()

    @classmethod
    def adopt(cls, bridge: TransformerBridge) -> VisionBridge:
        """Turn a bridge that somebody else booted into this class, in place."""
        if isinstance(bridge, cls):
            return bridge
        if not isinstance(bridge, SAETransformerBridge):
            bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}  # type: ignore[assignment]
        bridge.__class__ = cls  # as SAETransformerBridge.boot_transformers itself does
        adopted: Any = bridge
        adopted._learn_aliases()
        return adopted

    def _learn_aliases(self) -> None:
        hooks = super(SAETransformerBridge, self).hook_dict
        self._canonical: dict[str, str] = {
            alias: point.name
            for alias, point in hooks.items()
            if isinstance(point, HookPoint) and point.name not in (None, alias)
        }

    @property
    def smallest_image(self) -> tuple[int, int]:
        """The smallest picture that a hook point is tried out with: two patches by two."""
        cfg: Any = self.cfg
        return 2 * cfg.patch_size, 2 * cfg.patch_size

    @property
    def attn_implementation(self) -> str:
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

    def _resolve_hook_name(self, hook_name: str) -> str:
        return self._canonical.get(hook_name, hook_name)

    def add_sae(self, sae: SAE[Any], use_error_term: bool | None = None) -> None:
        """Splice `sae` in at the hook point that its metadata names, until `reset_saes`.

        Raises:
            UnknownNameError: the model has no such hook point (SAELens only logs it).
        """
        metadata = sae.cfg.metadata
        for name in (metadata.hook_name, metadata.hook_name_out):
            if name is not None:
                resolve_hook_name(self, name)
        super().add_sae(sae, use_error_term=use_error_term)
