"""The default family: CNNs, timm's models and vision models of Hugging Face that no family claims."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ....registry.errors import ConfigError
from ...images.preprocess import timm_preprocessing as timm_preprocessing
from ..points import as_pair
from .family import VisionFamily, VisionSource, load_transformers

if TYPE_CHECKING:
    from ..hooked_module import HookedVisionModel

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
REGISTERS = ("register_tokens", "reg_token", "distillation_token", "dist_token")
POOLING = ("head", "pool", "attn_pool", "decoder")  # whose tokens are not in the blocks


def wrap(module: nn.Module, model_name: str, *, family: str = "wrapped") -> HookedVisionModel:
    """Tap the named submodules of any vision model.

    Prefix tokens are found by the names of parameters, sizes in the Hugging Face or timm config.
    """
    # It imports SAELens, which TransformerLens alone, and its users, can do without.
    from ..hooked_module import HookedVisionModel, WrappedConfig

    config: Any = getattr(module, "config", None)
    timm_config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    prefix = {
        name.rpartition(".")[2]: parameter.shape
        for name, parameter in module.named_parameters()
        if not name.startswith(POOLING)
    }
    widths = getattr(config, "hidden_sizes", None) or [
        getattr(config, "hidden_dim", None) or getattr(module, "num_features", 0)
    ]
    channels, *size = timm_config.get("input_size", (3, 224, 224))
    cfg = WrappedConfig(
        model_name=model_name,
        d_model=getattr(config, "hidden_size", None) or widths[-1],
        n_layers=0,
        image_size=as_pair(getattr(config, "image_size", None) or size),
        n_channels=getattr(config, "num_channels", channels),
        has_class_token=any(name in prefix for name in CLASS_TOKENS),
        n_register_tokens=sum(prefix[name][-2] for name in REGISTERS if name in prefix),
    )
    return HookedVisionModel(module, cfg, family=family)


def load_wrapped(source: VisionSource) -> nn.Module:
    """A model of transformers, or of timm where the checkpoint's config is timm's (a dict)."""
    return _load_timm(source) if isinstance(source.config, dict) else load_transformers(source)


def _load_timm(source: VisionSource) -> nn.Module:
    try:
        import timm  # type: ignore[import-not-found]  # an extra
    except ImportError as error:
        problem = f"a model of timm, which cannot be imported ({error})"
        allowed = "pip install 'taxolens[timm]'"
        raise ConfigError("model_name", problem, given=source.name, allowed=allowed) from error
    place = "local-dir" if Path(source.name).is_dir() else "hf-hub"
    revision = f"@{source.revision}" if source.revision else ""
    model = timm.create_model(
        f"{place}:{source.name}{revision}", pretrained=not source.random_weights
    )
    return model.to(source.dtype).eval()


FAMILY = VisionFamily(
    name="wrapped",
    architectures=(),
    load=load_wrapped,
    description="CNNs, timm, other Hugging Face vision models: hooks on named submodules.",
)
